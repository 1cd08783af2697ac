"""Diffusion transformers, known by the modules of their blocks: what each base model is made of, as data.

A transformer is stacks of blocks that are all alike, so a base is its stacks, how deep each is, and the shapes in a block.
Names are those of ComfyUI's model classes (comfy/ldm, 0.30.0), underscored and without the word for the model:
`double_blocks` is a stack, `img_attn_qkv` a module in each of its blocks. What stands outside numbered blocks, such as
`img_in`, tells no base from another and is left out.

Sizes: ComfyUI's own where it has them (comfy/model_detection.py and the defaults of its classes: Qwen-Image, HiDream, Cosmos,
Z-Image's and Lumina's widths, LTX-2), else the configuration that the model was published with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

Shape = tuple[int, ...]
Block = Mapping[str, Shape]
Stacks = Mapping[str, Sequence[Block]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Transformer:
    """One base model.

    name: what people call it.   kin: the models whose LoRAs work on one another after a fashion have it in common.
    stacks: stack -> its blocks in order, each module -> shape of its weight (out, in).
    branches: a part that some models of this base have and others lack, for people -> what its modules' names match.
    """

    name: str
    kin: str
    stacks: Stacks
    branches: Mapping[str, re.Pattern[str]] = field(default_factory=dict)

    @cached_property
    def modules(self) -> Mapping[str, Shape]:
        """Name -> shape of every module in a block that all models of this base have."""
        return {
            f"{stack}_{number}_{module}": shape
            for stack, blocks in self.stacks.items()
            for number, block in enumerate(blocks)
            for module, shape in block.items()
        }

    def branch(self, module: str) -> str | None:
        """The branch that a module belongs to, None for one that every model of this base has, or none."""
        return next((name for name, pattern in self.branches.items() if pattern.fullmatch(module)), None)


def _same(depth: int, block: Block) -> list[Block]:
    return [block] * depth


def _double(width: int, hidden: int, into: int, modulated: bool) -> Block:
    block: dict[str, Shape] = {}
    for stream in ("img", "txt"):
        block |= {
            f"{stream}_attn_qkv": (3 * width, width),
            f"{stream}_attn_proj": (width, width),
            f"{stream}_mlp_0": (into, width),
            f"{stream}_mlp_2": (width, hidden),
        }
        if modulated:
            block[f"{stream}_mod_lin"] = (6 * width, width)
    return block


def _streams(
    width: int, double: int, single: int, *, ratio: int = 4, gated: bool = False, modulated: bool = True
) -> Stacks:
    """Flux' two stacks. ratio: of the MLP's width to the model's.   gated: the MLP's first layer is twice as wide.
    modulated: each block has a modulation of its own.
    """
    hidden = ratio * width
    into = 2 * hidden if gated else hidden
    one: dict[str, Shape] = {"linear1": (3 * width + into, width), "linear2": (width, width + hidden)}
    if modulated:
        one["modulation_lin"] = (3 * width, width)
    stacks = {"double_blocks": _same(double, _double(width, hidden, into, modulated))}
    return stacks | ({"single_blocks": _same(single, one)} if single else {})


def _chroma(width: int, double: int, single: int) -> Stacks:
    """Flux with one network for all modulations."""
    guidance: Block = {"in_layer": (5120, 5120), "out_layer": (5120, 5120)}
    return {**_streams(width, double, single, modulated=False), "distilled_guidance_layer_layers": _same(5, guidance)}


def _hunyuan(width: int, double: int, single: int) -> Stacks:
    refiner: Block = {
        "adaLN_modulation_1": (2 * width, width),
        "self_attn_qkv": (3 * width, width),
        "self_attn_proj": (width, width),
        "mlp_0": (4 * width, width),
        "mlp_2": (width, 4 * width),
    }
    refiners = {"txt_in_individual_token_refiner_blocks": _same(2, refiner)}
    return {**_streams(width, double, single), **refiners}


def _qwen(width: int, depth: int) -> Stacks:
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out_0", "to_add_out")
    block: dict[str, Shape] = {f"attn_{name}": (width, width) for name in names}
    for stream in ("img", "txt"):
        block |= {
            f"{stream}_mod_1": (6 * width, width),
            f"{stream}_mlp_net_0_proj": (4 * width, width),
            f"{stream}_mlp_net_2": (width, 4 * width),
        }
    return {"transformer_blocks": _same(depth, block)}


def _wan(width: int, hidden: int, depth: int) -> Stacks:
    block: dict[str, Shape] = {f"{kind}_attn_{name}": (width, width) for kind in ("self", "cross") for name in "qkvo"}
    return {"blocks": _same(depth, {**block, "ffn_0": (hidden, width), "ffn_2": (width, hidden)})}


def _lumina(width: int, hidden: int, depth: int, *, qkv: int, modulation: tuple[str, int]) -> Stacks:
    """modulation: its module's name and the width that it reads."""
    plain: Block = {
        "attention_qkv": (qkv, width),
        "attention_out": (width, width),
        "feed_forward_w1": (hidden, width),
        "feed_forward_w2": (width, hidden),
        "feed_forward_w3": (hidden, width),
    }
    name, reads = modulation
    block = {**plain, name: (4 * width, reads)}
    return {"layers": _same(depth, block), "noise_refiner": _same(2, block), "context_refiner": _same(2, plain)}


