"""Report the machine and the versions of its software."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ci.gpu import result

_KIT = Path(__file__).resolve().parents[4] / "kit.json"
_PACKAGES = {"cuda-bindings": "cuda-bindings", "nixl": "nixl", "Ray": "ray"}


def main(told: result.Result) -> str:
    """Report each fact separately: an unknown fact does not hide others."""
    facts: dict[str, Callable[[], str]] = {
        "date": lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "card": cards,
        "driver": lambda: _ask_driver("driver_version"),
        "torch": lambda: str(_torch().__version__),
        "CUDA": lambda: str(_torch().version.cuda),
        "NCCL": nccl,
        **{name: partial(version, package) for name, package in _PACKAGES.items()},
        "commit": commit,
        "Python": platform.python_version,
        "host": host,
    }
    for name, find in facts.items():
        try:
            value = find()
        except Exception as error:
            value = f"unknown ({result.describe(error)})"
        told.note(**{name: value})
    return "found"


def cards() -> str:
    """Return the GPUs that torch sees."""
    torch = _torch()
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch sees"
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    return "; ".join(found)


def nccl() -> str:
    """Return torch's NCCL version."""
    torch = _torch()
    if not hasattr(torch._C, "_nccl_version"):
        return "none in this torch"
    return ".".join(map(str, torch.cuda.nccl.version()))


def version(package: str) -> str:
    """Return the installed version of a package."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "not installed"


def commit() -> str:
    """Return the commit of the kit or of this checkout."""
    if _KIT.exists():
        return str(json.loads(_KIT.read_text())["commit"] or "unknown")
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12")


def host() -> str:
    """Return facts of the host that affect the figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    shared = shutil.disk_usage("/dev/shm").free / 2**30
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {shared:.0f} GiB of /dev/shm free, "
        f"Linux {platform.release()}"
    )


def _torch() -> Any:
    import torch

    return torch


def _ask_driver(field: str) -> str:
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    lines = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").splitlines()
    return ", ".join(sorted(set(lines)))


def _output(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


if __name__ == "__main__":
    result.run(main)
