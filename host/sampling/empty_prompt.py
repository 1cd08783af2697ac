"""The empty prompt, which guidance leads away from where no negative prompt is connected.

What it is depends on what the model was trained to take for "no prompt". For Stable Diffusion 1 and 2, and for the flow
models, it is the text encoder's answer to an empty text, which no sampler can make up: zeros there are another prompt.
SDXL was trained with zeros in its place, and its authors' pipeline takes these where no negative prompt is given (diffusers,
force_zeros_for_empty_prompt of its model_index.json). So there are two ways to it, and an error where neither is open:
to go on at cfg 1 would be a picture that was not asked for.
"""

import logging
import math
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_base
import torch

logger = logging.getLogger(__name__)

# What a conditioning says of its own text, and where and when it holds. All else is of the picture: an inpainting
# model's background, a video's first frame, a ControlNet, the size it was trained at. That belongs to both prompts.
OF_THE_TEXT = ("conditioning_", "t5xxl_", "attention_mask", "pooled_output", "deepstack_", "grid", "visual_pos_masks", "gligen",
               "unclip_conditioning", "text_input_ids", "unprocessed_ltxav_embeds", "minimax_token_tags")  # fmt: skip
PLACE_AND_TIME = {"area", "set_area_to_bounds", "mask", "mask_strength", "strength", "start_percent", "end_percent",
                  "clip_start_percent", "clip_end_percent", "default"}  # fmt: skip

_encoded: "WeakKeyDictionary[Any, tuple[tuple, list]]" = WeakKeyDictionary()


def negative_for(model, positive, negative, clip, *, cfg: float, guided: bool):
    """The CONDITIONING to guide away from: `negative`, or where it is None and needed, the empty prompt.

    None where nothing looks at it: at cfg 1, unless a node on the MODEL does (Self-Attention Guidance) and there is a
    text encoder.   clip: the CLIP, or None.   guided: whether any step uses cfg.
    Raises ValueError where an empty prompt is needed and there is no way to it.
    """
    needed = guided and not math.isclose(cfg, 1.0)
    wished = clip is not None and model.model_options.get("disable_cfg1_optimization", False)
    if negative is not None or not (needed or wished):
        return negative
    if clip is not None:
        empty, how = encoded_empty(clip), "an empty text, encoded"
    elif isinstance(model.model, comfy.model_base.SDXL):
        empty, how = _zeros_of(positive), "zeros, with which SDXL was trained for it"
    else:
        raise ValueError(
            f"cfg is {cfg:g}, but there is no negative prompt to guide away from, and the empty prompt of this model takes its "
            "text encoder. Connect the CLIP to clip, or CLIP Text Encode to negative (its text may be empty), or set cfg to 1."
        )
    logger.warning("No negative prompt is connected: cfg %g guides away from the empty prompt (%s).", cfg, how)
    shared = shared_by_all(positive)
    return [[tensor, shared | own] for tensor, own in empty]


def encoded_empty(clip) -> list:
    """CONDITIONING of an empty text, as core's CLIP Text Encode makes it; remembered, or every picture would load the CLIP."""
    state = (clip.patcher.patches_uuid, clip.layer_idx)
    known = _encoded.get(clip)
    if known is None or known[0] != state:
        known = _encoded[clip] = (state, clip.encode_from_tokens_scheduled(clip.tokenize("")))
    return known[1]


def _zeros_of(positive) -> list:
    tensor, about = positive[0]
    pooled = about.get("pooled_output")
    return [[torch.zeros_like(tensor), {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}]]


def shared_by_all(positive) -> dict:
    """What all parts of a CONDITIONING say of the picture alike, by the very same object."""
    first, *others = (about for _, about in positive)
    return {
        key: value
        for key, value in first.items()
        if key not in PLACE_AND_TIME
        and not key.startswith(OF_THE_TEXT)
        and all(key in other and _same(other[key], value) for other in others)
    }


def _same(one, other) -> bool:
    return one is other or (isinstance(one, int | float | str | bool) and one == other)
