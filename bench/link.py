"""The workers as run.py uses them: one process for each side, with one request a line."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.arms import BARE, OURS, STOCK_ZERO_COPY, Arm

ROOT = Path(__file__).resolve().parents[1]
ANSWER_LIMIT_S = 300.0
#: By side, what is added to the environment of its processes.
VARIABLES = {STOCK_ZERO_COPY: {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}}


class WorkerFailed(Exception):
    """A worker gave no answer or reported an error."""


class Worker:
    """One worker process.

    Args:
        python: The Python that runs it.
        kind: "ray" or "bare".
        log: The file for its standard error.
        variables: Additions to its environment.
    """

    def __init__(
        self, python: Path, kind: str, log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
        environment.pop("RAY_ADDRESS", None)
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "bench.worker", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=log.parent,
                env=environment,
                start_new_session=True,
            )

    def ask(self, **request: Any) -> Any:
        """Send one request and wait for its answer.

        Raises:
            WorkerFailed: It failed, ended, or did not answer in time. After the last two, the
                worker cannot be used any more.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"the worker ended; see {self._log}") from None
        answer = self._read_answer()
        if "failure" in answer:
            raise WorkerFailed(answer["failure"])
        return answer

    def _read_answer(self) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_LIMIT_S)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        reason = "ended" if ready else f"gave no answer in {ANSWER_LIMIT_S:.0f} s"
        self.kill()
        raise WorkerFailed(f"the worker {reason}; see {self._log}")

    @property
    def is_alive(self) -> bool:
        """Return whether it accepts requests."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the worker; kill it if it does not exit."""
        if self.is_alive:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Kill the worker and its child processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Workers:
    """The workers of one case, each started at its first use.

    Args:
        ours: The Python with this wheel.
        stock: The Python with stock Ray.
        logs: The folder for their logs.
    """

    def __init__(self, ours: Path, stock: Path, logs: Path) -> None:
        self._ours, self._stock, self._logs = ours, stock, logs
        self._running: dict[str, Worker] = {}

    def open(self, name: str, arm: Arm) -> None:
        """Set up an arm under its own name."""
        options = dict(arm.options)
        self._of(arm).ask(do="open", arm=name, scenario=arm.scenario, options=options)

    def sample(self, name: str, arm: Arm) -> list[float]:
        """Measure an open arm once."""
        samples: list[float] = self._of(arm).ask(do="sample", arm=name)["samples"]
        return samples

    def close(self, name: str, arm: Arm) -> None:
        """Close an arm that open set up."""
        self._of(arm).ask(do="close", arm=name)

    def _of(self, arm: Arm) -> Worker:
        worker = self._running.get(arm.side)
        if worker is None or not worker.is_alive:
            python = self._ours if arm.side in (OURS, BARE) else self._stock
            kind = "bare" if arm.side == BARE else "ray"
            log = self._logs / f"{arm.side.replace(' ', '-')}.log"
            variables = VARIABLES.get(arm.side)
            worker = self._running[arm.side] = Worker(python, kind, log, variables)
        return worker

    def stop(self) -> None:
        """End all workers."""
        for worker in self._running.values():
            worker.stop()
        self._running.clear()
