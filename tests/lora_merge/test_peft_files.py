"""Files of PEFT's: scales that are kept beside them, and what ComfyUI reads in another way, in words."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.lora_merge import Lora, describe, load, merge_with_account, save
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.comparing.report import as_text
from lcm_kit.lora_merge.merging.report import warnings_of
from lcm_kit.lora_merge.metadata.adapter_config import Misfit, misfit, noted
from lcm_kit.tests.lora_merge.make import factors, kohya

NAME = "mid_block.attentions.0.proj_in"
MODULE = "lora_unet_middle_block_1_proj_in"


def adapter(folder, *, name="adapter_model", rank=4, **config):
    up, down = factors(8, rank, 6)
    path = folder / f"{name}.safetensors"
    save_file({f"base_model.model.{NAME}.lora_B.weight": up, f"base_model.model.{NAME}.lora_A.weight": down}, path)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8} | config))
    return path


def said(lora):
    """In every report that a LoRA gets into."""
    merged = warnings_of(merge_with_account([(lora, 1.0), (lora, 0.5)])[1])
    text = as_text(compare([(lora, 1.0)]))
    notes = [line.removeprefix("  note: ") for line in describe(lora).splitlines() if line.startswith("  note: ")]
    for note in notes:
        assert any(note in line for line in merged)
        assert note in text
    return "; ".join(notes)


def test_a_renamed_adapter_keeps_the_scale_of_the_config_beside_it(tmp_path):
    path = adapter(tmp_path)
    shutil.copy(path, tmp_path / "mystyle.safetensors")
    assert said(load(path)) == ""
    renamed = load(tmp_path / "mystyle.safetensors")
    assert renamed.modules[MODULE].scale == load(path).modules[MODULE].scale == 2.0
    assert said(renamed) == "its scale is that of adapter_config.json beside it"
    save(renamed, tmp_path / "again.safetensors")
    again = load(tmp_path / "again.safetensors")
    assert (again.modules[MODULE].scale, said(again)) == (2.0, "")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 8}, "it says rank 8, but mid_block.attentions.0.proj_in has 4"),
        ({"r": None}, "it says rank None, but"),
        ({"r": [4]}, "it says rank"),
        ({"target_modules": ["to_q"]}, "it does not name mid_block.attentions.0.proj_in"),
    ],
)
def test_a_config_of_another_file_is_not_used_and_that_is_said(tmp_path, config, reason):
    lora = load(adapter(tmp_path, name="mystyle", **config))
    assert lora.modules[MODULE].scale == 1.0
    assert f"adapter_config.json beside it was not used: {reason}" in said(lora)


def test_an_adapter_without_a_config_has_the_scale_that_is_usual_without(tmp_path):
    path = adapter(tmp_path)
    assert load(path).modules[MODULE].scale == 2.0
    (tmp_path / "adapter_config.json").unlink()
    lora = load(path)
    assert (lora.modules[MODULE].scale, said(lora)) == (1.0, "")


@pytest.mark.parametrize("length", [39, 40, 41, 1000])
def test_of_what_a_config_says_for_a_rank_so_much_is_kept(length):
    """It is anybody's text, and goes into the metadata of what is saved."""
    assert misfit({"r": "9" * length}, {"a": 4}) == Misfit("a", 4, "9" * min(length, 40))


def test_a_config_that_fits_in_every_rank_and_module_is_used(tmp_path):
    fitting = {"r": 16, "rank_pattern": {"proj_in": 4}, "target_modules": ["to_q", "proj_in"]}
    assert load(adapter(tmp_path, name="mystyle", **fitting)).modules[MODULE].scale == 2.0


def test_files_that_are_none_of_pefts_do_not_look_at_it(tmp_path):
    adapter(tmp_path)
    save_file(kohya(MODULE, *factors(8, 4, 6)), tmp_path / "style.safetensors")
    lora = load(tmp_path / "style.safetensors")
    assert (lora.modules[MODULE].scale, said(lora)) == (1.0, "")
    (tmp_path / "adapter_config.json").write_text("{")
    assert load(tmp_path / "style.safetensors").modules[MODULE].scale == 1.0


