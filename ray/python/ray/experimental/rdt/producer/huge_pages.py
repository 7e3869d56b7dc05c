"""Huge pages for the tensors that a producer creates."""

from __future__ import annotations

import os
import sys

#: torch reads it once, when it first allocates host memory.
_SETTING = "THP_MEM_ALLOC_ENABLE"


def request_for_new_tensors() -> None:
    """Let torch request huge pages for the large host tensors of this process.

    The setting is in the environment for this call only, so child processes do not inherit it. The
    user's own setting is kept. Without effect if torch is not imported or has allocated before.

    Runs on: the actor, before its constructor.
    """
    torch = sys.modules.get("torch")
    if torch is None or _SETTING in os.environ:
        return
    os.environ[_SETTING] = "1"
    try:
        torch.empty(1)
    finally:
        del os.environ[_SETTING]
