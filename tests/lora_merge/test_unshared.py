"""LoHa and LoKr that one input alone changes: they stay what they are, exactly, at any strength."""

import pytest
import torch

from lcm_kit.lora_merge import Lora, LoraLayer, describe_merge, load, merge, merge_with_account, resize, save
from lcm_kit.lora_merge.one_module.unshared import smaller_whole, times, uncut
from lcm_kit.tests.lora_merge import kinds
from lcm_kit.tests.lora_merge.make import factors, generator, kohya, relative

LINEAR, CONV, ELSEWHERE = (
    "lora_unet_input_blocks_1_1_proj_in",
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_middle_block_1_proj_in",
)
CASES = [
    (kind, kernel)
    for kind, (name, needs_kernel) in kinds.ADDITIVE.items()
    if name != "LoRA"
    for kernel in ((), (3, 3))
    if kernel or not needs_kernel
]


def module_of(kernel):
    return CONV if kernel else LINEAR


def one_of(kind, kernel, alpha=None, dtype=torch.float32):
    return Lora.from_state_dict(
        kinds.state_dict(kind, module_of(kernel), kernel=kernel, alpha=alpha, dtype=dtype), source="one"
    )


def elsewhere():
    return Lora.from_state_dict(kohya(ELSEWHERE, *factors(8, 3, 12), 2.0), source="elsewhere")


@pytest.mark.parametrize(("alpha", "strength"), [(None, 1.0), (5.0, 0.5), (None, 2.0), (5.0, -0.7), (-2.0, 2.5)])
@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_it_stays_what_it_is_and_its_update_is_strength_times_what_it_was(tmp_path, kind, kernel, alpha, strength):
    module, one = module_of(kernel), one_of(kind, kernel, alpha)
    wanted = strength * kinds.dense(kinds.parts(kind, kernel=kernel), alpha)
    calls = [([(one, strength)], {}), ([(one, strength), (elsewhere(), 0.8)], {})]
    calls += [([(elsewhere(), 0.8), (one, strength)], {"method": "tsv"}), ([(one, strength)], {"rank": 8})]
    for inputs, options in calls:
        merged = merge(inputs, **options)
        assert merged.modules[module].kind == kinds.ADDITIVE[kind][0]
        if "core" not in kind or "LoHa" in kind:  # which ComfyUI cannot multiply: it is folded in
            assert merged.modules[module].parameters == one.modules[module].parameters
        assert relative(merged.delta(module).flatten(1), wanted) < 1e-6
    save(merged, tmp_path / "x.safetensors", dtype=torch.float32)
    assert relative(load(tmp_path / "x.safetensors").delta(module).flatten(1), wanted) < 1e-6


@pytest.mark.parametrize("kind", ["LoKr, both whole", "LoKr, second low-rank", "LoHa"])
def test_at_strength_one_not_a_bit_changes(kind):
    one = one_of(kind, (), 2.0, torch.float16)
    merged = merge([(one, 1.0), (elsewhere(), 0.0)], out_dtype=torch.float16)
    for name, part in one.modules[LINEAR].parts().items():
        assert torch.equal(merged.modules[LINEAR].parts()[name], part)


def test_alpha_takes_the_strength_where_it_has_an_effect():
    halved = merge([(one_of("LoHa", (), 3.0), -0.5)])
    assert halved.modules[LINEAR].alpha == -1.5
    whole = one_of("LoKr, both whole", (), 3.0)
    (layer,) = merge([(whole, -0.5)]).modules.values()
    assert layer.alpha == 3.0
    assert torch.equal(layer.w1 * layer.w2[0, 0], -0.5 * whole.modules[LINEAR].w1 * layer.w2[0, 0])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("alpha", [None, 0.75])
def test_alpha_takes_as_much_as_float32_bears_and_no_more(alpha, sign):
    """Its powers of two keep within 120 of either sign; below 2 ** 1 a number is of the power 1."""
    layer = one_of("LoHa", (), alpha).modules[LINEAR]
    size = layer.written_alpha  # 2, the rank, without alpha
    for power in (-121, -120, 119, 120):
        strength = sign * 2.0**power / size
        assert (times(layer, strength) is not None) == (-120 <= power + 1 <= 120)
    assert times(layer, 0.0).alpha == 0
    assert times(layer, 1.0) is layer


@pytest.mark.parametrize("strengths", [(0.5, 0.0), (0.0, -2.0)])
def test_what_is_not_cut_has_all_of_its_energy(strengths):
    one = one_of("LoHa", (), 3.0).modules[LINEAR]
    energies = [strength**2 * float(one.delta().double().square().sum()) for strength in strengths]
    found = uncut(one, [(one, strength) for strength in strengths])
    assert found.layer is one
    assert (found.energy, found.lost_energy) == (pytest.approx(sum(energies)), 0.0)
    assert list(found.source_energy) == list(found.kept_energy) == pytest.approx(energies)


@pytest.mark.parametrize(("first", "second"), [((8, 6), (2, 3)), ((2, 3), (8, 6))])
def test_of_two_whole_matrices_the_smaller_one_is_multiplied(first, second):
    """By the number of entries, whichever it is; the larger one keeps its values."""
    g = generator(3)
    parts = {name: torch.randn(*shape, generator=g).half() for name, shape in (("w1", first), ("w2", second))}
    one = Lora.from_state_dict({f"{LINEAR}.lokr_{name}": part for name, part in parts.items()})
    (layer,) = merge([(one, 0.3)]).modules.values()
    small, large = sorted(parts, key=lambda name: parts[name].numel())
    assert torch.equal(getattr(layer, large), parts[large].float())
    assert torch.equal(getattr(layer, small), 0.3 * parts[small].float())


