"""How a program of a step tells the runner what came of it: through a file.

A program has ``main(result)``, which returns the remark that stands in the report, raises ``Skip``
where it cannot run, and any other exception where it fails. What it measured goes into the figures
as soon as it is known, so that it is there even if the program is ended at its time limit.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Names the file, in the environment of the program.
FILE = "RDT_GPU_RESULT"


class Skip(Exception):
    """The program cannot run here; says why."""


class Result:
    """What a program knows so far.

    Args:
        path: The file; None where a person has started the program.

    Attributes:
        figures: By name, in any units that the name tells.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self.figures: dict[str, Any] = {}

    def note(self, **figures: Any) -> None:
        """Adds figures; the program still runs."""
        self.figures |= figures
        if self._path is not None:
            self._write("", "")

    def end(self, state: str, remark: str) -> None:
        """Says how the program ends: "passed", "failed" or "skipped"."""
        self._write(state, remark)

    def _write(self, state: str, remark: str) -> None:
        content = {"state": state, "remark": remark, "figures": self.figures}
        if self._path is None:
            print(f"{state}: {remark}", flush=True)
            return
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(content))
        fresh.replace(self._path)


def run(main: Callable[[Result], str]) -> None:
    """Runs a program to its end, and ends the process with 1 if it failed."""
    path = os.environ.get(FILE)
    result = Result(Path(path) if path else None)
    try:
        result.end("passed", main(result))
    except Skip as reason:
        result.end("skipped", str(reason))
    except BaseException as error:
        traceback.print_exc()
        result.end("failed", describe(error))
        sys.exit(1)


def describe(error: BaseException) -> str:
    """One line of an error: of one from a Ray actor, the last, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:300]
