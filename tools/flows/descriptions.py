"""The example workflows in the order of their numbers, which their names begin with."""

from . import beside, flow_models, lora_work, sd15, sdxl
from .flow import Flow


def _numbered(flows: list[Flow]) -> list[Flow]:
    for number, flow in enumerate(flows, start=1):
        flow.name = f"{number} {flow.name}"
    return flows


FLOWS = _numbered([*sd15.FLOWS, *sdxl.FLOWS, *flow_models.FLOWS, *lora_work.FLOWS, *beside.FLOWS])
