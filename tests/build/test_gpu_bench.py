"""The bench of GPU hand-overs: its figures, its bounds, and all of it with host tensors."""

from __future__ import annotations

import sys

import pytest
import torch

from ci.gpu import result
from ci.gpu.programs import bench, bench_arm, pair
from tests.support import ROOT


def test_figures_are_medians_of_all_turns() -> None:
    assert bench.medians({("auto", "4 KiB"): [0.001, 0.009, 0.002], ("nixl", "4 KiB"): []}) == {
        ("auto", "4 KiB"): 2.0
    }


def test_the_table_has_a_dash_for_what_was_not_measured() -> None:
    found = {("auto", "4 KiB"): 0.5, ("nixl", "1 GiB"): 2.0}
    text = bench.table(found, {"4 KiB": (1, 4 << 10), "1 GiB": (1, 1 << 30)})
    assert [line.split() for line in text.splitlines()] == [
        ["ms", "(GB/s)", "auto", "nixl"],
        ["4", "KiB", "0.500", "-"],
        ["1", "GiB", "-", "2.00", "(536.9)"],
    ]


def test_bounds_are_told_for_what_was_measured() -> None:
    found = {
        ("auto", "1 GiB"): 1.0,
        ("auto", "4 KiB"): 0.4,
        ("plain", "4 KiB"): 0.2,
        ("cuda_ipc", "1 GiB"): 0.24,
        ("cuda_ipc", "4 KiB"): 0.2,
        ("stock cuda_ipc", "1 GiB"): 0.2,
    }
    assert bench.bounds(found, {"device": 1000.0}) == [
        ("auto, 1 GiB, in device copy rates: 1.07 of at least 0.7", True),
        ("cuda_ipc, 1 GiB in 4 KiB: 1.20 of at most 1.2", True),
        ("cuda_ipc, 4 KiB, in plain Ray's: 1.00 of at most 1.3", True),
        ("auto, 4 KiB, in plain Ray's: 2.00 of at most 1.3", False),
        ("cuda_ipc, 1 GiB, in stock's: 1.20 of at most 1", False),
    ]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda tensors: None, ""),
        (lambda tensors: tensors[1].fill_(0), "1 of 2 tensors have wrong bytes"),
        (lambda tensors: tensors.pop(), "1 tensors"),
    ],
)
def test_bytes_are_verified(spoil, told) -> None:
    worker = pair.Worker()
    bench_arm.hold(worker, 2, 100, "cpu")
    tensors = bench_arm.given(worker)
    spoil(tensors)
    if not told:
        bench_arm._verify(tensors, 2, 100)
        return
    with pytest.raises(AssertionError, match=told):
        bench_arm._verify(tensors, 2, 100)


def test_wrong_bytes_are_counted_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "_PART", 10)
    tensor = torch.full((25,), 7, dtype=torch.uint8)
    tensor[[3, 24]] = 0
    assert pair.wrong_bytes(tensor, 7) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_arms_are_measured_with_host_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits that a busy machine keeps."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(bench, "START_LIMIT_S", 200)
    monkeypatch.setattr(bench, "TURN_LIMIT_S", 60)
    monkeypatch.setattr(bench, "TURNS", 1)
    kinds = {name: bench.KINDS[name] for name in ("auto", "plain")}
    told = result.Result(None)
    arms = {name: bench.Arm(kind, sys.executable, "cpu") for name, kind in kinds.items()}
    measured = bench.Bench(told, arms)
    try:
        measured.start()
        measured.measure({"4 KiB": bench.CASES["4 KiB"]})
    finally:
        measured.close()
    remark = bench.conclude(told, measured, {"4 KiB": bench.CASES["4 KiB"]}, {})
    assert remark.startswith("2 figures, ")
    assert set(told.figures["milliseconds"]) == {"auto, 4 KiB", "plain, 4 KiB"}


def test_an_arm_that_does_not_answer_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dropped; one that reports an error goes on with its next case."""
    monkeypatch.setattr(bench, "TURNS", 2)
    arms = {"hangs": FakeArm(bench.ArmEnded("no answer")), "well": FakeArm(None)}
    arms["fails"] = FakeArm(RuntimeError("no memory"), only="1 GiB")
    measured = bench.Bench(result.Result(None), arms)
    measured.start()
    measured.measure({"4 KiB": (1, 4 << 10), "1 GiB": (1, 1 << 30)})
    assert measured.failures == {"hangs, 4 KiB": "no answer", "fails, 1 GiB": "no memory"}
    assert bench.medians(measured.times) == {
        ("well", "4 KiB"): 1000.0,
        ("well", "1 GiB"): 1000.0,
        ("fails", "4 KiB"): 1000.0,
    }


class FakeArm(bench.Arm):
    """Takes a second for everything, or fails.

    Args:
        error: What it raises.
        only: For which case; "" for all.
    """

    def __init__(self, error: Exception | None, only: str = ""):
        self._error = error
        self._only = bench.CASES[only] if only else None

    def wait_ready(self, limit_s: float) -> None:
        pass

    def measure(self, count: int, nbytes: int) -> list[float]:
        if self._error is not None and self._only in (None, (count, nbytes)):
            raise self._error
        return [1.0]
