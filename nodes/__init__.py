"""The nodes of LCM Kit: this list is the table of contents."""

from comfy_api.latest import ComfyExtension, io

from ..host.page import for_pages
from .any_ksampler import LCMAnyKSampler
from .by_step import LoRAByStep
from .comparing import CompareLoRA
from .distilling import Distill
from .editing import LCMEdit
from .extracting import ExtractLoRA
from .grid import LCMGrid
from .guidance import LCMGuidanceEmbedding, LCMNegativePrompt, LimitDenoised
from .loading import ApplyLoRA, LCMLoader, LoadLoRA
from .merging import MergeLoRA, ResizeLoRA, SaveLoRA
from .sampling import LCMKSampler, LCMSampler
from .scheduling import LCMPreset, LCMScheduler

NODES = [
    for_pages(node)
    for node in (
        LCMKSampler,
        LCMEdit,
        LCMSampler,
        LCMScheduler,
        LCMPreset,
        LCMAnyKSampler,
        LCMGrid,
        LCMLoader,
        LoadLoRA,
        MergeLoRA,
        ResizeLoRA,
        ApplyLoRA,
        LoRAByStep,
        SaveLoRA,
        CompareLoRA,
        ExtractLoRA,
        LCMNegativePrompt,
        LCMGuidanceEmbedding,
        LimitDenoised,
        Distill,
    )
]


class LCMKitExtension(ComfyExtension):
    """What ComfyUI asks for at start-up."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
