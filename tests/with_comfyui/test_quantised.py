"""Models in ComfyUI's quantised formats, whose linear layers are no nn.Linear and keep scales beside their weights."""

import comfy.quant_ops
import comfy.sd
import pytest
import torch

from lcm_kit.host.training.loan import casting_again, lent
from lcm_kit.nodes.distilling import Distill
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.test_distilling import WIDGETS

CPU = torch.device("cpu")
FORMATS = tiny.quantised_formats()

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(params=FORMATS)
def quantised(request):
    model = tiny.quantised_model(request.param, tiny.small_model())
    assert any(isinstance(weight, comfy.quant_ops.QuantizedTensor) for weight in model.model.parameters())
    return model


def distilled(model, **widgets):
    inputs = {name: [value] for name, value in (WIDGETS | {"steps": 3, "dtype": "fp32"} | widgets).items()}
    return Distill.execute(
        [model], [tiny.cond(1)], [tiny.cond(2)], latent=[tiny.latent(4, seed=1)], **inputs
    ).result  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distill_trains_a_quantised_model_as_the_model_its_weights_stand_for(quantised, checkpointing):
    plain = tiny.dequantised(quantised)
    expected, _, _ = distilled(plain, gradient_checkpointing=checkpointing)
    before = {key: value.clone() for key, value in quantised.model.state_dict().items()}
    actual, _, report = distilled(quantised, gradient_checkpointing=checkpointing)
    assert actual.keys() == expected.keys()
    assert f"LCM-LoRA with {len(actual) // 3} modules" in report
    ups = [key for key in expected if "lora_up" in key]
    assert all(actual[key].any() for key in ups)
    one, other = (torch.cat([lora[key].flatten() for key in ups]) for lora in (actual, expected))
    # Adam's first steps are the gradients' signs, of which rounding turns the smallest. int8 layers round their inputs.
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9
    after = quantised.model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key].float(), value.float()), key
    # Core loads what came out on the quantised model, every key of it.
    loaded, _ = comfy.sd.load_lora_for_models(quantised, None, dict(actual), 1.0, 0)
    assert len(loaded.patches) == len(actual) // 3


def test_weights_that_are_dequantised_in_every_call_are_not_kept(quantised):
    """The same gradient, from weights that the backward pass makes anew: here those that are cast to bf16 as well."""
    dtype = torch.bfloat16
    with torch.inference_mode(False), torch.enable_grad(), lent(quantised, dtype) as patcher:
        network = patcher.model.diffusion_model
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        context = tiny.cond(1)[0][0].to(dtype)
        gradients, kept = [], []
        for active in (False, True):
            y = x.clone().requires_grad_()
            sizes = {}

            def pack(tensor, sizes=sizes):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with casting_again(network, active):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    output = network(y, torch.tensor([500.0]), context=context)
                output.square().mean().backward()
            gradients.append(y.grad)
            kept.append(sum(sizes.values()))
        assert gradients[0].any()
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert kept[1] < kept[0]
