"""What the tiny model is taught: captions that are true, in words that its tokenizer knows."""

import torch

from lcm_kit.demo.prompts import FIGURE, GRID, VOCABULARY
from lcm_kit.demo.train.data import COLOUR_NAMES, COLOURS, CONCEPTS, NAMES, SIZE, caption, draw, vocabulary


def test_the_vocabulary_file_holds_the_words_of_all_captions():
    assert VOCABULARY.read_text(encoding="utf-8").split() == vocabulary()


def test_every_prompt_of_the_demo_is_made_of_known_words():
    words = {word for prompt in (*FIGURE, *(p for line in GRID for p in line)) for word in prompt.split()}
    assert words <= set(vocabulary())


def test_a_caption_names_the_thing_its_group_or_neither_and_never_another_colour():
    generator = torch.Generator().manual_seed(0)
    cat, blue = NAMES.index("cat face"), COLOUR_NAMES.index("blue")
    captions = {caption(cat, blue, generator) for _ in range(300)}
    grounds = ("", "blue background")
    assert captions == {f"{what} {ground}".strip() for what in ("cat face", "animal", "") for ground in grounds}


def test_one_caption_stands_for_many_pictures():
    glyph = torch.zeros(64, 4, 64, 64)
    glyph[:, :, 16:40, 20:50] = 1  # an opaque white rectangle, off centre
    pictures = draw(glyph, torch.full((64,), COLOUR_NAMES.index("blue")), torch.Generator().manual_seed(0))
    assert pictures.shape == (64, 3, SIZE, SIZE)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert len({picture.numpy().tobytes() for picture in pictures}) == 64


def test_an_empty_picture_is_its_background():
    for index, name in enumerate(COLOURS):
        plain = draw(torch.zeros(1, 4, 64, 64), torch.tensor([index]), torch.Generator().manual_seed(index))[0]
        assert (plain.mean((1, 2)) * 255 - torch.tensor(COLOURS[name])).abs().max() < 13  # it varies by 5 %
        assert plain.std((1, 2)).max() < 1e-6


def test_every_concept_has_its_own_emoji():
    assert len({emoji for emoji, _ in CONCEPTS.values()}) == len(CONCEPTS)
