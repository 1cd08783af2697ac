"""How the text meets the picture in each family of transformers. A new family is one row.

Read from ComfyUI's own classes (comfy/ldm): where their attention is called, in what order the tokens stand, and what
else moves when a text gets longer. What is not listed is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .texts import CONTEXT, LLAMA, MASK


def _no_refiners(dit) -> int:
    return 0


def _nothing_around(dit, inputs) -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True)
class Family:
    """name: as users say it.
    across: the picture looks at the text (cross-attention). Else both stand in one sequence (joint attention).
    pairs: the text cannot be followed by another: its tokens see each other outside joint attention, or its length
        moves the picture. Then each picture goes along twice.
    texts: inputs of the model that hold the text.   parts: those of them that the sequence is made of, in order.
    picture_first: the text stands behind the picture.
    positions: text tokens have a place in rope, which its `post_input` patch lets us set.
    refiners: how many calls of attention, before all others, are among text tokens alone.
    around: tokens (before, after) this text in the joint sequence that belong to the text's side, such as an image's.
    keeps_length: no text may be longer than the positive one, because its length moves the picture.
    """

    name: str
    across: bool = False
    pairs: bool = False
    texts: tuple[str, ...] = (CONTEXT,)
    parts: tuple[str, ...] = (CONTEXT,)
    picture_first: bool = False
    positions: bool = False
    refiners: Callable[..., int] = _no_refiners
    around: Callable[..., tuple[int, int]] = _nothing_around
    keeps_length: bool = False


def _around_hunyuan(dit, inputs) -> tuple[int, int]:
    """The glyph text (byt5) stands before the text in HunyuanVideo 1.5 and else behind it; an image before all."""
    image, glyphs = (inputs.get(name) for name in ("clip_fea", "txt_byt5"))
    image = 0 if image is None else image.shape[-2]
    glyphs = 0 if glyphs is None or dit.byt5_in is None else glyphs.shape[-2]
    return (image + glyphs, 0) if dit.cond_type_embedding is not None else (image, glyphs)


_WAN = Family("Wan", across=True)
_LTX = Family("LTX-Video", across=True, texts=(CONTEXT, MASK))
_COSMOS = Family("Cosmos Predict 2", across=True)

# Module in comfy.ldm and class -> family. The class itself: what is derived from it may have other attention.
FAMILIES = {
    "wan.model.WanModel": _WAN,
    "wan.model.VaceWanModel": replace(_WAN, name="Wan VACE"),
    "wan.model.CameraWanModel": replace(_WAN, name="Wan Camera"),
    "wan.model_animate.AnimateWanModel": replace(_WAN, name="Wan Animate"),
    "wan.model.SCAILWanModel": replace(_WAN, name="SCAIL"),
    "lightricks.model.LTXVModel": _LTX,
    "lightricks.av_model.LTXAVModel": replace(_LTX, name="LTX-2"),
    "cosmos.predict2.MiniTrainDIT": _COSMOS,
    "anima.model.Anima": replace(_COSMOS, name="Anima"),
    "flux.model.Flux": Family("Flux", positions=True),
    "chroma.model.Chroma": Family("Chroma"),
    "qwen_image.model.QwenImageTransformer2DModel": Family("Qwen-Image", texts=(CONTEXT, MASK), positions=True),
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": Family("SD3"),
    "hidream.model.HiDreamImageTransformer2DModel": Family(
        "HiDream", texts=(CONTEXT, LLAMA), parts=(CONTEXT, LLAMA, LLAMA), picture_first=True
    ),
    "lumina.model.NextDiT": Family(
        "Z-Image or Lumina 2", pairs=True, keeps_length=True, refiners=lambda dit: len(dit.context_refiner)
    ),
    "hunyuan_video.model.HunyuanVideo": Family(
        "HunyuanVideo or HunyuanImage",
        pairs=True,
        texts=(CONTEXT, MASK),
        refiners=lambda dit: len(dit.txt_in.individual_token_refiner.blocks),
        around=_around_hunyuan,
    ),
}

# Class in comfy.model_base -> why it is out, although its transformer is in the table.
APART = {"LongCatImage": "the length of its text moves the picture"}
# Class in comfy.ldm whose attention ComfyUI keeps from patches: no transformer_options reach it.
OUT_OF_REACH = {"PixArtMS", "HunYuanDiT", "ErnieImageModel", "AceStepConditionGenerationModel"}


def family_of(model) -> Family:
    """The row of a MODEL, or a ValueError that names the model and what works."""
    base, dit = model.model, model.model.diffusion_model
    family = FAMILIES.get(f"{type(dit).__module__.removeprefix('comfy.ldm.')}.{type(dit).__name__}")
    reason = APART.get(type(base).__name__)
    if family is None:
        known = type(dit).__name__ in OUT_OF_REACH
        reason = "ComfyUI lets no patch into its attention" if known else "how its text meets the picture is not known"
    elif getattr(dit, "context_processor", None) is not None:
        reason = "its text goes through attention of its own first"  # no published SD3 does
    if reason:
        names = ", ".join(dict.fromkeys(one.name for one in FAMILIES.values()))
        raise ValueError(
            f"This model is a {type(dit).__name__} ({type(base).__name__}), and LCM Negative Prompt cannot work on it: "
            f"{reason}. It works on UNets with cross-attention (SD 1.x, SD 2.x, SDXL, SSD-1B) and on {names}. For this "
            "one use cfg above 1."
        )
    if family.positions and not _reads(dit, "post_input"):
        family = replace(family, pairs=True)  # Qwen-Image in ComfyUI before 0.30
    return family


def _reads(dit, patch: str) -> bool:
    """Whether this version of a transformer looks for patches of that name."""
    methods = (getattr(type(dit), name, None) for name in ("_forward", "forward_orig"))
    return any(patch in method.__code__.co_consts for method in methods if method is not None)
