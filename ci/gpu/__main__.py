"""``python -m ci.gpu [STEP...]``: run the steps for a machine with NVIDIA GPUs; see doc/gpu.md.

Prints a line for each program when it ends, and writes two reports. The exit status is 1 if a
program failed. A program that cannot run here is skipped with the reason, which is no failure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ci.gpu import runner, steps
from ci.gpu.report import TABLE, Report, describe, line
from ci.gpu.runner import Outcome, Program
from ci.gpu.steps import Step

ROOT = Path(__file__).resolve().parents[2]
_MACHINE = Program("", ("-m", "ci.gpu.programs.machine"), 60)


def main(arguments: list[str]) -> int:
    """Run the steps."""
    options = _parse(arguments)
    try:
        chosen = steps.choose(steps.steps(options.stock_python), options.steps)
    except ValueError as error:
        print(f"ci/gpu/run.sh: {error}", file=sys.stderr)
        return 2
    # Child processes of the programs can import ci and the tests.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    deadline = time.monotonic() + options.within
    machine = find_facts()
    print(describe(machine), flush=True)
    run = Run(options.out, machine, deadline)
    run.run(chosen)
    print(f"reports: {options.out}/gpu-report.txt and .json")
    return int(run.report.has_failures)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/gpu/run.sh", description="check a machine with GPUs")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all steps")
    parser.add_argument("--stock-python", default="", help="Python with stock Ray, to compare")
    parser.add_argument("--within", type=float, default=480, help="time limit in seconds")
    out = os.environ.get("OUT") or "gpu-report"
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for the reports")
    return parser.parse_args(arguments)


def find_facts() -> dict[str, Any]:
    """Describe the machine, in a separate process that uses the GPU alone."""
    found = runner.run(_MACHINE, ROOT, _MACHINE.limit_s)
    return found.figures or {"machine": found.remark}


class Run:
    """One run, which writes its reports to a folder and must end at a deadline."""

    def __init__(self, out: Path, machine: dict[str, Any], deadline: float):
        self._deadline = deadline
        self._lock = threading.Lock()
        self.report = Report(out, machine)

    def run(self, chosen: list[Step]) -> None:
        """Run steps in order; a failed program does not stop the others."""
        for is_alone, group in itertools.groupby(chosen, key=lambda step: step.is_alone):
            programs = [(step, program) for step in group for program in step.programs]
            at_once = 1 if is_alone else max(1, (os.cpu_count() or 1) // 4)
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(self._run, programs))

    def _run(self, what: tuple[Step, Program]) -> None:
        step, program = what
        left = self._deadline - time.monotonic()
        if left > 0:
            outcome = runner.run(program, ROOT, left)
        else:
            outcome = Outcome("skipped", "no time was left for it")
        with self._lock:
            print(line(step.name, program.name, outcome), flush=True)
            if TABLE in outcome.figures:
                print(outcome.figures[TABLE], flush=True)
            self.report.add(step.name, program.name, outcome)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
