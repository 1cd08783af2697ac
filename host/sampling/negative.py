"""A negative prompt at cfg 1: normalised attention guidance as a patch on a MODEL."""

import logging
import math

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...samplers.attention_guidance import check_attention_guidance, normalized_attention_guidance

logger = logging.getLogger(__name__)

KEY = "lcm_kit.negative_prompt"
Wrap = comfy.patcher_extension.WrappersMP


def with_negative_prompt(model, negative, *, scale: float, tau: float, alpha: float, end_step: int):
    """A clone of the MODEL whose cross-attention leads away from `negative` wherever the positive prompt is evaluated.

    negative: CONDITIONING of one entry. end_step: model steps it works in, counted from the start; -1 all, 0 none.
    scale, tau, alpha: see normalized_attention_guidance. At a neutral point the clone has no patch at all.
    Raises ValueError for a model, a conditioning or a value that this cannot work with.
    """
    check_attention_guidance(scale=scale, tau=tau, alpha=alpha)
    if end_step < -1:
        raise ValueError(f"end_step is {end_step}; it must be -1 (all steps), 0 (none) or a number of steps.")
    blocks, width = _attention_blocks(model)
    context = _context_of(negative, width)
    if model.get_wrappers(Wrap.APPLY_MODEL, KEY):
        raise ValueError(
            "This model already has an LCM Negative Prompt. Use one of them, and join two negative prompts with "
            "ConditioningConcat."
        )
    model = model.clone()
    if scale == 1.0 or alpha == 0.0 or end_step == 0:
        return model
    patch = NegativePrompt(context, blocks, end_step, {"scale": scale, "tau": tau, "alpha": alpha})
    model.add_wrapper_with_key(Wrap.PREDICT_NOISE, KEY, remember_positive)
    model.add_wrapper_with_key(Wrap.CALC_COND_BATCH, KEY, find_positive)
    model.add_wrapper_with_key(Wrap.APPLY_MODEL, KEY, patch.apply_model)
    return model


def _attention_blocks(model) -> tuple[list[tuple[str, int, int]], int]:
    """(keys of the transformer blocks as ComfyUI names them to patches, width of their text), or a ValueError."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"This model is a {type(unet).__name__} ({type(model.model).__name__}); LCM Negative Prompt works on UNets "
            "with cross-attention, such as SD 1.x, SD 2.x, SDXL and SSD-1B. For this one use cfg above 1, or a node "
            "made for it, such as ComfyUI-NAG."
        )
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


def _context_of(negative, width: int) -> torch.Tensor:
    """(1 or more, tokens, width) the text of a CONDITIONING, or a ValueError."""
    if len(negative) != 1:
        raise ValueError(
            f"negative has {len(negative)} entries; it must have one. Join several texts with ConditioningConcat in "
            "place of ConditioningCombine, and leave prompt schedules to the positive prompt."
        )
    context, options = negative[0]
    if context is None or context.ndim != 3 or context.shape[-1] != width:
        shape = None if context is None else tuple(context.shape)
        raise ValueError(
            f"negative has the shape {shape}, and this model reads texts of width {width}: (images, tokens, {width}). "
            "Encode it with the CLIP that belongs to the model."
        )
    # What else a conditioning can carry has no meaning inside attention; a pooled output always comes along.
    ignored = {"area", "mask", "start_percent", "end_percent", "gligen", "hooks"} & options.keys()
    if ignored:
        logger.warning(
            "LCM Negative Prompt takes the text of its conditioning only; %s is not used.", ", ".join(sorted(ignored))
        )
    return context


def remember_positive(executor, x, timestep, model_options=None, seed=None):
    """Around a guider's predict_noise: keeps which conditionings are its positive prompt."""
    positive = getattr(executor.class_obj, "conds", {}).get("positive")
    if positive:
        uuids = frozenset(cond["uuid"] for cond in positive if "uuid" in cond)
        model_options = _with_option(model_options, "positive_uuids", uuids)
    return executor(x, timestep, model_options, seed)


def find_positive(executor, model, conds, x_in, timestep, model_options):
    """Around calc_cond_batch: says which entries of `conds` are the positive prompt.

    Their place does not tell: DualCFGGuider puts it last, and Self-Attention Guidance evaluates the negative alone. A
    single uuid does not either: core copies a positive area, uuid and all, to the negatives. So all have to match.
    """
    uuids = (model_options.get("transformer_options", {}).get(KEY) or {}).get("positive_uuids")
    if uuids:
        places = frozenset(i for i, cond in enumerate(conds) if cond and all(c.get("uuid") in uuids for c in cond))
        model_options = _with_option(model_options, "places", places)
    return executor(model, conds, x_in, timestep, model_options)


