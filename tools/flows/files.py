"""The model files of the example workflows, each with the address it is downloaded from.

Acceleration LoRAs are those of lora_merge/recognise/catalogue.py; the others are where ComfyUI's own workflow templates
have them from.
"""

from __future__ import annotations

from ...lora_merge.recognise.catalogue import PUBLISHED

_SITE = "https://huggingface.co"


class ModelFile(str):
    """A file's name in ComfyUI's models folder. url: where it is; directory: the folder it belongs into."""

    url: str
    directory: str

    def __new__(cls, name: str, url: str, directory: str) -> ModelFile:
        file = super().__new__(cls, name)
        file.url, file.directory = url, directory
        return file


def _published(preset: str, base: str, name: str = "", expert: str | None = None, has: str = "") -> ModelFile:
    """A LoRA of the catalogue. name: what to keep it as, where its own says nothing; has: what its own name holds."""
    (entry,) = (e for e in PUBLISHED if (e.preset, e.base, e.expert) == (preset, base, expert) and has in e.file)
    file = entry.file.rpartition("/")[2]
    return ModelFile(name or file, f"{entry.link}/resolve/main/{entry.file}", "loras")


def _hosted(repository: str, path: str, directory: str) -> ModelFile:
    return ModelFile(path.rpartition("/")[2], f"{_SITE}/{repository}/resolve/main/{path}", directory)


def _split(repository: str, directory: str, name: str) -> ModelFile:
    return _hosted(f"Comfy-Org/{repository}", f"split_files/{directory}/{name}", directory)


SD15 = _hosted("Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors", "checkpoints")
SDXL = _hosted("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors", "checkpoints")
SDXL_TURBO = _hosted("stabilityai/sdxl-turbo", "sd_xl_turbo_1.0_fp16.safetensors", "checkpoints")

FLUX_SCHNELL = _hosted("Comfy-Org/flux1-schnell", "flux1-schnell-fp8.safetensors", "checkpoints")
CANNY_SD15 = _hosted(
    "comfyanonymous/ControlNet-v1-1_fp16_safetensors", "control_v11p_sd15_canny_fp16.safetensors", "controlnet"
)

STYLE = ModelFile(
    "MoXinV1.safetensors",
    "https://civitai.com/api/download/models/14856?type=Model&format=SafeTensor&size=full&fp=fp16",
    "loras",
)

LCM_SD15 = _published("LCM", "SD1.5", "lcm-lora-sdv1-5.safetensors")
LCM_SDXL = _published("LCM", "SDXL", "lcm-lora-sdxl.safetensors", has="pytorch_lora_weights")
ANIMATELCM = _hosted("wangfuyun/AnimateLCM", "AnimateLCM_sd15_t2v_lora.safetensors", "loras")
ANIMATELCM_MOTION = _hosted(
    "conrevo/AnimateDiff-A1111", "motion_module/mm_sd15_AnimateLCM.safetensors", "animatediff_models"
)
LIGHTNING = _published("Lightning 4 steps", "SDXL")
HYPER = _published("Hyper-SD 4 steps", "SDXL")
DMD2 = _published("DMD2", "SDXL", has="fp16")

QWEN = _split("Qwen-Image_ComfyUI", "diffusion_models", "qwen_image_fp8_e4m3fn.safetensors")
QWEN_TEXT = _split("Qwen-Image_ComfyUI", "text_encoders", "qwen_2.5_vl_7b_fp8_scaled.safetensors")
QWEN_VAE = _split("Qwen-Image_ComfyUI", "vae", "qwen_image_vae.safetensors")
QWEN_LIGHTNING = _published("Qwen-Image-Lightning 4 steps", "Qwen-Image", has="Qwen-Image-Lightning-4steps-V1.0.s")

Z_IMAGE = _split("z_image_turbo", "diffusion_models", "z_image_turbo_bf16.safetensors")
Z_IMAGE_TEXT = _split("z_image_turbo", "text_encoders", "qwen_3_4b.safetensors")
Z_IMAGE_VAE = _split("z_image_turbo", "vae", "ae.safetensors")

_WAN = "Wan_2.2_ComfyUI_Repackaged"
WAN_HIGH = _split(_WAN, "diffusion_models", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors")
WAN_LOW = _split(_WAN, "diffusion_models", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors")
WAN_TEXT = _split("Wan_2.1_ComfyUI_repackaged", "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
WAN_VAE = _split(_WAN, "vae", "wan_2.1_vae.safetensors")
WAN_LORA_HIGH = _published("Wan 2.2 lightx2v", "Wan 2.1/2.2 14B", expert="high", has="t2v_lightx2v")
WAN_LORA_LOW = _published("Wan 2.2 lightx2v", "Wan 2.1/2.2 14B", expert="low", has="t2v_lightx2v")
