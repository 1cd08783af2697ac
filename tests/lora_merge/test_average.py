"""The mean of several LoRAs, such as the checkpoints of one training: of their updates, not of their factors."""

import pytest
import torch
from safetensors.torch import save_file

from lcm_kit.lora_merge import Lora, load, merge, merge_with_account
from lcm_kit.lora_merge.__main__ import main
from lcm_kit.lora_merge.merging.report import describe_merge
from lcm_kit.tests.lora_merge.make import factors, kohya

MODULES = {"lora_unet_down_blocks_1_attentions_0_proj_in": (12, 10, ()), "lora_unet_conv_in": (8, 6, (3, 3))}
RANK = 3


def checkpoint(seed, alpha=2.0):
    state = {}
    for number, (module, (out, into, kernel)) in enumerate(MODULES.items()):
        state |= kohya(module, *factors(out, RANK, into, kernel, seed=10 * seed + number), alpha)
    return state


STATES = [checkpoint(seed) for seed in range(5)]
LORAS = [Lora.from_state_dict(state, source=f"run-{number}") for number, state in enumerate(STATES)]


def update(state, module):
    """float64, (out, in * kernel), from the tensors alone."""
    up, down = (state[f"{module}.lora_{end}.weight"].double().flatten(1) for end in ("up", "down"))
    return float(state[f"{module}.alpha"]) / RANK * up @ down


def mean(weights, module):
    return sum(w * update(state, module) for w, state in zip(weights, STATES, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    "weights", [(1, 1, 1, 1, 1), (1, 2, 3, 4, 5), (0, 0, 1, 1, 0), (0.9**4, 0.9**3, 0.9**2, 0.9, 1)]
)
def test_an_average_is_the_mean_of_the_updates(weights):
    """Weighted, too: with the last weights it is the exponential moving average of the checkpoints."""
    merged = merge(list(zip(LORAS, weights, strict=True)), method="average")
    for module in MODULES:
        wanted = mean(weights, module)
        assert float((merged.delta(module).double().flatten(1) - wanted).norm() / wanted.norm()) < 1e-6


def test_it_is_not_the_product_of_averaged_factors():
    merged = merge([(lora, 1.0) for lora in LORAS], method="average")
    for module in MODULES:
        up, down = (
            sum(state[f"{module}.lora_{end}.weight"].flatten(1) for state in STATES) / len(STATES)
            for end in ("up", "down")
        )
        of_factors, ours = 2.0 / RANK * up @ down, merged.delta(module).flatten(1)
        assert float((ours - of_factors).norm() / ours.norm()) > 0.5


def test_only_the_ratio_of_the_weights_counts():
    one, ten = (merge([(lora, weight) for lora in LORAS], method="average").to_state_dict() for weight in (1.0, 10.0))
    assert all(torch.equal(one[key], ten[key]) for key in one)


def test_cut_to_the_rank_of_one_checkpoint_it_is_the_best_that_this_rank_holds():
    merged = merge([(lora, 1.0) for lora in LORAS], method="average", rank=RANK)
    for module in MODULES:
        wanted = mean([1] * 5, module)
        lost = torch.linalg.svdvals(wanted)[RANK:].norm()
        error = (merged.delta(module).double().flatten(1) - wanted).norm()
        assert float(error) == pytest.approx(float(lost), rel=1e-4)
        assert merged.modules[merged.find(module)].rank == RANK


def test_a_module_that_some_of_them_lack_counts_as_unchanged_there():
    missing, module = next(iter(MODULES)), next(iter(MODULES))
    fewer = {key: value for key, value in STATES[1].items() if not key.startswith(missing)}
    merged = merge([(LORAS[0], 1.0), (Lora.from_state_dict(fewer), 1.0)], method="average")
    torch.testing.assert_close(merged.delta(module).double().flatten(1), update(STATES[0], module) / 2)


def test_block_strengths_are_factors_on_the_mean():
    merged = merge([(lora, 1.0) for lora in LORAS], method="average", block_strengths="conv=0.5")
    for module, factor in zip(MODULES, (1.0, 0.5), strict=True):
        wanted = factor * mean([1] * 5, module)
        torch.testing.assert_close(merged.delta(module).double().flatten(1), wanted, rtol=1e-4, atol=1e-5)


def test_one_lora_is_its_own_mean_and_the_report_says_what_the_strengths_are():
    merged, account = merge_with_account([(LORAS[0], 0.3)], method="average")
    for module in MODULES:
        torch.testing.assert_close(merged.delta(module), LORAS[0].delta(module))
    _, account = merge_with_account([(LORAS[0], 1.0), (LORAS[1], 2.0)], method="average")
    text = describe_merge(account, merged)
    assert "each strength is a weight, divided by their sum, 3." in text
    assert "Exact: no module was cut." in text


def test_weights_that_make_no_mean_are_refused():
    with pytest.raises(ValueError, match="run-1: strength is -1, but in an average it is a weight"):
        merge([(LORAS[0], 2.0), (LORAS[1], -1.0)], method="average")
    with pytest.raises(ValueError, match="all strengths are 0"):
        merge([(LORAS[0], 0.0), (LORAS[1], 0.0)], method="average")


def test_the_command_takes_all_checkpoints_of_a_pattern_and_its_file_can_be_made_again(tmp_path, capsys):
    for number, state in enumerate(STATES):
        save_file(state, tmp_path / f"run-{number:06}.safetensors")
    save_file(STATES[0], tmp_path / "other.safetensors")
    command = [
        "merge",
        str(tmp_path / "run-*.safetensors"),
        "-o",
        str(tmp_path / "mean.safetensors"),
        "--dtype",
        "fp32",
    ]
    assert main([*command, "--method", "average"]) == 0
    assert "Merged 5 LoRAs, method average" in capsys.readouterr().out
    made = load(tmp_path / "mean.safetensors")
    for module in MODULES:
        torch.testing.assert_close(made.delta(module).double().flatten(1), mean([1] * 5, module), rtol=1e-4, atol=1e-5)
    assert main(["reproduce", str(tmp_path / "mean.safetensors")]) == 0
    assert "is the same, bit for bit" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "none-*.safetensors"), "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "there is no file of such a name" in capsys.readouterr().err


def test_a_strength_after_a_pattern_is_that_of_all_its_files(tmp_path):
    for number, state in enumerate(STATES[:4]):
        save_file(state, tmp_path / f"{'early' if number < 2 else 'late'}-{number}.safetensors")
    out = tmp_path / "mean.safetensors"
    texts = [str(tmp_path / "early-?.safetensors"), f"{tmp_path / 'late-*.safetensors'}:3"]
    assert main(["merge", *texts, "-o", str(out), "--dtype", "fp32", "--method", "average"]) == 0
    for module in MODULES:
        wanted = sum(w * update(state, module) for w, state in zip((1, 1, 3, 3), STATES, strict=False)) / 8
        torch.testing.assert_close(load(out).delta(module).double().flatten(1), wanted, rtol=1e-4, atol=1e-5)
