"""Every input of every node, from the schemas, with values that it does not take: an error in words, never another."""

import asyncio
import math
import os

import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_api.latest import io

from lcm_kit.host.door.check import check, name_in_words
from lcm_kit.host.door.choices import is_dynamic_choice, keys
from lcm_kit.host.door.links import KINDS
from lcm_kit.host.door.node import Node, in_the_name_of
from lcm_kit.host.door.paths import without_folders
from lcm_kit.lora_merge import METHODS
from lcm_kit.nodes import LCMKitExtension
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.with_comfyui import tiny

NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(LCMKitExtension().get_node_list())}
INPUTS = [(node_id, entry.id) for node_id, node in NODES.items() for entry in node.GET_SCHEMA().inputs]
LONG = "9" * 10_000_000
OTHERS = [5, 0.5, math.nan, True, "x", "", {}, ("x", 0), object(), ["99", 0]]
NUMBERS = [
    "",
    "x",
    "1",
    LONG,
    "\ud800",
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    None,
    True,
    [],
    {},
    torch.ones(1),
    object(),
]
FILES = ("lora_name", "unet_name")
CHOICE = "COMFY_DYNAMICCOMBO_V3"


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def lora_file(comfy_home):
    folder = comfy_home / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "door_lcm.safetensors"
    safetensors.torch.save_file(tiny.lora(tiny.small_model(), rank=1), path)
    yield path.name
    path.unlink()


@pytest.fixture(scope="module")
def links(vae):
    """A value for every kind of link."""
    model = tiny.small_model()
    return {
        "MODEL": model,
        "CLIP": tiny.tiny_clip(),
        "VAE": vae,
        "CONDITIONING": tiny.cond(1),
        "LATENT": tiny.latent(1, seed=1),
        "LORA_MODEL": tiny.lora(model, rank=1),
        "LCM_PRESET": PRESETS["LCM"],
        "LORA_STACK": [],
        "SIGMAS": torch.linspace(1, 0, 5),
        "IMAGE": torch.zeros(1, 8, 8, 3),
    }


@pytest.fixture(scope="module")
def legal(links, lora_file):
    """(schema) -> a legal value for each of its inputs."""

    def values(schema):
        found = {}
        for entry in schema.inputs:
            kind = str(entry.get_io_type())
            default = entry.options[0] if kind == "COMBO" and entry.options else getattr(entry, "default", None)
            default = keys(entry)[0] if kind == CHOICE else default
            found[entry.id] = links[kind] if kind in links else default
        return found | ({"lora_name": lora_file} if "lora_name" in found else {})

    return values


def illegal(entry, links):
    """Values that the input does not take, by its type."""
    kind = str(entry.get_io_type())
    empty = [] if entry.optional else [None]
    if kind == "FLOAT":
        return [
            *NUMBERS[:9],
            *NUMBERS[10:],
            *empty,
            math.nextafter(entry.min, -math.inf),
            math.nextafter(entry.max, math.inf),
        ]
    if kind == "INT":
        return [*NUMBERS[:9], *NUMBERS[10:], *empty, 1.5, entry.min - 1, entry.max + 1]
    if kind == "BOOLEAN":
        return ["true", "", 2, math.nan, [], {}, object(), *empty]
    if kind == "STRING":
        return [5, math.nan, True, [], {}, b"x", "a\0b", "a\ud800", LONG, object(), *empty]
    if kind == CHOICE:
        wrong = ["nonsense", "", LONG, 0, math.nan, [], {}, object(), None]
        inside = [
            {entry.id: option.key, own.id: value}
            for option in entry.options
            for own in option.inputs
            for value in illegal(own, links)
        ]
        return [*wrong, *({entry.id: value} for value in wrong), *inside]
    if kind == "COMBO":
        return ["nonsense", "", "\ud800", "a\0b", LONG, 0, math.nan, [], {}, object(), *empty]
    strangers = [value for other, value in links.items() if other != kind]
    return [*OTHERS, *empty, *(value for value in strangers if not KINDS[kind].fits(value))]


