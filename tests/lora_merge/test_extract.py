import itertools
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.lora_merge import Lora, load
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.extracting.checkpoints import named_rows, pairs, prefix_of
from lcm_kit.lora_merge.extracting.extract import Extraction, extract
from lcm_kit.lora_merge.extracting.report import describe
from lcm_kit.tests.lora_merge.make import dense, factors, generator, relative

LINEAR = "lora_unet_middle_block_1_proj_in"
CONVOLUTION = "lora_unet_input_blocks_1_0_in_layers_2"


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed)) * math.prod(shape[1:]) ** -0.5


@pytest.mark.parametrize("shape", [(40, 30), (12, 60), (60, 12), (20, 8, 3, 3), (8, 20, 3, 3), (16, 16, 1, 1)])
def test_a_lora_on_a_model_is_found_again(shape):
    up, down = factors(shape[0], 4, shape[1], shape[2:])
    delta = dense(up, down, 0.5)
    base = weight(*shape)
    lora, account = extract([(f"{LINEAR}.weight", base + delta.float(), base)], rank=4)
    (layer,) = lora.modules.values()
    assert (layer.rank, layer.shape, layer.scale) == (4, shape, 1.0)
    assert relative(layer.delta(), delta) < 1e-5
    assert account.error < 1e-5  # float32 rounding of the sum
    assert (account.modules, account.ranks) == (1, (4, 4))


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (6, 4, 3, 3)])
def test_the_error_is_the_smallest_possible_and_is_told(shape, rank):
    tuned, base = weight(*shape, seed=1), weight(*shape, seed=2)
    lora, account = extract([(f"{LINEAR}.weight", tuned, base)], rank=rank)
    wanted = tuned.double() - base.double()
    spectrum = torch.linalg.svdvals(wanted.flatten(1))
    best = math.sqrt(float(spectrum[rank:].square().sum() / spectrum.square().sum()))
    assert relative(lora.delta(LINEAR), wanted) == pytest.approx(best, abs=1e-6)
    assert account.error == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("size", [2.0**-80, 2.0**-20, 2.0**-6, 1.0, 2.0**6, 2.0**80])
def test_the_error_is_relative_whatever_the_size_of_the_difference(size):
    base = torch.zeros(20, 30)
    (one, account), (other, whole) = (
        extract([(f"{LINEAR}.weight", s * weight(20, 30), base)], rank=3) for s in (size, 1.0)
    )
    assert account.error == pytest.approx(whole.error, rel=1e-5)
    assert 0.1 < whole.error < 1
    assert account.energy == pytest.approx(size**2 * whole.energy, rel=1e-5)
    assert relative(one.delta(LINEAR), size * other.delta(LINEAR)) < 1e-5


@pytest.mark.parametrize(("small", "rank"), [(3e-7, 2), (5e-8, 1)])
def test_without_a_share_to_keep_the_smallest_component_stays_that_is_no_rounding(small, rank):
    """3e-7 of the largest has 1e-13 of the energy, and rounding of float32 would be 3e-8. Below 1e-7 of the largest nothing is
    sure: the energies are eigenvalues in float64."""
    base = torch.zeros(64, 64, dtype=torch.float64)
    tuned = torch.diag(torch.tensor([1.0, small, *[0.0] * 62], dtype=torch.float64))
    lora, _ = extract([(f"{LINEAR}.weight", tuned, base)], rank=8)
    assert lora.modules[LINEAR].rank == rank
    assert float(lora.delta(LINEAR)[1, 1]) == pytest.approx(small if rank == 2 else 0.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(64, 4), (4, 64), (9, 9), (4, 4, 4, 4)])
@pytest.mark.parametrize(("share", "found"), [(0.99, False), (1.01, True)])
def test_below_what_rounding_makes_of_the_weights_there_is_no_difference(shape, share, found):
    """Of weights w rounded to float32 the rounding is a random matrix of entries eps * w, of norm eps * w * (sqrt(m) + sqrt(n))."""
    base = torch.full(shape, 3.0, dtype=torch.float64)
    tuned = base.clone()
    rows, columns = shape[0], math.prod(shape[1:])
    tuned.view(-1)[0] += share * 2.0**-23 * 3.0 * (math.sqrt(rows) + math.sqrt(columns))
    _, account = extract([(f"{LINEAR}.weight", tuned, base)], rank=2)
    assert (account.modules, account.equal) == ((1, 0) if found else (0, 1))


