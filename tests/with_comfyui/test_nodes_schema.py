"""The contract of the nodes: saved workflows depend on every id, type and default here."""

import asyncio
import inspect
import re

import pytest
from comfy_api.latest import io
from PIL import Image

from lcm_kit.host.door.choices import is_dynamic_choice, keys, with_all_inside
from lcm_kit.host.door.node import Node
from lcm_kit.host.page import plain
from lcm_kit.nodes import LCMKitExtension
from lcm_kit.tests.helpers import ROOT

# node id -> (display name, required inputs in widget order, optional inputs, output types);
# an input is (id, type, default), default None where it has none
STRENGTHS = [(f"strength_{n}", "FLOAT", 1.0) for n in range(1, 5)]
LORAS = [(f"lora_{n}", "LORA_MODEL", None) for n in range(1, 5)]
CHOICE = "COMFY_DYNAMICCOMBO_V3"
SEED, DENSE = ("seed", "INT", 0), ("dense", "BOOLEAN", False)
CONTRACT = {
    "LCMKitKSampler": (
        "LCM KSampler",
        [
            ("model", "MODEL", None),
            ("positive", "CONDITIONING", None),
            ("latent_image", "LATENT", None),
            ("seed", "INT", 0),
            ("steps", "INT", 4),
            ("cfg", "FLOAT", 1.0),
            ("denoise", "FLOAT", 1.0),
            ("gamma", "FLOAT", 1.0),
            ("cfg_steps", "INT", -1),
            ("original_steps", "INT", 50),
        ],
        [
            ("negative", "CONDITIONING", None),
            ("gammas", "STRING", ""),
            ("preset", "LCM_PRESET", None),
            ("start_at_step", "INT", 0),
            ("end_at_step", "INT", 1000),
            ("add_noise", "BOOLEAN", True),
            ("return_with_leftover_noise", "BOOLEAN", False),
            ("model_low", "MODEL", None),
            ("boundary", "FLOAT", 0.875),
            ("clip", "CLIP", None),
        ],
        ["LATENT"],
    ),
    "LCMKitEdit": (
        "LCM Edit (no inversion)",
        [
            ("model", "MODEL", None),
            ("source", "CONDITIONING", None),
            ("target", "CONDITIONING", None),
            ("latent_image", "LATENT", None),
            ("seed", "INT", 0),
            ("steps", "INT", 4),
            ("cfg", "FLOAT", 1.0),
            ("denoise", "FLOAT", 1.0),
            ("original_steps", "INT", 50),
            ("keep", "FLOAT", 0.2),
        ],
        [("preset", "LCM_PRESET", None)],
        ["LATENT"],
    ),
    "LCMKitSampler": (
        "LCM Multistep Sampler",
        [("gamma", "FLOAT", 1.0), ("seed", "INT", -1)],
        [
            ("gammas", "STRING", ""),
            ("preset", "LCM_PRESET", None),
            ("sigmas", "SIGMAS", None),
            ("s_noise", "FLOAT", 1.0),
            ("s_noise_end", "FLOAT", 1.0),
            ("noise_clip_std", "FLOAT", 0.0),
        ],
        ["SAMPLER"],
    ),
    "LCMKitPreset": (
        "LCM Preset (TCD, DMD2, Hyper, Lightning, Turbo)",
        [("name", "COMBO", "LCM"), ("steps", "INT", 0)],
        [],
        ["LCM_PRESET", "INT", "FLOAT", "STRING"],
    ),
    "LCMKitScheduler": (
        "LCM Scheduler",
        [
            ("model", "MODEL", None),
            ("steps", "INT", 4),
            ("denoise", "FLOAT", 1.0),
            ("original_steps", "INT", 50),
            ("timesteps", "STRING", ""),
        ],
        [("preset", "LCM_PRESET", None)],
        ["SIGMAS"],
    ),
    "LCMKitAnyKSampler": (
        "LCM for any KSampler",
        [("model", "MODEL", None), ("gamma", "FLOAT", 1.0), ("original_steps", "INT", 50)],
        [("gammas", "STRING", ""), ("preset", "LCM_PRESET", None)],
        ["MODEL"],
    ),
    "LCMKitGrid": (
        "LCM Grid (XY plot)",
        [
            ("model", "MODEL", None),
            ("latent_image", "LATENT", None),
            ("vae", "VAE", None),
            ("row_axis", "COMBO", "strength of lora"),
            ("rows", "STRING", "0, 0.4, 0.8, 1.2"),
            ("column_axis", "COMBO", "steps"),
            ("columns", "STRING", "1, 2, 4, 8"),
            ("seed", "INT", 0),
            ("steps", "INT", 4),
            ("cfg", "FLOAT", 1.0),
        ],
        [
            ("positive", "CONDITIONING", None),
            ("negative", "CONDITIONING", None),
            ("lora", "LORA_MODEL", None),
            ("clip", "CLIP", None),
            ("preset", "LCM_PRESET", None),
            ("prompt", "STRING", ""),
            ("denoise", "FLOAT", 1.0),
            ("gamma", "FLOAT", 1.0),
            ("cell", "INT", 512),
        ],
        ["IMAGE", "IMAGE", "STRING", "STRING"],
    ),
    "LCMKitLoader": (
        "LCM-LoRA Loader",
        [
            ("model", "MODEL", None),
            ("lora_name", "COMBO", None),
            ("strength_model", "FLOAT", 1.0),
            ("wrong_base", "COMBO", "refuse"),
        ],
        [("clip", "CLIP", None), ("lora_stack", "LORA_STACK", None)],
        ["MODEL", "CLIP", "LCM_PRESET", "LORA_MODEL", "INT", "FLOAT", "STRING"],
    ),
    "LCMKitLoadLoRA": ("Load LoRA (weights)", [("lora_name", "COMBO", None)], [], ["LORA_MODEL", "STRING"]),
    "LCMKitLoRAMix": (
        "LoRA Mix (LoRA stack)",
        [
            ("model", "MODEL", None),
            ("lcm_lora", "COMBO", "auto"),
            ("lcm_strength", "FLOAT", 1.0),
            *(
                (f"{name}_{n}", kind, default)
                for n in range(1, 5)
                for name, kind, default in (
                    ("on", "BOOLEAN", True),
                    ("lora", "COMBO", "none"),
                    ("strength", "FLOAT", 1.0),
                )
            ),
            ("block_strengths", "STRING", ""),
            ("wrong_base", "COMBO", "refuse"),
        ],
        [("clip", "CLIP", None)],
        ["MODEL", "CLIP", "LORA_MODEL", "LCM_PRESET", "LORA_STACK", "STRING"],
    ),
    "LCMKitMergeLoRA": (
        "Merge LoRAs (add, TIES, DARE)",
        [*STRENGTHS, ("method", CHOICE, None), ("size", CHOICE, None)],
        [
            *LORAS,
            ("balanced", "BOOLEAN", False),
            ("protect", "COMBO", "auto"),
            ("mu", "FLOAT", 0.0),
            ("block_strengths", "STRING", ""),
            ("model", "MODEL", None),
        ],
        ["LORA_MODEL", "STRING"],
    ),
    "LCMKitResizeLoRA": (
        "Resize LoRA",
        [("lora", "LORA_MODEL", None), ("size", CHOICE, None), ("dtype", "COMBO", "fp16")],
        [],
        ["LORA_MODEL", "STRING"],
    ),
    "LCMKitApplyLoRA": (
        "Apply LoRA (weights)",
        [
            ("model", "MODEL", None),
            ("lora", "LORA_MODEL", None),
            ("strength_model", "FLOAT", 1.0),
            ("strength_clip", "FLOAT", 1.0),
        ],
        [("clip", "CLIP", None), ("wrong_base", "COMBO", "refuse")],
        ["MODEL", "CLIP", "STRING"],
    ),
    "LCMKitLoRAByStep": (
        "LoRA by Step",
        [
            ("model", "MODEL", None),
            ("lora", "LORA_MODEL", None),
            ("positive", "CONDITIONING", None),
            ("strengths", "STRING", "1, 1, 0, 0"),
        ],
        [("negative", "CONDITIONING", None)],
        ["CONDITIONING", "CONDITIONING", "HOOKS", "STRING"],
    ),
    "LCMKitSaveLoRA": (
        "Save LoRA",
        [
            ("lora", "LORA_MODEL", None),
            ("filename_prefix", "STRING", "LCMKit/merged"),
            ("dtype", "COMBO", "fp16"),
            ("format", "COMBO", "auto"),
            ("output_name_mode", "COMBO", "increment"),
        ],
        [("title", "STRING", ""), ("author", "STRING", ""), ("trigger_words", "STRING", "")],
        ["STRING"],
    ),
    "LCMKitCompareLoRA": (
        "Compare LoRAs",
        [*STRENGTHS, ("rank", "INT", 0)],
        [*LORAS, ("model", "MODEL", None)],
        ["IMAGE", "STRING"],
    ),
    "LCMKitExtractLoRA": (
        "Extract LoRA",
        [("model_tuned", "MODEL", None), ("model_base", "MODEL", None), ("rank", "INT", 64), ("keep", "FLOAT", 1.0)],
        [("clip_tuned", "CLIP", None), ("clip_base", "CLIP", None)],
        ["LORA_MODEL", "STRING"],
    ),
    "LCMKitNegativePrompt": (
        "LCM Negative Prompt (NAG, cfg 1)",
        [
            ("model", "MODEL", None),
            ("negative", "CONDITIONING", None),
            ("scale", "FLOAT", 3.0),
            ("tau", "FLOAT", 2.5),
            ("alpha", "FLOAT", 0.5),
            ("end_step", "INT", -1),
        ],
        [],
        ["MODEL"],
    ),
    "LCMKitGuidanceEmbedding": (
        "LCM Guidance Embedding",
        [("model", "MODEL", None), ("unet_name", "COMBO", None), ("guidance", "FLOAT", 8.0)],
        [],
        ["MODEL"],
    ),
    "LCMKitLimitDenoised": (
        "Limit Denoised (dynamic thresholding)",
        [("model", "MODEL", None), ("quantile", "FLOAT", 0.95)],
        [],
        ["MODEL"],
    ),
    "LCMKitDistill": (
        "Distill LCM-LoRA",
        [
            ("model", "MODEL", None),
            ("positive", "CONDITIONING", None),
            ("negative", "CONDITIONING", None),
            ("steps", "INT", 1000),
            ("batch", "INT", 4),
            ("accumulate", "INT", 1),
            ("rank", "INT", 64),
            ("alpha", "FLOAT", 0.0),
            ("learning_rate", "FLOAT", 1e-4),
            ("guidance_min", "FLOAT", 8.5),
            ("guidance_max", "FLOAT", 8.5),
            ("skip", "INT", 20),
            ("seed", "INT", 0),
            ("samples", "INT", 64),
            ("width", "INT", 512),
            ("height", "INT", 512),
            ("dtype", "COMBO", "auto"),
            ("gradient_checkpointing", "BOOLEAN", True),
            ("resume", "STRING", "auto"),
        ],
        [
            ("latent", "LATENT", None),
            ("vae", "VAE", None),
            ("original_steps", "INT", 0),
            ("weighting", "COMBO", "x0"),
            ("average", "FLOAT", 0.0),
            ("save_every", "INT", 100),
            ("validation", "CONDITIONING", None),
            ("caption_dropout", "FLOAT", 0.0),
            ("optimizer", "COMBO", "adamw"),
            ("tf32", "BOOLEAN", False),
            ("start_from", "LORA_MODEL", None),
            ("phases", "INT", 1),
            ("recipe", "COMBO", "none"),
            ("compile", "BOOLEAN", False),
        ],
        ["LORA_MODEL", "IMAGE", "STRING"],
    ),
}

