"""What a negative CONDITIONING says to a model, in the model's own terms."""

import logging

import torch

from ....lora_merge.words import many

logger = logging.getLogger(__name__)

CONTEXT, MASK, LLAMA = "c_crossattn", "attention_mask", "encoder_hidden_states_llama3"  # core's names for model inputs


def text_of(negative) -> tuple[torch.Tensor, dict]:
    """(text, what comes with it) of a CONDITIONING of one entry, or a ValueError."""
    if len(negative) != 1:
        raise ValueError(
            f"negative has {many(len(negative), 'entries', 'entry')}; it must have one. Join several texts with ConditioningConcat in "
            "place of ConditioningCombine, and leave prompt schedules to the positive prompt."
        )
    context, options = negative[0]
    # What else a conditioning can carry has no meaning inside attention; a pooled output always comes along.
    ignored = {"area", "mask", "start_percent", "end_percent", "gligen", "hooks"} & options.keys()
    if ignored:
        logger.warning(
            "LCM Negative Prompt takes the text of its conditioning only; %s is not used.", ", ".join(sorted(ignored))
        )
    return context, options


def check_text(context, width: int | None = None) -> None:
    """Raises ValueError where a text is not (images, tokens, width); width None takes any."""
    if context is None or context.ndim != 3 or (width is not None and context.shape[-1] != width):
        shape = None if context is None else tuple(context.shape)
        wanted = f"texts of width {width}: (images, tokens, {width})" if width else "texts (images, tokens, width)"
        raise ValueError(
            f"negative has the shape {shape}, and this model reads {wanted}. Encode it with the CLIP that belongs to "
            "the model."
        )


def check_parts(negative: dict, inputs: dict, parts: tuple[str, ...]) -> None:
    """Raises ValueError where a negative text, in the model's terms, is not made as the positive one of `inputs` is."""
    check_text(negative.get(CONTEXT), inputs[CONTEXT].shape[-1])
    missing = sorted({name for name in parts if name in inputs} - negative.keys())
    if missing:
        raise ValueError(
            f"negative lacks {', '.join(missing)}, which this model reads beside the text. Encode it with the CLIP that "
            "belongs to the model."
        )


class NegativeText:
    """A negative text for transformers: most have a way of their own from a CONDITIONING to what they read."""

    def __init__(self, context, options: dict):
        self.context, self.options = context, options
        self._encoded: dict[tuple, dict[str, torch.Tensor]] = {}

    def of(self, model, x, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Those of the model inputs `names` that this text gives. model: the BaseModel; x: its latents of this call.

        By the model's own extra_conds, as core has it for every prompt: Flux.2 fills texts up, Anima and LTX-2 send
        them through a network of their own. Once for each device and each state of the weights.
        """
        # Several GPUs sample in threads of their own: what one of them makes must not be handed to another.
        where = (x.device, getattr(model.current_patcher, "patches_uuid", None))
        known = self._encoded.get(where)
        if known is None:
            size = {"width": x.shape[3] * 8, "height": x.shape[2] * 8} if x.ndim >= 4 else {}
            own = {"cross_attn": self.context, "noise": x, "device": x.device, "prompt_type": "negative"}
            conds = model.extra_conds(**{"pooled_output": None} | size | self.options | own)
            found = {name: getattr(conds.get(name), "cond", None) for name in names}
            known = {name: one.to(x.device) for name, one in found.items() if one is not None}
            self._encoded = {**self._encoded, where: known} if len(self._encoded) < 8 else {where: known}
        return known


def neutral(mask: torch.Tensor):
    """The value of a mask of this dtype at a token that is attended to."""
    return 0 if mask.is_floating_point() else 1


def masks_of(positive, negative, lengths: tuple[int, int]):
    """The two texts' masks (rows, tokens), or (None, None); where one has none it attends to all."""
    if positive is None and negative is None:
        return None, None
    known = positive if positive is not None else negative

    def made(mask, length):
        return known.new_full((1, length), neutral(known)) if mask is None else mask.to(known)

    return made(positive, lengths[0]), made(negative, lengths[1])
