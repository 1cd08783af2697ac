"""The embedded model's files, through ComfyUI's own loaders."""

from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch

from lcm_kit.distillation.adapter import adapted
from lcm_kit.nodes.loading import LCMLoader

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODELS = DEMO / "models"


def pictures(*fill):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 64, 64, 3, generator=generator) if not fill else torch.full((1, 64, 64, 3), fill[0])


def test_the_encoder_is_linear_in_the_pixels_as_built(vae):
    # An affine map commutes with averages; a network that merely learned to encode would not.
    a, b = pictures().split(1)
    mean = vae.encode((a + b) / 2)
    torch.testing.assert_close(mean, (vae.encode(a) + vae.encode(b)) / 2, rtol=0, atol=1e-3)


def test_each_latent_position_sees_its_own_8_by_8_pixels_alone(vae):
    picture = pictures()[:1]
    changed = picture.clone()
    changed[:, 16:24, 32:40] = 1 - changed[:, 16:24, 32:40]
    difference = (vae.encode(changed) - vae.encode(picture)).abs().amax(dim=(0, 1))
    assert difference[2, 4] > 0.01
    difference[2, 4] = 0
    assert difference.max() < 1e-4


@pytest.mark.parametrize("brightness", [0.2, 0.5, 0.8])
def test_the_decoder_returns_a_plain_picture(vae, brightness):
    picture = pictures(brightness)
    assert (vae.decode(vae.encode(picture)) - picture).abs().mean() < 0.05


def test_the_base_predicts_v_and_reads_captions(tiny_emoji):
    model, clip = tiny_emoji
    assert model.model.model_type.name == "V_PREDICTION"
    cat, dog, unknown, empty = (
        clip.encode_from_tokens(clip.tokenize(text)) for text in ("cat face", "a Dog, face!", "zzz", "")
    )
    assert cat.shape == (1, 12, 128)
    assert not torch.equal(cat, dog)
    assert torch.equal(unknown, empty)


@pytest.mark.parametrize("name", ["tiny_emoji_lcm_lora", "tiny_emoji_phased_lora", "tiny_emoji_ink_lora"])
def test_a_lora_changes_every_layer_that_the_paper_s_do(tiny_emoji, name):
    model, _ = tiny_emoji
    lora = comfy.utils.load_torch_file(str(MODELS / "loras" / f"{name}.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    layers = [n for n, module in model.model.diffusion_model.named_modules() if adapted(n, module)]
    assert patched.patches.keys() == {f"diffusion_model.{n}.weight" for n in layers}


@pytest.mark.parametrize(("kind", "preset"), [("lcm", "LCM"), ("phased", "Phased LCM 4 steps")])
def test_an_acceleration_lora_brings_the_preset_it_was_distilled_for(tiny_emoji, monkeypatch, kind, preset):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(MODELS / "loras")], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    _, _, handed, _, steps, cfg, _ = LCMLoader.execute(
        tiny_emoji[0], f"tiny_emoji_{kind}_lora.safetensors", 1.0, "refuse"
    ).result
    folder_paths.filename_list_cache.pop("loras", None)
    assert (handed.name, steps, cfg) == (preset, 4, 1.0)


def test_all_of_the_demo_stays_within_30_megabytes():
    files = [f for f in DEMO.rglob("*") if f.is_file() and "output" not in f.parts and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 30e6
