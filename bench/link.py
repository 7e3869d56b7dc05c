"""The workers, as run.py sees them: one process for each side, asked line by line."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from bench.arms import BARE, OURS, Arm

ROOT = Path(__file__).resolve().parents[1]
ANSWER_LIMIT_S = 300.0


class WorkerFailed(Exception):
    """A worker gave no answer, or said that it could not do what it was asked."""


class Worker:
    """One worker process.

    Args:
        python: The Python that runs it.
        kind: "ray" or "bare".
        log: Where its standard error goes.
    """

    def __init__(self, python: Path, kind: str, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
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
        """Sends one request and waits for its answer.

        Raises:
            WorkerFailed: It failed, ended, or did not answer in time; after the last two the
                worker is of no more use.
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
        """Whether it can be asked."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the worker in good order, or by force when it does not."""
        if self.is_alive:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Ends the worker and all that it started, at once."""
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
        """Sets an arm up under a name of its own."""
        options = dict(arm.options)
        self._of(arm).ask(do="open", arm=name, scenario=arm.scenario, options=options)

    def sample(self, name: str, arm: Arm) -> list[float]:
        """Measures an open arm once."""
        samples: list[float] = self._of(arm).ask(do="sample", arm=name)["samples"]
        return samples

    def close(self, name: str, arm: Arm) -> None:
        """Ends what open set up."""
        self._of(arm).ask(do="close", arm=name)

    def _of(self, arm: Arm) -> Worker:
        worker = self._running.get(arm.side)
        if worker is None or not worker.is_alive:
            python = self._ours if arm.side in (OURS, BARE) else self._stock
            kind = "bare" if arm.side == BARE else "ray"
            log = self._logs / f"{arm.side.replace(' ', '-')}.log"
            worker = self._running[arm.side] = Worker(python, kind, log)
        return worker

    def stop(self) -> None:
        """Ends all workers."""
        for worker in self._running.values():
            worker.stop()
        self._running.clear()
