"""The runner of GPU steps: what becomes of programs that pass, fail, skip, crash and hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ci.gpu import __main__ as command
from ci.gpu import runner, steps
from ci.gpu.report import Report
from ci.gpu.runner import Outcome, Program
from ci.gpu.steps import Step
from tests.support import ROOT, wait_until

BEGIN = "from ci.gpu import result\n"


def program(source: str, limit_s: float = 60, name: str = "") -> Program:
    return Program(name, ("-c", BEGIN + textwrap.dedent(source)), limit_s)


def run(source: str, limit_s: float = 60) -> Outcome:
    return runner.run(program(source), ROOT, limit_s)


def test_a_program_that_passes_has_figures_and_a_remark() -> None:
    outcome = run("""
        def main(told):
            told.note(rate=3.5)
            print("words")
            return "3.5 GB/s"
        result.run(main)
    """)
    assert (outcome.state, outcome.remark) == ("passed", "3.5 GB/s")
    assert outcome.figures == {"rate": 3.5}
    assert outcome.output == "words\n"
    assert outcome.seconds > 0


def test_a_program_that_fails_says_why_in_a_line() -> None:
    outcome = run("""
        def main(told):
            raise ValueError("first\\nthe cause")
        result.run(main)
    """)
    assert (outcome.state, outcome.remark) == ("failed", "ValueError: the cause")
    assert "Traceback" in outcome.output


def test_a_program_that_cannot_run_is_skipped() -> None:
    outcome = run("""
        def main(told):
            raise result.Skip("no GPU")
        result.run(main)
    """)
    assert (outcome.state, outcome.remark) == ("skipped", "no GPU")


def test_a_program_that_crashes_has_failed() -> None:
    outcome = run("import os; print('last words', flush=True); os.abort()")
    assert (outcome.state, outcome.remark) == ("failed", "ended with -6: last words")


def test_a_program_that_hangs_is_ended_with_all_that_it_started() -> None:
    """One of them ignores signals, and has a session of its own."""
    outcome = run(
        """
        import subprocess, sys, time
        child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)"
        def main(told):
            children = [
                subprocess.Popen([sys.executable, "-c", child], start_new_session=own)
                for own in (False, True)
            ]
            told.note(children=[each.pid for each in children])
            time.sleep(1000)
        result.run(main)
        """,
        limit_s=5,
    )
    assert outcome.state == "failed"
    assert outcome.remark.startswith("still running after 5 s")
    children = outcome.figures["children"]
    assert len(children) == 2
    for pid in children:
        wait_until(lambda pid=pid: not _runs(pid), f"{pid} has ended")


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_program_that_says_that_it_passed_and_does_not_end_has_failed() -> None:
    outcome = run(
        """
        import time
        result.run(lambda told: "all well")
        time.sleep(1000)
        """,
        limit_s=3,
    )
    assert (outcome.state, outcome.remark) == ("failed", "still running after 3 s; all well")


PASSES = "result.run(lambda told: 'well')"
FAILS = "result.run(lambda told: 1 / 0)"


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_failure_stops_no_other_step(
    is_alone: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [
        Step("one", (program(FAILS, name="a"), program(PASSES, name="b")), is_alone),
        Step("two", (program(PASSES),), is_alone),
    ]
    run = command.Run(tmp_path, {"card": "none"}, time.monotonic() + 100)
    run.run(chosen)
    assert run.report.has_failures
    content = json.loads((tmp_path / "gpu-report.json").read_text())
    found = {(each["step"], each["program"]): each["state"] for each in content["programs"]}
    assert found == {("one", "a"): "failed", ("one", "b"): "passed", ("two", ""): "passed"}
    assert content["machine"] == {"card": "none"}
    printed = capsys.readouterr().out
    assert "division by zero" in printed
    assert sum("passed" in line for line in printed.splitlines()) == 2


def test_the_report_names_what_it_ran_on() -> None:
    facts = command.find_facts()
    assert {"date", "card", "driver", "torch", "CUDA", "NCCL", "cuda-bindings", "nixl"} < set(facts)
    assert not any("unknown" in value for value in facts.values()), facts


def test_a_step_for_which_no_time_is_left_is_skipped(tmp_path: Path) -> None:
    run = command.Run(tmp_path, {"card": "none"}, time.monotonic() - 1)
    run.run([Step("late", (program(PASSES),))])
    assert "no time was left" in (tmp_path / "gpu-report.txt").read_text()
    assert not run.report.has_failures


def test_the_report_to_read_has_tables_and_output(tmp_path: Path) -> None:
    report = Report(tmp_path, {"card": "none"})
    report.add("bench", "pairs", Outcome("passed", "well", 2.0, {"table": "a b\n1 2"}, "noise\n"))
    text = (tmp_path / "gpu-report.txt").read_text()
    assert text.startswith("card: none\n\nbench pairs")
    assert "== bench pairs\na b\n1 2\n" in text
    assert text.endswith("== output of bench pairs\nnoise\n")


def test_unknown_steps_are_told_with_the_known_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ci.gpu", "check", "bake"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no step is called bake; steps are check, ceilings, gpu-tests" in done.stderr


def test_steps_run_in_the_order_in_which_they_are_named() -> None:
    known = steps.steps("")
    assert [step.name for step in steps.choose(known, ["graph", "check"])] == ["graph", "check"]
    assert steps.choose(known, []) == list(known)


def test_every_program_of_every_step_exists() -> None:
    for step in steps.steps("/stock/python"):
        for each in step.programs:
            assert each.arguments[0] == "-m"
            module = each.arguments[1].replace(".", os.sep) + ".py"
            assert (ROOT / module).is_file(), module