# node id -> input -> option -> its own inputs
CHOICES = {
    "LCMKitMergeLoRA": {
        "method": {
            "linear": [],
            "average": [],
            "ties": [("density", "FLOAT", 0.2), DENSE],
            "dare": [("density", "FLOAT", 0.9), SEED, DENSE],
            "dare_ties": [("density", "FLOAT", 0.9), SEED, DENSE],
            "della": [("density", "FLOAT", 0.9), ("spread", "FLOAT", 0.3), SEED, DENSE],
            "della_ties": [("density", "FLOAT", 0.9), ("spread", "FLOAT", 0.3), SEED, DENSE],
            "magnitude": [("density", "FLOAT", 0.5), DENSE],
            "breadcrumbs": [("density", "FLOAT", 0.9), ("outliers", "FLOAT", 0.01), DENSE],
            "slerp": [],
            "tsv": [],
        },
        "size": {
            "exact": [],
            "rank": [("rank", "INT", 64)],
            "keep": [("keep", "FLOAT", 0.98)],
            "retain": [("retain", "FLOAT", 0.9)],
            "file size": [("max_mb", "FLOAT", 100.0)],
        },
    },
    "LCMKitResizeLoRA": {
        "size": {
            "rank": [("rank", "INT", 32)],
            "keep": [("keep", "FLOAT", 0.98)],
            "file size": [("max_mb", "FLOAT", 100.0)],
        },
    },
}

NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(LCMKitExtension().get_node_list())}


def described(inputs):
    return [(name, kind, options.get("default")) for name, (kind, options) in inputs.items()]


def test_the_extension_offers_exactly_the_contract():
    assert NODES.keys() == CONTRACT.keys()


@pytest.mark.parametrize("node_id", CONTRACT)
def test_inputs_and_outputs_are_those_of_the_contract(node_id):
    """Saved workflows hold the values of widgets by their order, which is that of the contract; links by name."""
    info = NODES[node_id].GET_NODE_INFO_V1()
    name, required, optional, outputs = CONTRACT[node_id]
    assert (info["display_name"], info["output"]) == (name, outputs)
    needed, free = described(info["input"]["required"]), described(info["input"].get("optional", {}))
    assert sorted(needed + free, key=str) == sorted(required + optional, key=str)
    assert needed == [entry for entry in required if entry[2] is None and entry[1] != CHOICE]
    widgets = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", CHOICE)
    assert [entry for entry in needed + free if entry[1] in widgets] == [
        entry for entry in required + optional if entry[1] in widgets
    ]


def test_each_option_of_a_choice_has_the_inputs_of_the_contract():
    found = {}
    for node_id, node in NODES.items():
        groups = node.GET_NODE_INFO_V1()["input"]
        for name, (kind, options) in (groups["required"] | groups.get("optional", {})).items():
            if kind == CHOICE:
                found.setdefault(node_id, {})[name] = {
                    option["key"]: described(option["inputs"]["required"] | option["inputs"].get("optional", {}))
                    for option in options["options"]
                }
    assert found == CHOICES


