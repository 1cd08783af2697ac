"""Classifier-free guidance in the first steps only."""

import comfy.samplers


class FirstStepsGuider(comfy.samplers.CFGGuider):
    """Core's guider, with two differences: the negative prompt may be absent, and guidance may end early.

    last_guided_sigma: guidance is used at this noise level and above; 0 uses it throughout, infinity never.
    """

    last_guided_sigma = 0.0

    def set_conds(self, positive, negative=None):
        conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
        self.inner_set_conds(conds)

    def set_cfg(self, cfg, last_guided_sigma=0.0):
        super().set_cfg(cfg)
        self.last_guided_sigma = last_guided_sigma

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """timestep: (b,) noise levels, as core names them here. Returns the denoised x."""
        guided = float(timestep.max()) >= self.last_guided_sigma
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds.get("negative", None),
            self.conds.get("positive", None),
            self.cfg if guided else 1.0,
            model_options=model_options or {},
            seed=seed,
        )
