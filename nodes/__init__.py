"""The nodes of LCM Kit: this list is the table of contents."""

from comfy_api.latest import ComfyExtension, io

from .distilling import Distill
from .editing import LCMEdit
from .guidance import LCMGuidanceEmbedding, LCMNegativePrompt, LimitDenoised
from .loading import ApplyLoRA, LCMLoader, LoadLoRA
from .merging import MergeLoRA, ResizeLoRA, SaveLoRA
from .sampling import LCMKSampler, LCMPreset, LCMSampler, LCMScheduler


class LCMKitExtension(ComfyExtension):
    """What ComfyUI asks for at start-up."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LCMKSampler,
            LCMSampler,
            LCMScheduler,
            LCMPreset,
            LCMEdit,
            LCMLoader,
            LoadLoRA,
            MergeLoRA,
            ResizeLoRA,
            ApplyLoRA,
            SaveLoRA,
            LCMNegativePrompt,
            LCMGuidanceEmbedding,
            LimitDenoised,
            Distill,
        ]
