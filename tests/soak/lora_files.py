"""Random LoRA files: every kind of update in every spelling, then broken in one to three ways.

All is drawn from the `random.Random` that is handed in, so that a seed makes the same file again.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_kit.tests.lora_merge import kinds

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
# (spellings of one module, out, inputs, kernel): UNets, text encoders, DiTs and what nobody knows.
MODULES: list[tuple[list[str], int, int, tuple[int, ...]]] = [
    (["lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in",
      "base_model.model.mid_block.attentions.0.proj_in", "diffusion_model.middle_block.1.proj_in"], 8, 12, ()),
    (["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
      "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"], 12, 8, ()),
    (["lora_unet_down_blocks_0_resnets_0_conv1", "unet.down_blocks.0.resnets.0.conv1", "lora_unet_input_blocks_1_0_in_layers_2"], 8, 12, (3, 3)),
    (["lora_te_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
      "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"], 8, 8, ()),
    (["lora_unet_time_embedding_linear_1", "unet.time_embedding.linear_1"], 8, 12, ()),
    (["transformer.transformer_blocks.0.attn.to_q", "diffusion_model.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"], 12, 12, ()),
    (["transformer.single_transformer_blocks.1.attn.to_v", "transformer.transformer_blocks.1.ff.net.0.proj"], 12, 12, ()),
    (["lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"], 12, 4, ()),
    (["diffusion_model.blocks.3.self_attn.q", "lora_unet_blocks_3_self_attn_q", "blocks.3.self_attn.q"], 8, 8, ()),
    (["diffusion_model.layers.2.attention.qkv", "diffusion_model.layers.2.attention.to_q"], 12, 4, ()),
    (["lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"], 8, 8, ()),
    (["lora_unet_some_custom_thing", "diffusion_model.some.custom.thing", "some.custom.thing"], 12, 12, ()),
]  # fmt: skip
ALPHAS = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, -64.0, 1e-30, 1e30, 3e38, 1e-45, 1.0, 4.0, 128.0, 65504.0]
METADATA: list[Any] = [
    None, {}, {"format": "pt"}, {"lora_alpha": "4"}, {"lora_alpha": "4", "use_rslora": "True"}, {"lora_alpha": "x"}, {"lora_alpha": "nan"},
    {"r": "2", "lora_alpha": "1", "alpha_pattern": '{"to_q": 8}'}, {"lora_alpha": "2", "alpha_pattern": '{".*.*.*=": 1, "(": 2}'},
    {"rank_pattern": '{"^(a+)+$": 4}', "lora_alpha": "1e400"}, {"lora_adapter_metadata": "{}"}, {"lora_adapter_metadata": "[5]"},
    {"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 2}'}, {"use_rslora": "maybe"}, {"lcm_kit.merge": "{}"},
    {"lcm_kit.merge": "[" * 20_000}, {"lcm_kit.merge": '{"version": 2, "inputs": [{"name": 1}]}'}, {"lcm_kit.preset": "NOPE"},
    {"ss_base_model_version": "sdxl" * 300}, {"modelspec.architecture": "\0"}, {"ss_network_dim": "-1"}, {"lcm_kit.preset": ""},
    {"ss_tag_frequency": "{" * 90}, {"ss_tag_frequency": '{"a": {"b": 1e999}}'}, {"ss_tag_frequency": '{"1_x": {"word": 3}}'},
    {"modelspec.title": "<img src=x>", "modelspec.date": "tomorrow", "sshs_model_hash": "0" * 64}, {"": "x"}, {"x" * 3000: "y" * 30_000},
    {"modelspec.thumbnail": "data:image/png;base64," + "A" * 500}, {"ss_network_module": "networks.lora", "ss_network_args": "nonsense"},
]  # fmt: skip
# What stands in no module's name of ours; and parts that other trainers write.
STRAYS = [
    "foo", "lora_unet_x.lora_up.weight", "x.bias", "position_ids", "lora_unet_y.alpha", "bundle_emb.x.string_to_param.*", "emb_params",
    "x.on_input", ".lora_up.weight", "a.b.c.alpha", ".alpha", "..alpha", "__metadata", "lora_unet_z.scalar", "lora_unet_z.set_weight",
    "lora_unet_z.w_norm", "lora_unet_z.b_norm", "lora_unet_z.diff_b", "lora_unet_z.diff", "lora_unet_z.diff_m", "t5.lora_B.bias", "\u202e.diff", "img_in.reshape_weight",
]  # fmt: skip


def random_file(path: Path, draw: random.Random) -> str:
    """Writes a file and returns, in words, what was done to it; "" for a sound one."""
    tensors = sound(draw)
    metadata = draw.choice(METADATA) if draw.random() < 0.5 else None
    way = draw.random()
    if way < 0.25:
        write(path, tensors, metadata)
        return ""
    if way < 0.75:
        done = [change(tensors, draw) for _ in range(draw.choice([1, 1, 1, 2, 3])) if tensors]
        write(path, tensors, metadata)
        return " + ".join(done)
    if way < 0.88:
        write(path, tensors, metadata, lambda header: break_header(header, draw))
        return "header"
    write(path, tensors, metadata)
    path.write_bytes(broken_bytes(bytearray(path.read_bytes()), draw))
    return "bytes"


def sound(draw: random.Random) -> dict[str, Tensor]:
    """The tensors of one to four modules, each of a kind and in a spelling of its own."""
    tensors: dict[str, Tensor] = {}
    for spellings, out, inputs, kernel in draw.sample(MODULES, draw.randint(1, 4)):
        kind = draw.choice([*kinds.ADDITIVE, *kinds.CARRIED, *["LoRA"] * 12])
        if kinds.ADDITIVE.get(kind, ("", False))[1] and not kernel:
            kind = "LoRA"
        module, alpha, seed = (
            draw.choice(spellings),
            draw.choice([None, 1.0, 2.0, 4.0, 0.0, -1.0]),
            draw.randrange(10**6),
        )
        tensors |= kinds.state_dict(kind, module, out, inputs, kernel, alpha=alpha, seed=seed)
        if draw.random() < 0.15:
            tensors[f"{module}.diff_b"] = normal(draw, out)
        if draw.random() < 0.05:
            tensors[f"{module}.diff"] = normal(draw, out, inputs, *kernel)
    return tensors


def normal(draw: random.Random, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))


def change(tensors: dict[str, Tensor], draw: random.Random) -> str:
    """Changes the tensors in one way, and returns its name."""
    key = draw.choice(list(tensors))
    name, way = draw.choice(list(CHANGES.items()))
    way(tensors, key, draw)
    return name


def _dtype(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    tensors[key] = tensors[key].to(draw.choice(list(DTYPES.values())))


def _all_dtypes(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    dtype = draw.choice([torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
    tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def _alpha(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    dtype = draw.choice([torch.float32, torch.float16, torch.float64, torch.bfloat16])
    tensors[f"{_module(key)}.alpha"] = torch.tensor(draw.choice(ALPHAS), dtype=dtype)


def _alpha_shape(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    shape = draw.choice([(1,), (1, 1), (2,), (3, 3), (0,), (1, 1, 1, 1, 1)])
    tensors[f"{_module(key)}.alpha"] = torch.ones(shape, dtype=draw.choice([torch.float32, torch.int64, torch.bool]))


def _value(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    tensor = tensors[key]
    if tensor.numel() and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        most = min(3e38, torch.finfo(tensor.dtype).max)
        tensors[key] = tensor = tensor.clone()
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([math.nan, math.inf, -math.inf, most, 1e-40])


def _scaled(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    if tensors[key].dtype.is_floating_point and tensors[key].dtype.itemsize > 1:
        tensors[key] = tensors[key] * draw.choice([0.0, -1.0, 1e4, 1e10, 1e20, 1e30, 1e-8, 1e-20, 1e-38])


def _all_scaled(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    factor = draw.choice([0.0, 1e10, 1e18, 1e25, 1e-10, 1e-20])
    tensors.update({name: (tensor.float() * factor).to(tensor.dtype) for name, tensor in tensors.items()})


def _shape(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    tensor = tensors[key]
    flat = tensor.reshape(-1)
    ways: list[Callable[[], Tensor]] = [
        lambda: tensor.reshape(*tensor.shape, *([1] * max(0, 5 - tensor.dim()))),
        lambda: flat[:1].reshape(()) if len(flat) else tensor,
        lambda: flat,
        lambda: flat[:0].reshape(0, *([1] * max(0, tensor.dim() - 1))),
        lambda: tensor.transpose(0, 1).contiguous() if tensor.dim() > 1 else tensor,
        lambda: torch.cat([flat, flat]),
        lambda: tensor[..., None, None] if tensor.dim() == 2 else tensor,
        lambda: torch.cat([tensor.float()] * 2, dim=draw.randrange(2)).to(tensor.dtype) if tensor.dim() > 1 else tensor,
    ]
    tensors[key] = draw.choice(ways)().contiguous()


def _twice(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    for spellings, *_ in MODULES:
        for name in spellings:
            if key.startswith(f"{name}."):
                other = draw.choice(spellings)
                parts = [part for part in tensors if part.startswith(f"{name}.")]
                tensors.update({f"{other}{part[len(name) :]}": tensors[part].clone() for part in parts})
                return


def _ending(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    ends = {".lora_up.weight": [".lora_B.weight", "_lora.up.weight", ".lora_B.default.weight", ".lora.up.weight"],
            ".lora_down.weight": [".lora_A.weight", "_lora.down.weight", ".lora_A.default.weight", ".lora.down.weight"]}  # fmt: skip
    for end, others in ends.items():
        if key.endswith(end):
            new = key.removesuffix(end) + draw.choice(others)
            tensors[new] = tensors[key].clone() if draw.random() < 0.5 else tensors.pop(key)
            return


def _drop(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    del tensors[key]


def _stray(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    tensors[draw.choice(STRAYS)] = torch.ones(draw.choice([(), (2,), (2, 2), (0,), (8, 12, 3, 3)]))


def _name(tensors: dict[str, Tensor], key: str, draw: random.Random) -> None:
    odd = [
        "Unet",
        "unet ",
        "ünet",
        "unet__",
        "unet_" * 20,
        "unet_1000000000000000000000_",
        "unet/..",
        "%s%n",
        "{0}",
        "unet_\u202e",
        "\0",
        "unet\n",
        "",
    ]
    part = draw.choice(["unet", "lora_", "blocks", "attn", ".", "_"])
    tensors[key.replace(part, draw.choice(odd), 1)] = tensors.pop(key)


CHANGES: dict[str, Callable[[dict[str, Tensor], str, random.Random], None]] = {
    "dtype": _dtype, "all dtypes": _all_dtypes, "alpha": _alpha, "shape of alpha": _alpha_shape, "value": _value, "scaled": _scaled,
    "all scaled": _all_scaled, "shape": _shape, "two spellings": _twice, "ending": _ending, "dropped": _drop, "stray": _stray, "name": _name,
}  # fmt: skip


def _module(key: str) -> str:
    for mark in (".lora", ".hada", ".lokr", ".oft", "."):
        if mark in key:
            return key.rsplit(mark, 1)[0]
    return key


def write(
    path: Path, tensors: dict[str, Tensor], metadata: Any, broken: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """A safetensors file, byte by byte: the library refuses much of what is to be tried."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data, end = [], 0
    for key, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + len(raw)]}
        data.append(raw)
        end += len(raw)
    if broken:
        broken(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def break_header(header: dict[str, Any], draw: random.Random) -> None:
    keys = [key for key in header if key != "__metadata__"]
    key = draw.choice(keys)
    entry, way = header[key], draw.randrange(12)
    if way == 0:
        entry["dtype"] = draw.choice(["F4", "F8_E8M0", "C64", "f32", "", None, 5, [], {}])
    elif way == 1:
        entry["shape"] = draw.choice([[-1], [0], [2**63], [1.5], "x", None, [[1]], [True], [1] * 9, {}])
    elif way == 2:
        entry["data_offsets"] = draw.choice(
            [[0], [5, 1], [0, 2**64], [-1, 5], "x", None, [0, 1, 2], [True, False], [0.0, 4.0]]
        )
    elif way == 3:
        entry.pop(draw.choice(list(entry)))
    elif way == 4:
        header["__metadata__"] = draw.choice(
            [5, [], "x", False, "", 0, {"a": 1}, {"a": None}, {"a": {}}, {"a": "\ud800"}]
        )
    elif way == 5:
        entry["extra"] = draw.choice([1, math.nan, "x"])
    elif way == 6:
        header[draw.choice(["", "\0", "\ud800", f"{key}\n", "x" * 501, "x" * 10_000])] = header.pop(key)
    elif way == 7:
        header[key] = draw.choice([None, 5, [], "x", {}])
    elif way == 8:
        entry["shape"] = list(reversed(entry["shape"]))
    elif way == 9:
        entry["shape"] = [math.prod(entry["shape"])]
    elif way == 10:
        entry["shape"] = [1, *entry["shape"]]
    else:
        other = draw.choice(keys)
        header[key], header[other] = header[other], header[key]


def broken_bytes(content: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 2, 5, 40])):
        at = draw.randrange(max(1, len(content)))
        way = draw.randrange(4)
        if way == 0:
            content[at : at + 1] = bytes([draw.randrange(256)])
        elif way == 1:
            del content[at : at + draw.randrange(1, 50)]
        elif way == 2:
            content[at:at] = draw.randbytes(draw.randrange(1, 20))
        else:
            content[at:at] = content[max(0, at - 30) : at]
    return bytes(content)