def test_the_rank_is_sixty_four_unless_told():
    lora, _ = extract([(f"{LINEAR}.weight", weight(70, 72), torch.zeros(70, 72))])
    assert lora.modules[LINEAR].rank == 64


def test_the_names_of_one_unet_are_of_one_kind():
    ones = [(f"{name}.weight", torch.ones(4, 4), torch.zeros(4, 4)) for name in (
        LINEAR, "lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "diffusion_model.something.else")]  # fmt: skip
    with pytest.raises(ValueError, match="mine: its weights mix the block names of diffusers with those of ldm"):
        extract(ones, source="mine")
    assert len(extract(ones[1:])[0].modules) == len(extract([ones[0], *ones[2:]])[0].modules) == 3


def test_what_is_no_weight_in_floating_point_is_named():
    one = torch.ones(4, 4)
    weights = [
        ("a.weight", torch.tensor(2.0), torch.tensor(1.0)),
        ("b.weight", one.to(torch.uint8), 0 * one.to(torch.uint8)),
        ("c.weight", one.bool(), ~one.bool()),
        ("d.weight", one.int(), 0 * one.int()),
        ("e.table", one, 0 * one),
        ("weight", one, 0 * one),
        ("bias", one[0], 0 * one[0]),
        ("f.bias", one[0], one[0].clone()),
        ("g.weight", one[0], one[0].clone()),
    ]
    lora, account = extract([*weights, (f"{LINEAR}.weight", one.to(torch.int8), 0 * one.to(torch.int8))])
    assert account.other == ("a.weight", "b.weight", "c.weight", "d.weight", "e.table", "weight", "bias")
    assert (account.equal, account.vectors, list(lora.modules)) == (2, 0, [LINEAR])


def test_what_it_is_called_is_its_title():
    lora, _ = extract([(f"{LINEAR}.weight", weight(8, 6), torch.zeros(8, 6))], rank=2, source="my style")
    assert (lora.metadata["modelspec.title"], lora.source) == ("my style", "my style")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k", (1280, 2048), "stable-diffusion-xl-v1-base/lora"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", (640, 768), "stable-diffusion-v1/lora"),
        (LINEAR, (8, 6), None),
    ],
)  # fmt: skip
def test_what_it_is_for_is_noted_where_its_modules_tell(name, shape, said):
    tuned = torch.zeros(shape)
    tuned[0, 0] = 1
    lora, _ = extract([(f"{name}.weight", tuned, torch.zeros(shape))], rank=1, source="x")
    assert lora.metadata == {"modelspec.title": "x"} | ({"modelspec.architecture": said} if said else {})


def test_an_outlier_is_not_clamped():
    base = weight(64, 64)
    tuned = base.clone()
    tuned[3, 5] += 100.0
    lora, account = extract([(f"{LINEAR}.weight", tuned, base)], rank=1)
    assert lora.delta(LINEAR)[3, 5] == pytest.approx(100, rel=1e-6)
    assert account.error < 1e-6


@pytest.mark.parametrize("shape", [(20, 30), (4, 30), (30, 4), (4, 4)])
@pytest.mark.parametrize("rank", [3, 64])
def test_keep_stops_at_the_smallest_rank_that_holds_the_share(shape, rank):
    """Where the update has other ranks than four as where it has none."""
    s = torch.tensor([4.0, 2.0, 1.0, 0.5])
    q = torch.linalg.qr(weight(shape[0], 4, seed=3))[0]
    delta = (q * s) @ torch.linalg.qr(weight(shape[1], 4, seed=4))[0].T
    base = torch.zeros(shape)
    for keep in (0.5, 0.94, 0.95, 0.98, 0.99, 1.0):
        lora, _ = extract([(f"{LINEAR}.weight", delta, base)], rank=rank, keep=keep)
        needed = int((s.square().cumsum(0) / s.square().sum() < keep - 1e-6).sum()) + 1
        assert lora.modules[LINEAR].rank == min(rank, needed)


