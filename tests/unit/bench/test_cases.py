"""Cases of the benchmark: each forms its rows from arms that it measures."""

from __future__ import annotations

from typing import Any

import pytest

from bench.arms import BARE, STOCK_ZERO_COPY, Arm, Samples
from bench.cases import CASES
from bench.libraries import SENDERS

ONE_HOST = (
    *("hop", "medium_hop", "small_objects", "repeated", "gloo_large", "fresh", "created"),
    *("state_dict", "many", "fan_out", "task_hop", "generator", "awaited"),
)


class FakeRounds:
    """Rounds that measure nothing; every arm gets the same samples."""

    def __init__(self) -> None:
        self.arms: dict[str, Arm] = {}

    def measure(self, arms: dict[str, Arm], rounds: int) -> dict[str, Samples]:
        assert not self.arms.keys() & arms.keys(), "names of arms are unique in a case"
        self.arms |= arms
        return {name: Samples([0.1] * 8) for name in arms}

    measure_alone = measure


def run(name: str) -> tuple[dict[str, Arm], list[Any]]:
    rounds = FakeRounds()
    rows = CASES[name](rounds)  # type: ignore[arg-type]
    return rounds.arms, rows


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_measured(name: str) -> None:
    _, rows = run(name)
    assert rows
    assert all(row.ratio is not None for row in rows)


@pytest.mark.parametrize("name", ONE_HOST)
def test_plain_ray_and_zero_copy_are_in_the_same_case(name: str) -> None:
    arms, rows = run(name)
    assert STOCK_ZERO_COPY in {arm.side for arm in arms.values()}
    assert any(row.best_alternative for row in rows)


def test_peers_measures_every_library_on_the_bytes_of_ours() -> None:
    arms, _ = run("peers")
    libraries = {arm.options["library"]: arm for arm in arms.values() if arm.side == BARE}
    assert libraries.keys() == SENDERS.keys()
    shapes = {(arm.options["nbytes"], arm.options["count"]) for arm in arms.values()}
    assert shapes == {(256 << 20, 8)}
