"""Arms, samples, bounds and rows. Pure data: no Ray, no processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

OURS, STOCK, BARE = "ours", "stock", "bare"
STOCK_AFTER_RDT = "stock after RDT"
STOCK_ZERO_COPY = "stock zero-copy"


@dataclass(frozen=True)
class Arm:
    """One of the scenarios that a case measures in turn.

    Args:
        side: The process that runs it: OURS, STOCK, STOCK_AFTER_RDT, STOCK_ZERO_COPY (consumers get
            read-only views of Ray's object store) or BARE (without Ray).
        scenario: The scenario's name in that process.
        options: The scenario's options.
    """

    side: str
    scenario: str
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Samples:
    """All samples of one arm: seconds, or bytes for memory. Lower is better.

    Args:
        values: The samples in the order of measurement.
        failure: Why samples are missing.
    """

    values: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def is_empty(self) -> bool:
        """Return whether nothing was measured."""
        return not self.values

    @property
    def median(self) -> float:
        """The median sample."""
        return median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile."""
        if len(self.values) < 2:
            return self.median, self.median
        first, _, third = quantiles(self.values, n=4, method="inclusive")
        return first, third

    def every(self, step: int, first: int) -> Samples:
        """Return each sample at `first` plus a multiple of `step`."""
        return Samples(self.values[first::step], self.failure)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        if self.is_empty:
            return {"failure": self.failure}
        first, third = self.spread
        found: dict[str, object] = {"median": self.median, "q1": first, "q3": third}
        if self.failure:
            found["failure"] = self.failure
        return {**found, "samples": self.values}


def slowest(several: Iterable[Samples]) -> Samples:
    """Return the samples with the greatest median; empty ones count as zero."""
    return max(several, key=lambda samples: 0.0 if samples.is_empty else samples.median)


@dataclass(frozen=True)
class Unit:
    """The unit in which an arm's samples are shown.

    Args:
        suffix: The unit's name.
        scale: Factor of a sample; for a rate, the dividend of a sample.
        is_rate: Whether higher is better in this unit.
        digits: Digits after the point.
    """

    suffix: str
    scale: float
    is_rate: bool = False
    digits: int = 2

    def convert(self, sample: float) -> float:
        """Return a sample in this unit."""
        return self.scale / sample if self.is_rate else self.scale * sample

    def show(self, samples: Samples) -> str:
        """Return the median with its unit, or the failure."""
        if samples.is_empty:
            return "-"
        return f"{self.convert(samples.median):.{self.digits}f} {self.suffix}"

    def show_spread(self, samples: Samples) -> str:
        """Return the quartiles, smaller number first."""
        if samples.is_empty:
            return samples.failure
        low, high = sorted(self.convert(value) for value in samples.spread)
        return f"{low:.{self.digits}f} to {high:.{self.digits}f}"


MILLISECONDS = Unit("ms", 1e3)
SECONDS = Unit("s", 1.0)
MEBIBYTES = Unit("MiB", 1 / (1 << 20), digits=1)
PER_SECOND = Unit("/s", 1.0, is_rate=True, digits=0)


def gigabytes_per_second(nbytes: int) -> Unit:
    """Return the rate unit of a transfer of this size."""
    return Unit("GB/s", nbytes / 1e9, is_rate=True)


@dataclass(frozen=True)
class Bound:
    """The bound of a row.

    Args:
        limit: The limit of the ratio; None for a row that is information only.
        text: The shown text.
        is_speed: Whether the ratio is a speed (at least the limit) rather than a cost (at most the
            limit).
    """

    limit: float | None
    text: str
    is_speed: bool

    def ratio(self, ours: Samples, against: Samples) -> float:
        """Return the ratio of medians, ours to the other."""
        cost = ours.median / against.median
        return 1 / cost if self.is_speed else cost

    def is_met(self, ratio: float) -> bool | None:
        """Return whether a ratio is good enough; None without a limit."""
        if self.limit is None:
            return None
        return ratio >= self.limit if self.is_speed else ratio <= self.limit


def at_most(limit: float, text: str = "") -> Bound:
    """Bound our cost: at most this many times the other's."""
    return Bound(limit, text or f"<= {limit:g}x", is_speed=False)


def at_least(limit: float) -> Bound:
    """Bound our speed: at least this many times the other's."""
    return Bound(limit, f">= {limit:g}x", is_speed=True)


#: For a row that is information only: our speed, without a limit.
NO_BOUND = Bound(None, "none", is_speed=True)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        measure: The measured quantity.
        ours: This wheel's samples.
        against: The samples to compare with.
        against_name: Its name.
        bound: The bound.
        unit: The unit of the samples.
        stock: Stock Ray's samples of the same scenario, if it supports it.
        stock_against: The samples to compare stock's with, if not `against`.
        plain: Samples of plain Ray in the same run, if measured.
        zero_copy: The same with zero-copy tensors.
    """

    measure: str
    ours: Samples
    against: Samples
    against_name: str
    bound: Bound
    unit: Unit
    stock: Samples = field(default_factory=Samples)
    stock_against: Samples | None = None
    plain: Samples = field(default_factory=Samples)
    zero_copy: Samples = field(default_factory=Samples)

    @property
    def ratio(self) -> float | None:
        """Our ratio to the other; None if one was not measured."""
        if self.ours.is_empty or self.against.is_empty:
            return None
        return self.bound.ratio(self.ours, self.against)

    @property
    def stock_ratio(self) -> float | None:
        """The same ratio for stock Ray."""
        against = self.stock_against if self.stock_against is not None else self.against
        if self.stock.is_empty or against.is_empty:
            return None
        return self.bound.ratio(self.stock, against)

    @property
    def is_met(self) -> bool | None:
        """Return whether the bound is met; None if there is none or it was not measured."""
        return None if self.ratio is None else self.bound.is_met(self.ratio)

    @property
    def best_alternative(self) -> tuple[str, float] | None:
        """Name the fastest alternative of stock Ray, with our speed in relation to it.

        None if plain Ray was not measured, since stock RDT alone is not the best alternative.
        """
        if self.ours.is_empty or self.plain.is_empty:
            return None
        sides = {"stock RDT": self.stock, "plain": self.plain, "zero-copy": self.zero_copy}
        medians = {name: side.median for name, side in sides.items() if not side.is_empty}
        best = min(medians, key=lambda name: medians[name])
        return best, medians[best] / self.ours.median

    @property
    def failure(self) -> str:
        """The reason for a missing ratio."""
        return self.ours.failure or self.against.failure

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "measure": self.measure,
            "stock": self.unit.show(self.stock),
            "stock_ratio": self.stock_ratio,
            "plain": self.unit.show(self.plain),
            "zero_copy": self.unit.show(self.zero_copy),
            "best_alternative": self.best_alternative,
            "ours": self.unit.show(self.ours),
            "against": f"{self.against_name}: {self.unit.show(self.against)}",
            "ratio": self.ratio,
            "bound": self.bound.text,
            "met": self.is_met,
            "failure": self.failure,
        }
