"""What several folders of tests share: waiting for a state, programs as a user starts them."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: How soon a dead producer must be known, and what a busy machine may add to it.
KNOWN_WITHIN_S, BUSY_S = 2, 8

#: What drivers of their own begin with.
START = """
import os, sys, time
import ray

def start():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             object_store_memory=100 << 20)
"""

#: What some of them need as well.
MAKER = """
@ray.remote(num_cpus=0)
class Maker:
    @ray.method(tensor_transport="auto")
    def make(self, count):
        import torch
        return torch.ones(count)

    def total(self, tensor):
        return float(tensor.sum())
"""


@functools.cache
def why_no_nixl() -> str:
    """Why nixl cannot be used here, "" if it can.

    Its API is imported to find out: the package ``nixl`` is only a front for the one that is built
    for the CUDA version of torch, which may be missing.
    """
    raise_exceptions = logging.raiseExceptions  # importing nixl changes it for the whole process
    try:
        importlib.import_module("nixl._api")
    except ImportError as error:
        return f"nixl cannot be imported: {error}"
    finally:
        logging.raiseExceptions = raise_exceptions
    return ""


def needs_nixl() -> pytest.MarkDecorator:
    """Skips a test where nixl cannot be used."""
    return pytest.mark.skipif(bool(why_no_nixl()), reason=why_no_nixl() or "nixl is here")


def wait_until(is_reached: Callable[[], Any], what: str = "", limit_s: float = 30) -> None:
    """Returns once ``is_reached()`` is true; fails with ``what`` if that takes too long.

    ``what`` may be left out where ``is_reached`` raises AssertionError until it is reached.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            if is_reached() is not False:
                return
            reason = what or "not reached"
        except AssertionError as error:
            reason = f"{what} {error}"
        if time.monotonic() > deadline:
            pytest.fail(f"after {limit_s:g} s: {reason}")
        time.sleep(0.02)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keeps a process stopped, all its threads, as a machine that hangs would."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: _states(pid) == {"T"}, f"{pid} has stopped")
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _states(pid: int) -> set[str]:
    """Of its threads, as proc(5) writes them."""
    files = Path(f"/proc/{pid}/task").glob("*/stat")
    return {file.read_text().rpartition(")")[2].split()[0] for file in files}


def run_program(
    arguments: list[str | Path],
    folder: Path,
    limit_s: float = 90,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Runs a Python program in another folder; returns what it printed, fails if it fails.

    First come its logs and warnings, then its output: a line of one never falls into a line of
    the other. It runs in a process group of its own, so that its Ray processes end with it at
    the limit.
    """
    program = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, logs = program.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        output, logs = program.communicate()
        pytest.fail(f"still running after {limit_s:g} s; it printed:\n{logs}{output}")
    assert program.returncode == 0, logs + output
    return logs + output


def run_driver(source: str, folder: Path, **options: Any) -> str:
    """Runs the source of a Ray driver as a program of its own; see ``run_program``."""
    file = folder / "driver.py"
    file.write_text(textwrap.dedent(source))
    return run_program([file], folder, **options)
