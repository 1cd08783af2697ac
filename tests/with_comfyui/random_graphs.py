"""Random workflows from the nodes' own descriptions: our nodes, and those of ComfyUI that feed them, on the demo's model.

Most values are legal, some lie at an end of their range, and at most one of a workflow is none that its input takes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# kind of link -> (class, output) of what makes it; the first is the shortest way
MAKERS = {
    "MODEL": [("CheckpointLoaderSimple", 0), ("LCMKitLoader", 0), ("LCMKitApplyLoRA", 0), ("LCMKitLimitDenoised", 0),
              ("LCMKitNegativePrompt", 0), ("ModelSamplingDiscrete", 0)],
    "CLIP": [("CheckpointLoaderSimple", 1), ("LCMKitLoader", 1), ("LCMKitApplyLoRA", 1)],
    "VAE": [("VAELoader", 0)],
    "CONDITIONING": [("CLIPTextEncode", 0), ("ConditioningZeroOut", 0), ("ConditioningCombine", 0)],
    "LATENT": [("EmptyLatentImage", 0), ("LCMKitKSampler", 0), ("LCMKitEdit", 0), ("VAEEncode", 0), ("SamplerCustom", 0)],
    "IMAGE": [("VAEDecode", 0), ("LCMKitDistill", 1)],
    "LORA_MODEL": [("LCMKitLoadLoRA", 0), ("LCMKitMergeLoRA", 0), ("LCMKitResizeLoRA", 0), ("LCMKitExtractLoRA", 0),
                   ("LCMKitDistill", 0), ("LCMKitLoader", 3)],
    "LCM_PRESET": [("LCMKitPreset", 0), ("LCMKitLoader", 2)],
    "SAMPLER": [("LCMKitSampler", 0), ("KSamplerSelect", 0)],
    "SIGMAS": [("LCMKitScheduler", 0)],
}  # fmt: skip
NONE = ("CheckpointLoaderSimple", "VAE")
CHOICE = "COMFY_DYNAMICCOMBO_V3"
# Values of ComfyUI's own nodes, and of ours where a random text would mean nothing.
GIVEN = {
    "ckpt_name": ["tiny_emoji.safetensors"], "vae_name": ["tiny_emoji_vae.safetensors"], "text": ["cat face", "", "owl"],
    "sampling": ["eps", "lcm"], "zsnr": [False], "sampler_name": ["euler", "lcm"], "add_noise": [True],
    "noise_seed": [0, 7], "width": [64], "height": [64], "batch_size": [1, 2],
    "lora_name": ["tiny_emoji_lcm_lora.safetensors", "tiny_emoji_ink_lora.safetensors"],
    "unet_name": ["tiny_emoji.safetensors"],
    "filename_prefix": ["test_graphs", "test/graphs", " test_graphs.safetensors", "../test", "", "CON", "test\n"],
    "output_name_mode": ["increment", "exact name"],
    "resume": ["", "", "", "test a", "test.latents", "../x"],
    "gammas": ["", "0, 1", "0.3", "2", "nan", "1,,", "0 " * 2000],
    "timesteps": ["", "999, 499", "1, 2", "-1", "x", "inf", "1" * 60],
    "block_strengths": ["", "down=0.5", "lora_2: up=0.3", "mid=nan", "te=0", "x", "unet=1e999", "lora_9: mid=1"],
}  # fmt: skip
# Not what is allowed, but how much work it makes: the end of a range, and of what is tried.
MOST = {"steps": 6, "batch": 2, "accumulate": 2, "samples": 2, "rank": 80, "original_steps": 1000, "cfg_steps": 1000}
# So these are always given: what they are by default would be more.
ALWAYS = {*MOST, "width", "height", "clip"}
ILLEGAL = {
    "FLOAT": [math.nan, math.inf, -math.inf, 1e30, -1e30, None, "x", {}],
    "INT": [math.nan, 10**30, -(10**30), None, "x", {}],
    "STRING": ["a\0b", "\ud800", "x" * 200_000],
    "COMBO": ["nonsense", None, 5, "", math.nan, {"a": 1}],
    "BOOLEAN": [],  # ComfyUI makes a truth of anything
    "LINK": ["x", 5, math.nan, True, {}, None],
}


@dataclass
class Graph:
    """nodes: the workflow in API format.   planted: (node, input) of the illegal value, or None."""

    nodes: dict[str, Any] = field(default_factory=dict)
    planted: tuple[str, str] | None = None


class Maker:
    """info: the server's object_info.   seed: of everything that is drawn.
    alone: every link by the shortest way, every value as it is by default, and nothing optional.
    """

    def __init__(self, info: Mapping[str, Any], seed: object, *, alone: bool = False):
        self.info, self.alone = info, alone
        self.random = random.Random(f"{seed}")
        self.graph = Graph()

    def make(self, target: str) -> Graph:
        """A workflow around a node of this class, shown in a Preview Any if it shows nothing itself."""
        node = self.node(target, depth=0)
        if self.random.random() < 0.4:
            self.plant(node, target)
        return self.make_visible(node, target)

    def make_visible(self, node: str, kind: str) -> Graph:
        """The workflow so far, with what makes ComfyUI run this node."""
        outputs = self.info[kind]["output"]
        if outputs[0] in ("SAMPLER", "SIGMAS"):
            self.sampled(node, outputs[0])
        elif not self.info[kind]["output_node"]:
            # A report if there is one: Preview Any needs half a minute to write out a LoRA's tensors.
            self.add("PreviewAny", {"source": [node, outputs.index("STRING") if "STRING" in outputs else 0]})
        return self.graph

    def sampled(self, node: str, output: str) -> None:
        """SamplerCustom around a SAMPLER or SIGMAS."""
        custom = self.node("SamplerCustom", depth=1, ready={output: [node, 0]})
        self.add("PreviewAny", {"source": [custom, 0]})

    def node(self, kind: str, depth: int, ready: Mapping[str, Any] | None = None) -> str:
        """Adds a node and all that feeds it. ready: kind of link -> the link to use."""
        values: dict[str, Any] = {}
        for group in ("required", "optional"):
            for name, (type_, *more) in self.info[kind]["input"].get(group, {}).items():
                # Where no CLIP goes in, none comes out, and CLIP Text Encode has words of its own for that.
                if (
                    group == "optional"
                    and name not in ALWAYS
                    and type_ != CHOICE
                    and (self.alone or self.random.random() < 0.5)
                ):
                    continue
                options = dict(more[0]) if more else {}
                if isinstance(type_, list):  # a choice, as nodes of the older kind have it
                    type_, options["options"] = "COMBO", type_
                if type_ == CHOICE:
                    values |= self.choice(kind, name, options, depth)
                    continue
                values[name] = (ready or {}).get(type_) or self.value(kind, name, type_, options, depth)
        return self.add(kind, {name: value for name, value in values.items() if value is not None})

    def choice(self, kind: str, name: str, options: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """A choice with inputs of its own, and these under dotted names."""
        option = options["options"][0] if self.alone else self.random.choice(options["options"])
        found = {name: option["key"]}
        for group in option["inputs"].values():
            for own, (type_, *more) in group.items():
                found[f"{name}.{own}"] = self.value(kind, own, type_, more[0] if more else {}, depth)
        return found

    def add(self, kind: str, values: dict[str, Any]) -> str:
        name = str(len(self.graph.nodes) + 1)
        self.graph.nodes[name] = {"class_type": kind, "inputs": values}
        return name

    def value(self, kind: str, name: str, type_: str, options: Mapping[str, Any], depth: int) -> Any:
        draw = self.random
        if name in GIVEN and self.alone:
            return GIVEN[name][0]
        if name in GIVEN and not (kind == "LCMKitDistill" and name in ("width", "height")):
            return draw.choice(GIVEN[name])
        if type_ == "COMBO":
            return options.get("default", options["options"][0]) if self.alone else draw.choice(options["options"])
        if kind == "VAEDecode" and type_ == "LATENT":  # an empty latent has other channels until it is sampled
            return [self.node("LCMKitKSampler", depth + 1), 0]
        if type_ in MAKERS:
            return self.link(type_, depth)
        if type_ == "BOOLEAN":
            return options.get("default", False) if self.alone else draw.random() < 0.5
        if type_ not in ("INT", "FLOAT"):
            return "" if type_ == "STRING" else None
        return self.number(name, type_, options)

    def number(self, name: str, type_: str, options: Mapping[str, Any]) -> float:
        draw = self.random
        low, high = options["min"], min(options["max"], MOST.get(name, options["max"]))
        default = min(options.get("default", low), high)
        if name in ("width", "height"):
            return 64
        if self.alone:
            return low if name in MOST else default
        if draw.random() < 0.5:
            return default
        if draw.random() < 0.4:
            return draw.choice([low, high, min(high, low + options.get("step", 1))])
        return draw.randint(low, high) if type_ == "INT" else draw.uniform(max(low, -3), min(high, 3))

    def link(self, type_: str, depth: int) -> list[Any]:
        """A link to an earlier node with such an output, or to a new one."""
        there = [
            [name, self.info[node["class_type"]]["output"].index(type_)]
            for name, node in self.graph.nodes.items()
            # The demo's checkpoint has no VAE.
            if type_ in self.info[node["class_type"]]["output"] and (node["class_type"], type_) != NONE
        ]
        if there and (self.alone or self.random.random() < 0.6):
            return self.random.choice(there)
        makers = MAKERS[type_][: 1 if depth > 2 or self.alone else None]
        kind, output = self.random.choice(makers)
        if kind == "LCMKitDistill" and depth > 0 and self.random.random() < 0.8:
            kind, output = makers[0]
        return [self.node(kind, depth + 1), output]

    def plant(self, node: str, kind: str) -> None:
        """An illegal value in place of one of the node's."""
        inputs = self.graph.nodes[node]["inputs"]
        described = self.info[kind]["input"]
        types = {
            name: entry[0] for group in described.values() if isinstance(group, dict) for name, entry in group.items()
        }
        name = self.random.choice(sorted(inputs))
        type_ = "COMBO" if isinstance(types.get(name), list) or types.get(name) == CHOICE else types.get(name)
        if type_ is None:  # an input of an option
            return
        values = ILLEGAL.get(type_, ILLEGAL["LINK"])
        if name in described.get("optional", {}) and types[name] != CHOICE:  # null is nothing connected there
            values = [value for value in values if value is not None]
        if values:
            inputs[name] = self.random.choice(values)
            self.graph.planted = (node, name)
