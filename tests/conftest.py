"""Lets the tests import this repository as `lcm_kit`, whatever its folder is called."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest

# Processes that share the machine share its cores: two that take all of them each would wait for one another. Set before
# torch is imported, and for the servers and commands that the tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lcm_kit"

# What ComfyUI does in load_custom_node, under a name that tests can write down.
spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[PACKAGE])
pytest.register_assert_rewrite(f"{PACKAGE}.tests.helpers")

# First on the path, so that `import nodes` is ComfyUI's nodes.py and never this repository's nodes/.
if os.environ.get("COMFYUI_PATH"):
    sys.path.insert(0, str(Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()))

# How long an example takes says how busy the machine is. A run for a change tries the same examples as the run before it;
# new ones are tried where somebody looks for faults: `make fuzz`, or pytest --hypothesis-profile=drawn_anew.
hypothesis.settings.register_profile("the_same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("drawn_anew", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("the_same")
