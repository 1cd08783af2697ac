"""Runs these tests on the real ComfyUI named by COMFYUI_PATH; without it each file is skipped and says so.

In process, `import comfy`, `import nodes` and `import folder_paths` are ComfyUI's own, on the CPU, with a base directory
of their own: nothing is written into anybody's ComfyUI. `server` is a whole ComfyUI in a process of its own.
"""

import gc
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

from lcm_kit.tests.helpers import ROOT, each_value

DEMO_MODELS = ROOT / "demo" / "models"
HOME = None
# What goes to one process, the longest first, so that none is alone with one at the end; all else goes file by file.
# Pages share a browser's process and a server, and are not drawn two at a time.
PAGES, SERVER = "pages", "server"
FILES = {  # group -> the files whose tests may ask for its fixture
    PAGES: re.compile(r"test_(\w+_in_page|browser|frozen)\.py"),
    SERVER: re.compile(r"test_(\w+_in_server|comparing|demo|hostile_texts|random_graphs|startup|workflows)\.py"),
}
RUNNING = pytest.StashKey()  # the browser
LONG = (PAGES, SERVER, "test_distillation_command.py", "test_soak.py", "test_soak_trainings.py")

if os.environ.get("COMFYUI_PATH"):
    from comfy.cli_args import args

    from lcm_kit.demo.comfyui_server import furnish
    from lcm_kit.tests.with_comfyui.comfy_server import MODELS

    HOME = Path(tempfile.mkdtemp(prefix="lcm-kit-tests-"))
    furnish(HOME, {}, MODELS)
    args.cpu = True  # before comfy.model_management is imported
    args.base_directory = str(HOME)  # before folder_paths is imported


class NeedsComfyUI(pytest.Module):
    def collect(self):
        folder = ROOT / ".comfyui"
        pytest.skip(
            f"needs the real ComfyUI: run `make integration`, or set COMFYUI_PATH to one ({folder} after `make setup`)",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path, parent):
    # Not an importorskip in every file: those would skip as well when a broken ComfyUI fails to import.
    return None if HOME else NeedsComfyUI.from_parent(parent, path=module_path)


def pytest_configure(config):
    # pytest-xdist would begin with the files of the most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_addoption(parser):
    parser.addoption(
        "--each-value",
        action="store_true",
        help="of each file every test, and each value of each parameter, but not all combinations; no slow test",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Shares groups of files. By names of files, as the process that shares knows no fixtures; pytest-xdist's own groups are
    lost with pytest 9.2, which does not look where pytest-xdist 3.8 puts them, and no word is said."""
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return group_of(super()._split_scope(nodeid))

    return ByGroup(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config, items):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(group_of(item.path), len(LONG)))
    for item in items:
        needed = PAGES if "browser" in item.fixturenames else SERVER if "server" in item.fixturenames else None
        if needed and group_of(item.path) not in (PAGES, needed):
            raise pytest.UsageError(
                f"{item.nodeid} needs the fixture of the {needed}: name its file in FILES ({__file__})"
            )
    if config.getoption("each_value"):
        files = defaultdict(list)
        for item in items:
            if item.get_closest_marker("slow") is item.get_closest_marker("rare") is None:
                files[item.path].append(item)
        kept = {cases[place] for cases in files.values() for place in each_value([values_of(case) for case in cases])}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def pytest_collection_finish():
    """What is there before the first test stays: neither the collector nor a test that looks through all objects need see it."""
    gc.collect()
    gc.freeze()


def group_of(file):
    """Of a path: the group whose files are called so, or the file's name."""
    name = Path(file).name
    return next((group for group, names in FILES.items() if names.fullmatch(name)), name)


def values_of(item):
    """Parameter, or the names of a list of tuples -> what its value in this case is known by; and the test itself."""
    test = {("test",): item.nodeid.partition("[")[0]}
    if not hasattr(item, "callspec"):
        return test
    params = item.callspec.params
    lists = [mark.args[0] for mark in item.iter_markers("parametrize")]
    together = [names.replace(" ", "").split(",") if isinstance(names, str) else names for names in lists]
    alone = [[name] for name in params.keys() - {name for names in together for name in names}]
    return test | {tuple(names): tuple(known_by(params[name]) for name in names) for names in [*together, *alone]}


def known_by(value):
    """Alike in all processes, which have to choose the same cases: constants that are equal may be one object or two."""
    return repr(value) if isinstance(value, (str, int, float, tuple, list, dict, type(None))) else id(value)


def pytest_unconfigure():
    if HOME:
        shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def every_progress_report():
    """ComfyUI leaves out progress reports that follow each other within 0.1 s; the tests count them."""
    with pytest.MonkeyPatch.context() as patch:
        if HOME:
            import comfy.utils

            patch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
            patch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0)
        yield


