"""The loop that trains the demo's models, on a model whose answer is known; and the judges of different styles."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from lcm_kit.launch.data import read_captions
from lcm_kit.launch.options import parsed
from lcm_kit.launch.run import _settings

TRAIN = Path(__file__).resolve().parents[2] / "demo" / "train"


@pytest.fixture
def script(monkeypatch):
    """Imports one of demo/train's scripts as they import each other, for the time of a test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(TRAIN))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == TRAIN:
            del sys.modules[name]


def data(target: torch.Tensor) -> dict[str, torch.Tensor]:
    n = 20
    zeros = torch.zeros(n, dtype=torch.long)
    return {"latent": target.expand(n, -1).clone(), "concept": zeros, "colour": zeros}


class Offset(torch.nn.Module):
    """Learns one vector."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))


def test_training_goes_on_where_it_stopped_and_ends_at_the_answer(script, tmp_path):
    loop = script("loop")
    target = torch.tensor([1.0, -2.0, 3.0])
    exported, captions = [], set()

    def run() -> Offset:
        module = Offset()

        def loss(z0, words, generator):
            captions.update(words)
            return (module.weight - z0).square().mean()

        course = loop.Course(
            minutes=0.01, batch=4, lr=0.1, warm_up=5, average=0.9, seed=1, empty=0.5, save_every=1_000_000
        )
        loop.train(
            {"offset": module}, data(target), loss, course, tmp_path / "state.pt", lambda *made: exported.append(made)
        )
        return module

    run()
    module = run()
    (_, first), (averaged, second) = exported
    assert 0 < first < second
    # The rate falls to a hundredth at the end of each run, so Adam has come to rest.
    torch.testing.assert_close(averaged["offset"]["weight"], target, rtol=0, atol=0.02)
    torch.testing.assert_close(module.weight.detach(), target, rtol=0, atol=0.02)
    assert {"", "cat face", "cat face white background"} <= captions


def test_the_rate_warms_up_stays_and_falls(script):
    course = script("loop").Course(minutes=1, batch=1, lr=2.0, warm_up=10, average=0.9, seed=0)
    assert course.lr_at(0, 1.0) == pytest.approx(0.2)
    assert course.lr_at(50, 0.9) == course.lr_at(50, 0.4) == 2.0
    assert course.lr_at(50, 0.2) == pytest.approx(1.0)
    assert course.lr_at(50, 0.0) == pytest.approx(0.02)


def test_judges_of_other_styles_have_files_and_answers_of_their_own(script, monkeypatch, tmp_path):
    classifier = script("classifier")
    assert classifier.file_of(["noto", "ink"]) == classifier.PATH
    monkeypatch.setattr(classifier, "WORK", tmp_path)
    wide = ("noto", "ink", "twemoji", "fluent")
    with pytest.raises(FileNotFoundError, match="--styles noto ink twemoji fluent"):
        classifier.load(wide)
    concept, style = classifier.Classifier(wide)(torch.zeros(2, 3, 64, 64))
    assert (concept.shape, style.shape) == ((2, 103), (2, 4))


def test_a_batch_shows_each_concept_in_the_style_it_says(script):
    classifier = script("classifier")
    # Style k is opaque and of brightness k / 3, everywhere: the middle of a picture gives it away.
    sets = torch.ones(4, 103, 4, 64, 64) * (torch.arange(4) / 3).view(4, 1, 1, 1, 1)
    sets[:, :, 3] = 1
    pictures, _, style = classifier.batch(sets, 40, torch.Generator().manual_seed(0))
    torch.testing.assert_close(pictures[:, 0, 32, 32], style / 3)
    assert set(style.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("kind", "guidance", "style"), [("phased", 3, False), ("ink_fast", 4, True)])
def test_the_refined_loras_are_asked_of_the_command_in_words_it_knows(
    script, monkeypatch, tmp_path, kind, guidance, style
):
    lcm = script("lcm")
    monkeypatch.setattr(lcm, "WORK", tmp_path)
    words = [*map(str, lcm.data(kind))]
    options = parsed(["--checkpoint", "model.safetensors", "-o", "lora.safetensors", *words])
    settings = _settings(options)
    assert (settings.phases, settings.steps, settings.batch * settings.accumulate) == (4, 600, 24)
    assert settings.cfg == (guidance, guidance)
    assert settings.grid(1000) == [124, 249, 374, 499, 624, 749, 874, 999]
    assert bool(options.lora) == style
    assert options.start_from == str(lcm.LORAS["lcm"])
    captions = read_captions(options.prompts)
    assert len(captions) == len({*captions}) == 2 * len(lcm.NAMES)


def test_what_is_shipped_in_phases_is_cut_and_another_file_is_as_it_was_distilled(script, monkeypatch, tmp_path):
    lcm, run = script("lcm"), []
    monkeypatch.setattr(lcm, "WORK", tmp_path)
    monkeypatch.setattr(lcm.subprocess, "run", lambda words, cwd: run.append(words) or type("", (), {"returncode": 0}))

    def outputs(*arguments):
        run.clear()
        monkeypatch.setattr(sys, "argv", ["lcm.py", *arguments])
        with pytest.raises(SystemExit) as left:
            lcm.main()
        assert left.value.code == 0
        return [
            (words[2], words[max(i for i, word in enumerate(words) if word in ("-o", "--output")) + 1]) for words in run
        ]

    shipped, whole, other = (
        str(lcm.LORAS["phased"]),
        str(tmp_path / lcm.LORAS["phased"].name),
        str(tmp_path / "a.safetensors"),
    )
    assert outputs("--kind", "phased") == [("distillation", whole), ("lora_merge", shipped)]
    assert outputs("--kind", "phased", "--output", other, "--phases", "2") == [("distillation", other)]
    assert str(tmp_path / "a.run") in run[0]
    assert run[0][-2:] == ["--phases", "2"]
    assert outputs("--kind", "ink_fast") == [("distillation", str(lcm.LORAS["ink_fast"]))]


def test_captions_that_are_there_are_not_written_again(script, tmp_path):
    lcm = script("lcm")
    path = lcm.captions(tmp_path / "captions.txt")
    before = path.stat().st_mtime_ns, path.read_text()
    assert (lcm.captions(path).stat().st_mtime_ns, path.read_text()) == before
    path.write_text("cut off")
    assert lcm.captions(path).read_text() == before[1]