def test_the_account_has_the_smallest_and_the_largest_rank_and_no_error_of_nothing():
    base = torch.zeros(8, 6)
    ones = [
        (f"{name}.weight", dense(*factors(8, rank, 6)).float(), base) for name, rank in (("a", 3), ("b", 1), ("c", 2))
    ]
    lora, account = extract(ones)
    assert (account.modules, account.ranks, [layer.alpha for layer in lora.modules.values()]) == (3, (1, 3), [3, 1, 2])
    _, none = extract([("a.weight", base, base.clone())])
    assert (none.modules, none.ranks, none.error, none.energy, none.equal) == (0, None, 0.0, 0.0, 1)


def test_a_device_may_be_told_for_each_weight():
    tuned, base = weight(8, 6), torch.zeros(8, 6)
    asked = []
    lora, _ = extract([(f"{LINEAR}.weight", tuned, base)], device=lambda one: asked.append(one) or "cpu")
    assert [one is tuned for one in asked] == [True]
    assert torch.equal(lora.delta(LINEAR), extract([(f"{LINEAR}.weight", tuned, base)])[0].delta(LINEAR))


def test_modules_keep_the_spelling_that_they_came_with():
    names = ["lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"]
    lora, _ = extract([(f"{name}.weight", weight(8, 6), torch.zeros(8, 6)) for name in names])
    assert [*lora.spellings.values()] == names
    assert {key.partition(".")[0] for key in lora.to_state_dict()} == {*names}


def test_equal_weights_are_left_out_and_others_are_accounted_for():
    base, norm, bias = weight(8, 6), torch.ones(5), torch.zeros(8)
    weights = [
        ("lora_unet_input_blocks_1_1_proj_in.weight", base, base.clone()),
        (f"{LINEAR}.weight", base + 1, base),
        (f"{LINEAR}.bias", bias + 1, bias),
        ("lora_unet_middle_block_1_norm.bias", norm + 1, norm),
        ("lora_unet_middle_block_1_norm.weight", norm + 2, norm),
        ("positions", base + 1, base),
    ]
    lora, account = extract(weights, rank=2)
    assert set(lora.modules) == {LINEAR}
    assert {key: float(diff[0]) for key, diff in lora.diffs.items()} == {
        (LINEAR, "diff_b"): 1.0,
        ("lora_unet_middle_block_1_norm", "w_norm"): 2.0,
        ("lora_unet_middle_block_1_norm", "b_norm"): 1.0,
    }
    assert (account.modules, account.vectors, account.equal, account.other) == (1, 3, 1, ("positions",))
    assert "1 weight does not differ" in describe(account)
    again = Lora.from_state_dict(lora.to_state_dict())
    assert again.diffs.keys() == lora.diffs.keys()
    none, account = extract(weights, rank=2, vectors=False)
    assert not none.diffs
    assert (len(account.unwanted), account.other) == (3, ("positions",))
    assert re.search(r"^Left out, as asked: 3 biases and norms \(\S+, \.\.\.\)\.$", describe(account), re.M)
    assert describe(account).endswith("under the names of LoRA files are extracted: 1 parameters (positions).")


def test_rounding_of_float32_is_no_difference():
    base = weight(50, 40)
    moved = (base.double() + 1.0).float() - 1.0  # as far as float32 rounds
    delta = dense(*factors(50, 2, 40))
    lora, account = extract([(f"{LINEAR}.weight", (base.double() + delta).float(), base)], rank=40)
    assert lora.modules[LINEAR].rank == 2
    _, account = extract([("a.weight", base * (1 + 2**-24), base), ("b.weight", moved, moved)], rank=4)
    assert (account.modules, account.equal) == (0, 2)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float64, torch.float64)])
def test_inputs_are_left_alone_and_half_precision_is_read_exactly(dtypes):
    tuned, base = (weight(20, 10, seed=seed).to(dtype) for seed, dtype in enumerate(dtypes, 1))
    before = tuned.clone(), base.clone()
    lora, _ = extract([(f"{LINEAR}.weight", tuned, base)], rank=10)
    assert torch.equal(tuned, before[0])
    assert torch.equal(base, before[1])
    assert relative(lora.delta(LINEAR), tuned.double() - base.double()) < 1e-6


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ([], {"rank": 0}, "rank is 0, but the smallest rank is 1"),
        ([], {"keep": 0.0}, "above 0 and at most 1"),
        ([("a.weight", torch.ones(2, 3), torch.ones(3, 2))], {}, r"a.weight: the tuned model has \(2, 3\), the base"),
    ],
)
def test_bad_input_is_refused(weights, options, said):
    with pytest.raises(ValueError, match=said):
        extract(weights, **options)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["a.weight", "a.bias"])
