"""Output of a run: the arms of each case, the table of all rows, and the JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.arms import MEBIBYTES, MILLISECONDS, Arm, Row, Samples

Measured = dict[str, tuple[Arm, Samples]]
VERDICTS = {True: "[green]yes", False: "[red]no", None: "-"}
HEADINGS = (
    "stock RDT",
    "plain Ray",
    "zero-copy",
    "this wheel",
    "to the best of these",
    "against",
    "ratio",
    "bound",
    "met",
)


def show_arms(console: Console, name: str, title: str, measured: Measured) -> None:
    """Print the samples of one case."""
    table = Table("arm", title=f"{name}: {title}", title_justify="left")
    table.add_column("median", justify="right")
    table.add_column("quartiles", justify="right")
    table.add_column("samples", justify="right")
    for arm_name, (arm, samples) in measured.items():
        unit = MEBIBYTES if arm.scenario == "extra_memory" else MILLISECONDS
        shown = unit.show(samples), unit.show_spread(samples), str(len(samples.values))
        table.add_row(arm_name, *shown)
    console.print(table)


def show_rows(console: Console, rows: list[Row]) -> None:
    """Print the table of bounds."""
    table = Table(title="This wheel against stock Ray (medians)", title_justify="left")
    table.add_column("measure", min_width=40)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        stock = row.unit.show(row.stock) + _in_brackets(row.stock_ratio)
        against = f"{row.unit.show(row.against)} ({row.against_name})"
        table.add_row(
            row.measure,
            stock,
            *(row.unit.show(samples) for samples in (row.plain, row.zero_copy, row.ours)),
            _against_best(row),
            against,
            ratio,
            row.bound.text,
            _verdict(row),
        )
    console.print(table)
    for row in rows:
        if row.ratio is None:
            console.print(f"{row.measure}: {row.failure}", soft_wrap=True, highlight=False)


def _verdict(row: Row) -> str:
    return "[yellow]not measured" if row.ratio is None else VERDICTS[row.is_met]


def _against_best(row: Row) -> str:
    if row.best_alternative is None:
        return "-"
    name, speed = row.best_alternative
    return f"{speed:.2f}x ({name})"


def _in_brackets(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2f}x)"


def write_json(
    path: Path, machine: dict[str, str], cases: dict[str, tuple[Measured, list[Row]]]
) -> None:
    """Write all results, including each sample.

    Args:
        path: The file; its folder is created.
        machine: The machine and the two Pythons.
        cases: Case name to its samples and rows.
    """
    found = {
        name: {
            "arms": {
                arm_name: {
                    "side": arm.side,
                    "scenario": arm.scenario,
                    "options": dict(arm.options),
                    **samples.as_dict(),
                }
                for arm_name, (arm, samples) in measured.items()
            },
            "rows": [row.as_dict() for row in rows],
        }
        for name, (measured, rows) in cases.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "cases": found}, indent=1) + "\n")
