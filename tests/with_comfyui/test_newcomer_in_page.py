"""A newcomer's road in ComfyUI's real page, by the clock: from the list of templates to the first picture."""

import time

import pytest
import safetensors.torch

from lcm_kit.demo.graphs import TINY
from lcm_kit.tests.helpers import ROOT
from lcm_kit.tests.with_comfyui.web_page import becomes, opened_page
from lcm_kit.tools.flows.files import LCM_SD15, SD15

TEMPLATE = "1 First picture with an LCM-LoRA"
SECONDS = 60


@pytest.fixture(scope="module")
def files(server):
    """The embedded model under the names that the template asks for: a checkpoint with its VAE, and the LCM-LoRA."""
    models, home = ROOT / "demo" / "models", server.home / "models"
    tensors = safetensors.torch.load_file(models / "checkpoints" / TINY.checkpoint)
    vae = safetensors.torch.load_file(models / "vae" / TINY.vae)
    made = [home / "checkpoints" / str(SD15), home / "loras" / str(LCM_SD15)]
    with safetensors.safe_open(models / "checkpoints" / TINY.checkpoint, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(
        tensors | {f"first_stage_model.{key}": tensor for key, tensor in vae.items()}, made[0], metadata
    )
    made[1].write_bytes((models / "loras" / TINY.lcm).read_bytes())
    yield
    for path in made:
        path.unlink()


def test_from_the_list_of_templates_to_the_picture_in_a_minute_and_one_click_after_opening(browser, server, files):
    page = opened_page(browser, server)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    card = page.get_by_text(TEMPLATE).first
    search = page.locator("[role=dialog] input[type=text], [role=dialog] input[type=search], [role=dialog] input").first
    search.wait_for()
    search.fill("First picture with an LCM")
    card.wait_for()
    began = time.monotonic()
    card.click()
    page.wait_for_function("() => app.graph.nodes.some(n => n.type === 'LCMKitKSampler')")
    dialogs = page.locator("[role=dialog]:visible")
    assert becomes(page, 0, dialogs.count) == 0, "nothing is missing, nothing asks"
    # The embedded model makes pictures of 64 pixels; of 512 it would need minutes, which SD 1.5 on a GPU does not.
    page.evaluate(
        """size => {
            const node = app.graph.nodes.find(n => n.type === "EmptyLatentImage");
            for (const widget of node.widgets) if (/width|height/.test(widget.name)) widget.value = size;
        }""",
        TINY.size,
    )
    page.get_by_test_id("queue-button").click()
    done = """() => {
        if (app.lastExecutionError || Object.keys(app.lastNodeErrors ?? {}).length) return "failed";
        const node = app.graph.nodes.find(n => n.type === "SaveImage");
        return node?.imgs?.length && node.imgs[0].complete && node.imgs[0].naturalWidth;
    }"""
    width = page.wait_for_function(done, timeout=SECONDS * 1000).json_value()
    took = time.monotonic() - began
    assert dialogs.count() == 0, "nor has anything asked meanwhile"
    page.close()
    assert width == TINY.size
    assert took < SECONDS