@pytest.mark.parametrize(
    "whose", [("the tuned model",), ("the base",), ("the tuned model", "the base")], ids=" and ".join
)
def test_the_model_whose_weights_are_not_finite_is_named(whose, name, value):
    sound = torch.arange(6.0).reshape(2, 3) if name == "a.weight" else torch.arange(2.0)
    pair = [sound, sound + 1]
    for weight, model in zip(pair, ("the tuned model", "the base"), strict=True):
        weight[1] = value if model in whose else weight[1]
    said = f"^{name}: the weights of {' and of '.join(whose)} are not all finite numbers"
    with pytest.raises(ValueError, match=said):
        extract([(name, *pair)])


@pytest.mark.parametrize(
    ("key", "prefix", "name"),
    [
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "", f"{CONVOLUTION}.weight"),
        ("input_blocks.1.0.in_layers.2.bias", "diffusion_model.", f"{CONVOLUTION}.bias"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusion_model.", "lora_unet_down_blocks_0_resnets_0_conv1.weight"),
        ("double_blocks.0.img_attn.qkv.weight", "diffusion_model.", "diffusion_model.double_blocks.0.img_attn.qkv.weight"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "", "diffusion_model.double_blocks.0.img_attn.qkv.weight"),
        ("transformer_blocks.0.attn.to_q.weight", "transformer.", "transformer.transformer_blocks.0.attn.to_q.weight"),
        ("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight", "", "lora_te_text_model_encoder_layers_0_mlp_fc1.weight"),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.2.self_attn.q_proj.bias", "", "lora_te1_text_model_encoder_layers_2_self_attn_q_proj.bias"),
        ("conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_proj.weight", "", "lora_te2_text_model_encoder_layers_3_mlp_fc2.weight"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.weight", "", "lora_te_text_model_encoder_layers_0_mlp_fc1.weight"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.bias", "", "lora_te2_text_model_encoder_layers_0_mlp_fc1.bias"),
        ("cond_stage_model.model.transformer.resblocks.3.attn.out_proj.bias", "", "lora_te_text_model_encoder_layers_3_self_attn_out_proj.bias"),
    ],
)  # fmt: skip
def test_checkpoint_keys_get_the_names_of_lora_files(key, prefix, name):
    assert named_rows(key, prefix) == [(name, (0.0, 1.0))]


@pytest.mark.parametrize(
    "key",
    [
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.model.transformer.resblocks.3.ln_1.weight",
        "conditioner.embedders.1.model.text_projection",
        "text_encoder_2.text_projection.weight",
    ],
)
def test_what_lora_files_have_no_name_for_has_none_here(key, tmp_path):
    ((name, rows),) = named_rows(key, "")
    assert (name.startswith(key), name != key, rows) == (True, True, (0.0, 1.0))
    _, account = extract([(name, torch.ones(2, 2), torch.zeros(2, 2))])
    assert account.other == (name,)


BLOCK, SINGLE, JOINT = (f"{name}.0.attn.to_q.weight" for name in ("transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks"))  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", SINGLE], ""),
        (["model.x.weight", SINGLE], ""),
        (["unet.conv_in.weight"], ""),
        (["diffusion_model.x.weight", "y.weight"], ""),
        (["double_blocks.0.img_attn.qkv.weight"], "diffusion_model."),
        # Blocks that diffusers alone has, and those of Qwen-Image's own name with diffusers' layers of Flux or SD3 around them.
        (["x.weight", SINGLE], "transformer."),
        (["x.weight", JOINT], "transformer."),
        (["x.weight", BLOCK], "diffusion_model."),
        (["x.weight", BLOCK, "context_embedder.weight"], "transformer."),
        (["x.weight", BLOCK, "pos_embed.proj.weight"], "transformer."),
        (["context_embedder.weight", "pos_embed.proj.weight"], "diffusion_model."),
        (["x.transformer_blocks.0.weight", "x.single_transformer_blocks.0.weight", "context_embedder.weight"], "diffusion_model."),
        ([], "diffusion_model."),
    ],
)  # fmt: skip
def test_the_names_of_a_bare_diffusion_model_tell_whose_they_are(keys, prefix):
    assert prefix_of(keys) == prefix_of(keys[::-1]) == prefix


