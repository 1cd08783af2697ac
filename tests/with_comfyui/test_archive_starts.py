"""What the registry hands out, unpacked into a ComfyUI that has nothing else: it starts there and lacks nothing."""

import json
import os
import shutil
import signal
import socket
import time
import urllib.parse
import zipfile

import pytest

from lcm_kit.demo.comfyui_server import ComfyUIServer
from lcm_kit.tests.helpers import ROOT, published_files
from lcm_kit.tests.with_comfyui.comfy_server import PACK, comfyui, import_times, own_page


@pytest.fixture(scope="module")
def clean_server(tmp_path_factory):
    """ComfyUI with the unpacked archive as its only pack, and no models."""
    folder = tmp_path_factory.mktemp("archive")
    with zipfile.ZipFile(folder / "node.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in published_files():
            archive.write(ROOT / path, path)
    shutil.unpack_archive(folder / "node.zip", folder / PACK)
    home = tmp_path_factory.mktemp("clean")
    with ComfyUIServer(comfyui(), home, packs={PACK: folder / PACK}, arguments=own_page(comfyui())) as server:
        yield server


def test_it_is_imported_without_a_warning(clean_server):
    log = clean_server.log_text()
    assert import_times(log)[PACK][1], log
    about_us = [line for line in log.splitlines() if PACK in line or "LCM Kit" in line]  # others' failures are theirs
    assert [line for line in about_us if any(word in line for word in ("Traceback", "Cannot import", "WARNING"))] == []


def test_every_node_is_there(clean_server):
    there = {name for name in json.loads(clean_server.request("/object_info")) if name.startswith("LCMKit")}
    assert there == set(json.loads((ROOT / "node_list.json").read_text(encoding="utf-8")))


def test_workflows_help_pages_and_languages_are_served(clean_server):
    named = json.loads(clean_server.request("/workflow_templates"))[PACK]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
    for name in named:
        own = clean_server.request(f"/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}.json")
        assert json.loads(own)["nodes"]
    for page in (ROOT / "web" / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "web").as_posix()
        assert clean_server.request(f"/extensions/{PACK}/{path}") == page.read_bytes()
    languages = {folder.name for folder in (ROOT / "locales").iterdir()}
    assert languages <= set(json.loads(clean_server.request("/i18n")))


@pytest.mark.slow
def test_stop_leaves_no_process_and_frees_the_port(clean_server):
    """Even of a server that SIGTERM does not reach, here because it is suspended. The last test: nobody needs it any more."""
    process = clean_server.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    start = time.monotonic()
    clean_server.stop()
    assert time.monotonic() - start < 20
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", clean_server.port)) != 0
