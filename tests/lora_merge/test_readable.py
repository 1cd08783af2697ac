"""What `save` writes, `load` reads; what it could not read is refused before a byte is written."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcm_kit.lora_merge import Lora as LoraOf
from lcm_kit.lora_merge import LoraLayer, load, merge, save
from lcm_kit.lora_merge.disk.header import MAX_NAME
from lcm_kit.lora_merge.naming.names import kohya_name
from lcm_kit.lora_merge.updates.weight_dependent import Carried
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, kohya, relative

PREFIXES = [
    "lora_unet_", "lora_unet__", "lora_unet___", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "unet.", "transformer.",
    "diffusion_model.", "base_model.model.", "lycoris_", "text_encoder.", "text_encoders.clip_l.transformer.", "text_model.",
    "model.diffusion_model.", "", "_", ".", " ",
]  # fmt: skip
BODIES = [
    "mid_block_attentions_0_proj_in", "middle_block_1_proj_in", "down_blocks.0.attentions.0.proj_in", "input_blocks_1_1_proj_in",
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_processor_to_q", "x_processor_processor_to_q", "attn1_to_out",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", "blocks.0.attn.qkv", "x", "", "_", "__", ".", "..", "a.b",
    "lora_unet_x", "x.alpha", "x.lora_up", "x.lora", "x_lora", "x.lora_A", "x.diff", "0", "\u00e4", "\u4e2d\u6587", "a b", "<b>", "'\"", "\\", "/",
    "\n", "\x00", "\ud800", "\u202e", "lora_te_text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1", "y" * 470, "z" * 500,
]  # fmt: skip
NAMES = st.builds("".join, st.tuples(st.sampled_from(PREFIXES), st.sampled_from(BODIES)))
SHAPES = st.sampled_from([(6, 5, ()), (6, 5, (1, 1)), (4, 3, (3, 3))])


def saved_and_loaded(lora, path, **how):
    """What is read back, or None where save said in words that it would not do it and left nothing behind."""
    said = None
    try:
        save(lora, path, overwrite=True, **how)
    except ValueError as error:
        said = str(error)
    if said is not None:
        assert said.startswith(lora.source)
        assert list(path.parent.iterdir()) == []
        return None
    again = load(path)
    path.unlink()
    return again


def assert_same(again, lora, tolerance):
    assert len(again.spellings) == len(lora.spellings)
    for module in lora.spellings:
        found = again.find(module if module in again.spellings else lora.spellings[module])
        if module in lora.modules:
            assert relative(again.delta(found).flatten(1), lora.delta(module).flatten(1)) < tolerance
        assert (found in again.carried) == (module in lora.carried)
    assert len(again.diffs) == len(lora.diffs)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    shape=SHAPES,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    format=st.sampled_from(["kohya", "diffusers"]),
)
def test_a_saved_lora_is_the_lora_or_is_refused(tmp_path_factory, names, shape, dtype, format):
    """Loras made in a program, where a name may be anything."""
    folder = tmp_path_factory.mktemp("saved")
    layers = {name: LoraLayer(*factors(shape[0], 2, *shape[1:], seed=n), 1.0 + n) for n, name in enumerate(names)}
    lora = LoraOf(layers, source="made here")
    again = saved_and_loaded(lora, folder / "x.safetensors", dtype=dtype, format=format)
    if again is not None:
        assert_same(again, lora, 2e-2)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modules=st.lists(st.tuples(NAMES, st.sampled_from([*kinds.ADDITIVE, *kinds.CARRIED])), min_size=1, max_size=4),
)
def test_what_load_reads_save_writes(tmp_path_factory, modules):
    """Whatever a file holds that is read at all can be saved, and is read again."""
    folder = tmp_path_factory.mktemp("saved")
    state = {}
    for name, kind in modules:
        state |= kinds.state_dict(kind, name, kernel=(3, 3), alpha=2.0)
    try:
        lora = LoraOf.from_state_dict(state, source="read")
    except ValueError:
        return
    again = saved_and_loaded(lora, folder / "x.safetensors", dtype=torch.float32)
    if again is not None:
        assert_same(again, lora, 1e-6)
    else:
        # Only for what the file's own header cannot hold, and for names whose alpha reads as that of another module.
        odd = ("lora", "lora_linear_layer")
        assert any(
            len(name) > MAX_NAME - 40 or not name.isprintable() or not name or name.endswith(odd) for name, _ in modules
        )


@given(NAMES)
def test_the_spelling_of_a_spelling_is_itself_however_many_underscores(name):
    if "processor_processor" not in name:
        assert kohya_name(kohya_name(name)) == kohya_name(name)


def test_three_underscores_are_one_module_with_one():
    first, second = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet___mid_block_attentions_0_proj_in"
    with pytest.raises(ValueError, match="are two spellings of one module"):
        LoraOf.from_state_dict(kohya(first, *factors(6, 2, 5)) | {f"{second}.diff_b": torch.ones(6)})
    assert set(LoraOf.from_state_dict(kohya(second, *factors(6, 2, 5))).spellings.values()) == {first}


def broken(**change):
    up, down = factors(6, 2, 5)
    return {"lora_unet_x": LoraLayer(**{"up": up, "down": down, "alpha": 1.0} | change)}


UP, DOWN = factors(6, 2, 5)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraOf({}, source="made here"), "there is nothing to save"),
        (
            LoraOf(broken(up=UP * math.nan), source="made here"),
            r"(?:lora_unet_x.*too large|NaN or infinite values in lora_unet_x)",
        ),
        (
            LoraOf(broken(down=DOWN / 0), source="made here"),
            r"(?:lora_unet_x.*too large|NaN or infinite values in lora_unet_x)",
        ),
        (LoraOf(broken(alpha=1e39), source="made here"), "lora_unet_x: alpha is 1e.39, and float32 has no such number"),
        (
            LoraOf(broken(alpha=1e-50), source="made here"),
            "lora_unet_x: alpha is 1e-50, and float32 has no such number",
        ),
        (
            LoraOf({}, {("lora_unet_x", "diff"): torch.full((2, 2), math.inf)}, source="made here"),
            "lora_unet_x.*too large",
        ),
        (
            LoraOf({}, {("lora_unet_x", "diff"): torch.ones(0, 3)}, source="made here"),
            "1 tensor has no values, lora_unet_x.diff",
        ),
        (LoraOf({}, {("lora_unet_x", "diff"): torch.ones((1,) * 9)}, source="made here"), "lora_unet_x.diff has shape"),
        (
            LoraOf(broken(), metadata={"a": "\ud800"}, source="made here"),
            "metadata 'a' is .*without halves of surrogate pairs",
        ),
        (
            LoraOf(broken(), metadata={"a": 3}, source="made here"),
            "metadata 'a' is 3, but names and values have to be text",
        ),
        (LoraOf(broken(), spellings={"lora_unet_x": "x" * 495}, source="made here"), "names have 1 to 500 printable"),
        (
            LoraOf(
                broken() | {"lora_unet_y": LoraLayer(UP, DOWN)},
                spellings={"lora_unet_y": "lora_unet_x"},
                source="made here",
            ),
            "lora_unet_x and lora_unet_y would both be written as lora_unet_x",
        ),
        (
            LoraOf(broken() | {"lora_unet__x": LoraLayer(UP, DOWN)}, source="made here"),
            "lora_unet_x and lora_unet__x are two spellings of one module.* It cannot be saved",
        ),
        (
            LoraOf(
                {}, carried={"lora_unet_x": Carried("OFT", {"oft_blocks": torch.ones(2, 3, 4)})}, source="made here"
            ),
            r"lora_unet_x: oft_blocks is \(2, 3, 4\)",
        ),
        (
            LoraOf({"x": LoraLayer(UP, DOWN)}, {("x", "diff"): torch.ones(6, 5)}, source="made here"),
            "has both x.diff and another update of its weight",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_no_loader_would_read_is_refused_by_name_and_nothing_is_written(tmp_path, lora, said, dtype):
    with pytest.raises(ValueError, match=f"made here: .*{said}|made here: {said}"):
        save(lora, tmp_path / "x.safetensors", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


ONE, TWO = "lora_unet_x", "lora_unet_y"


def holding(part, module):
    """The fields of a LoRA with one update of a module."""
    if part in ("6 x 5", "7 x 5"):
        return {"modules": {module: LoraLayer(*factors(int(part[0]), 2, 5))}}
    if part == "OFT":
        return {"carried": {module: Carried("OFT", {"oft_blocks": torch.ones(2, 3, 3)})}}
    return {"diffs": {(module, part): torch.ones(6) if part in ("diff_b", "w_norm", "b_norm") else torch.ones(6, 5)}}


PARTS = ("6 x 5", "7 x 5", "OFT", "diff", "diff_b", "w_norm")


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
def test_a_name_that_would_be_read_as_another_modules_is_refused_where_that_shows(tmp_path, first, second):
    """Each is spelled as the other is called, so that a loader would find the other's update under its name."""
    fields = {}
    for part, module in ((first, ONE), (second, TWO)):
        for field, value in holding(part, module).items():
            fields[field] = fields.get(field, {}) | value
    fields.setdefault("modules", {})
    swapped = LoraOf(**fields, spellings={ONE: TWO, TWO: ONE}, source="made here")
    if first == second:  # told from the other by its values alone
        save(swapped, tmp_path / "x.safetensors", dtype=torch.float32)
        return
    with pytest.raises(
        ValueError, match=r"^made here: cannot be saved, since a loader would read something else"
    ) as error:
        save(swapped, tmp_path / "x.safetensors", dtype=torch.float32)
    assert all(f"{one} has other parts or another shape in it" in str(error.value) for one in (ONE, TWO))
    assert list(tmp_path.iterdir()) == []
    straight = LoraOf(**fields, source="made here")
    assert_same(saved_and_loaded(straight, tmp_path / "x.safetensors", dtype=torch.float32), straight, 1e-6)


def test_a_config_beside_the_file_would_change_its_scale(tmp_path):
    """Folders of PEFT: a file named adapter_model takes its scale from the config beside it."""
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}', encoding="utf-8")
    lora = LoraOf.from_state_dict(kohya("lora_unet_input_blocks_1_1_proj_in", *factors(6, 2, 5), 1.0), source="one")
    merged = merge([(lora, 0.5)])
    for format in ("kohya", "diffusers"):
        try:
            save(merged, tmp_path / "adapter_model.safetensors", dtype=torch.float32, format=format, overwrite=True)
        except ValueError as error:
            assert "adapter_config.json" in str(error)  # noqa: PT017
        else:
            again = load(tmp_path / "adapter_model.safetensors")
            assert relative(next(iter(again.modules.values())).delta(), merged.delta(next(iter(merged.modules)))) < 1e-6