def test_the_fused_attention_of_open_clip_is_taken_apart():
    found = named_rows("conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight", "")
    assert [name for name, _ in found] == [
        f"lora_te2_text_model_encoder_layers_3_self_attn_{x}_proj.weight" for x in "qkv"
    ]
    assert [round(12 * end) for _, (_, end) in found] == [4, 8, 12]


def checkpoint(seed=0):
    prefix = "model.diffusion_model."
    return {
        f"{prefix}input_blocks.1.0.in_layers.2.weight": weight(8, 6, 3, 3, seed=seed),
        f"{prefix}input_blocks.1.0.in_layers.2.bias": weight(8, seed=seed + 1),
        f"{prefix}middle_block.1.proj_in.weight": weight(10, 12, seed=seed + 2),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": weight(12, 4, seed=seed + 3),
        "cond_stage_model.model.token_embedding.weight": weight(9, 4, seed=seed + 4),
        "first_stage_model.decoder.conv_in.weight": weight(4, 4, 3, 3, seed=seed + 5),
    }


def test_the_command_makes_the_lora_of_two_checkpoints(tmp_path, capsys):
    base, tuned = checkpoint(), checkpoint()
    up, down = factors(10, 2, 12)
    tuned["model.diffusion_model.middle_block.1.proj_in.weight"] += dense(up, down).float()
    fused = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    tuned[fused] = tuned[fused].clone()
    tuned[fused][4:8] += 1.0  # of q, k, v the second
    tuned["cond_stage_model.model.token_embedding.weight"] += 1.0
    tuned["first_stage_model.decoder.conv_in.weight"] += 1.0
    for name, tensors in (("tuned", tuned), ("base", base)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    words = [str(tmp_path / f"{name}.safetensors") for name in ("tuned", "base")]
    output = tmp_path / "out.safetensors"
    assert main(["extract", *words, "-o", str(output), "--rank", "2", "--dtype", "fp32"]) == 0
    told = capsys.readouterr().out
    assert "Extracted 2 modules, rank 1 to 2" in told
    assert "token_embedding.weight" in told  # named, for no LoRA can hold it
    lora = load(output)
    assert set(lora.modules) == {LINEAR, "lora_te1_text_model_encoder_layers_0_self_attn_k_proj"}
    assert relative(lora.delta(LINEAR), dense(up, down)) < 1e-5
    assert main(["extract", *words, "-o", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {f"other.{key}": value for key, value in t.items()}, "Give two models of one family"),
        (lambda t: {key: torch.ones(3, 3) for key in t}, "weights differ in shape"),
        (lambda t: t | {"model.diffusion_model.middle_block.1.proj_in.scale_weight": torch.ones(1)}, "are quantised"),
        (lambda t: t, "do not differ: there is nothing to extract"),
    ],
)
def test_files_that_do_not_go_together_are_refused(change, said, tmp_path, capsys):
    save_file(checkpoint(), tmp_path / "base.safetensors")
    save_file(change(checkpoint()), tmp_path / "tuned.safetensors")
    words = [str(tmp_path / name) for name in ("tuned.safetensors", "base.safetensors")]
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def files(tmp_path, **models):
    for name, tensors in models.items():
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors"
        )
    return [str(tmp_path / f"{name}.safetensors") for name in models]


def as_dtype(tensors, dtype):
    if dtype == torch.int8:
        return {key: (50 * tensor).round().clamp(-127, 127).to(dtype) for key, tensor in tensors.items()}
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


PLAIN = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(("of_tuned", "of_base"), [*itertools.product(PLAIN, PLAIN), (torch.int8, torch.int8)])
def test_checkpoints_of_any_plain_dtype_are_read_as_their_numbers(of_tuned, of_base, tmp_path, capsys):
    tuned, base = as_dtype(checkpoint(seed=1), of_tuned), as_dtype(checkpoint(seed=7), of_base)
    words = files(tmp_path, tuned=tuned, base=base)
    output = tmp_path / "out.safetensors"
    assert main(["extract", *words, "-o", str(output), "--rank", "64", "--dtype", "fp32"]) == 0
    lora, key = load(output), "model.diffusion_model.middle_block.1.proj_in.weight"
    assert relative(lora.delta(LINEAR), tuned[key].double() - base[key].double()) < 1e-5
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.bias"
    assert relative(lora.diffs[CONVOLUTION, "diff_b"], tuned[key].double() - base[key].double()) < 1e-6
    # The same file twice has nothing to extract, whatever its dtype.
    assert main(["extract", words[0], words[0], "-o", str(tmp_path / "none.safetensors")]) == 2
    assert "there is nothing to extract" in capsys.readouterr().err


