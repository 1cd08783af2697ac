"""The door: a negative prompt put on a MODEL, and when it works."""

import functools
import logging

import comfy.patcher_extension
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ....samplers.attention_guidance import check_attention_guidance
from ...reports import tell
from .families import family_of
from .pairs import PairRoad
from .rows import KEY, find_positive, positive_rows, remember_positive
from .texts import NegativeText, check_text, text_of
from .tokens import TokenRoad
from .unet import UNetRoad, attention_blocks

logger = logging.getLogger(__name__)

Wrap = comfy.patcher_extension.WrappersMP
POSITIONAL = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")


def with_negative_prompt(model, negative, *, scale: float, tau: float, alpha: float, end_step: int):
    """A clone of the MODEL whose attention to the text leads away from `negative` wherever the positive prompt is
    evaluated.

    negative: CONDITIONING of one entry. end_step: model steps it works in, counted from the start; -1 all, 0 none.
    scale, tau, alpha: see normalized_attention_guidance. At a neutral point the clone has no patch at all.
    Raises ValueError for a model, a conditioning or a value that this cannot work with.
    """
    check_attention_guidance(scale=scale, tau=tau, alpha=alpha)
    if end_step < -1:
        raise ValueError(f"end_step is {end_step}; it must be -1 (all steps), 0 (none) or a number of steps.")
    road = _road(model, negative, {"scale": scale, "tau": tau, "alpha": alpha})
    if model.get_wrappers(Wrap.APPLY_MODEL, KEY):
        raise ValueError(
            "This model already has an LCM Negative Prompt. Use one of them, and join two negative prompts with "
            "ConditioningConcat."
        )
    model = model.clone()
    if scale == 1.0 or alpha == 0.0 or end_step == 0:
        return model
    model.add_wrapper_with_key(Wrap.PREDICT_NOISE, KEY, remember_positive)
    model.add_wrapper_with_key(Wrap.CALC_COND_BATCH, KEY, find_positive)
    model.add_wrapper_with_key(Wrap.APPLY_MODEL, KEY, NegativePrompt(road, end_step).apply_model)
    return model


def _road(model, negative, guidance: dict):
    """How the text reaches the picture in this model, and the way of the negative text with it."""
    if isinstance(model.model.diffusion_model, UNetModel):
        blocks, width = attention_blocks(model)
        context, _ = text_of(negative)
        check_text(context, width)
        return UNetRoad(context, blocks, guidance)
    family = family_of(model)
    context, options = text_of(negative)
    check_text(context)
    if family.pairs:
        line = f"LCM Negative Prompt evaluates {family.name} twice in each step that it works in, as cfg does; end_step sets how many."
        logger.info("%s", line)
        tell(line)
    return (PairRoad if family.pairs else TokenRoad)(NegativeText(context, options), family, guidance)


class NegativePrompt:
    """The patch. It is put in at each model call, and costs nothing where it does not apply."""

    def __init__(self, road, end_step: int):
        self.road, self.end_step = road, end_step

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **c):
        """Around BaseModel.apply_model. x: (chunks * b, ...), one chunk for each evaluated conditioning."""
        options = transformer_options or {}
        rows = positive_rows(options, len(x))
        if rows is None or c_crossattn is None or not self._is_on(options, t):
            return executor(x, t, c_concat, c_crossattn, control, options, **c)

        def call(inputs):
            others = {name: value for name, value in inputs.items() if name not in POSITIONAL}
            return executor(*(inputs[name] for name in POSITIONAL), **others)

        given = dict(zip(POSITIONAL, (x, t, c_concat, c_crossattn, control, options), strict=True))
        return self.road.run(call, executor.class_obj, rows, given | c, functools.partial(_is_first, options, t))

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


def _is_first(options, sigma) -> bool:
    """Whether this is the first step. Without a schedule each counts as one."""
    schedule = options.get("sample_sigmas")
    return schedule is None or bool(sigma.max() >= schedule[0] * (1 - 1e-4))
