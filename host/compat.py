"""Newer schema keywords, only where the running ComfyUI has them."""

import inspect
from typing import Any


def if_known(callee: Any, **keywords: Any) -> dict[str, Any]:
    """The keywords that `callee` accepts.

    `search_aliases` came with ComfyUI 0.11, `advanced` with 0.10; before that either is a TypeError at start-up.
    """
    known = inspect.signature(callee).parameters
    return {name: value for name, value in keywords.items() if name in known}