@pytest.fixture
def no_gradients():
    """As in ComfyUI's own execution."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def comfy_home():
    """The base directory (models/, input/, output/) of the ComfyUI that runs in process."""
    return HOME


@pytest.fixture(scope="module")
def model():
    """A tiny SD 1.x, where a file has none of its own. Nothing may change it: nodes work on clones."""
    from lcm_kit.tests.with_comfyui import tiny

    return tiny.tiny_model()


@pytest.fixture(scope="module")
def wide():
    """Another base than `model`: the same module names, wider context."""
    from lcm_kit.tests.with_comfyui import tiny

    return tiny.tiny_model(context_dim=24)


@pytest.fixture(scope="session")
def tiny_emoji():
    """(MODEL, CLIP) of the demo by ComfyUI's own loader, which knows the model type only meanwhile. Work on clones."""
    import comfy.sd
    import comfy.supported_models

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "demo"))
        from tiny_emoji.model import TinyEmoji

        patch.setattr(comfy.supported_models, "models", [TinyEmoji, *comfy.supported_models.models])
        path = DEMO_MODELS / "checkpoints" / "tiny_emoji.safetensors"
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)
    for name in [name for name in sys.modules if name.startswith("tiny_emoji")]:
        del sys.modules[name]
    return model, clip


@pytest.fixture(scope="session")
def tiny_emoji_lcm(tiny_emoji):
    """The demo's MODEL with its LCM-LoRA, by ComfyUI's own loader."""
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(DEMO_MODELS / "loras" / "tiny_emoji_lcm_lora.safetensors"))
    return comfy.sd.load_lora_for_models(tiny_emoji[0], None, lora, 1.0, 0.0)[0]


@pytest.fixture(scope="session")
def vae():
    """The demo's VAE."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(DEMO_MODELS / "vae" / "tiny_emoji_vae.safetensors")))


@pytest.fixture(scope="module")
def distill_here():
    """The distillation's command in this process, where ComfyUI is loaded already: arguments -> exit status. What it adds to
    ComfyUI is taken away again."""
    import comfy.supported_models
    import torch

    from lcm_kit.distillation.__main__ import main

    models, path, threads = [*comfy.supported_models.models], [*sys.path], torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that tests start: sums in the same order
    yield main
    torch.set_num_threads(threads)
    comfy.supported_models.models[:], sys.path[:] = models, path


@pytest.fixture
def loras_folder(comfy_home, tmp_path, monkeypatch):
    """An empty folder that ComfyUI takes for its first loras folder, and nothing in memory."""
    import folder_paths

    from lcm_kit.host.lora import files

    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors", ".pt"}))
    monkeypatch.setitem(folder_paths.filename_list_cache, "loras", None)
    folder_paths.filename_list_cache.pop("loras")
    yield folder
    files._cache.clear()


@pytest.fixture
def large(monkeypatch):
    """Every file is one of those whose factors stay in it."""
    from lcm_kit.lora_merge.files import load_save

    monkeypatch.setattr(load_save, "_STREAMED", 0)


@pytest.fixture
def put(loras_folder):
    """Writes tensors into it, under a name, with metadata."""
    import safetensors.torch

    def write(name, tensors, metadata=None):
        safetensors.torch.save_file(tensors, loras_folder / name, metadata)
        return name

    return write


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One running ComfyUI server for all tests, with this pack, the demo's models and previews."""
    from lcm_kit.tests.with_comfyui.comfy_server import pack_server

    with pack_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server):
    """A fresh client of the shared server."""
    from lcm_kit.demo.comfyui_client import Client

    with Client(server) as connected:
        yield connected


@pytest.fixture(scope="session")
def browser(request):
    from lcm_kit.tests.with_comfyui.web_page import Browser, chromium

    path = chromium()
    if path is None:
        pytest.skip("no Chromium: install it (Debian: apt-get install chromium), or name one with CHROMIUM=/path")
    request.config.stash[RUNNING] = Browser(path)
    return request.config.stash[RUNNING]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    running = item.config.stash.get(RUNNING, None)
    if running is not None and (nextitem is None or group_of(nextitem.path) != PAGES):
        running.close()


@pytest.fixture(scope="module")
def page(browser, server):
    """ComfyUI's page on the shared server."""
    from lcm_kit.tests.with_comfyui.web_page import opened_page

    opened = opened_page(browser, server)
    yield opened
    opened.close()