def _with_option(model_options, name, value) -> dict:
    model_options = dict(model_options or {})
    options = dict(model_options.get("transformer_options", {}))
    options[KEY] = {**options.get(KEY, {}), name: value}
    return model_options | {"transformer_options": options}


class NegativePrompt:
    """The patch. It is put in at each model call, last of all, so that other nodes' patches keep working as they are
    wherever they stand in the graph, and it costs nothing where it does not apply.
    """

    def __init__(self, context, blocks, end_step, guidance):
        self.context, self.blocks, self.end_step, self.guidance = context, blocks, end_step, guidance
        self._cast: dict[tuple, torch.Tensor] = {}  # (device, dtype) -> context

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **c):
        """Around BaseModel.apply_model. x: (chunks * b, ...), one chunk for each evaluated conditioning."""
        options = transformer_options or {}
        places = options.get(KEY, {}).get("places", [0])  # without a guider the positive prompt comes first
        chunks = options.get("cond_or_uncond", [0])
        guided = [i for i, place in enumerate(chunks) if place in places]
        if guided and c_crossattn is not None and self._is_on(options, t):
            options = self._patched(options, Rows(guided, len(chunks), len(x)))
        return executor(x, t, c_concat, c_crossattn, control, options, **c)

    def _is_on(self, options, sigma) -> bool:
        if self.end_step < 0:
            return True
        schedule = options.get("sample_sigmas")
        if schedule is None:
            raise ValueError(
                "LCM Negative Prompt cannot tell the step: this sampler does not say which noise levels it visits. Set "
                "end_step to -1."
            )
        if self.end_step >= len(schedule) - 1:
            return True
        # 1e-4: some samplers hand the level on in fewer bits. Levels between two steps belong to the earlier one.
        return bool(sigma.max() > schedule[self.end_step] * (1 + 1e-4))

    def _patched(self, options, rows) -> dict:
        patches, replacements = dict(options.get("patches", {})), dict(options.get("patches_replace", {}))
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), self._append_negative(rows)]
        others = replacements.get("attn2", {})
        # As core does: a patch for one depth goes before one for the whole block.
        own = {key: self._attention(rows, others.get(key, others.get(key[:2]))) for key in self.blocks}
        replacements["attn2"] = {**others, **own}
        return options | {"patches": patches, "patches_replace": replacements}

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
                    f"LCM Negative Prompt expects {rows.all} images with a text each in cross-attention and got "
                    f"{len(q)} with {texts}: another node on this model splits the prompt by regions. Remove one of "
                    "the two."
                )
            # What _joined filled up is cut off, so the positive attention is the plain model's to the bit.
            positive = attend(q, k[:texts, : rows.tokens], v[:texts, : rows.tokens], options)
            k, v = (rows.spread(t[texts:, : self.context.shape[1]]) for t in (k, v))
            negative = attend(rows.of(q), k, v, rows.options(options))
            return rows.put(positive, normalized_attention_guidance(rows.of(positive), negative, **self.guidance))

        return guided_attention


class Rows:
    """Which rows of a batch belong to the positive prompt: chunks `guided` of `chunks`, `all` rows in total."""

    def __init__(self, guided: list[int], chunks: int, rows: int):
        self.guided, self.all, self.each = guided, rows, rows // chunks
        self.whole = len(guided) == chunks
        self.tokens = 0  # of the positive texts, known once they are there

    def of(self, tensor):
        return tensor if self.whole else torch.cat([tensor.chunk(self.all // self.each)[i] for i in self.guided])

    def put(self, tensor, changed):
        if self.whole:
            return changed
        chunks = list(tensor.chunk(self.all // self.each))
        for i, chunk in zip(self.guided, changed.chunk(len(self.guided)), strict=True):
            chunks[i] = chunk
        return torch.cat(chunks)

    def spread(self, negative):
        """(images, ...) -> one row for each guided row; fewer texts than images repeat, as core has it."""
        times = math.ceil(self.each / len(negative))
        if len(negative) == 1:
            return negative.expand(self.each * len(self.guided), *negative.shape[1:])
        return negative.repeat(times, 1, 1)[: self.each].repeat(len(self.guided), 1, 1)

    def options(self, options: dict) -> dict:
        """For another patch, which may sort its rows by these."""
        names = ("cond_or_uncond", "uuids")
        return options | {name: [options[name][i] for i in self.guided] for name in names if name in options}


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
