"""The example workflows in the order of their numbers."""

from . import flow_models, lora_work, sd15, sdxl

FLOWS = [*sd15.FLOWS, *sdxl.FLOWS, *flow_models.FLOWS, *lora_work.FLOWS]
