"""The bench of GPU hand-overs: its figures, its bounds, and all of it with host tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
def test_all_arms_that_carry_host_tensors_are_measured(tmp_path: Path) -> None:
    told = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, "-m", "ci.gpu.programs.bench", "--device", "cpu", "--largest", "4096"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), result.FILE: str(told)},
        check=True,
    )
    content = json.loads(told.read_text())
    assert content["state"] == "passed"
    assert set(content["figures"]["milliseconds"]) == {"auto, 4 KiB", "nixl, 4 KiB", "plain, 4 KiB"}
