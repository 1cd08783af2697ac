"""What is allowed in a training and hardly meant: rules on numbers, before it begins."""

from dataclasses import dataclass

from ...distillation.settings import Settings

# Beginnings of ComfyUI's names for models -> guidance in ComfyUI's own workflow templates.
GUIDANCE = {"WAN": "3.5 to 6", "Qwen": "2.5 to 4"}
# Of the model's own pictures, each learnt so often or more: then more of them would have cost little.
FEW, OFTEN = 256, 10


@dataclass(frozen=True)
class FewPictures:
    """The model made few.   times: that each is learnt, about."""

    made: int
    times: int


@dataclass(frozen=True)
class ForeignGuidance:
    """The guidance is Stable Diffusion 1.5's.   model: ComfyUI's name of a flow model."""

    model: str

    @property
    def usual(self) -> str | None:
        """The beginning of the model's name of which the templates' guidance is known."""
        return next((kind for kind in GUIDANCE if self.model.startswith(kind)), None)


Advice = FewPictures | ForeignGuidance


def advice(settings: Settings, pictures: int, own: bool, flow: str | None) -> list[Advice]:
    """pictures: how many there are.   own: whether the model made them.
    flow: ComfyUI's name of a flow model, None for any other."""
    found: list[Advice] = []
    draws = settings.steps * settings.batch * settings.accumulate
    if own and pictures < FEW and draws >= OFTEN * pictures:
        found.append(FewPictures(pictures, draws // pictures))
    if flow is not None and Settings.guidance_min in settings.cfg:
        found.append(ForeignGuidance(flow))
    return found
