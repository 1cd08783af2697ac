"""The road of most transformers: the negative text goes along as further tokens of the positive one.

Everything but attention works token by token there, so both texts pass through the model beside one picture, and only
attention has to keep them apart: the picture attends to either, the results are mixed, and each text sees itself and the
picture alone. That is the method of the paper for both kinds of transformers, at the cost of the text's tokens and of a
second attention. ComfyUI hands each attention to transformer_options["optimized_attention_override"].
"""

import functools

import torch

from ....lora_merge.words import many
from ....samplers.attention_guidance import normalized_attention_guidance
from .texts import CONTEXT, MASK, check_parts, masks_of, neutral

OVERRIDE = "optimized_attention_override"
_ARGUMENTS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")  # of core's attention, after heads


class SameLength(Exception):
    """Attention of a picture to itself has as many tokens as the texts: which is which cannot be told."""


class TokenRoad:
    def __init__(self, text, family, guidance):
        self.text, self.family, self.guidance = text, family, guidance

    def run(self, call, model, rows, inputs, first):
        """The call of a BaseModel with these inputs, guided in these rows. first(): whether it is of the first step."""
        negative = self.text.of(model, inputs["x"], self.family.texts)
        check_parts(negative, inputs, self.family.parts)
        lengths = {n: (inputs[n].shape[-2], negative[n].shape[-2]) for n in negative if n != MASK and n in inputs}
        kind = Across if self.family.across else Beside
        image = inputs.get("clip_fea")  # Wan attends to an image as well
        taken, total = {None if image is None else image.shape[-2]}, sum(lengths[CONTEXT])
        for filling in range(4):  # at most: of a picture, of sound, and of an image
            if kind is Across and total + filling in taken:
                continue
            joined = self._joined(rows, inputs, negative, lengths[CONTEXT], filling)
            attention = kind(rows, self.family, lengths, total + filling, self.guidance)
            options = with_override(inputs["transformer_options"], attention)
            if self.family.positions:
                options = with_patch(options, "post_input", functools.partial(own_positions, lengths[CONTEXT]))
            try:
                result = call(inputs | joined | {"transformer_options": options})
            except SameLength:
                continue
            check_met(first, attention.met, model)
            return result
        raise AssertionError("three lengths cannot fill four")

    def _joined(self, rows, inputs, negative, lengths, filling):
        """Inputs of the model with the negative text behind the positive one. filling: tokens that nobody reads."""
        joined = {}
        for name in (n for n in negative if n != MASK and n in inputs):
            positive = inputs[name]
            other = rows.spread(negative[name].to(positive), rows.chunks)
            joined[name] = torch.nn.functional.pad(torch.cat([positive, other], dim=-2), (0, 0, 0, filling))
        if MASK in self.family.texts:
            positive, other = masks_of(inputs.get(MASK), negative.get(MASK), lengths)
            if positive is not None:
                positive = positive.expand(rows.all, -1)
                masks = torch.cat([positive, rows.spread(other, rows.chunks)], dim=-1)
                joined[MASK] = torch.nn.functional.pad(masks, (0, filling), value=neutral(masks))
        return joined


def with_override(options: dict, attention) -> dict:
    """These transformer_options with `attention` around each attention, and around an override that is there."""
    attention.other = options.get(OVERRIDE)
    return options | {OVERRIDE: attention}


def with_patch(options: dict, name: str, patch) -> dict:
    patches = options.get("patches", {})
    return options | {"patches": {**patches, name: [*patches.get(name, []), patch]}}


def check_met(first, met: int, model) -> None:
    """Never silent: a model or another node may leave out what the guidance stands on."""
    if not met and first():
        raise ValueError(
            f"LCM Negative Prompt met no attention to the text in the first step of this "
            f"{type(model.diffusion_model).__name__} ({type(model).__name__}): another node replaces its attention or "
            "leaves the step out. Remove one of the two, or use cfg above 1."
        )


def own_positions(lengths, args):
    """post_input patch: the negative text counts its tokens from where the positive one does."""
    positive, negative = lengths
    ids = args["txt_ids"]
    if ids.shape[1] != positive + negative:
        raise ValueError(
            f"LCM Negative Prompt expects a text of {many(positive, 'tokens')} in this model and got "
            f"{ids.shape[1] - negative}: another node lengthens it. Remove one of the two."
        )
    return args | {"txt_ids": torch.cat([ids[:, :positive], ids[:, :negative]], dim=1)}


class Override:
    """Attention of one model call, in place of core's. met: how many calls were the text's."""

    def __init__(self, rows, guidance):
        self.rows, self.guidance, self.other, self.met = rows, guidance, None, 0

    def __call__(self, func, q, k, v, heads, *args, **options):
        options = dict(zip(_ARGUMENTS, args, strict=False)) | options
        attend = func if self.other is None else functools.partial(self.other, func)
        if not options.get("skip_reshape"):  # SD3 leaves the heads apart
            q, k, v = (t.flatten(2) for t in (q, k, v))
        mask = options.pop("mask", None)
        bound = functools.partial(attend_to, attend, heads, options)
        return self.attention(bound, q, k, v, mask, options.get("transformer_options") or {})

    def attention(self, attend, q, k, v, mask, options):
        """q, k, v: ([rows, heads,] tokens, channels).   attend: core's or another override, of (q, k, v, mask)."""
        raise NotImplementedError