@pytest.mark.parametrize(("node_id", "name"), INPUTS)
def test_a_value_that_an_input_does_not_take_is_refused_in_words(node_id, name, links, legal):
    node, schema = NODES[node_id], NODES[node_id].GET_SCHEMA()
    entry = next(entry for entry in schema.inputs if entry.id == name)
    wrap = (lambda value: [value]) if schema.is_input_list else (lambda value: value)
    given = {key: wrap(value) for key, value in legal(schema).items()}
    for value in illegal(entry, links):
        with pytest.raises(ValueError, match=f"^{name_in_words(schema)}: ") as error:
            node.execute(**given | {name: wrap(value)})
        message = str(error.value)
        assert name in message, (value, message)
        assert len(message) < 3000
        message.encode()
        assert message.endswith("."), message


@pytest.mark.parametrize("node_id", NODES)
def test_legal_values_and_those_at_the_ends_pass(node_id, legal):
    schema = NODES[node_id].GET_SCHEMA()
    wrap = (lambda value: [value]) if schema.is_input_list else (lambda value: value)
    given = legal(schema)
    for entry in schema.inputs:
        ends = [getattr(entry, "min", None), getattr(entry, "max", None)]
        ends += legal_choices(entry) if is_dynamic_choice(entry) else getattr(entry, "options", None) or ()
        ends += [""] if str(entry.get_io_type()) == "STRING" else []
        ends += [None] if entry.optional and not is_dynamic_choice(entry) else []
        for end in [one for one in ends if one is not None or (entry.optional and not is_dynamic_choice(entry))]:
            check(schema, {key: wrap(value) for key, value in (given | {entry.id: end}).items()}, {})


def legal_choices(entry):
    """Every option by its name alone, and with each of its inputs at both ends, by default and left out."""
    for option in entry.options:
        yield option.key
        for own in option.inputs:
            for end in (getattr(own, "min", None), getattr(own, "max", None), own.default, None):
                yield {entry.id: option.key, own.id: own.default if end is None else end}
                yield {entry.id: option.key, own.id: None}


@pytest.mark.parametrize("node_id", NODES)
def test_every_link_of_a_node_is_of_a_kind_that_is_known(node_id):
    kinds = {str(entry.get_io_type()) for entry in NODES[node_id].GET_SCHEMA().inputs}
    assert kinds <= KINDS.keys() | {"FLOAT", "INT", "STRING", "BOOLEAN", "COMBO", CHOICE}
    assert issubclass(NODES[node_id], Node)


def test_models_are_no_clips_and_vaes(links):
    real = ("MODEL", "CLIP", "VAE")
    for kind in real:
        assert [other for other in real if KINDS[kind].fits(links[other])] == [kind]
        assert KINDS[kind].fits(links[kind])


def test_every_fault_is_named_at_once(legal):
    node = NODES["LCMKitSampler"]
    with pytest.raises(
        ValueError, match=r"LCM Multistep Sampler: gamma is nan.* from 0 to 1\. .*default 1\.0.* seed is -2"
    ):
        node.execute(gamma=math.nan, seed=-2)


def test_a_link_to_an_input_that_is_not_there_is_refused(links, legal):
    """ComfyUI hands it on to the node."""
    node = NODES["LCMKitMergeLoRA"]
    with pytest.raises(ValueError, match=r"Merge LoRAs: There is no input 'lora_x'\. The inputs are lora_1, "):
        node.execute(**legal(node.GET_SCHEMA()) | {"lora_x": links["LORA_MODEL"]})


@pytest.mark.parametrize("node_id", ["LCMKitLoader", "LCMKitLoadLoRA", "LCMKitGuidanceEmbedding"])
def test_an_unknown_file_is_told_before_the_run_and_in_it(node_id, legal):
    node = NODES[node_id]
    name = next(entry.id for entry in node.GET_SCHEMA().inputs if entry.id in FILES)
    answer = node.validate_inputs(**{name: "door_lmc.safetensors"})
    assert answer.startswith(f"{name}: 'door_lmc.safetensors' is ")
    assert "press R" in answer
    assert (node_id == "LCMKitGuidanceEmbedding") or "near it: door_lcm.safetensors" in answer
    with pytest.raises(ValueError, match=r"'door_lmc\.safetensors' is "):
        node.execute(**legal(node.GET_SCHEMA()) | {name: "door_lmc.safetensors"})
    for value in (None, [], {}, "a\0b", "\ud800", LONG, "../../etc/passwd", "/etc/passwd"):
        answer = node.validate_inputs(**{name: value})
        assert answer is True if not isinstance(value, str) else answer.startswith(f"{name}: ")
        node.fingerprint_inputs(**{name: value})


# ---- choices with inputs of their own


