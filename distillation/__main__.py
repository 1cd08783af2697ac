"""Distilling on the command line, on one device or many: `python -m lcm_kit.distillation`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if (__package__ or "").count(".") == 0:
    # Started in a clone, as `python -m distillation` or by path: the pack's relative imports need a package around it.
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "lcm_kit", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    sys.modules["lcm_kit"] = importlib.util.module_from_spec(spec)
    __package__ = "lcm_kit.distillation"

from ..launch.options import parsed

STOPPED = 130  # what a shell calls a program that was interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, with one line on standard error that says what and why, 130 stopped."""
    try:
        options = parsed(arguments)
        # Late: --help and bad options need no torch.
        from ..launch.run import run

        print(run(options), end="")
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        # All processes of a machine see the same files and options; one of them tells.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("stopped; the same command goes on from the last finished step", file=sys.stderr)
        return STOPPED
    return 0


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Launchers and job schedulers end a run by SIGTERM, which would leave no time for a last checkpoint.
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
