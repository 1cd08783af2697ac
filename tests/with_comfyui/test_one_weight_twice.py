"""Two LoRAs of one model in two spellings, over every name that ComfyUI knows: both are applied, or the merge is refused."""

import re
from itertools import combinations, permutations

import comfy.lora
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.flux
import comfy.text_encoders.hydit
import comfy.text_encoders.sd3_clip
import pytest
import torch

from lcm_kit.host.lora import fit as fitting
from lcm_kit.host.lora import patches
from lcm_kit.lora_merge import Lora, merge
from lcm_kit.lora_merge.comparing.compare import compare
from lcm_kit.lora_merge.files.twice import Named, twice
from lcm_kit.lora_merge.naming import names
from lcm_kit.lora_merge.naming.unet import infer_layout
from lcm_kit.nodes.merging import MergeLoRA
from lcm_kit.tests.with_comfyui import bases, dits, tiny

PREFIX = re.compile(
    r"lora_unet_|lycoris_|lora_transformer_|lora_prior_unet_|transformer\.|unet\.base_model\.model\.|base_model\.model\."
    r"|diffusion_model\.|"
)


def lora(spelled, shape, seed=0):
    """Keys of a LoRA of one module."""
    g = torch.Generator().manual_seed(seed)
    if len(shape) < 2:
        return {f"{spelled}.diff": torch.randn(shape, generator=g)}
    up, down = torch.randn(shape[0], 2, generator=g), torch.randn(2, *shape[1:], generator=g)
    return {
        f"{spelled}.lora_up.weight": up.reshape(*up.shape, *(1 for _ in shape[2:])),
        f"{spelled}.lora_down.weight": down,
    }


def delta(state, shape):
    """The update that the keys of one module make."""
    if len(shape) < 2:
        return next(iter(state.values()))
    up, down = state.values()
    return (up.flatten(1) @ down.flatten(1)).reshape(shape)


def by_weight(homes, shape_of):
    """(weight, part) -> ComfyUI's names for it."""
    found = {}
    for spelled, home in homes.items():
        if shape_of(spelled) is not None:
            found.setdefault(dits.target_of(home), []).append(spelled)
    return found


def naming(spelled, home):
    """The prefix of a name, and whether what follows is the model's own naming."""
    prefix = PREFIX.match(spelled)[0]
    body = dits.target_of(home)[0].removeprefix("diffusion_model.").removesuffix(".weight")
    return prefix, spelled.removeprefix(prefix).replace(".", "_") == body.replace(".", "_")


def by_core(state, homes, weights):
    """Weight -> what ComfyUI adds to it."""
    found = {}
    for target, patch in comfy.lora.load_lora(dict(state), dict(homes), log_missing=False).items():
        weight, part = dits.target_of(target)
        turn = target[2] if isinstance(target, tuple) and len(target) > 2 else None
        found.setdefault(weight, []).append((1.0, patch, 1.0, part, turn))
    return {key: comfy.lora.calculate_weight(these, torch.zeros(weights[key]), key) for key, these in found.items()}


@pytest.mark.parametrize("name", dits.KNOWN)
def test_every_pair_of_names_of_a_weight_meets_or_is_refused(name):
    """Of one block of each kind: another one's names are these with another number. Names that meet are one name, and so
    do all of them if each meets the next: those are merged, each once as the first and once as the second.
    """
    homes = dits.homes(name)
    groups = by_weight(homes, lambda spelled: dits.shape_at(name, spelled))
    assert sum(map(len, groups.values())) > 50
    for target, spellings in one_of_a_kind(groups).items():
        shape = dits.shape_at(name, spellings[0])
        one = [pair for pair in combinations(spellings, 2) if outcome(*pair, shape) == "one"]
        meet = {pair for first, second in one for pair in ((first, second), (second, first))}
        for first in spellings:
            second = next((s for s in around(spellings, first) if (first, s) in meet), None)
            if second is not None:
                merged = merge([(Lora.from_state_dict(lora(s, shape)), 1.0) for s in (first, second)])
                known = {names_of(key) for key in merged.to_state_dict()}
                assert [dits.target_of(homes[known.pop()])] == [target], (first, second)


