"""What is told while a node runs is in its report: warnings of this pack's log, whichever file they are from, and a preset's say."""

import logging

import pytest
import torch
from comfy_api.latest import io, ui

from lcm_kit.demo.graphs import TINY
from lcm_kit.host import reports
from lcm_kit.host.door.node import Node
from lcm_kit.host.door.replaced import REPLACES, replaced
from lcm_kit.host.page import WORD_JOINER
from lcm_kit.nodes import NODES
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.helpers import as_read, lines_in_markdown
from lcm_kit.tests.with_comfyui import tiny
from lcm_kit.tests.with_comfyui.test_distilling import WIDGETS

OF_THE_PACK = logging.getLogger("lcm_kit.samplers.anywhere")


def node_that(work, report=None):
    """A node of ours that does `work` while it runs; its own report is `report`."""

    class Telling(Node):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="LCMKitTelling", display_name="Telling", category="LCM Kit", inputs=[], outputs=[])

        @classmethod
        def execute(cls):
            work()
            return io.NodeOutput(ui=None if report is None else ui.PreviewText(report))

    return reports.for_pages(Telling)


def told(work, report=None):
    return node_that(work, report).execute().ui["text"]


def test_a_warning_of_any_file_is_told_once_and_in_the_order_of_the_log():
    def work():
        for what in ("first", "second", "first"):
            OF_THE_PACK.warning("%s of %d", what, 2)

    assert told(work) == ["first of 2\nsecond of 2"]


def test_what_others_log_and_what_is_no_warning_stays_in_the_log():
    def work():
        logging.getLogger("comfy.somewhere").warning("not ours")
        logging.getLogger().warning("nobody's")
        OF_THE_PACK.info("no warning")

    assert told(work) == []


def test_a_line_comes_after_the_nodes_own_report_unless_that_says_it():
    def work():
        OF_THE_PACK.warning("Said already, on one line.")
        OF_THE_PACK.warning("New.")

    assert told(work, "Report.\nSaid already,\n  on one line.") == ["Report.\nSaid already,\n  on one line.\nNew."]


def test_what_is_told_becomes_no_markup():
    assert told(lambda: reports.tell("<img src=x>")) == [f"<{WORD_JOINER}img src=x>"]


def test_a_node_inside_a_node_keeps_its_own_lines():
    inner = node_that(lambda: reports.tell("inside"))
    assert told(lambda: (inner.execute(), reports.tell("outside"))) == ["outside"]


def test_an_error_leaves_nothing_for_the_next_node():
    def work():
        reports.tell("before the error")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        told(work)
    assert told(lambda: None) == []


def test_outside_of_a_run_nothing_happens():
    reports.tell("to nobody")
    OF_THE_PACK.warning("to nobody")


def schemas_with_presets():
    schemas = [node.define_schema() for node in NODES]
    return [(s, entry) for s in schemas for entry in s.inputs if (entry.extra_dict or {}).get(REPLACES)]


@pytest.mark.parametrize(("schema", "entry"), schemas_with_presets(), ids=lambda one: getattr(one, "node_id", ""))
def test_a_preset_names_every_field_of_the_node_that_is_set_and_has_no_effect(schema, entry):
    """Also for pages: each name is an input of the node, and the same words stand in the tooltip."""
    inputs = {one.id: one for one in schema.inputs}
    names = entry.extra_dict[REPLACES]
    assert entry.as_dict()[REPLACES] == names
    assert names
    assert all(name in inputs and name in entry.tooltip for name in names)
    defaults = {name: inputs[name].default for name in names}
    preset = PRESETS["TCD"]
    assert [*replaced(schema, {})] == []
    (line,) = replaced(schema, {entry.id: preset, **defaults})
    assert line.startswith("Preset TCD: 4 steps, cfg 1, gamma 0.3")
    assert "in place" not in line
    for name in names:
        (line,) = replaced(schema, {entry.id: preset, **defaults, name: defaults[name] / 2})
        assert line.endswith(f"It stands in place of this node's {name} {defaults[name] / 2!r}.")


def test_every_node_that_takes_a_preset_says_what_it_replaces():
    takers = {
        s.node_id for node in NODES for s in [node.define_schema()] for i in s.inputs if i.get_io_type() == "LCM_PRESET"
    }
    assert takers == {schema.node_id for schema, _ in schemas_with_presets()}


BY_ID = {schema.node_id: node for node in NODES for schema in [node.define_schema()]}
REPORTING = sorted(id_ for id_, node in BY_ID.items() if "report" in node.RETURN_NAMES)


@pytest.fixture(scope="module")
def inputs(tiny_emoji, tiny_emoji_lcm, vae):
    """id of a node -> what it is given, so that it reports."""
    model, clip = tiny_emoji[:2]
    style, lcm = (BY_ID["LCMKitLoadLoRA"].execute(name).result[0] for name in (TINY.style, TINY.lcm))
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("cat face"))
    both = {"lora_1": style, "strength_1": 0.8, "lora_2": lcm, "strength_2": 1.0}
    empty = {"samples": torch.zeros(1, 12, 8, 8)}
    grid = {"row_axis": "strength of lora", "rows": "0, 1", "column_axis": "steps", "columns": "1, 99"}
    return {
        "LCMKitLoader": {"model": model, "lora_name": TINY.lcm, "strength_model": 1.0, "wrong_base": "refuse"},
        "LCMKitLoadLoRA": {"lora_name": TINY.style},
        "LCMKitApplyLoRA": {"model": model, "clip": clip, "lora": lcm, "strength_model": 1.0, "strength_clip": 1.0},
        "LCMKitLoRAByStep": {"model": model, "lora": lcm, "positive": positive, "strengths": "1, 0"},
        "LCMKitLoRAMix": {"model": model, "clip": clip, "lora_1": TINY.style, "lora_2": TINY.style, "on_2": False},
        "LCMKitMergeLoRA": both | {"method": "ties", "size": "exact"},
        "LCMKitResizeLoRA": {"lora": lcm, "size": {"size": "rank", "rank": 4}, "dtype": "fp16"},
        "LCMKitCompareLoRA": both | {"rank": 0},
        "LCMKitExtractLoRA": {"model_tuned": tiny_emoji_lcm, "model_base": model, "rank": 2, "keep": 1.0},
        "LCMKitPreset": {"name": "Hyper-SD 8 steps CFG", "steps": 0},
        "LCMKitGrid": grid
        | {"model": model, "lora": lcm, "positive": positive, "latent_image": empty, "vae": vae, "seed": 1, "cfg": 1.0},
        "LCMKitDistill": {name: [value] for name, value in WIDGETS.items()}
        | {"model": [tiny.small_model()], "positive": [tiny.cond(1)], "negative": [tiny.cond(2)]}
        | {"latent": [tiny.latent(4, seed=1)]},
    }


@pytest.mark.parametrize("id_", REPORTING)
def test_the_report_a_node_hands_out_reads_line_by_line_as_plain_text_and_as_markdown(id_, inputs):
    node = BY_ID[id_]
    with torch.inference_mode():
        output = node.execute(**inputs[id_])
    report = output.args[node.RETURN_NAMES.index("report")]
    lines = [line for line in as_read(report).split("\n") if line]
    assert len(lines) > 1
    assert list(map(as_read, lines_in_markdown(report))) == lines
    # The node itself shows it as it was written.
    (shown,) = output.ui["text"]
    assert [line for line in shown.split("\n") if line][: len(lines)] == lines


def test_this_is_every_node_with_a_report(inputs):
    assert sorted(inputs) == REPORTING
