# LCM Kit: `make help` says what there is.
#
# COMFYUI_PATH=/their/ComfyUI and PYTHON=/their/python, on the command line or in the environment, make every
# command use them. Then nothing is downloaded. Without them `make setup` builds .venv, .comfyui and, for the tests,
# the oldest ComfyUI that LCM Kit supports: COMFYUI=floor makes a command use that one.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint unit integration mutants fuzz soak floor compatibility presets workflows pictures frozen locales brand gpu clean

BASE_PYTHON ?= python3
# Waiting threads must not spin: on a laptop two ComfyUI threads would fight for the cores.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests are rewritten and compiled once, not anew by each process of each run: `make clean` removes what is kept.
unexport PYTHONDONTWRITEBYTECODE

# An interpreter that cannot even read the script is named here.
SETUP := "$(BASE_PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || \
  { echo 'setup: $(BASE_PYTHON) is missing or too old: run make BASE_PYTHON=/path/to/python3.11'; exit 1; }; \
  "$(BASE_PYTHON)" tools/setup_comfyui.py --comfyui "$(COMFYUI_PATH)" --python "$(PYTHON)" --for

ifneq ($(filter-out floor,$(COMFYUI)),)
  $(error COMFYUI=$(COMFYUI): `floor` is all it can be; your own ComfyUI is named by COMFYUI_PATH=/its/folder)
endif

ifneq ($(COMFYUI_PATH),)
  TREE := $(COMFYUI_PATH)
  RUN := $(or $(PYTHON),python3)
else
  TREE := $(CURDIR)/.comfyui$(if $(filter floor,$(COMFYUI)),-floor)
  RUN := $(or $(PYTHON),$(CURDIR)/.venv/bin/python)
endif

# On the floor every test runs, and in each file each value of each parameter, but not all combinations, and no slow test.
SOME := $(if $(filter floor,$(COMFYUI)),--each-value,-m "not rare")

# Where pytest-xdist is installed the tests share two processes, file by file; with ComfyUI all pages are one's, and all
# else that asks the server (tests/with_comfyui/conftest.py). Each takes about 1 GB of memory.
WORKERS ?= 2
SPREAD = $(shell "$(RUN)" -c 'import xdist' 2>/dev/null && echo '-n $(WORKERS) --dist $(1)')

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo
	@echo '  make demo PROMPT="cat face"          pictures of your own words'
	@echo '  make test COMFYUI_PATH=... PYTHON=...  with your own ComfyUI and its Python (each command takes these)'
	@echo '  make integration COMFYUI=floor         on the oldest supported ComfyUI, 0.16.3 (so do demo and compatibility)'

setup:  ## builds .venv and the real ComfyUI in .comfyui, once (6 GB, minutes)
	@$(SETUP) test

demo:  ## makes pictures in 4 steps with the embedded model, through ComfyUI's own server
	@$(SETUP) $(if $(filter floor,$(COMFYUI)),test,demo)
	@COMFYUI_PATH="$(TREE)" "$(RUN)" demo/run.py $(if $(PROMPT),--prompt "$$PROMPT")

test: lint unit integration $(if $(COMFYUI_PATH)$(COMFYUI),,floor)  ## lint, unit and integration on both versions: what CI runs

lint: setup  ## ruff and mypy
	"$(RUN)" -m ruff check .
	"$(RUN)" -m ruff format --check .
	mkdir -p build/typing && ln -sfn ../.. build/typing/lcm_kit
	"$(RUN)" -m mypy

unit: setup  ## the tests that need no ComfyUI
	env -u COMFYUI_PATH "$(RUN)" -m pytest $(call SPREAD,loadfile) tests --ignore=tests/with_comfyui

integration: setup  ## the tests that run the real ComfyUI: nodes, server, web page
	COMFYUI_PATH="$(TREE)" "$(RUN)" -m pytest $(call SPREAD,loadfile) $(SOME) tests/with_comfyui

floor:  ## integration on the oldest ComfyUI that LCM Kit supports, without the slowest tests and all combinations
	@$(MAKE) --no-print-directory integration COMFYUI=floor

mutants: setup  ## small changes of the code, one at a time: does a unit test notice?
	"$(RUN)" tools/mutants.py --sample $(or $(SAMPLE),300)

fuzz: setup  ## random values for all stated properties, random and broken LoRA files on the whole way; SECONDS=1800 SEED=1
	env -u COMFYUI_PATH "$(RUN)" -m pytest -q $(call SPREAD,load) -m hypothesis --hypothesis-profile=drawn_anew tests --ignore=tests/with_comfyui
	env -u COMFYUI_PATH OMP_NUM_THREADS=1 "$(RUN)" tests/soak/fuzz.py --seconds $(or $(SECONDS),1800) --seed $(or $(SEED),1)

soak: setup  ## kills, races, random workflows and hundreds of prompts; PROMPTS=500 KILLS=200 SAVES=100 TRAININGS=50 GRAPHS=2000
	"$(RUN)" tests/soak/kills.py $(or $(KILLS),200)
	COMFYUI_PATH="$(TREE)" "$(RUN)" tests/soak/trainings.py $(or $(TRAININGS),50)
	COMFYUI_PATH="$(TREE)" "$(RUN)" tests/soak/save_race.py $(or $(SAVES),100)
	COMFYUI_PATH="$(TREE)" "$(RUN)" tests/soak/prompts.py $(or $(PROMPTS),500)
	COMFYUI_PATH="$(TREE)" GRAPHS=$(or $(GRAPHS),2000) "$(RUN)" -m pytest -q tests/with_comfyui/test_random_graphs.py

compatibility: setup  ## tries everything on one ComfyUI and writes a row of docs/compatibility.md
	@COMFYUI_PATH="$(TREE)" WORKERS="$(WORKERS)" "$(RUN)" tools/compatibility.py

presets: setup  ## writes docs/presets.md from samplers/presets.py
	@"$(RUN)" tools/presets.py

workflows: setup  ## writes example_workflows/*.json and demo/workflow.json from the descriptions in tools/flows/
	@COMFYUI_PATH="$(TREE)" "$(RUN)" tools/workflows.py $(if $(PACKS),--packs "$(PACKS)")

pictures: setup  ## screenshots of nodes, workflows and help pages, and the help pages' pictures in web/docs; ONLY=LCMKitGrid
	@COMFYUI_PATH="$(TREE)" "$(RUN)" tools/pictures.py $(if $(ONLY),--only "$(ONLY)") $(if $(WHAT),--what "$(WHAT)")

frozen: setup  ## writes tests/frozen: what saved workflows depend on; LINE="a line of CHANGELOG.md" after a release
	@COMFYUI_PATH="$(TREE)" "$(RUN)" tools/frozen.py $(if $(LINE),--line "$$LINE")

locales: setup  ## writes locales/ from tools/translations/ and the nodes' own texts
	@COMFYUI_PATH="$(TREE)" "$(RUN)" tools/locales.py

brand: setup  ## draws docs/icon.png and docs/banner.png for the registry
	@"$(RUN)" tools/brand.py

gpu: setup  ## what a CPU cannot show, on an NVIDIA GPU: benchmarks/gpu.md; REHEARSE=1 tries the script on a CPU
	@COMFYUI_PATH="$(TREE)" "$(RUN)" benchmarks/on_gpu.py $(if $(REHEARSE),--rehearse)

clean:  ## removes .venv, ComfyUI and everything that tools left behind
	rm -rf .venv .comfyui .comfyui-floor .comfyui.part .frontends .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info demo/output
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
