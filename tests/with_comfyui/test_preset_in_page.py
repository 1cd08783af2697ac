"""A preset that is connected, in ComfyUI's real page and in both of its renderers: what it replaces is off, and nothing is silent."""

import pytest

from lcm_kit.demo.graphs import TINY, Graph, Shot, lcm_only
from lcm_kit.tests.with_comfyui.web_page import becomes, open_graph, opened_page, report_on, run_in_page

REPLACED = {"steps", "cfg", "gamma", "original_steps"}
FIELDS = """name => Object.fromEntries(app.graph.nodes.find(n => n.type === name).widgets.map(w => [w.name, Boolean(w.disabled)]))"""


def with_preset(**sampler):
    graph = lcm_only(TINY, Shot("cat face", 7, 4))
    (node,) = (node["inputs"] for node in graph.values() if node["class_type"] == "LCMKitKSampler")
    node |= {"steps": 4, "cfg": 1.0} | sampler
    node["preset"] = [graph.add("LCMKitPreset", name="LCM", steps=2), 0]
    return graph


def off(page, expected, node="LCMKitKSampler"):
    """Names of the fields that are off, once they are the expected ones."""
    return becomes(page, expected, lambda: {name for name, off in page.evaluate(FIELDS, node).items() if off})


def set_mode(page, mode):
    page.evaluate("mode => { app.graph.nodes.find(n => n.type === 'LCMKitPreset').mode = mode; }", mode)
    page.keyboard.press("Shift")  # whatever switches a node off by hand ends with a key or a click


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "Nodes 2.0"])
def renderer(request, browser, server):
    page = opened_page(browser, server, **{"Comfy.VueNodes.Enabled": request.param})
    page.vue = request.param
    yield page
    page.close()


def test_the_fields_that_a_preset_replaces_are_off_while_it_is_connected(renderer):
    open_graph(renderer, with_preset(), "preset")
    assert off(renderer, REPLACED) == REPLACED
    if renderer.vue:
        renderer.wait_for_function("() => document.querySelectorAll('[data-node-id]').length > 3")
    disconnect = "() => { const n = app.graph.nodes.find(n => n.type === 'LCMKitKSampler'); n.disconnectInput(n.findInputSlot('preset')); }"
    for mode in (4, 2):  # bypassed, never: nothing comes through
        set_mode(renderer, mode)
        assert off(renderer, set()) == set()
    set_mode(renderer, 0)
    assert off(renderer, REPLACED) == REPLACED
    renderer.evaluate(disconnect)
    assert off(renderer, set()) == set()


def test_what_is_sent_is_the_same_with_the_fields_off(renderer):
    graph = with_preset(steps=7)
    open_graph(renderer, graph, "preset")
    sent = renderer.evaluate("() => app.graphToPrompt().then(both => Object.values(both.output))")
    (sampler,) = (node["inputs"] for node in sent if node["class_type"] == "LCMKitKSampler")
    assert (sampler["steps"], sampler["cfg"], sampler["gamma"]) == (7, 1.0, 1.0)


def test_a_changed_field_without_effect_is_told_on_the_node(renderer):
    open_graph(renderer, with_preset(steps=7, cfg=2.5), "preset")
    assert run_in_page(renderer)["status"]["status_str"] == "success"
    assert report_on(renderer, "LCMKitKSampler") == (
        "Preset LCM: 2 steps, cfg 1, gamma 1, 50 original steps. It stands in place of this node's steps 7, cfg 2.5."
    )


