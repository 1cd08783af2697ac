"""The road of transformers whose text cannot be followed by another: each picture goes along twice, with either text.

The second copy has the negative text and all else of the first. Attention gives both copies the same guided picture, so
they stay equal, and the first is the result. It costs what cfg costs, in the steps it works in.
"""

import logging
from functools import partial

import torch

from ....lora_merge.words import many
from ....samplers.attention_guidance import normalized_attention_guidance
from .rows import of_chunks
from .texts import CONTEXT, MASK, check_parts, masks_of
from .tokens import Override, check_met, with_override

logger = logging.getLogger(__name__)


class PairRoad:
    def __init__(self, text, family, guidance):
        self.text, self.family, self.guidance = text, family, guidance

    def run(self, call, model, rows, inputs, first):
        """The call of a BaseModel with these inputs, guided in these rows. first(): whether it is of the first step."""
        family, dit = self.family, model.diffusion_model
        if family.keeps_length and inputs.get("ref_latents"):
            raise ValueError(
                "LCM Negative Prompt does not work with reference latents on this model (Z-Image Omni): each of them "
                "has a text of its own. Remove one of the two, or use cfg above 1."
            )
        negative = self.text.of(model, inputs["x"], family.texts)
        check_parts(negative, inputs, family.parts)
        texts = inputs[CONTEXT], rows.spread(negative[CONTEXT].to(inputs[CONTEXT]))
        if family.keeps_length:
            texts = self._cut(*texts, first)
        keeps = self._keeps(inputs, negative, *(text.shape[1] for text in texts))
        doubled = {name: rows.doubled(value) for name, value in inputs.items() if name != "transformer_options"}
        doubled[CONTEXT] = torch.cat([_filled(text, len(keeps[0])) for text in texts])
        if MASK in family.texts and MASK in doubled:
            doubled[MASK] = None  # what it hides is left out of attention instead
        attention = Pairs(rows, keeps, family.refiners(dit), *family.around(dit, inputs), self.guidance)
        options = with_override(rows.doubled_options(inputs["transformer_options"]), attention)
        result = call(doubled | {"transformer_options": options})
        check_met(first, attention.met, model)
        return result[: rows.all]

    def _cut(self, positive, negative, first):
        """The two texts, the negative one not longer than the positive one."""
        room = positive.shape[1]
        if negative.shape[1] > room and first():
            logger.warning(
                "The negative prompt is longer than the prompt (%s against %d) and %s has no room for more: its "
                "end is left out. Make it shorter, or the prompt longer.",
                many(negative.shape[1], "tokens"),
                room,
                self.family.name,
            )
        return positive, negative[:, :room]

    def _keeps(self, inputs, negative, length, other):
        """For either text which of its tokens count, (tokens,) bool of the longer one's length."""
        masks = (None, None)
        if MASK in self.family.texts:
            masks = masks_of(inputs.get(MASK), negative.get(MASK), (length, other))
        keeps = []
        for mask, own in zip(masks, (length, other), strict=True):
            keep = torch.ones(own, dtype=torch.bool) if mask is None else _counted(mask)
            keeps.append(torch.nn.functional.pad(keep, (0, max(length, other) - own)))
        return keeps


def _filled(text, length):
    """With tokens that nobody attends to. Their mean is the text's own, which HunyuanVideo reads."""
    missing = length - text.shape[1]
    return text if not missing else torch.cat([text, text.mean(1, keepdim=True).expand(-1, missing, -1)], dim=1)


def _counted(mask):
    keep = mask > -1 if mask.is_floating_point() else mask > 0
    if (keep != keep[:1]).any() or (mask.is_floating_point() and (mask[keep] != 0).any()):
        raise ValueError(
            "LCM Negative Prompt cannot weigh the tokens of a text, or hide different ones in each picture of a batch, "
            "on this model. Take the mask off the prompt, or make the pictures one by one."
        )
    return keep[0].cpu()


class Pairs(Override):
    """Attention of one model call. refiners: calls among the text alone, before all others. before, after: tokens
    around the text in the joint sequence.
    """

    def __init__(self, rows, keeps, refiners, before, after, guidance):
        super().__init__(rows, guidance)
        self.keeps, self.refiners, self.before, self.after = keeps, refiners, before, after
        self.calls, self.text, self.total = 0, None if refiners else len(keeps[0]), None

    def attention(self, attend, q, k, v, mask, options):
        self.calls += 1
        length = k.shape[-2]
        if self.calls <= self.refiners:
            self.text = length  # Z-Image fills it up
            return self._apart(attend, q, k, v, mask, 0)
        start, rows = self.text + self.before + self.after, self.rows
        # Refiners of the picture run before there are blocks, and parts added by other nodes see it alone.
        if "block_type" not in options or length <= start or length != (self.total or length):
            return attend(q, k, v, mask)
        self.total = length
        self.met += 1
        out = self._apart(attend, q, k, v, mask, self.before)
        positive, negative = out[: rows.all, start:], out[rows.all :, start:]
        guided = normalized_attention_guidance(rows.of(positive), negative, **self.guidance)
        picture = torch.cat([rows.put(positive, guided), guided])
        return torch.cat([out[:, :start], picture], dim=1)

    def _apart(self, attend, q, k, v, mask, start):
        """Attention in which either text's copies see what counts of it; it begins at token `start`."""
        if all(keep.all() for keep in self.keeps):
            return attend(q, k, v, mask)
        done, all_rows = [], self.rows.all
        for keep, copies, chunks in zip(
            self.keeps,
            (slice(None, all_rows), slice(all_rows, None)),
            (slice(None, self.rows.chunks), slice(self.rows.chunks, None)),
            strict=True,
        ):
            seen = torch.ones(k.shape[-2], dtype=torch.bool)
            seen[start : start + len(keep)] = keep
            seen = seen.nonzero()[:, 0].to(k.device)
            own = None if mask is None else mask[copies] if len(mask) == len(q) and mask.ndim > 2 else mask
            own = None if own is None else own.index_select(-1, seen)
            keys, values = (t[copies].index_select(-2, seen) for t in (k, v))
            done.append(attend(q[copies], keys, values, own, partial(of_chunks, chunks)))
        return torch.cat(done)
