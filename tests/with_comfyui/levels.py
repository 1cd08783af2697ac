"""Models of which nothing but the noise levels is asked."""

import copy
from types import SimpleNamespace

import comfy.model_base
import comfy.supported_models_base


class Sampled:
    """A MODEL of which nothing but model_sampling is asked, as ComfyUI makes it and its nodes patch it."""

    def __init__(self, model_type, settings):
        config = comfy.supported_models_base.BASE({})
        config.sampling_settings = settings
        self.model = SimpleNamespace(model_config=config)
        self.model_sampling = comfy.model_base.model_sampling(config, model_type)

    def clone(self):
        return copy.copy(self)

    def add_object_patch(self, name, value):
        assert name == "model_sampling"
        self.model_sampling = value

    def add_patches(self):
        raise NotImplementedError

    def get_model_object(self, name):
        assert name == "model_sampling"
        return self.model_sampling


def shifted(shift, times):
    """Levels of a flow model at these times, worked out by hand."""
    return [shift * t / (1 + (shift - 1) * t) for t in times]
