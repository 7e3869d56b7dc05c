"""Measure this wheel against stock Ray 2.60.0 in one run on one machine, and report met bounds.

Run: ./build.sh bench      or: python bench/run.py --stock-python PATH [--only hop] [--quick]
doc/benchmarks.md describes how each row is measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from bench.arms import Row
from bench.cases import CASES
from bench.link import Workers
from bench.report import Measured, show_arms, show_rows, write_json
from bench.rounds import Rounds

OUTPUT = Path(__file__).resolve().parents[1] / "build" / "bench"
FILE_WIDTH = 190
PACKAGES = ("ray", "torch", "nixl", "numpy", "mooncake-transfer-engine-non-cuda")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--stock-python", type=Path, required=True, help="a Python with stock ray==2.60.0 and torch"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of each case")
    parser.add_argument(
        "--only",
        action="append",
        choices=CASES,
        metavar="CASE",
        help=f"run this case; can be repeated:  {', '.join(CASES)}",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=0,
        metavar="N",
        help="N rounds of each case (default: its own)",
    )
    parser.add_argument(
        "--json", type=Path, default=OUTPUT / "results.json", metavar="FILE", help="where to write"
    )
    return parser.parse_args()


def run_case(console: Console, name: str, args: argparse.Namespace) -> tuple[Measured, list[Row]]:
    """Run one case with workers of its own; return the samples of each arm, and the rows."""
    workers = Workers(Path(sys.executable), args.stock_python, OUTPUT)
    with console.status(name) as status:
        rounds = Rounds(
            workers, args.repeat, args.quick, lambda text: status.update(f"{name}: {text}")
        )
        try:
            rows = CASES[name](rounds)
        finally:
            workers.stop()
    title = (CASES[name].__doc__ or "").partition("\n")[0]
    show_arms(console, name, title, rounds.measured)
    return rounds.measured, rows


def describe_machine() -> dict[str, str]:
    """Return the machine's facts that matter for a benchmark; name to text."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = os.getloadavg()[0]
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / (1 << 30):.1f} GiB",
        "huge pages": _huge_pages(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load when started": f"{load:.2f}",
    }


def describe_python(python: Path) -> str:
    """Return a Python's version and its relevant packages."""
    program = (
        "import sys, importlib.metadata as m\n"
        f"names = [n for n in {PACKAGES} if any(True for _ in m.distributions(name=n))]\n"
        "print('Python', sys.version.split()[0], *(f'{n} {m.version(n)}' for n in names))"
    )
    found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return chosen[1] if chosen else "unknown"


def main() -> None:
    """Run the benchmark."""
    args, console = parse_arguments(), Console()
    if not console.is_terminal:  # wide enough for the table
        console = Console(width=FILE_WIDTH)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    machine = describe_machine() | {
        "this wheel": describe_python(Path(sys.executable)),
        "stock": describe_python(args.stock_python),
    }
    for name, text in machine.items():
        console.print(f"{name:>18}: {text}", highlight=False)
    cases = {}
    for name in args.only or CASES:
        cases[name] = run_case(console, name, args)
        write_json(args.json, machine, cases)
    show_rows(console, [row for _, rows in cases.values() for row in rows])
    console.print(f"Every sample: {args.json}. The workers' messages: {OUTPUT}.", soft_wrap=True)


if __name__ == "__main__":
    main()