def attend_to(attend, heads, options, q, k, v, mask, change=None):
    """change: what to make of the transformer_options, where only some rows are attended to."""
    if change is not None and options.get("transformer_options"):
        options = options | {"transformer_options": change(options["transformer_options"])}
    return attend(q, k, v, heads, mask=mask, **options)


class Across(Override):
    """Cross-attention: k and v are of both texts."""

    def __init__(self, rows, family, lengths, total, guidance):
        super().__init__(rows, guidance)
        self.lengths, self.total = lengths[CONTEXT], total

    def attention(self, attend, q, k, v, mask, options):
        if k.shape[-2] != self.total:
            return attend(q, k, v, mask)
        if q.shape[-2] == self.total:
            raise SameLength
        self.met += 1
        rows, (length, other) = self.rows, self.lengths
        first, second = slice(0, length), slice(length, length + other)
        positive = attend(q, _at(k, first), _at(v, first), None if mask is None else mask[..., first])
        mask = None if mask is None else _of(rows, mask[..., second])
        k, v = (rows.of(_at(t, second)) for t in (k, v))
        negative = attend(rows.of(q), k, v, mask, rows.options)
        return rows.put(positive, normalized_attention_guidance(rows.of(positive), negative, **self.guidance))


class Beside(Override):
    """Joint attention: q, k and v are of both texts and the picture. The first call tells how long the sequence is;
    where a model also lets the picture attend to itself (SD3.5 medium), those calls are shorter.
    """

    def __init__(self, rows, family, lengths, total, guidance):
        super().__init__(rows, guidance)
        self.parts, self.picture_first = [lengths[name] for name in family.parts], family.picture_first
        self.total = None

    def attention(self, attend, q, k, v, mask, options):
        if self.total is None:
            self._read(k.shape[-2], k.device)
        if k.shape[-2] != self.total or q.shape[-2] != self.total:
            return attend(q, k, v, mask)
        self.met += 1
        rows = self.rows
        positive = attend(*(t.index_select(-2, self.plain) for t in (q, k, v)), self._masked(mask, self.plain))
        mask = self._masked(mask, self.instead)
        mask = None if mask is None else _of(rows, mask)
        q, k, v = (rows.of(t).index_select(-2, self.instead) for t in (q, k, v))
        negative = attend(q, k, v, mask, rows.options)
        return self._together(positive, negative)

    def _read(self, total, device):
        """Where the tokens of the picture (0), the positive text (1) and the negative one (2) are."""
        texts = [kind for lengths in self.parts for kind, n in zip((1, 2), lengths, strict=True) for _ in range(n)]
        picture = [0] * (total - len(texts))
        kinds = torch.tensor([*picture, *texts] if self.picture_first else [*texts, *picture])
        self.total = total

        def places(found):
            return found.nonzero()[:, 0].to(device)

        self.plain, self.instead = places(kinds != 2), places(kinds != 1)  # the sequence with either text
        plain, instead = kinds[kinds != 2], kinds[kinds != 1]
        self.picture, self.other_picture, self.other_text = (
            places(plain == 0),
            places(instead == 0),
            places(instead == 2),
        )

    def _together(self, positive, negative):
        """(rows, tokens, channels) in the model's order: the guided picture, and each text as it sees the picture."""
        rows, seen = self.rows, positive.index_select(1, self.picture)
        guided = normalized_attention_guidance(
            rows.of(seen), negative.index_select(1, self.other_picture), **self.guidance
        )
        out = positive.new_zeros((len(positive), self.total, positive.shape[-1]))
        out[:, self.plain] = positive.index_copy(1, self.picture, rows.put(seen, guided))
        text = self.instead[self.other_text]
        out[:, text] = rows.put(out[:, text], negative.index_select(1, self.other_text))
        return out

    def _masked(self, mask, chosen):
        """The part of a mask (..., queries or 1, keys) that belongs to the chosen tokens."""
        if mask is None:
            return None
        if mask.shape[-1] == len(self.plain):  # made for the model as it is: the negative text is not in it
            mask = self._widened(mask, -1)
            mask = self._widened(mask, -2) if mask.shape[-2] == len(self.plain) else mask
        square = mask.shape[-2] == self.total
        mask = mask.index_select(-1, chosen)
        return mask.index_select(-2, chosen) if square else mask

    def _widened(self, mask, dim):
        shape = list(mask.shape)
        shape[dim] = self.total
        return mask.new_full(shape, neutral(mask)).index_copy(dim, self.plain, mask)


def _at(tensor, tokens: slice):
    # Contiguous: attention kernels of other packages take nothing else.
    return tensor[..., tokens, :].contiguous()


def _of(rows, mask):
    """A mask's guided rows; one for all rows stays as it is."""
    return rows.of(mask) if mask.ndim > 2 and len(mask) == rows.all and rows.all > 1 else mask
