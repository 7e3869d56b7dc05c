"""The reports of a GPU run: one in JSON, one as text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ci.gpu.runner import Outcome

#: The figure that is text.
TABLE = "table"

_WIDTH = 26


class Report:
    """Reports that are rewritten after each program, so that an aborted run leaves its results."""

    def __init__(self, folder: Path, machine: dict[str, Any]):
        self._folder = folder
        self._machine = machine
        self._outcomes: list[tuple[str, str, Outcome]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def has_failures(self) -> bool:
        return any(outcome.state == "failed" for _, _, outcome in self._outcomes)

    def add(self, step: str, program: str, outcome: Outcome) -> None:
        self._outcomes.append((step, program, outcome))
        self._write()

    def _write(self) -> None:
        rows = [
            {"step": step, "program": program, **asdict(outcome)}
            for step, program, outcome in self._outcomes
        ]
        content = json.dumps({"machine": self._machine, "programs": rows}, indent=1)
        (self._folder / "gpu-report.json").write_text(content + "\n")
        (self._folder / "gpu-report.txt").write_text(self._text())

    def _text(self) -> str:
        parts = [describe(self._machine), ""]
        parts += [line(step, program, outcome) for step, program, outcome in self._outcomes]
        for step, program, outcome in self._outcomes:
            if TABLE in outcome.figures:
                parts += ["", f"== {step} {program}".rstrip(), outcome.figures[TABLE]]
        for step, program, outcome in self._outcomes:
            if outcome.output.strip():
                parts += ["", f"== output of {step} {program}".rstrip(), outcome.output.rstrip()]
        return "\n".join(parts) + "\n"


def describe(machine: dict[str, Any]) -> str:
    """Return the machine's facts, one a line."""
    return "\n".join(f"{name}: {value}" for name, value in machine.items())


def line(step: str, program: str, outcome: Outcome) -> str:
    """Return one line for a program."""
    name = f"{step} {program}".rstrip()
    return f"{name:<{_WIDTH}} {outcome.state:<8}{outcome.seconds:6.1f} s  {outcome.remark}"
