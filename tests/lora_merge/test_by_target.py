"""What a model says of names, as far as LoRAs use them."""

import pytest

from lcm_kit.lora_merge import Lora
from lcm_kit.lora_merge.merging.by_target import ModelNames, Target
from lcm_kit.lora_merge.naming.family import Rows
from lcm_kit.tests.lora_merge.make import factors, kohya

WEIGHTS = {f"diffusion_model.{name}.weight": (12, 4) for name in "abc"}
QKV, PROJ, OTHER = WEIGHTS
MODEL = ModelNames(
    {
        "lora_unet_a": Target(QKV),
        "transformer.a_k": Target(QKV, Rows(4, 4)),
        "lora_unet_b": Target(PROJ, turned=True),
        "lora_unet_c": Target(OTHER),
    },
    WEIGHTS,
)


def lora(*modules):
    return Lora.from_state_dict({key: part for m in modules for key, part in kohya(m, *factors(4, 2, 4)).items()})


def test_of_a_model_only_what_the_loras_name_is_kept():
    """A name that the model has not is none of its own, and one that no LoRA has is not asked for."""
    used = MODEL.of([lora("transformer.a_k", "lora_unet_x"), lora("lora_unet_b", "lora_te1_text_model_a")])
    spelled = next(name for name, target in used.targets.items() if target.weight == QKV)
    assert used.targets == {spelled: Target(QKV, Rows(4, 4)), "lora_unet_b": Target(PROJ, turned=True)}
    assert used.shapes == {QKV: (12, 4), PROJ: (12, 4)}
    assert MODEL.of([]).targets == MODEL.of([lora("lora_unet_x")]).shapes == {}


def test_what_a_model_says_comes_back_from_json_as_it_was():
    again = ModelNames.from_dict(MODEL.to_dict())
    assert (again.targets, again.shapes) == (MODEL.targets, MODEL.shapes)
    values = MODEL.to_dict()
    values["names"]["transformer.a_k"] = [0, 9, 4]
    with pytest.raises(ValueError, match=r"transformer\.a_k is rows 9 to 13 of diffusion_model\.a\.weight"):
        ModelNames.from_dict(values)