def one_of_a_kind(groups):
    """The groups of the first block of each kind, for each set of names that its blocks' weights have."""
    found = {}
    for target, spellings in groups.items():
        kind = tuple(re.sub(r"(?<=[._])\d+(?=[._])", "#", spelled) for spelled in spellings)
        found.setdefault((kind, target[1]), (target, spellings))
    return dict(found.values())


def around(spellings, first):
    """The others, from the one behind it on."""
    place = spellings.index(first)
    return [*spellings[place + 1 :], *spellings[:place]]


def names_of(key):
    return re.sub(r"\.(?:lora_(?:up|down)\.weight|alpha|diff|w_norm)$", "", key)


def outcome(first, second, shape, layout=None):
    """ "one" if the two names meet, "refused" if a merge refuses them; anything else is a failure."""
    pair = [names.kohya_name(first), names.kohya_name(second)]
    layout = layout or infer_layout(names.unet_bodies(pair))
    canonical = [names.canonical(spelled, layout) for spelled in pair]
    if canonical[0] == canonical[1]:
        return "one"
    found = twice([Named(n, canonical[n], pair[n], False, tuple(shape)) for n in (0, 1)])
    assert len(found) == 1, f"{first} and {second} are one weight, and nobody notices"
    return "refused"


@pytest.mark.parametrize("base", ["SD1.5", "SDXL", "SSD-1B"])
def test_every_pair_of_names_of_a_unet_meets(base):
    model = bases.model(base).model
    homes, weights = comfy.lora.model_lora_keys_unet(model, {}), model.state_dict()
    groups = by_weight(homes, lambda spelled: weights.get(dits.target_of(homes[spelled])[0]))
    groups = {target: [s for s in found if not s.endswith(".bias")] for target, found in groups.items()}
    layout = infer_layout(names.unet_bodies([names.kohya_name(s) for found in groups.values() for s in found]))
    for (weight, _), spellings in groups.items():
        for first, second in combinations(spellings, 2):
            assert outcome(first, second, weights[weight].shape, layout) == "one"


TEXT_ENCODERS = {
    "SD1.5": lambda **o: comfy.sd1_clip.SD1ClipModel(**o),
    "SDXL": lambda **o: comfy.sdxl_clip.SDXLClipModel(**o),
    "SDXL Refiner": lambda **o: comfy.sdxl_clip.SDXLRefinerClipModel(**o),
    "Flux": lambda **o: comfy.text_encoders.flux.FluxClipModel(**o),
    "SD3": lambda **o: comfy.text_encoders.sd3_clip.SD3ClipModel(clip_l=True, clip_g=True, t5=True, **o),
    "HunyuanDiT": lambda **o: comfy.text_encoders.hydit.HyditModel(**o),
}


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_every_pair_of_names_of_a_text_encoder_meets_or_is_refused(name):
    clip = TEXT_ENCODERS[name](device="meta", dtype=torch.float16)
    homes, weights = comfy.lora.model_lora_keys_clip(clip, {}), clip.state_dict()
    groups = by_weight(homes, lambda spelled: weights.get(dits.target_of(homes[spelled])[0]))
    several = 0
    for (weight, _), spellings in groups.items():
        for first, second in combinations(spellings, 2):
            outcome(first, second, weights[weight].shape)
            several += 1
    assert several > 100
    spelled = {
        names.kohya_name(s): weights[dits.target_of(homes[s])[0]].shape for s in homes if s.startswith("lora_te")
    }
    assert twice_of(spelled) == [] or name == "Flux"  # whose T5 ComfyUI calls te2 and te3