def _sd3(depth: int, twice: int = 0) -> Stacks:
    """twice: number of blocks, from the first, whose picture attends to itself once more (SD3.5 medium)."""
    width = 64 * depth
    stream: Block = {
        "attn_qkv": (3 * width, width),
        "attn_proj": (width, width),
        "mlp_fc1": (4 * width, width),
        "mlp_fc2": (width, 4 * width),
        "adaLN_modulation_1": (6 * width, width),
    }
    again: Block = {
        "attn2_qkv": (3 * width, width),
        "attn2_proj": (width, width),
        "adaLN_modulation_1": (9 * width, width),
    }
    # Nobody reads the text behind the last block, which only looks at it.
    last: Block = {"attn_qkv": (3 * width, width), "adaLN_modulation_1": (2 * width, width)}
    blocks = []
    for number in range(depth):
        text = last if number == depth - 1 else stream
        picture = {**stream, **again} if number < twice else stream
        blocks.append(
            {f"context_block_{name}": shape for name, shape in text.items()}
            | {f"x_block_{name}": shape for name, shape in picture.items()}
        )
    return {"joint_blocks": blocks}


def _attention(prefix: str, width: int, reads: int | None = None, inner: int | None = None) -> dict[str, Shape]:
    """reads: width of keys and values, the model's if None.   inner: width of all heads together, likewise."""
    inner = inner or width
    reads = reads or width
    return {
        f"{prefix}_to_q": (inner, width),
        f"{prefix}_to_k": (inner, reads),
        f"{prefix}_to_v": (inner, reads),
        f"{prefix}_to_out_0": (width, inner),
    }


def _ff(prefix: str, width: int) -> dict[str, Shape]:
    return {f"{prefix}_net_0_proj": (4 * width, width), f"{prefix}_net_2": (width, 4 * width)}


def _ltx(width: int, depth: int) -> Stacks:
    block = _attention("attn1", width) | _attention("attn2", width) | _ff("ff", width)
    return {"transformer_blocks": _same(depth, block)}


def _ltx_with_sound(width: int, sound: int, depth: int) -> Stacks:
    block = _attention("attn1", width) | _attention("attn2", width) | _ff("ff", width)
    block |= _attention("audio_attn1", sound) | _attention("audio_attn2", sound) | _ff("audio_ff", sound)
    block |= _attention("audio_to_video_attn", width, sound, sound)
    block |= _attention("video_to_audio_attn", sound, width, sound)
    return {"transformer_blocks": _same(depth, block)}


def _hidream(width: int, double: int, single: int) -> Stacks:
    def gated(prefix: str, hidden: int) -> dict[str, Shape]:
        return {f"{prefix}_w1": (hidden, width), f"{prefix}_w2": (width, hidden), f"{prefix}_w3": (hidden, width)}

    names = ("to_q", "to_k", "to_v", "to_out")
    experts = {"block_ff_i_gate": (4, width), **gated("block_ff_i_shared_experts", 3584)}
    for number in range(4):
        experts |= gated(f"block_ff_i_experts_{number}", 6912)
    one = {f"block_attn1_{name}": (width, width) for name in names} | experts
    two = one | {f"block_attn1_{name}_t": (width, width) for name in names} | gated("block_ff_t", 6912)
    return {
        "double_stream_blocks": _same(double, {**two, "block_adaLN_modulation_1": (12 * width, width)}),
        "single_stream_blocks": _same(single, {**one, "block_adaLN_modulation_1": (6 * width, width)}),
        "caption_projection": _same(double + single + 1, {"linear": (width, 4096)}),
    }


def _cosmos(width: int, depth: int) -> Stacks:
    block: dict[str, Shape] = {"mlp_layer1": (4 * width, width), "mlp_layer2": (width, 4 * width)}
    for kind, reads in (("self_attn", width), ("cross_attn", 1024)):
        block |= {f"{kind}_{name}_proj": (width, width) for name in ("q", "output")}
        block |= {f"{kind}_{name}_proj": (width, reads) for name in ("k", "v")}
    for kind in ("self_attn", "cross_attn", "mlp"):
        block |= {f"adaln_modulation_{kind}_1": (256, width), f"adaln_modulation_{kind}_2": (3 * width, 256)}
    time: Block = {"linear_1": (width, width), "linear_2": (3 * width, width)}
    return {"blocks": _same(depth, block), "t_embedder": [{}, time]}