@pytest.mark.parametrize("node_id", CONTRACT)
def test_an_api_client_may_leave_out_whatever_has_a_default(node_id):
    """It is then the default that the node runs with, also where its function has none or the client sends null."""
    node, schema = NODES[node_id], NODES[node_id].GET_SCHEMA()
    defaults = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None}
    assert {entry.id for entry in schema.inputs if not entry.optional}.isdisjoint(defaults)
    seen = []

    class Same(Node):
        define_schema = classmethod(lambda cls: schema)

        @classmethod
        def execute(cls, **inputs):
            seen.append(inputs)

    # A choice with inputs of its own has to be made, for ComfyUI leaves a misspelt one out.
    chosen = {entry.id: option for entry in schema.inputs if is_dynamic_choice(entry) for option in keys(entry)}
    Same.execute(**chosen)
    Same.execute(**chosen, **dict.fromkeys(defaults, [None] if schema.is_input_list else None))
    expected = {name: [value] if schema.is_input_list else value for name, value in defaults.items()}
    for entry in filter(is_dynamic_choice, schema.inputs):
        (inside,) = (option.inputs for option in entry.options if option.key == chosen[entry.id])
        expected[entry.id] = {entry.id: chosen[entry.id]} | {own.id: own.default for own in inside}
    assert seen == [expected, expected]
    inspect.signature(node.execute).bind(**expected | {entry.id: None for entry in schema.inputs if not entry.optional})


