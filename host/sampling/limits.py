"""The limit of samplers/limits.py in ComfyUI's sampling, after whatever guidance a MODEL uses."""

from ...samplers.limits import check_quantile, limit_denoised

OFF = 1.0


def with_limit(model, quantile: float):
    """A clone of the MODEL whose denoised picture is limited in every step of any sampler; the MODEL itself at OFF.

    Raises ValueError for a quantile that is not above 0.5 and at most 1.
    """
    check_quantile(quantile)
    if quantile == OFF:
        return model

    def limit(args):
        return limit_denoised(args["denoised"], args["cond_denoised"], quantile)

    model = model.clone()
    # cfg 1 needs no second model call for this: the limit is a no-op there.
    model.set_model_sampler_post_cfg_function(limit)
    return model