def _anima(width: int, depth: int) -> Stacks:
    """Cosmos-Predict2 with a small transformer before it, which reads another text encoder's words."""
    adapter = {f"{kind}_attn_{name}_proj": (1024, 1024) for kind in ("self", "cross") for name in "qkvo"}
    blocks = _same(6, {**adapter, "mlp_0": (4096, 1024), "mlp_2": (1024, 4096)})
    return {**_cosmos(width, depth), "llm_adapter_blocks": blocks}


def _branches(**patterns: str) -> dict[str, re.Pattern[str]]:
    return {name.replace("_", " "): re.compile(pattern) for name, pattern in patterns.items()}


_OF_WAN = _branches(
    image_branch=r"img_emb_.+|\w*blocks_\d+_cross_attn_(?:norm_)?[kv]_img",
    VACE_blocks=r"vace_.+",
    camera_adapter=r"control_adapter_.+",
    reference_input=r"ref_conv",
    pose_and_face_branch=r"(?:pose_patch_embedding|patch_embedding_pose|motion_encoder|face_adapter|face_encoder)(?:_.+)?",
    audio_branch=r"(?:casual_audio_encoder|audio_injector|audio_proj|cond_encoder|frame_packer|trainable_cond_mask)(?:_.+)?"
    r"|blocks_\d+_(?:audio_cross_attn_wrapper|norm1_audio)_.+",
)
_OF_FLUX = _branches(guidance_input=r"guidance_in_.+")
_OF_HUNYUAN = _branches(
    guidance_input=r"guidance_in_.+",
    pooled_text_input=r"vector_in_.+",
    glyph_input=r"byt5_in_.+",
    vision_input=r"vision_in_.+",
)
_OF_LTX = _branches(attention_gates=r".+_to_gate_logits")


def _table() -> list[Transformer]:
    def base(
        name: str, stacks: Stacks, kin: str | None = None, branches: Mapping[str, re.Pattern[str]] | None = None
    ) -> Transformer:
        return Transformer(name=name, kin=kin or name, stacks=stacks, branches=branches or {})

    def flux2(width: int, double: int, single: int) -> Stacks:
        return _streams(width, double, single, ratio=3, gated=True, modulated=False)

    return [
        base("Flux.1", _streams(3072, 19, 38), "Flux.1", _OF_FLUX),
        base("Chroma", _chroma(3072, 19, 38), "Flux.1"),
        base("Flux.2 dev", flux2(6144, 8, 48), None, _OF_FLUX),
        base("Flux.2 Klein 9B", flux2(4096, 8, 24), None, _OF_FLUX),
        base("Flux.2 Klein 4B", flux2(3072, 5, 20), None, _OF_FLUX),
        base("HunyuanVideo", _hunyuan(3072, 20, 40), None, _OF_HUNYUAN),
        base("HunyuanVideo 1.5", _hunyuan(2048, 54, 0), None, _OF_HUNYUAN),
        base("HunyuanImage 2.1", _hunyuan(3584, 20, 40), None, _OF_HUNYUAN),
        base("Qwen-Image", _qwen(3072, 60)),
        base("Wan 2.1 1.3B", _wan(1536, 8960, 30), None, _OF_WAN),
        base("Wan 2.2 5B", _wan(3072, 14336, 30), None, _OF_WAN),
        base("Wan 2.1/2.2 14B", _wan(5120, 13824, 40), None, _OF_WAN),
        base("Z-Image", _lumina(3840, 10240, 30, qkv=3 * 3840, modulation=("adaLN_modulation_0", 256))),
        base("Lumina 2", _lumina(2304, 9216, 26, qkv=3840, modulation=("adaLN_modulation_1", 1024))),
        base("SD3 medium", _sd3(24), "SD3"),
        base("SD3.5 medium", _sd3(24, 13), "SD3"),
        base("SD3.5 large", _sd3(38)),
        base("LTX-Video 2B", _ltx(2048, 28)),
        base("LTX-Video 13B", _ltx(4096, 48)),
        base("LTX-2", _ltx_with_sound(4096, 2048, 48), None, _OF_LTX),
        base("HiDream-I1", _hidream(2560, 16, 32)),
        base("Cosmos-Predict2 2B", _cosmos(2048, 28), "Cosmos-Predict2 2B"),
        base("Cosmos-Predict2 14B", _cosmos(5120, 36)),
        base("Anima", _anima(2048, 28), "Cosmos-Predict2 2B"),
    ]


TRANSFORMERS: tuple[Transformer, ...] = tuple(_table())
BY_NAME: Mapping[str, Transformer] = {base.name: base for base in TRANSFORMERS}
