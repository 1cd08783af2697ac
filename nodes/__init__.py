"""The nodes of LCM Kit: every node class of these files, in their order."""

from types import ModuleType

from comfy_api.latest import ComfyExtension, io

from ..host.reports import for_pages, listen
from . import (
    any_ksampler,
    by_step,
    comparing,
    distilling,
    editing,
    extracting,
    grid,
    guidance,
    loading,
    merging,
    mix,
    sampling,
    scheduling,
)

FILES = (
    sampling,
    scheduling,
    any_ksampler,
    grid,
    editing,
    loading,
    mix,
    by_step,
    merging,
    comparing,
    extracting,
    guidance,
    distilling,
)


def _nodes_of(file: ModuleType) -> list[type[io.ComfyNode]]:
    found = [one for one in vars(file).values() if isinstance(one, type) and one.__module__ == file.__name__]
    return [one for one in found if issubclass(one, io.ComfyNode)]


listen()
NODES = [for_pages(node) for file in FILES for node in _nodes_of(file)]


class LCMKitExtension(ComfyExtension):
    """What ComfyUI asks for at start-up."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
