"""Report of a program of a step to the runner, through a file.

A program has ``main(result)``. It returns the remark for the report, raises ``Skip`` if it cannot
run, or raises another exception if it fails. It adds each figure at once, so that the figures
exist even if the program is killed at its time limit.
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
    """The program cannot run here; the text is the reason."""


class Result:
    """The result of a program so far.

    Args:
        path: The file; None if a person started the program.

    Attributes:
        figures: Figures by name; the name states the unit.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self.figures: dict[str, Any] = {}

    def note(self, **figures: Any) -> None:
        """Add figures while the program runs."""
        self.figures |= figures
        if self._path is not None:
            self.end("", "")

    def end(self, state: str, remark: str) -> None:
        """Record how the program ends: "passed", "failed", "skipped", or "" if it still runs."""
        content = {"state": state, "remark": remark, "figures": self.figures}
        if self._path is None:
            print(f"{state}: {remark}", flush=True)
            return
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(content))
        fresh.replace(self._path)


def run(main: Callable[[Result], str]) -> None:
    """Run a program; exit with 1 if it failed."""
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
    """Return one line of an error; for an error of a Ray actor, the last line with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:300]
