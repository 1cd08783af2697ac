"""A MODEL lent to training: loaded by ComfyUI's memory management, its weights fit for gradients, then given back."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sampler_helpers
import torch
from comfy.quant_ops import QuantizedTensor
from torch.autograd.graph import saved_tensors_hooks

from ...distillation.compiling import check_compile
from ...distillation.precision import check_tf32
from ...distillation.recompute import replaced_forwards
from ...lora_merge.files.dtypes import DTYPES
from .data import Rows


def compute_type(model, choice: str, tf32: bool = False, compile: bool = False) -> torch.dtype:
    """The dtype to compute in: the one asked for, or for "auto" the one that suits the device.

    bf16 where it is fast, it needs no loss scaling; then fp16; on a CPU fp32. Raises ValueError for tf32 where it has
    none, and for compile where torch cannot.
    """
    if tf32:
        check_tf32(model.load_device)
    if compile:
        check_compile(model.load_device)
    if choice != "auto":
        return DTYPES[choice]
    device = model.load_device
    if comfy.model_management.is_device_cpu(device):
        return torch.float32
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


@contextmanager
def lent(model, dtype: torch.dtype) -> Iterator:
    """A clone of the MODEL, on its device with all its patches applied, and able to take part in a backward pass.

    Afterwards, also after an error or an interrupt, the MODEL has the weights and patches it came with, unloaded.
    """
    patcher = _own_clone(model)
    own = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    if dtype != own:
        patcher.set_model_compute_dtype(dtype)
    # Quantised layers round their inputs as well, where the device can compute so, and that has no gradient.
    if any(isinstance(weight, QuantizedTensor) for weight in patcher.model.parameters()):
        patcher.force_cast_weights = True
    try:
        # As core's Train LoRA: everything else goes, and the whole model stays on the device.
        comfy.model_management.load_models_gpu([patcher], memory_required=1e20, force_full_load=True)
        _leave_inference_mode(patcher.model)
        patcher.pre_run()
        with _in_training(), _without_formulas_told(patcher):
            yield patcher
    finally:
        patcher.cleanup()
        patcher.detach()
        # What loading with another compute dtype has set; ComfyUI would do it at the next load of the model.
        for module in patcher.model.modules():
            comfy.model_patcher.wipe_lowvram_weight(module)


def _own_clone(model):
    """A clone whose weights are whole and stay where they are loaded to.

    ComfyUI's dynamic VRAM pages weights in and out by itself, into places it has measured for them; nothing of ours may
    exchange them there. So it is asked for the same model without that, which it reads from its file again, as for
    its own Train LoRA. Raises ValueError where it cannot.
    """
    if not model.is_dynamic():
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ValueError(
            f"This model is under ComfyUI's dynamic VRAM and cannot be loaded a second time without it ({error}). Load "
            "it with one of ComfyUI's own loaders, or start ComfyUI with --disable-dynamic-vram."
        ) from error


@contextmanager
def _in_training() -> Iterator[None]:
    """Within it ComfyUI's networks compute by operations that have a gradient, as in core's Train LoRA: their fused
    ones (rotary embeddings, int8 layers) have none."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextmanager
def _without_formulas_told(patcher) -> Iterator[None]:
    """Says in words what torch says of an operation of ComfyUI's that has no gradient, in spite of the switch."""
    try:
        yield
    except RuntimeError as error:
        if "no autograd formula" not in str(error):
            raise
        raise ValueError(
            f"This model ({type(patcher.model.model_config).__name__}) cannot be trained in this ComfyUI: its network computes by an "
            f"operation that has no gradient ({str(error).split('.default')[0].rpartition(' ')[2]}). A newer ComfyUI may have one."
        ) from error


def _leave_inference_mode(model: torch.nn.Module) -> None:
    """Replaces weights that were loaded in inference mode by equal ones that autograd can keep, one at a time."""
    # Never a list of all of them: it would keep every old weight beside its copy, the network twice.
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_inference():
                value = tensor.detach().clone()
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        for name, tensor in module._buffers.items():
            if tensor is not None and tensor.is_inference():
                module._buffers[name] = tensor.detach().clone()


# How core's plain layers, and no others, compute with a cast weight.
_PLAIN = [
    getattr(comfy.ops.disable_weight_init, name).forward_comfy_cast_weights
    for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")
]


@contextmanager
def casting_again(network: torch.nn.Module, active: bool = True) -> Iterator[None]:
    """Within it the backward pass casts anew the weights that ComfyUI casts to another type in every call.

    Autograd would keep every cast weight until then: a second network. Not together with `recomputing`, which keeps
    none of them, and whose own handling of what autograd keeps this would hide. `active` False does nothing.
    """
    cast = [
        module
        for module in network.modules()
        if getattr(module, "comfy_cast_weights", False)
        and (getattr(type(module), "forward_comfy_cast_weights", None) in _PLAIN or _is_quantised(module))
        and "forward" not in vars(module)
    ]
    with replaced_forwards({module: _casting_again(module) for module in cast} if active else {}):
        yield


def _is_quantised(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), QuantizedTensor)


def _casting_again(module: torch.nn.Module) -> Callable:
    """The forward of a linear or convolution layer with a frozen weight. Of its inputs the gradient needs no values."""
    forward = module.forward

    def keep(tensor: torch.Tensor):
        weight = module.weight
        cast = tensor.dtype != weight.dtype and tensor.shape in (weight.shape, weight.shape[::-1])
        if not cast or module.weight_function:
            return tensor
        return tensor.dtype, tensor.device, tensor.shape, tensor.stride()

    def again(kept):
        if isinstance(kept, torch.Tensor):
            return kept
        dtype, device, shape, stride = kept
        weight, _ = comfy.ops.cast_bias_weight(module, dtype=dtype, device=device)
        return weight.as_strided(shape, stride)

    def called(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with saved_tensors_hooks(keep, again):
            return forward(*args, **kwargs)

    return called


class Denoiser:
    """(x, sigma, cond) -> x0 by the MODEL, with its own attention patches and wrappers. cond: Rows."""

    def __init__(self, patcher) -> None:
        self.model = patcher.model
        self.options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(patcher, {}, self.options)
        self.uuids = [uuid.uuid4(), uuid.uuid4()]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: Rows) -> torch.Tensor:
        # Patches are told which rows are which, as in sampling. Each call has its own dict: blocks write into it.
        told = {
            "cond_or_uncond": list(cond.parts),
            "uuids": [self.uuids[part] for part in cond.parts],
            "sigmas": sigma[: len(x) // len(cond.parts)],
        }
        c = cond.values | {"transformer_options": self.options["transformer_options"] | told}
        wrapper = self.options.get("model_function_wrapper")
        if wrapper is None:
            return self.model.apply_model(x, sigma, **c)
        call = {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": list(cond.parts)}
        return wrapper(self.model.apply_model, call)