def test_a_warning_is_on_its_node_until_a_run_without_it(renderer):
    """cfg without a negative prompt; told by the log, as all warnings are."""
    graph = lcm_only(TINY, Shot("cat face", 7, 4))
    (node,) = (node["inputs"] for node in graph.values() if node["class_type"] == "LCMKitKSampler")
    (encoder,) = (node["inputs"] for node in graph.values() if node["class_type"] == "CLIPTextEncode")
    node |= {"steps": 2, "cfg": 2.0, "clip": encoder["clip"]}
    open_graph(renderer, graph, "warning")
    assert run_in_page(renderer)["status"]["status_str"] == "success"
    told = report_on(renderer, "LCMKitKSampler")
    assert told.startswith("No negative prompt is connected: cfg 2 guides away from the empty prompt")
    renderer.get_by_label("LCM KSampler: report").wait_for()
    renderer.evaluate(
        "() => { app.graph.nodes.find(n => n.type === 'LCMKitKSampler').widgets.find(w => w.name === 'cfg').value = 1; }"
    )
    run_in_page(renderer)
    assert report_on(renderer, "LCMKitKSampler") is None


def any_ksampler(denoise):
    graph = Graph()
    base = graph.add("CheckpointLoaderSimple", ckpt_name=TINY.checkpoint)
    exact = graph.add("LCMKitAnyKSampler", model=[base, 0], gamma=1.0, original_steps=50)
    prompt = graph.add("CLIPTextEncode", text="cat", clip=[base, 1])
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    sampled = graph.add("KSampler", model=[exact, 0], positive=[prompt, 0], negative=[prompt, 0], latent_image=[latent, 0], seed=1,
                        steps=4, cfg=1.0, sampler_name="lcm", scheduler="simple", denoise=denoise)  # fmt: skip
    vae = graph.add("VAELoader", vae_name=TINY.vae)
    picture = graph.add("VAEDecode", samples=[sampled, 0], vae=[vae, 0])
    graph.add("PreviewImage", images=[picture, 0])
    return graph


def test_a_warning_reaches_a_node_of_comfyui_that_runs_our_sampler(renderer):
    """With `LCM for any KSampler` it is the KSampler that asks for too many steps. Kept and taken away as on our own nodes."""
    open_graph(renderer, any_ksampler(0.05), "any")
    assert run_in_page(renderer)["status"]["status_str"] == "success"
    told = report_on(renderer, "KSampler")
    assert "steps were asked for, but from timestep" in told
    saved = renderer.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    (node,) = (node for node in saved["nodes"] if node["type"] == "KSampler")
    assert node["properties"]["lcm_kit_report"] == told
    assert told not in node["widgets_values"]
    renderer.evaluate(
        "() => { app.graph.nodes.find(n => n.type === 'KSampler').widgets.find(w => w.name === 'denoise').value = 1; }"
    )
    run_in_page(renderer)
    assert report_on(renderer, "KSampler") is None


def test_strengths_are_called_after_what_is_connected(renderer):
    graph = Graph()
    lora = [graph.add("LCMKitLoadLoRA", lora_name=TINY.style), 0]
    first = graph.add(
        "LCMKitMergeLoRA", lora_1=lora, **{f"strength_{n}": 1.0 for n in range(1, 5)}, method="linear", size="exact"
    )
    graph.add(
        "LCMKitCompareLoRA", lora_1=[first, 0], lora_2=lora, **{f"strength_{n}": 1.0 for n in range(1, 5)}, rank=0
    )
    open_graph(renderer, graph, "names")
    labels = """type => app.graph.nodes.find(n => n.type === type).widgets.slice(0, 3).map(w => w.label ?? w.name)"""
    ink = TINY.style.removesuffix(".safetensors")
    for type_, expected in {
        "LCMKitMergeLoRA": [f"strength_1: {ink}", "strength_2", "strength_3"],
        "LCMKitCompareLoRA": ["strength_1: Merge LoRAs (add, TIES, DARE)", f"strength_2: {ink}", "strength_3"],
    }.items():
        assert becomes(renderer, expected, lambda type_=type_: renderer.evaluate(labels, type_)) == expected
    assert renderer.evaluate("() => app.canvas.default_connection_color_byType.LORA_MODEL") == "#e58fb1"
    css = "() => getComputedStyle(document.body).getPropertyValue('--color-datatype-LCM_PRESET').trim()"
    assert renderer.evaluate(css) == "#e8b04a"
