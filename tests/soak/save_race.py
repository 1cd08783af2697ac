"""Two processes save by increment into one loras folder: every save has to succeed, under a number of its own.

    COMFYUI_PATH=... python tests/soak/save_race.py [COUNT]         so many saves of each; 100 if not given
Prints one line and exits with 1 if a save failed or a file is missing.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def save(home: str, count: int) -> None:
    """In a process of its own: waits for a line, then saves; prints the name of each file, or what went wrong."""
    sys.argv = sys.argv[:1]  # ComfyUI reads it
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, home
    spec = importlib.util.spec_from_file_location(
        "lcm_kit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["lcm_kit"] = importlib.util.module_from_spec(spec)
    import torch

    from lcm_kit.host.lora.files import save_lora

    factors = {"lora_unet_x.lora_up.weight": torch.randn(200, 8), "lora_unet_x.lora_down.weight": torch.randn(8, 200)}
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(count):
        try:
            prefix = f"race/{number // 10}"
            name = save_lora(factors, prefix, dtype="fp16", format="kohya", name_mode="increment", about={})
            print("saved", name, flush=True)
        except Exception as error:
            print("failed", type(error).__name__, error, flush=True)


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as home:
        loras = Path(home, "models", "loras")
        loras.mkdir(parents=True)
        command = [sys.executable, __file__, "--save", home, str(count)]
        both = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            for _ in range(2)
        ]
        for process in both:
            while process.stdout.readline() not in ("ready\n", ""):
                pass
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        lines = [line for process in both for line in process.communicate()[0].splitlines()]
        names = {line for line in lines if line.startswith("saved ")}
        failed = [line for line in lines if line.startswith("failed ")]
        files = [file for file in loras.rglob("*") if file.is_file()]
    print(
        f"save_race: {2 * count} saves by increment in two processes, {len(names)} names, {len(files)} files, "
        f"{len(failed)} failed {failed[:1] or ''}"
    )
    return int(len(names) != 2 * count or len(files) != 2 * count or bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--save"]:
        save(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())
