"""The three official LCM-LoRAs, at full size, on the bases that they are mistaken for, in ComfyUI's own model classes."""

import folder_paths
import pytest
import torch

from lcm_kit.host.lora import files, model_base
from lcm_kit.host.lora.fit import fit
from lcm_kit.host.lora.model_base import base_of
from lcm_kit.lora_merge.recognise.base_models import BY_NAME
from lcm_kit.nodes.loading import ApplyLoRA, LCMLoader
from lcm_kit.tests.helpers import as_read
from lcm_kit.tests.lora_merge import full_size
from lcm_kit.tests.with_comfyui import bases

NAMES = tuple(full_size.CONFIGS)
REPOSITORIES = {"SD1.5": "lcm-lora-sdv1-5", "SDXL": "lcm-lora-sdxl", "SSD-1B": "lcm-lora-ssd-1b"}


@pytest.fixture(scope="module")
def lora_files(comfy_home, tmp_path_factory):
    """Base -> name of its LCM-LoRA in the loras folder. All official files bear one name, these do not help either."""
    folder = tmp_path_factory.mktemp("loras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
        folder_paths.filename_list_cache.pop("loras", None)
        names = {base: f"pytorch_lora_weights_{number}.safetensors" for number, base in enumerate(NAMES)}
        for base, name in names.items():
            full_size.write(folder / name, full_size.lora(base))
        yield names
    folder_paths.filename_list_cache.pop("loras", None)
    files._cache.clear()


pytestmark = pytest.mark.usefixtures("no_gradients")


def load(model, name, wrong_base="refuse"):
    return LCMLoader.execute(model, name, 1.0, wrong_base).result


@pytest.mark.parametrize("base", list(bases.CONFIGS))
def test_comfyuis_model_classes_are_recognised(base):
    found = base_of(bases.model(base))
    assert (found.base, found.config) == (base, bases.CONFIGS[base][0])
    assert found.modules == BY_NAME[base].ldm_modules.keys()


@pytest.mark.parametrize("base", NAMES)
def test_on_its_own_base_every_module_is_applied_and_reported(lora_files, base):
    model, count = bases.model(base), full_size.MODULES[base]
    changed, _, preset, _, steps, cfg, report = load(model, lora_files[base])
    assert len(changed.patches) == count
    assert model.patches == {}
    assert (steps, cfg, preset.name) == (4, 1.0, "LCM")
    lines = as_read(report).splitlines()
    assert lines[0] == f"{lora_files[base]}: {count} of {count} modules applied at strength 1."
    assert f"LCM-LoRA {base}" in lines[1]
    assert "very likely: by structure" in lines[1]
    assert lines[2] == f"Made for: {base}, this model: {base}."
    assert lines[3] == "Settings (LCM): LCM KSampler, 4 steps, cfg 1, gamma 1, 50 original steps."
    assert lines[4] == f"Rank 64, alpha 8, effective scale 0.125, parameters {full_size.PARAMETERS[base]:,}."
    assert len(lines) == 5


# LoRA, base -> modules with a name that the base has, with the very shape too, that fit, and that have no name there.
# Ten or eight fit that have not the very shape: 1x1 convolutions on linear layers, which ComfyUI adds up all the same.
MATRIX = {
    ("SSD-1B", "SDXL"): (423, 423, 423, 0),
    ("SDXL", "SSD-1B"): (423, 423, 423, 365),
    ("SD1.5", "SDXL"): (162, 79, 89, 116),
    ("SDXL", "SD1.5"): (162, 79, 89, 626),
    ("SD1.5", "SSD-1B"): (147, 68, 76, 131),
    ("SSD-1B", "SD1.5"): (147, 68, 76, 276),
}


def same_shape(lora, base):
    ours, theirs = full_size.unet_weights(lora), full_size.unet_weights(base)
    return sum(module.endswith(full_size.TARGETS) and theirs.get(module) == shape for module, shape in ours.items())


@pytest.mark.parametrize(("lora", "base"), MATRIX)
def test_on_another_base_it_is_refused_with_the_counts_and_the_file_to_use(lora_files, lora, base):
    hits, same, fits, misses = MATRIX[lora, base]
    model = bases.model(base)
    weights = files.read_lora(lora_files[lora])
    found = fit(weights, model)
    left, could = model_base.uncovered(found, base_of(model), weights.identity.structure.recognised.kinds)
    assert (len(found.placed), len(found.clashing), len(found.homeless), found.twice) == (fits, hits - fits, misses, ())
    assert same_shape(lora, base) == same
    assert (could, len(left)) == (full_size.MODULES[base], full_size.MODULES[base] - fits)
    with pytest.raises(ValueError, match="does not fit this model") as error:
        load(model, lora_files[lora])
    message = str(error.value)
    assert message.startswith(
        f"LCM-LoRA Loader: {lora_files[lora]} does not fit this model ({bases.CONFIGS[base][0]}): it is LCM-LoRA "
    )
    assert f"it is LCM-LoRA {lora}, and the model is {base}." in message
    assert f"Of its {full_size.MODULES[lora]} modules {fits} fit" in message
    assert f"Use LCM-LoRA {base} (https://huggingface.co/latent-consistency/{REPOSITORIES[base]}, " in message
    assert f"or load an {lora} checkpoint" in message
    for number, words in ((hits - fits, "have another shape"), (misses, "have no place in it")):
        assert (f"{number} {words}" in message) is (number > 0)
    assert "\n" not in message


def test_the_lora_of_a_smaller_sister_is_told_by_what_it_leaves_out(lora_files):
    """ComfyUI says nothing at all here, and the picture is spoilt."""
    with pytest.raises(ValueError, match=r"423 fit, 365 of the model's 788 modules of these kinds are left without it"):
        load(bases.model("SDXL"), lora_files["SSD-1B"])


@pytest.mark.parametrize(("lora", "base"), MATRIX)
def test_warn_applies_what_fits_and_says_why_it_is_wrong(lora_files, lora, base):
    changed, *_, report = load(bases.model(base), lora_files[lora], "warn")
    assert len(changed.patches) == MATRIX[lora, base][2]
    assert f"Made for: {lora}, this model: {base}." in report
    assert "Warning: " in report
    assert "pictures may be spoilt" in report


def test_apply_lora_takes_the_same_road(lora_files):
    lora = files.read_lora(lora_files["SSD-1B"])
    with pytest.raises(ValueError, match=r"it is LCM-LoRA SSD-1B, and the model is SDXL\. Use LCM-LoRA SDXL"):
        ApplyLoRA.execute(bases.model("SDXL"), lora, 1.0, 1.0)
    changed, _, report = ApplyLoRA.execute(bases.model("SDXL"), lora, 1.0, 1.0, wrong_base="warn").result
    assert len(changed.patches) == 423
    assert "365 of the model's 788 modules" in report


def test_a_plain_lora_model_of_another_node_is_recognised_too():
    with pytest.raises(ValueError, match=r"it is LCM-LoRA SSD-1B, and the model is SDXL"):
        ApplyLoRA.execute(bases.model("SDXL"), full_size.lora("SSD-1B"), 1.0, 1.0)


def test_a_style_lora_that_covers_attention_only_is_not_refused_for_being_small():
    style = full_size.lora("SDXL", targets=full_size.ATTENTION, rank=8)
    report = ApplyLoRA.execute(bases.model("SDXL"), style, 1.0, 1.0).result[2]
    assert "560 of 560 modules applied" in report
    assert "Made for: SDXL, this model: SDXL." in report
    assert "left without it" not in report


def test_a_lora_of_a_few_blocks_is_not_refused_where_several_bases_are_possible():
    """B-LoRAs hold two blocks; whose bases cannot be told apart by them."""
    blocks = full_size.lora(
        "SDXL", targets=full_size.ATTENTION, rank=8, only=lambda name: "up_blocks.0.attentions.0" in name
    )
    report = ApplyLoRA.execute(bases.model("SDXL"), blocks, 1.0, 1.0).result[2]
    assert "80 of 80 modules applied" in report


def test_a_style_lora_of_a_sister_model_is_applied_where_most_of_it_fits():
    style = full_size.lora("SSD-1B", targets=full_size.ATTENTION, rank=8)
    report = ApplyLoRA.execute(bases.model("SDXL"), style, 1.0, 1.0).result[2]
    assert "272 of 272 modules applied" in report
    assert "Made for: SSD-1B, this model: SDXL." in report


def test_a_style_lora_of_which_half_does_not_fit_is_refused():
    style = full_size.lora("SDXL", targets=full_size.ATTENTION, rank=8)
    with pytest.raises(
        ValueError, match=r"it is a LoRA for SDXL, and the model is SSD-1B\. .* 272 fit, 288 have no place"
    ):
        ApplyLoRA.execute(bases.model("SSD-1B"), style, 1.0, 1.0)


def test_an_inpainting_model_is_its_base(lora_files):
    report = load(bases.model("SD1.5", in_channels=9), lora_files["SD1.5"])[6]
    assert "278 of 278 modules applied" in report
    assert "this model: SD1.5." in report


@pytest.mark.parametrize(("blocks", "lacking"), [(1, 10), (7, 70)])
def test_a_pruned_model_is_not_refused(lora_files, blocks, lacking):
    """Without some of the ten transformer blocks in the middle."""
    model = bases.model.__wrapped__("SDXL")
    for block in range(10 - blocks, 10):
        model.model.diffusion_model.middle_block[1].transformer_blocks[block] = torch.nn.Identity()
    changed, *_, report = load(model, lora_files["SDXL"])
    assert len(changed.patches) == 788 - lacking
    assert f"{788 - lacking} of 788 modules applied" in report
    assert f"{lacking} have no place in this model" in report
    assert "Made for: SDXL, this model: SDXL." in report
    assert "Warning" not in report


def test_another_kind_of_model_is_named_by_its_class(lora_files):
    with pytest.raises(ValueError, match="does not fit this model") as error:
        load(bases.model("SDXL Refiner"), lora_files["SDXL"])
    assert "(SDXLRefiner)" in str(error.value)
    assert "and the model is of ComfyUI's class SDXLRefiner." in str(error.value)
    assert "use the LoRA for this one, or load an SDXL checkpoint" in str(error.value)
