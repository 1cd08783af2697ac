"""The road of UNets: patches of cross-attention, put in at each model call.

Last of all, so that other nodes' patches keep working as they are wherever they stand in the graph. The negative text
goes along as further rows that only to_k and to_v see.
"""

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer, optimized_attention

from ....lora_merge.words import many
from ....samplers.attention_guidance import normalized_attention_guidance


def attention_blocks(model) -> tuple[list[tuple[str, int, int]], int]:
    """(keys of a UNet's transformer blocks as ComfyUI names them to patches, width of their text), or a ValueError."""
    unet = model.model.diffusion_model
    parts = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}
    keys = []
    for name, part in parts.items():
        for number, block in enumerate(part):
            for layer in block if block is not None else ():
                if isinstance(layer, SpatialVideoTransformer):
                    raise ValueError(
                        f"This model ({type(model.model).__name__}) attends over time to a picture, not to a text, so "
                        "it has no place for a negative prompt. Use cfg above 1."
                    )
                if isinstance(layer, SpatialTransformer):
                    keys += [(name, number, depth) for depth in range(len(layer.transformer_blocks))]
    width = model.model.model_config.unet_config.get("context_dim")
    if not keys or not isinstance(width, int):
        raise ValueError(
            f"This model ({type(model.model).__name__}) has no cross-attention to a text. Use cfg above 1."
        )
    return keys, width


class UNetRoad:
    def __init__(self, context, blocks, guidance):
        self.context, self.blocks, self.guidance = context, blocks, guidance
        self._cast: dict[tuple, torch.Tensor] = {}  # (device, dtype) -> context

    def run(self, call, model, rows, inputs, first):
        """The call of a BaseModel with these inputs, guided in these rows. first(): whether it is of the first step."""
        options = dict(inputs["transformer_options"])
        patches, replacements = dict(options.get("patches", {})), dict(options.get("patches_replace", {}))
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), self._append_negative(rows)]
        others = replacements.get("attn2", {})
        # As core does: a patch for one depth goes before one for the whole block.
        own = {key: self._attention(rows, others.get(key, others.get(key[:2]))) for key in self.blocks}
        replacements["attn2"] = {**others, **own}
        options |= {"patches": patches, "patches_replace": replacements}
        return call(inputs | {"transformer_options": options})

    def _append_negative(self, rows):
        """attn2_patch: the negative text goes along as further rows, so that to_k and to_v project it as well."""

        def append(q, context, value, options):
            rows.tokens = context.shape[1]
            negative = self._like(context)
            joined = _joined(context, negative)
            return q, joined, joined if value is context or value is None else _joined(value, negative)

        return append

    def _like(self, context):
        # Several GPUs sample in threads of their own: what one of them makes must not be handed to another.
        where = (context.device, context.dtype)
        if where not in self._cast:
            self._cast[where] = self.context.to(context)
        return self._cast[where]

    def _attention(self, rows, other):
        """attn2_replace of one block. other: the patch that was there, or None for plain attention."""
        attend = other or _plain_attention

        def guided_attention(q, k, v, options):
            texts = len(k) - len(self.context)
            if len(q) != rows.all or texts != rows.all:
                raise ValueError(
                    f"LCM Negative Prompt expects {many(rows.all, 'images')} with a text each in cross-attention and got "
                    f"{len(q)} with {texts}: another node on this model splits the prompt by regions. Remove one of "
                    "the two."
                )
            # What _joined filled up is cut off, so the positive attention is the plain model's to the bit.
            positive = attend(q, k[:texts, : rows.tokens], v[:texts, : rows.tokens], options)
            k, v = (rows.spread(t[texts:, : self.context.shape[1]]) for t in (k, v))
            negative = attend(rows.of(q), k, v, rows.options(options))
            return rows.put(positive, normalized_attention_guidance(rows.of(positive), negative, **self.guidance))

        return guided_attention


def _plain_attention(q, k, v, options):
    """As in core's CrossAttention, to the bit."""
    return optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
    )


def _joined(texts, negative):
    """(a, m, width) and (b, n, width) -> (a + b, max(m, n), width), filled up with zeros.

    Only so that to_k and to_v see one tensor: they work token by token, and what was filled up is cut off again before
    attention. Where it is not, zeros would be tokens; core therefore repeats texts that it joins.
    """
    length = max(texts.shape[1], negative.shape[1])
    return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, length - t.shape[1])) for t in (texts, negative)])
