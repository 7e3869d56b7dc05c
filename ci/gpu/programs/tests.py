"""Run pytest in this process: report passed, failed and skipped tests so far."""

from __future__ import annotations

import sys

import pytest

from ci.gpu import result


class Count:
    """Plugin that records each test when it ends, and the running test."""

    def __init__(self, told: result.Result):
        self._told = told
        self.passed = 0
        self.failed: list[str] = []
        self.reasons: set[str] = set()
        self.skipped = 0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._told.note(running=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped += 1
            if isinstance(report.longrepr, tuple):
                self.reasons.add(report.longrepr[2].removeprefix("Skipped: "))
        elif report.when == "call":
            self.passed += 1
        self._told.note(passed=self.passed, failed=self.failed, skipped=sorted(self.reasons))

    def remark(self) -> str:
        """Return the summary if no test failed.

        Raises:
            Skip: All tests were skipped.
        """
        reasons = "; ".join(sorted(self.reasons))
        if not self.passed:
            raise result.Skip(reasons or "no tests selected")
        left_out = f", {self.skipped} skipped: {reasons}" if self.skipped else ""
        return f"{self.passed} tests{left_out}"


def main(told: result.Result) -> str:
    """Run the selected tests."""
    count = Count(told)
    status = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[count])
    told.figures.pop("running", None)
    if count.failed:
        names = ", ".join(nodeid.partition("::")[2] for nodeid in count.failed[:3])
        raise AssertionError(f"{len(count.failed)} of {len(count.failed) + count.passed}: {names}")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise AssertionError(f"pytest ended with {status}")
    return count.remark()


if __name__ == "__main__":
    result.run(main)