@pytest.mark.parametrize("name", ["Flux", "SD3", "HunyuanDiT"])
def test_names_of_an_encoder_that_is_no_clip_are_merged_into_one_that_comfyui_reads(name):
    clip = TEXT_ENCODERS[name](device="meta", dtype=torch.float16)
    homes, weights = comfy.lora.model_lora_keys_clip(clip, {}), clip.state_dict()
    groups = by_weight(homes, lambda spelled: weights.get(dits.target_of(homes[spelled])[0]))
    several = {w: those for (w, _), those in groups.items() if len(those) > 1 and not w.startswith("clip_")}
    tried = [w for w in several if weights[w].ndim == 2 and weights[w].numel() < 20_000_000][:3]
    assert tried
    for weight in tried:
        for first, second in permutations(several[weight], 2):
            states = [lora(s, tuple(weights[weight].shape), n) for n, s in enumerate((first, second))]
            try:
                merged = merge([(Lora.from_state_dict(state), 1.0) for state in states])
            except ValueError:
                assert {"lora_te2_", "lora_te3_"} == {first[:9], second[:9]}  # one number of Flux' T5 and another
                continue
            (module,) = {names_of(key) for key in merged.to_state_dict()}
            assert homes[module] == weight
            # The update on a few vectors: at the encoder's width a whole one has millions of numbers.
            x = torch.randn(weights[weight].shape[1], 4, generator=torch.Generator().manual_seed(9))
            found, wanted = on(merged.to_state_dict(), x), sum(on(state, x) for state in states)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)


def on(state, x):
    """What the keys of one module make of inputs x, a column each."""
    parts = {re.sub(r".*\.(lora_up|lora_down|alpha)(?:\.weight)?$", r"\1", key): value for key, value in state.items()}
    scale = float(parts["alpha"]) / len(parts["lora_down"]) if "alpha" in parts else 1.0
    return scale * (parts["lora_up"] @ (parts["lora_down"] @ x))


def twice_of(spelled):
    layout = infer_layout([])
    return twice([Named(0, names.canonical(s, layout), s, False, tuple(shape)) for s, shape in spelled.items()])


@pytest.mark.parametrize("name", dits.KNOWN)
def test_one_naming_never_names_a_weight_twice(name):
    """So that a file in it can be read: whatever it holds, in ComfyUI's own names or in diffusers'."""
    homes = dits.homes(name)
    groups = {}
    for spelled, home in homes.items():
        if (shape := dits.shape_at(name, spelled)) is not None:
            # One weight has two names in one naming where versions differ; a file has one of them.
            groups.setdefault(naming(spelled, home), {}).setdefault(
                dits.target_of(home), (names.kohya_name(spelled), shape)
            )
    for found in groups.values():
        assert twice_of(dict(found.values())) == []


def matrices(name):
    """Naming -> weight -> its name, of all matrices in numbered blocks."""
    groups = {}
    for spelled, home in dits.homes(name).items():
        shape = dits.shape_at(name, spelled)
        if shape is not None and len(shape) > 1 and re.search(r"\.\d+\.", dits.target_of(home)[0]):
            groups.setdefault(naming(spelled, home), {}).setdefault(dits.target_of(home), spelled)
    return list(groups.values())


SHARES = {
    "odd blocks": (
        [name for name in dits.KNOWN if name != "ACE-Step"],
        lambda weight: int(re.search(r"\.(\d+)\.", weight)[1]) % 2 == 1,
    ),
    "attention": (
        ["Flux", "Qwen-Image", "SD3", "Z-Image", "AuraFlow", "PixArt", "HiDream"],
        lambda weight: "att" in weight,
    ),
}


@pytest.mark.parametrize(("share", "name"), [(share, name) for share, (known, _) in SHARES.items() for name in known])
def test_loras_of_two_namings_for_different_weights_are_merged(share, name):
    """Some weights in one naming, the rest in another: nothing of it can be one weight, and all of it arrives."""
    homes, weights = dits.homes(name), dits.shapes(name)
    pairs, turn = list(combinations(matrices(name), 2)), dits.KNOWN.index(name)
    for first, second in (pair for place, pair in enumerate(pairs) if (place + turn) % 2 == 0 or len(pairs) < 6):
        states = [
            {k: v for target, s in found.items() if SHARES[share][1](target[0]) is wanted
             for k, v in lora(s, dits.shape_at(name, s), int(wanted)).items()}
            for wanted, found in ((True, first), (False, second))
        ]  # fmt: skip
        if not all(states):
            continue
        merged = merge([(Lora.from_state_dict(state), 1.0) for state in states])
        ours, separate = by_core(merged.to_state_dict(), homes, weights), [by_core(s, homes, weights) for s in states]
        assert ours.keys() == separate[0].keys() | separate[1].keys()
        for key, value in ours.items():
            wanted = sum(one[key] for one in separate if key in one)
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