UNET = "model.diffusion_model."


def test_the_account_in_words():
    facts = {"modules": 0, "vectors": 0, "equal": 3, "other": (), "ranks": None, "error": 0.5, "energy": 1.0}
    assert describe(Extraction(**facts)) == "The two models do not differ: nothing to extract."
    assert describe(Extraction(**facts | {"vectors": 2, "equal": 0})).split("\n") == [
        "Extracted 0 modules, rank 0.",
        "2 biases and norms differ and are kept whole.",
    ]
    assert describe(Extraction(**facts | {"modules": 2, "ranks": (4, 4), "other": ("a", "b")})).split("\n") == [
        "Extracted 2 modules, rank 4.",
        "Relative error 0.5: 75.00 % of the difference's energy is kept, the most that these ranks can hold.",
        "3 weights do not differ and are left out.",
        "Left out, since only weights and biases under the names of LoRA files are extracted: 2 parameters (a, ...).",
    ]
    assert "rank 1 to 4." in describe(Extraction(**facts | {"modules": 2, "ranks": (1, 4)}))


def numbered(count, *, aside=()):
    return {f"{UNET}middle_block.{n}.proj_in.weight": weight(3, 2, seed=n) for n in range(count)} | dict.fromkeys(
        aside, torch.ones(2, 2)
    )


def test_nine_keys_of_ten_are_one_family_and_fewer_are_not(tmp_path):
    """What the model is told its guidance by counts for nothing. Text encoders' keys that one file lacks come last."""
    encoder = "cond_stage_model.transformer.text_model.x.weight"
    both = files(tmp_path, tuned=numbered(10, aside=[f"{UNET}time_embed.cond_proj.weight", encoder]), base=numbered(9))
    found = pairs(*both)
    assert len(found) == 9
    assert found.only_one == [f"{UNET}middle_block.9.proj_in.weight", f"{UNET}time_embed.cond_proj.weight", encoder]
    with pytest.raises(ValueError, match=r"only 8 of 9 weights have the same name \(first other: \S+middle_block\.8\."):
        pairs(*files(tmp_path, tuned=numbered(9), base=numbered(8)))


def encoder(count, first=0):
    prefix = "cond_stage_model.transformer.text_model.encoder.layers."
    return {f"{prefix}{first + n}.mlp.fc1.weight": weight(3, 2, seed=n) for n in range(count)}


@pytest.mark.parametrize("order", [1, -1])
def test_text_encoders_count_where_both_files_have_them(order, tmp_path):
    words = files(tmp_path, one=numbered(9) | encoder(5), other=numbered(9) | encoder(5, first=5), bare=numbered(9))
    with pytest.raises(ValueError, match="only 9 of 19 weights have the same name"):
        pairs(*words[:2][::order])
    assert len(pairs(*words[1:][::order])) == 9
    alone = files(tmp_path, one=encoder(3), other=encoder(3, first=1))[::order]
    with pytest.raises(ValueError, match="only 2 of 4 weights have the same name"):
        pairs(*alone)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("encoders", [0, 3])
