"""Classifier-free guidance in the first steps only."""

import math
from functools import partial

import comfy.samplers

BEFORE_CFG = "sampler_pre_cfg_function"
COMBINING = (BEFORE_CFG, "sampler_cfg_function")
OF_ONE = ("LatentApplyOperationCFG",)
"""Nodes of core that change the positive prediction itself where it stands alone, and do so at every cfg."""


class FirstStepsGuider(comfy.samplers.CFGGuider):
    """Core's guider, with three differences: the negative prompt may be absent, guidance may end early, and where the
    negative prompt is not evaluated, guidance functions of other nodes get the positive prediction in its place.

    last_guided_sigma: guidance is used at this noise level and above; 0 uses it throughout, infinity never. Below it
    the guidance functions of other nodes (RescaleCFG, APG, TCFG, ...) rest too; what nodes do to the result stays.
    """

    last_guided_sigma = 0.0

    def set_conds(self, positive, negative=None):
        conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
        self.inner_set_conds(conds)

    def set_cfg(self, cfg, last_guided_sigma=0.0):
        super().set_cfg(cfg)
        self.last_guided_sigma = last_guided_sigma

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """timestep: (b,) noise levels, as core names them here. Returns the denoised x.

        Raises ValueError if a node on the model evaluates the negative prompt at any cfg, or sets another cfg than 1, and
        there is no negative prompt.
        """
        model_options = model_options or {}
        negative = self.conds.get("negative", None)
        if negative is None and model_options.get("disable_cfg1_optimization", False):
            raise ValueError(
                "A node on this model, such as Self-Attention Guidance, looks at the negative prompt even at cfg 1, "
                "and none is connected. Connect one, or remove that node."
            )
        guided = float(timestep.max()) >= self.last_guided_sigma
        if negative is None and guided and not math.isclose(self.cfg, 1.0):
            raise ValueError(
                f"A node on this model, such as CFG Override, sets cfg to {self.cfg:g}, and there is no negative prompt to guide "
                "away from. Connect one (its text may be empty), or remove that node."
            )
        evaluate = model_options.get("sampler_calc_cond_batch_function", _calc_cond_batch)
        model_options = model_options | {"sampler_calc_cond_batch_function": partial(_neutral, evaluate)}
        before = model_options.get(BEFORE_CFG, [])
        if not guided:
            # Nothing to combine; and APG's momentum would bring back what it saw in the guided steps.
            model_options = {key: value for key, value in model_options.items() if key not in COMBINING}
            before = list(filter(_is_of_one, before))
        before = [partial(_alone, change) if _is_of_one(change) else change for change in before]
        model_options |= {BEFORE_CFG: before}
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            negative,
            self.conds.get("positive", None),
            self.cfg if guided else 1.0,
            model_options=model_options,
            seed=seed,
        )


def _is_of_one(change) -> bool:
    return getattr(change, "__qualname__", "").partition(".")[0] in OF_ONE


def _alone(change, args):
    """What such a node makes of the positive prediction, for which it has a branch; beside a negative one as ever.

    Of two equal predictions it would change the difference, which is nothing.
    """
    predictions = args["conds_out"]
    if args["conds"][1] is not None:
        return change(args)
    (changed,) = change(args | {"conds_out": predictions[:1]})
    return [changed, changed.clone(), *predictions[2:]]


def _calc_cond_batch(args):
    return comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )


def _neutral(evaluate, args):
    """Core's predictions, but in place of a negative prompt that is not evaluated the positive one, not zeros.

    Core's own APG takes those zeros for a prediction (ComfyUI 0.30.0) and returns up to twice the picture at cfg 1. For
    two equal predictions every way to combine them has the same answer.
    """
    predictions = evaluate(args)
    if args["conds"][1] is None:
        predictions = [predictions[0], predictions[0].clone(), *predictions[2:]]
    return predictions
