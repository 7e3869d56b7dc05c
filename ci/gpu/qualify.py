"""Runs all that a GPU machine should run, and prints for each transport what became of it.

Run by run.sh. Exit status 1 if anything failed; a step that could not run is skipped, with the
reason, and is no failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
STEP_LIMIT_S = 1200

#: What each transport is tested with where there is no GPU.
LOGIC = {
    "auto": [
        "tests/unit/test_devices.py",
        "tests/unit/test_staged.py",
        "tests/integration/test_devices.py",
    ],
    "cuda_ipc": ["tests/unit/test_device_ipc.py"],
    "nccl": ["tests/unit/test_nccl.py"],
    "nixl": ["tests/unit/test_nixl.py", "tests/integration/test_nixl.py"],
    "gloo": ["tests/unit/test_gloo.py"],
}


@dataclass(frozen=True)
class Outcome:
    """What became of one step: "passed", "failed" or "skipped", and what there is to say."""

    state: str
    remark: str = ""


def main() -> int:
    """Runs all steps; the table of outcomes comes last."""
    print(describe_machine(), flush=True)
    rows = []
    for transport in LOGIC:
        for step, outcome in run_steps(transport):
            rows.append((transport, step, outcome))
            print(f"  {transport}: {step}: {outcome.state}. {outcome.remark}", flush=True)
    print(f"\n{'transport':<10}{'step':<14}{'outcome':<10}why")
    for transport, step, outcome in rows:
        print(f"{transport:<10}{step:<14}{outcome.state:<10}{outcome.remark}")
    return int(any(outcome.state == "failed" for _, _, outcome in rows))


def run_steps(transport: str) -> Iterator[tuple[str, Outcome]]:
    """All steps of one transport."""
    yield "fake device", run_tests(LOGIC[transport])
    yield "gpu tests", run_tests(["tests/gpu", "-k", transport])
    yield "conformance", run_program(["ci/gpu/conformance.py", transport])
    yield "example", run_program([f"examples/{transport}_pass.py"])
    yield "bench", run_program(["ci/gpu/bench.py", transport])


def describe_machine() -> str:
    """The GPUs and the torch that this machine has."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpus = ", ".join(names) if torch.cuda.is_available() else "no NVIDIA GPU that torch sees"
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}; {gpus}"


def run_tests(arguments: list[str]) -> Outcome:
    """pytest; its outcomes are read from its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        status, printed, errors = execute([*command, *arguments])
        if not report.exists():
            return Outcome("failed", last_line(printed + errors) or f"pytest ended with {status}")
        return judge(ElementTree.parse(report).getroot(), status, printed)


def judge(report: ElementTree.Element, status: int, printed: str) -> Outcome:
    """What pytest's report says."""
    cases = list(report.iter("testcase"))
    skips = [skip.get("message", "") for skip in report.iter("skipped")]
    reasons = "; ".join(sorted(set(skips)))
    if status != 0:
        print(printed)
        return Outcome("failed", last_line(printed))
    if len(skips) == len(cases):
        return Outcome("skipped", reasons)
    left_out = f", {len(skips)} skipped: {reasons}" if skips else ""
    return Outcome("passed", f"{len(cases) - len(skips)} tests{left_out}")


def run_program(arguments: list[str]) -> Outcome:
    """A program that ends its own way with "skipped: why" where it cannot run."""
    status, printed, errors = execute(arguments)
    if status != 0:
        print(printed, errors)
        return Outcome("failed", last_line(errors))
    if printed.startswith("skipped: "):
        return Outcome("skipped", printed.removeprefix("skipped: ").strip())
    return Outcome("passed", "; ".join(printed.strip().splitlines()))


def execute(arguments: list[str]) -> tuple[int, str, str]:
    """Runs this Python, for at most the limit, in a process group of its own.

    Returns:
        Its exit status, what it printed, and what it printed as errors.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=STEP_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, errors = process.communicate()
        errors += f"\nstill running after {STEP_LIMIT_S} s"
    return process.returncode, printed, errors


def last_line(printed: str) -> str:
    lines = printed.strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