def test_a_unet_in_diffusers_names_meets_one_in_ldms(order, encoders, tmp_path):
    theirs = {"input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1", "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
              "input_blocks.0.0": "conv_in"}  # fmt: skip
    beside = encoder(encoders)
    ldm = {f"{UNET}{own}.weight": weight(6, 4, seed=n) for n, own in enumerate(theirs)} | beside
    diffusers = {f"{other}.weight": weight(6, 4, seed=9 + n) for n, other in enumerate(theirs.values())} | beside
    found = pairs(*files(tmp_path, ldm=ldm, diffusers=diffusers)[::order])
    assert (len(found), found.only_one) == (3 + encoders, [])
    lora, account = extract(found, rank=4)
    assert account.equal == encoders
    for n, own in enumerate(theirs):
        wanted = order * (weight(6, 4, seed=n).double() - weight(6, 4, seed=9 + n).double())
        assert relative(lora.delta(f"lora_unet_{own.replace('.', '_')}"), wanted) < 1e-5


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("layout", ["SD", "Flux"])
def test_what_one_file_lacks_is_named_as_a_whole_checkpoint_names_it(order, layout, tmp_path):
    """In its own words, also where those have others for it."""
    of_unet = [f"input_blocks.{n}.0.in_layers.2" for n in (1, 2, 4, 5, 7, 8)] + [
        f"output_blocks.{n}.0.in_layers.2" for n in range(9)
    ]
    *names, lacking = {
        "SD": [*of_unet, "middle_block.0.in_layers.2"],
        "Flux": [f"double_blocks.{n}.img_attn.proj" for n in range(16)],
    }[layout]
    whole = {f"{UNET}{name}.weight": torch.ones(3, 2) for name in names}
    bare = {f"{name}.weight": torch.ones(3, 2) for name in (*names, lacking)}
    found = pairs(*files(tmp_path, whole=whole, bare=bare)[::order])
    assert (len(found), found.only_one) == (15, [f"{UNET}{lacking}.weight"])


def test_weights_that_differ_are_named_with_the_first_of_them(tmp_path):
    tuned, base = numbered(4), numbered(4)
    for n, shape in ((2, (4, 3)), (3, (5, 3))):
        tuned[f"{UNET}middle_block.{n}.proj_in.weight"] = torch.ones(shape)
    with pytest.raises(
        ValueError, match=r"2 weights differ in shape \(first: \S+block\.2\.proj_in\.weight, \(4, 3\) and \(3, 2\)\)"
    ):
        pairs(*files(tmp_path, tuned=tuned, base=base))
    tuned = numbered(4)
    for n in (1, 3):
        tuned[f"{UNET}middle_block.{n}.proj_in.weight"] = torch.ones(3, 2, dtype=torch.int8)
    for models in ({"tuned": tuned, "base": base}, {"base": base, "tuned": tuned}):
        with pytest.raises(ValueError, match=r"2 of 4 weights are 8-bit integers in one .*\(first: \S+block\.1\."):
            pairs(*files(tmp_path, **models))


def test_the_thirds_of_a_fused_weight_and_bias_are_read_and_a_single_number_is_named(tmp_path):
    prefix = "cond_stage_model.model.transformer.resblocks."
    tuned = numbered(1) | {
        f"{prefix}0.attn.in_proj_weight": weight(12, 4, seed=5),
        f"{prefix}0.attn.in_proj_bias": weight(12, seed=6),
        f"{prefix}1.attn.in_proj_weight": torch.tensor(2.0),
        "levels": torch.ones(3, dtype=torch.uint8),
    }
    base = {key: torch.zeros_like(tensor) for key, tensor in tuned.items()}
    lora, account = extract(pairs(*files(tmp_path, tuned=tuned, base=base)), rank=4)
    for n, letter in enumerate("qkv"):
        module = f"lora_te1_text_model_encoder_layers_0_self_attn_{letter}_proj"
        rows = slice(4 * n, 4 * n + 4)
        assert relative(lora.delta(module), tuned[f"{prefix}0.attn.in_proj_weight"][rows]) < 1e-5
        assert torch.equal(lora.diffs[module, "diff_b"], tuned[f"{prefix}0.attn.in_proj_bias"][rows])
    assert [name.rpartition("layers_1_self_attn_")[2] for name in account.other][:3] == [
        f"{letter}_proj.weight" for letter in "qkv"
    ]
    assert len(account.other) == 4


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("layout", ["SD", "Flux", "LTX"])
def test_a_whole_checkpoint_meets_the_bare_diffusion_model(prefix, order, layout, tmp_path, capsys):
    if layout == "SD":
        whole, bare = checkpoint(seed=1), checkpoint(seed=7)
        module, key = LINEAR, "middle_block.1.proj_in.weight"
    else:
        key = {"Flux": "double_blocks.0.img_attn.proj.weight", "LTX": "transformer_blocks.0.attn1.to_q.weight"}[layout]
        whole, bare = ({f"{UNET}{key}": weight(12, 10, seed=seed)} for seed in (1, 7))
        whole |= {f"text_encoders.t5xxl.transformer.block.{n}.weight": torch.ones(2, 2) for n in range(30)}
        module = f"diffusion_model.{key.removesuffix('.weight')}"
    # The text encoders' keys, more than there are of the model, count for nothing: one file has none.
    whole |= {f"conditioner.embedders.0.x.{n}.weight": torch.ones(2, 2) for n in range(30)}
    bare = {prefix + name.removeprefix(UNET): tensor for name, tensor in bare.items() if name.startswith(UNET)}
    words = files(tmp_path, whole=whole, bare=bare)[::order]
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors"), "--rank", "64", "--dtype", "fp32"]) == 0
    assert "weights are in one file only" in capsys.readouterr().out
    lora = load(tmp_path / "out.safetensors")
    assert relative(lora.delta(module), order * (whole[UNET + key].double() - bare[prefix + key].double())) < 1e-5


