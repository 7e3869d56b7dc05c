"""Rows of the benchmark: bounds, rows without one, and the best alternative."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from bench.arms import MILLISECONDS, NO_BOUND, Bound, Row, Samples, at_least, at_most, slowest
from bench.cases import LIBRARIES
from bench.report import show_rows


def row(bound: Bound, ours: float = 0.02) -> Row:
    return Row("hop", Samples([ours]), Samples([0.04]), "other", bound, MILLISECONDS)


@pytest.mark.parametrize(
    ("bound", "ratio", "is_met"),
    [
        (at_least(2), 2, True),
        (at_least(3), 2, False),
        (at_most(0.5), 0.5, True),
        (at_most(0.4), 0.5, False),
        (NO_BOUND, 2, None),
    ],
)
def test_ratio_is_a_speed_or_a_cost(bound: Bound, ratio: float, is_met: bool | None) -> None:
    assert row(bound).ratio == pytest.approx(ratio)
    assert row(bound).is_met is is_met


def test_row_without_a_bound_has_no_verdict() -> None:
    shown = show(row(NO_BOUND))
    assert "2.00x" in shown
    assert "none" in shown
    assert "not measured" not in shown


def test_row_without_samples_gives_the_reason() -> None:
    missing = dataclasses.replace(row(NO_BOUND), against=Samples(failure="skipped: no library"))
    shown = show(missing)
    assert "not measured" in shown
    assert "hop: skipped: no library" in shown


def test_best_alternative_is_the_fastest_without_this_wheel() -> None:
    compared = dataclasses.replace(
        row(NO_BOUND),
        stock=Samples([0.3]),
        plain=Samples([0.2]),
        zero_copy=Samples([0.01]),
    )
    assert compared.best_alternative == ("zero-copy", pytest.approx(0.5))
    assert "0.50x (zero-copy)" in show(compared)
    without = dataclasses.replace(compared, zero_copy=Samples(failure="ended"))
    assert without.best_alternative == ("plain", pytest.approx(10))


def test_stock_rdt_alone_is_not_the_best_alternative() -> None:
    assert dataclasses.replace(row(NO_BOUND), stock=Samples([0.3])).best_alternative is None


def test_each_hop_of_a_pair_has_its_own_samples() -> None:
    two_pairs = Samples([9.0, 1.0, 2.0, 7.0, 3.0, 2.0])
    hops = [two_pairs.every(3, number) for number in range(3)]
    assert [hop.values for hop in hops] == [[9.0, 7.0], [1.0, 3.0], [2.0, 2.0]]
    assert slowest(hops[1:]).median == 2.0
    assert slowest([Samples(failure="ended"), hops[0]]) is hops[0]


def test_every_library_has_a_sender() -> None:
    from bench.libraries import SENDERS

    assert tuple(SENDERS) == LIBRARIES


def show(shown: Row) -> str:
    console = Console(file=io.StringIO(), width=220)
    show_rows(console, [shown])
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