@pytest.mark.parametrize("node_id", CONTRACT)
def test_execute_takes_every_input(node_id):
    """A renamed parameter would show only when the node runs."""
    names = [entry.id for entry in NODES[node_id].GET_SCHEMA().inputs]
    inspect.signature(NODES[node_id].execute).bind(**dict.fromkeys(names))


@pytest.mark.parametrize("node_id", CONTRACT)
def test_every_node_explains_itself(node_id):
    schema = NODES[node_id].GET_SCHEMA()
    assert schema.description
    assert schema.category.startswith("LCM Kit/")
    inputs = list(with_all_inside(schema.inputs))
    untold = [entry.id for entry in inputs if not entry.tooltip]
    assert untold == []
    page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    missing = [entry.id for entry in inputs if f"`{entry.id}`" not in page and entry.id[-1] not in "234"]
    assert missing == []


def test_every_help_page_belongs_to_a_node():
    assert {page.stem for page in (ROOT / "web" / "docs").iterdir()} == NODES.keys()


def texts_in(value):
    """Every text in an answer of the server."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)


@pytest.mark.parametrize("node_id", CONTRACT)
def test_what_a_page_knows_of_a_node_is_no_markup(node_id):
    """Names, tooltips and choices; the page draws descriptions as Markdown and what a search finds as HTML."""
    texts = list(texts_in(NODES[node_id].GET_NODE_INFO_V1()))
    assert len(texts) > 5
    assert [text for text in texts if plain(text) != text] == []


def test_help_pages_are_markdown_without_html_or_strange_links():
    for page in (ROOT / "web" / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<[a-zA-Z/!?][^>]*>", text) == [], page.name
        links = re.findall(r"\]\(([^)]*)\)", text)
        assert [link for link in links if not link.startswith("https://") and link != f"{page.stem}.webp"] == [], (
            page.name
        )


@pytest.mark.parametrize("node_id", CONTRACT)
def test_a_help_page_has_its_picture(node_id):
    """If it is missing: make pictures ONLY=the node's id."""
    folder = ROOT / "web" / "docs"
    assert re.findall(r"!\[[^\]]+\]\((.*?)\)", (folder / f"{node_id}.md").read_text(encoding="utf-8")) == [
        f"{node_id}.webp"
    ]
    picture = folder / f"{node_id}.webp"
    assert picture.stat().st_size <= 60_000
    with Image.open(picture) as opened:
        assert opened.width >= 250


@pytest.mark.parametrize("node_id", CONTRACT)
def test_a_report_is_there_again_where_the_host_can_do_it(node_id):
    schema = NODES[node_id].GET_SCHEMA()
    if not hasattr(io.Schema, "has_intermediate_output"):
        pytest.skip("a newer ComfyUI sends the report of a cached node again")
    assert schema.has_intermediate_output


def test_the_seed_of_the_sampler_node_is_not_randomised_by_the_page():
    """The page adds "control after generate" to every widget called seed, unless told not to."""
    seed = NODES["LCMKitSampler"].GET_NODE_INFO_V1()["input"]["optional"]["seed"][1]
    assert seed["control_after_generate"] is False