@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_whole_it_is_no_larger_than_lora_whose_factors_have_as_many_numbers(kind, kernel):
    layer = one_of(kind, kernel).modules[module_of(kernel)]
    for rank in range(1, 40):
        up, down = factors(layer.shape[0], rank, layer.shape[1], kernel)
        assert smaller_whole(layer, rank) == (layer.parameters <= up.numel() + down.numel())
    assert smaller_whole(layer, 40)


@pytest.mark.parametrize("kind", ["LoKr, both whole", "LoHa"])
def test_where_another_input_changes_the_weight_they_add_up_as_lora(kind):
    one = one_of(kind, ())
    other = Lora.from_state_dict(kohya(LINEAR, *factors(8, 3, 12), 2.0), source="other")
    both = merge([(one, 0.5), (other, 1.0)])
    assert isinstance(both.modules[LINEAR], LoraLayer)
    assert relative(both.delta(LINEAR), 0.5 * one.delta(LINEAR) + other.delta(LINEAR)) < 1e-6
    # An input of strength 0 changes nothing.
    assert merge([(one, 0.5), (other, 0.0)]).kinds == one.kinds
    assert isinstance(
        merge([(one, 0.5), (other, 1.0)], block_strengths=["", "unet=0"]).modules[LINEAR], type(one.modules[LINEAR])
    )
    assert isinstance(merge([(one, 0.0), (other, 1.0)]).modules[LINEAR], LoraLayer)


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude"])
def test_a_method_that_prunes_what_is_alone_prunes_it(method):
    assert merge([(one_of("LoHa", ()), 0.5)], method=method).kinds == {"LoRA": 1}
    assert merge([(one_of("LoHa", ()), 0.5)], method=method, density=1.0).kinds == {"LoHa": 1}


def large_lokr(source="large"):
    """Matrices of rank 256, in 512 numbers each."""
    g = generator(1)
    state = {}
    for number in range(2):
        state[f"lora_unet_m{number}.lokr_w1"] = torch.randn(16, 16, generator=g)
        state[f"lora_unet_m{number}.lokr_w2"] = torch.randn(16, 16, generator=g)
    return Lora.from_state_dict(state, source=source)


def test_the_report_says_what_stays_and_what_it_would_be_otherwise():
    merged, account = merge_with_account([(large_lokr(), 0.5), (elsewhere(), 1.0)])
    text = describe_merge(account, merged)
    assert "Result: 3 modules (LoKr 2, LoRA 1), rank 3, 0.0 MB in float16" in text
    # 2 * 256 * (256 + 256) numbers of two bytes
    assert "2 modules that no other input changes stay LoKr: 0.0 MB in float16, as LoRA 0.5 MB." in text
    assert "Exact" in text


@pytest.mark.parametrize("aim", [{"keep": 0.99}, {"retain": 0.9}, {"max_mb": 0.02}, {"rank": 256}])
def test_a_cut_leaves_alone_what_would_not_become_smaller(aim):
    large = large_lokr()
    small, account = merge_with_account([(large, 0.5), (elsewhere(), 1.0)], **aim)
    assert small.kinds == {"LoKr": 2, "LoRA": 1}
    assert account.sources[0].retention == pytest.approx(1)
    for module in large.modules:
        assert relative(small.delta(module), 0.5 * large.delta(module)) < 1e-6
    assert resize(large, **aim).parameters == large.parameters


def test_a_rank_is_a_rank():
    cut, account = merge_with_account([(large_lokr(), 0.5)], rank=4)
    assert {(layer.kind, layer.rank) for layer in cut.modules.values()} == {("LoRA", 4)}
    assert account.sources[0].retention < 0.5


def test_a_file_stays_within_its_size(tmp_path):
    """LoHa of one rank takes twice the room of LoRA of one rank."""
    g = generator(2)
    parts = {"hada_w1_a": (400, 1), "hada_w1_b": (1, 400), "hada_w2_a": (400, 1), "hada_w2_b": (1, 400)}
    loha = {
        f"lora_unet_m{n}.{name}": torch.randn(*shape, generator=g) for n in range(20) for name, shape in parts.items()
    }
    lokr = {key.replace("unet_m", "unet_k"): part for key, part in large_lokr().to_state_dict().items()}
    large = Lora.from_state_dict(loha | lokr)
    for megabytes in (0.05, 0.06, 0.1, 0.2):
        small = merge([(large, 1.0)], max_mb=megabytes, out_dtype=torch.float16)
        save(small, tmp_path / "x.safetensors", overwrite=True)
        assert (tmp_path / "x.safetensors").stat().st_size <= 1e6 * megabytes


@pytest.mark.parametrize("kind", ["LoKr, both whole", "LoKr, both low-rank", "LoHa", "LoHa of two ranks"])
def test_diffusers_format_has_it_as_lora(tmp_path, kind):
    one = one_of(kind, (), 2.0)
    merged = merge([(one, 0.5)])
    save(merged, tmp_path / "x.safetensors", dtype=torch.float32, format="diffusers")
    again = load(tmp_path / "x.safetensors")
    assert again.kinds == {"LoRA": 1}
    assert relative(again.delta(LINEAR), merged.delta(LINEAR)) < 1e-6


def test_a_strength_that_no_alpha_can_hold_makes_lora():
    one = one_of("LoHa", (), 1e30)
    tiny = merge([(one, 1e-30)])
    assert tiny.kinds == {"LoHa": 1}
    with pytest.raises(ValueError, match="float32 ends at"):
        merge([(one, 1e20)])
