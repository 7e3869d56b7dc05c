"""Run the programs of the steps, each with a time limit and in its own process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci.gpu import result

#: Environment variable of a program and its child processes, to find remaining ones.
MARK = "RDT_GPU_PROGRAM"
_OUTPUT_BYTES = 100_000


@dataclass(frozen=True)
class Program:
    """One program of a step.

    Attributes:
        name: Its topic, or "" if the step has only one program.
        arguments: For Python.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program.

    Attributes:
        state: "passed", "failed" or "skipped".
        remark: The main figure, or the reason.
        output: The end of its output.
    """

    state: str
    remark: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    output: str = ""


def run(program: Program, root: Path, limit_s: float) -> Outcome:
    """Run a program in a checkout; never raise for its failure.

    Its output goes to a file, so that no remaining child process can block the runner. At the limit
    and at the end, all its child processes are killed.
    """
    started = time.monotonic()
    limit_s = min(limit_s, program.limit_s)
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="gpu-step-") as folder:
        told, printed = Path(folder, "result.json"), Path(folder, "output.txt")
        environment = {**os.environ, **program.environment, MARK: mark, result.FILE: str(told)}
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *program.arguments],
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            late = ""
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                late = f"still running after {limit_s:g} s"
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kill_marked(mark)
        seconds = time.monotonic() - started
        content = json.loads(told.read_text()) if told.exists() else {}
        return judge(content, _tail(printed), process.returncode, late, seconds)


def judge(
    told: dict[str, Any], output: str, status: int | None, late: str, seconds: float
) -> Outcome:
    """Return the outcome: the program's own report, unless it ended in another way."""
    state, remark = told.get("state", ""), told.get("remark", "")
    if late:
        state, remark = "failed", f"{late}; {remark or _last_line(output)}"
    elif not state:
        state, remark = "failed", f"ended with {status}: {_last_line(output)}"
    return Outcome(state, remark, seconds, told.get("figures", {}), output)


def kill_marked(mark: str) -> None:
    """Kill the processes with a mark in their environment: some have their own groups."""
    wanted = f"{MARK}={mark}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def _tail(printed: Path) -> str:
    content = printed.read_bytes()
    cut = b"...\n" if len(content) > _OUTPUT_BYTES else b""
    return (cut + content[-_OUTPUT_BYTES:]).decode(errors="replace")


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