GUIDANCE = [
    "time_embed.cond_proj.weight",
    "guidance_in.in_layer.weight",
    "time_text_embed.guidance_embedder.linear_1.bias",
]


@pytest.mark.parametrize("key", GUIDANCE)
@pytest.mark.parametrize("order", [1, -1])
def test_what_tells_a_model_its_guidance_is_left_out_by_name(key, order, tmp_path, capsys):
    """As in full LCMs and in Flux dev beside schnell; of so few weights a tenth is less than one."""
    told = checkpoint(seed=1) | {f"{UNET}{key}": torch.ones(4, 4)}
    words = files(tmp_path, told=told, base=checkpoint(seed=7))[::order]
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors"), "--rank", "64", "--dtype", "fp32"]) == 0
    assert f"Among these is {UNET}{key}, by which a model is told its guidance" in capsys.readouterr().out
    module = "model.diffusion_model.middle_block.1.proj_in.weight"
    wanted = order * (told[module].double() - checkpoint(seed=7)[module].double())
    assert relative(load(tmp_path / "out.safetensors").delta(LINEAR), wanted) < 1e-5


SCALES = {
    "comfy_quant": {"comfy_quant": torch.zeros(30, dtype=torch.uint8), "weight_scale": torch.ones(())},
    "scaled fp8": {"scale_weight": torch.ones(()), "scale_input": torch.ones(())},
    "bitsandbytes": {"weight.absmax": torch.ones(3), "weight.quant_map": torch.ones(16), "weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
    "8 bits of bitsandbytes": {"SCB": torch.ones(10)},
    "GPTQ": {"qweight": torch.ones(2, 2, dtype=torch.int32), "qzeros": torch.ones(2, dtype=torch.int32), "scales": torch.ones(2)},
    "Nunchaku": {"wscales": torch.ones(2, 2)},
    "packed": {"weight": torch.zeros(10, 6, dtype=torch.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("which", ["tuned", "base", "both"])
def test_quantised_checkpoints_are_refused_in_a_sentence_with_counts(kind, which, tmp_path, capsys):
    more = {
        f"{UNET}{module}.{end}": part
        for module in ("middle_block.1.proj_in", "out.2")
        for end, part in SCALES[kind].items()
    }
    models = {name: checkpoint() | (more if which in (name, "both") else {}) for name in ("tuned", "base")}
    words = files(tmp_path, **models)
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"its weights are quantised \(.*\b2 \w+.* among \d+ tensors, first: .*\)\. Give the original, or use", said
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_a_note_of_quantisation_in_the_header_is_enough(tmp_path, capsys):
    words = files(tmp_path, base=checkpoint())
    save_file(checkpoint(), tmp_path / "tuned.safetensors", {"_quantization_metadata": "{}"})
    assert main(["extract", str(tmp_path / "tuned.safetensors"), *words, "-o", str(tmp_path / "out.safetensors")]) == 2
    assert "its weights are quantised (_quantization_metadata among 5 tensors)" in capsys.readouterr().err


def test_integers_in_one_file_only_have_no_meaning(tmp_path, capsys):
    words = files(tmp_path, tuned=as_dtype(checkpoint(1), torch.int8), base=checkpoint())
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors")]) == 2
    assert "5 of 5 weights are 8-bit integers in one of them only, without a scale" in capsys.readouterr().err


def test_other_formats_are_not_opened(tmp_path, capsys):
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    words = [str(tmp_path / "model.ckpt")] * 2
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors")]) == 2
    assert "only .safetensors files are read" in capsys.readouterr().err
