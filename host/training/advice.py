"""What is allowed and hardly meant: said in the log before a training begins, and in its report."""

from ...distillation.settings import Settings
from .teacher_pictures import is_flow

# Beginnings of ComfyUI's names for models -> guidance in ComfyUI's own workflow templates.
GUIDANCE = {"WAN": "3.5 to 6", "Qwen": "2.5 to 4"}
# Of the model's own pictures, each learnt so often or more: then more of them would have cost little.
FEW, OFTEN = 256, 10


def advice_for(model, settings: Settings, pictures: int, own: bool) -> list[str]:
    """Sentences. pictures: how many there are.   own: whether the model made them."""
    found = []
    draws = settings.steps * settings.batch * settings.accumulate
    if own and pictures < FEW and draws >= OFTEN * pictures:
        found.append(
            f"Few pictures: the model made {pictures}, and each is learnt about {draws // pictures} times. Some hundreds, of "
            "varied prompts, make a LoRA that works for more; raise samples."
        )
    low, high = settings.cfg
    if is_flow(model) and Settings.guidance_min in (low, high):
        name = type(model.model.model_config).__name__
        usual = next(
            (f"; templates have {cfg} for {kind}" for kind, cfg in GUIDANCE.items() if name.startswith(kind)), ""
        )
        found.append(
            f"Guidance {Settings.guidance_min:g} is Stable Diffusion 1.5's, and this model is another ({name}){usual}. Set "
            "guidance_min and guidance_max to the cfg at which it makes its best pictures."
        )
    return found
