"""Output of the demo: one line for each step, one table, one plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table


@dataclass(frozen=True)
class Step:
    """Measurements of one step."""

    number: int
    plain_s: float
    rdt_s: float
    nbytes: int

    @property
    def plain_rate(self) -> float:
        """Return the rate of plain objects in GB/s."""
        return self.nbytes / self.plain_s / 1e9

    @property
    def rdt_rate(self) -> float:
        """Return the rate of RDT in GB/s."""
        return self.nbytes / self.rdt_s / 1e9

    @property
    def speedup(self) -> float:
        """Return the time of plain objects divided by the time of RDT."""
        return self.plain_s / self.rdt_s

    def __str__(self) -> str:
        return (
            f"step {self.number}: plain {self.plain_s:.3f} s, RDT {self.rdt_s:.3f} s, "
            f"{self.speedup:.1f}x; all embeddings equal"
        )


def make_table(steps: list[Step], transport: str) -> Table:
    """Return the table of all steps with the medians below."""
    table = Table(
        title=f"Weight sync: 103 tensors to two actors, plain objects and RDT ({transport})"
    )
    for heading in ("step", "plain s", "plain GB/s", "RDT s", "RDT GB/s", "faster", "embeddings"):
        table.add_column(heading, justify="right")
    for step in steps:
        table.add_row(str(step.number), *_cells(step), "equal")
    table.add_section()
    table.add_row("median", *_cells(_median_step(steps)), "", style="bold")
    return table


def _cells(step: Step) -> list[str]:
    plain = [f"{step.plain_s:.3f}", f"{step.plain_rate:.2f}"]
    rdt = [f"{step.rdt_s:.3f}", f"{step.rdt_rate:.2f}"]
    return [*plain, *rdt, f"{step.speedup:.1f}x"]


def _median_step(steps: list[Step]) -> Step:
    plain_s = median(step.plain_s for step in steps)
    return Step(0, plain_s, median(step.rdt_s for step in steps), steps[0].nbytes)


def save_plot(steps: list[Step], transport: str, path: Path) -> None:
    """Draw the seconds of each step as pairs of bars, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    numbers = [step.number for step in steps]
    plain = axes.bar(
        [n - 0.2 for n in numbers], [s.plain_s for s in steps], 0.4, label="plain Ray object"
    )
    rdt = axes.bar(
        [n + 0.2 for n in numbers], [s.rdt_s for s in steps], 0.4, label=f"RDT ({transport})"
    )
    axes.bar_label(plain, [f"{step.plain_rate:.1f} GB/s" for step in steps], fontsize=8)
    axes.bar_label(rdt, [f"{step.rdt_rate:.1f} GB/s" for step in steps], fontsize=8)
    axes.set(
        xlabel="training step", ylabel="seconds until both actors have the weights", xticks=numbers
    )
    axes.set_title(
        f"Weight sync of all-MiniLM-L6-v2, {steps[0].nbytes / 1e6:.0f} MB a step to two actors"
    )
    axes.legend()
    figure.savefig(path, dpi=120)