def test_a_broken_config_beside_a_renamed_adapter_is_named(tmp_path):
    path = adapter(tmp_path, name="mystyle")
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json beside it was not used: it is not JSON" in said(load(path))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("where", ["config", "diffusers", "renamed"])
def test_an_adapter_of_a_changed_base_model_says_so(tmp_path, start, where):
    if where == "diffusers":
        up, down = factors(8, 4, 6)
        packed = {"unet.r": 4, "unet.lora_alpha": 4, "unet.init_lora_weights": start}
        state = {f"unet.{NAME}.lora_B.weight": up, f"unet.{NAME}.lora_A.weight": down}
        save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(packed)})
        lora = load(tmp_path / "x.safetensors")
    else:
        name = "adapter_model" if where == "config" else "style"
        lora = load(adapter(tmp_path, name=name, init_lora_weights=start))
    assert f"trained with init_lora_weights '{start}', which changes the base model too" in said(lora)
    save(lora, tmp_path / "again.safetensors")
    assert start in said(load(tmp_path / "again.safetensors"))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_beginnings_are_none_of_our_business(tmp_path, start):
    assert said(load(adapter(tmp_path, init_lora_weights=start))) == ""


def test_dora_of_pefts_is_said_to_be_applied_in_another_way():
    up, down = factors(8, 4, 6)
    name = f"base_model.model.{NAME}"
    state = {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    dora = Lora.from_state_dict(state | {f"{name}.lora_magnitude_vector": torch.ones(8)}, source="x")
    note = "its DoRA was trained by PEFT, which divides by the norm of the tuned weight"
    assert note in describe(dora)
    assert any(note in line for line in warnings_of(merge_with_account([(dora, 1.0)])[1]))
    # From the graph's LORA_MODEL, whose keys are LyCORIS's.
    assert note in describe(Lora.from_state_dict(dora.to_state_dict(), metadata=dora.metadata))
    lycoris = {
        f"{MODULE}.lora_up.weight": up,
        f"{MODULE}.lora_down.weight": down,
        f"{MODULE}.dora_scale": torch.ones(8, 1),
    }
    assert note not in describe(Lora.from_state_dict(lycoris))


def test_what_peft_saves_beside_factors_is_listed():
    up, down = factors(8, 4, 6)
    name = f"base_model.model.{NAME}"
    extra = {
        f"{name}.lora_B.bias": torch.ones(8),
        "base_model.model.conv_in.modules_to_save.weight": torch.ones(4, 4),
        "base_model.model.emb.lora_embedding_A": torch.ones(4, 8),
        "base_model.model.emb.trainable_tokens_delta": torch.ones(4, 8),
        "base_model.model.conv_out.bias": torch.ones(4),
    }
    lora = Lora.from_state_dict({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down} | extra)
    assert set(lora.keys.unread) == set(extra)
    text = describe(lora)
    for words in (
        "LoRA with a bias of its own",
        "LoRA of an embedding",
        "weights that PEFT saves whole (2 keys",
        "unknown (1 key",
    ):
        assert words in text


def test_what_a_packed_configuration_says_of_its_making_is_noted_field_by_field():
    """diffusers writes it under the part of the model; what the file says by itself goes first, and ranks are read elsewhere."""
    packed = {
        "unet.init_lora_weights": "pissa",
        "unet.use_dora": True,
        "unet.r": 4,
        "unet.lora_alpha": "8",
        "use_dora.x": True,
    }
    key = "lora_adapter_metadata"
    assert noted({key: json.dumps(packed)}, ()) == {
        key: json.dumps(packed),
        "init_lora_weights": "pissa",
        "use_dora": "True",
    }
    assert noted({key: json.dumps(packed), "init_lora_weights": "olora"}, ())["init_lora_weights"] == "olora"
    for other in (4, None, ["pissa"]):
        text = {key: json.dumps({"unet.init_lora_weights": other})}
        assert noted(text, ()) == text
    assert noted({key: "["}, ()) == {key: "["}
    assert noted({}, ["a.lora_A.weight"]) == {}
    assert noted({}, ["a.lora_A.weight", "a.lora_magnitude_vector.weight"]) == {"use_dora": "True"}