def choosing():
    share = io.Float.Input("share", default=0.5, min=0.0, max=1.0)
    options = [io.DynamicCombo.Option("exact", []), io.DynamicCombo.Option("cut", [share])]
    size = io.DynamicCombo.Input("size", options=options)
    grows = io.Autogrow.Input("loras", template=io.Autogrow.TemplatePrefix(io.LoraModel.Input("lora"), "lora", min=0))
    return io.Schema("LCMKitChoosing", "Choosing", "test", inputs=[size, grows], outputs=[])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"size is missing or unknown\. Choose one of exact, cut\."),
        ({"size": {"size": "nonsense"}}, "size is 'nonsense', but it has to be one of exact, cut"),
        ({"size": {"size": None}}, "size is empty, but"),
        ({"size": {"size": ["cut"]}}, "size is a list of 1 entry, but"),
        ({"size": {}}, "size is empty, but"),
        ({"size": None}, "size is empty, but"),
        (
            {"size": {"size": "cut", "share": math.nan}},
            "size.share is nan, but it has to be a finite number from 0 to 1",
        ),
        ({"size": {"size": "exact"}, "loras": {"lora1": 5}}, "loras.lora1 is 5, but it has to be a LORA_MODEL"),
        ({"size": {"size": "exact"}, "loras": 5}, "loras is 5, but it has to be a LORA_MODEL"),
    ],
)
def test_what_no_host_checks_of_a_dynamic_choice_is_checked(given, message):
    with pytest.raises(ValueError, match=f"^Choosing: .*{message}"):
        check(choosing(), {"loras": {}} | given, {})


@pytest.mark.parametrize("size", [{"size": "exact"}, {"size": "cut", "share": 1.0}, "exact"])
def test_a_dynamic_choice_that_is_right_passes(size, links):
    check(choosing(), {"size": size, "loras": {"lora0": links["LORA_MODEL"], "lora1": None}}, {})


# ---- what errors say


def test_no_folder_of_the_machine_is_told():
    (loras, *_), _ = folder_paths.folder_names_and_paths["loras"]
    output = folder_paths.get_output_directory()
    home = os.path.expanduser("~")
    for text, expected in [
        (f"{loras}/a/b.safetensors exists already.", "loras/a/b.safetensors exists already."),
        (f"no room in {output}.", "no room in output."),
        (f"[Errno 13] denied: '{output}/LCMKit/x'", "[Errno 13] denied: 'output/LCMKit/x'"),
        (f"{folder_paths.base_path}/main.py", "ComfyUI/main.py"),
        (f"{home}/notes.txt", "~/notes.txt"),
        ("and/or 1/2", "and/or 1/2"),
        (f"{loras}2/other", f"{without_folders(os.path.dirname(loras))}/loras2/other"),
    ]:
        assert without_folders(text) == expected


def test_errors_keep_their_kind_and_get_the_nodes_name():
    (loras, *_), _ = folder_paths.folder_names_and_paths["loras"]
    for error, expected in [
        (ValueError(f"{loras}/x: is cut off."), "Load: loras/x: is cut off."),
        (ValueError("Load: said already"), "Load: said already"),
        (FileExistsError(f"{loras}/x: exists already."), "Load: loras/x: exists already."),
        (PermissionError(13, "Permission denied", f"{loras}/x"), "[Errno 13] Load: Permission denied: 'loras/x'"),
        (ValueError("x" * 100_000), f"Load: {'x' * 2000} ... {'x' * 2000}"),
        (RuntimeError(f"not ours, {loras}/x"), "not ours, loras/x"),
        (KeyboardInterrupt(), ""),
    ]:
        with pytest.raises(type(error)) as caught, in_the_name_of("Load"):
            raise error
        assert caught.value is error
        assert str(error) == expected


def test_methods_and_dtypes_out_of_their_lists_are_named(links):
    merge = {"lora_1": links["LORA_MODEL"], "lora_2": links["LORA_MODEL"], "size": "exact"}
    with pytest.raises(ValueError, match=f"method is 'nonsense', .* one of {', '.join(METHODS)}"):
        NODES["LCMKitMergeLoRA"].execute(**merge, method="nonsense")
    with pytest.raises(ValueError, match=r"dtype is 'fp8', .* one of fp16, bf16, fp32"):
        NODES["LCMKitResizeLoRA"].execute(links["LORA_MODEL"], {"size": "rank", "rank": 1}, "fp8")
