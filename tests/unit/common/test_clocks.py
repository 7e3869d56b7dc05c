"""Steps of the wall clock change nothing: no code of ours reads it."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

WALL_CLOCKS = re.compile(
    r"time\.time(_ns)?\(|datetime\.(now|today|utcnow)|CLOCK_REALTIME|system_clock|gettimeofday"
    r"|\btime\((NULL|nullptr)?\)"
)
SOURCES = [
    *(ROOT / "ray" / "python").rglob("*.py*"),
    *(ROOT / "ray" / "src").rglob("*.cc"),
    *(ROOT / "ray" / "src").rglob("*.h"),
]


def test_deadlines_come_from_the_monotonic_clock() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in SOURCES
        if path.suffix != ".pyc"
        for match in WALL_CLOCKS.finditer(path.read_text())
    }
    assert len(SOURCES) > 100
    assert not found


@pytest.mark.parametrize("line", ["now = time.time()", "std::chrono::system_clock::now()"])
def test_wall_clocks_are_recognized(line: str) -> None:
    assert WALL_CLOCKS.search(line)