SLICES = [
    ("Flux", "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_k"),
    ("Flux", "diffusion_model.single_blocks.1.linear1", "transformer.single_transformer_blocks.1.proj_mlp"),
    ("Flux", "diffusion_model.single_blocks.1.linear1_qkv", "transformer.single_transformer_blocks.1.attn.to_v"),
    ("SD3", "lora_unet_joint_blocks_0_x_block_attn_qkv", "transformer.transformer_blocks.0.attn.to_q"),
    ("Z-Image", "diffusion_model.layers.0.attention.qkv", "diffusion_model.layers.0.attention.to_q"),
    ("PixArt", "lora_unet_blocks_0_cross_attn_kv_linear", "base_model.model.transformer_blocks.0.attn2.to_v"),
]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("name", "fused", "part"), SLICES)
def test_a_fused_weight_and_a_slice_of_it_are_both_applied(name, fused, part, order):
    homes, weights = dits.homes(name), dits.shapes(name)
    states = [lora(spelled, dits.shape_at(name, spelled), seed) for seed, spelled in enumerate((fused, part))]
    merged = merge([(Lora.from_state_dict(state), 1.0) for state in states[::order]])
    ours, separate = by_core(merged.to_state_dict(), homes, weights), [by_core(s, homes, weights) for s in states]
    assert list(ours) == [dits.target_of(homes[fused])[0]]
    for key, value in ours.items():
        torch.testing.assert_close(value, separate[0][key] + separate[1][key], rtol=1e-5, atol=1e-5)


# What public LoRAs are spelled like, of one module that is called so in several families.
PUBLIC = [
    ("LTX-Video", "transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_q"),
    ("Flux", "lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"),
]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("name", "first", "second"), PUBLIC)
def test_what_would_lose_one_of_two_loras_is_refused_with_both_names(name, first, second, swap):
    pair = (second, first) if swap else (first, second)
    shape = next(filter(None, (dits.shape_at(name, s) for s in pair if s in dits.homes(name))), (16, 16))
    loras = [Lora.from_state_dict(lora(s, shape, n), source=f"{n}.safetensors") for n, s in enumerate(pair)]
    for work in (merge, compare):
        with pytest.raises(ValueError, match="two spellings of one weight") as refused:
            work([(one, 1.0) for one in loras])
        for number, spelled in enumerate(pair):
            assert f"{spelled} ({number}.safetensors)" in str(refused.value)
    slots = {f"strength_{n}": 1.0 for n in range(1, 5)} | {
        "lora_1": lora(pair[0], shape),
        "lora_2": lora(pair[1], shape),
    }
    with pytest.raises(ValueError, match=r"\(lora_1\) and .*\(lora_2\).* two spellings of one weight"):
        MergeLoRA.execute(method="linear", size="exact", **slots)
    with pytest.raises(ValueError, match="two spellings of one weight"):
        Lora.from_state_dict(lora(pair[0], shape) | lora(pair[1], shape))


def test_apply_names_both_spellings_and_blames_no_other_model():
    """A LORA_MODEL as another node may make it."""
    model = tiny.tiny_model()
    pair = "diffusion_model.input_blocks.1.1.proj_in", "lora_unet_input_blocks_1_1_proj_in"
    both = lora(pair[0], (32, 32)) | lora(pair[1], (32, 32), 1)
    found = fitting.fit(both, model)
    assert (found.twice, found.placed, found.clashing) == ((pair,), pair[:1], ())
    with pytest.raises(ValueError, match=f"names a weight twice: {pair[0]} and {pair[1]};") as refused:
        patches.apply(model, None, both, 1.0, 1.0)
    assert "another base model" not in str(refused.value)
    report = patches.apply(model, None, both, 1.0, 1.0, allow_misfit=True).report
    assert f"1 pair names one weight twice, and one of the two is left out: {' and '.join(pair)}." in report
