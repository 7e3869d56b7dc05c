"""Time transfers of existing tensors from actor to actor on one GPU.

Each arm is a separate Ray (``bench_arm``). All are started first and then measured one at a time in
rounds, so changes of the machine affect all arms. A figure is the median over all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ci.gpu import result
from ci.gpu.programs import ceilings, pair

#: Tensors, and bytes of each.
CASES = {
    "4 KiB": (1, 4 << 10),
    "1 GiB": (1, 1 << 30),
    "64 MiB": (1, 64 << 20),
    "1 MiB": (1, 1 << 20),
    "2,000 x 4 KiB": (2000, 4 << 10),
    "64 x 16 MiB": (64, 16 << 20),
}
TURNS = 3
ROUNDS = 5
#: Budget for one turn of a slow arm.
BUDGET_S = 1.5
START_LIMIT_S = 80.0
TURN_LIMIT_S = 20.0
END_LIMIT_S = 10.0
#: Limit for all turns. It omits the last turns, not the last cases.
MEASURE_S = 100.0


@dataclass(frozen=True)
class Kind:
    """An arm before its start.

    Attributes:
        transport: The named transport; "plain" for Ray without RDT.
        environment: Variables of all its processes.
        is_stock: Whether it runs stock Ray.
        carries_host: Whether it can be measured with host tensors.
    """

    transport: str
    environment: dict[str, str] = field(default_factory=dict)
    is_stock: bool = False
    carries_host: bool = False


KINDS = {
    "cuda_ipc": Kind("cuda_ipc", pair.STRICT),
    "auto": Kind("auto", pair.STRICT, carries_host=True),
    "staged": Kind("auto", {**pair.STRICT, **pair.LANES["staged"][1]}),
    "nixl": Kind("nixl", pair.STRICT, carries_host=True),
    "plain": Kind("plain", carries_host=True),
    "stock cuda_ipc": Kind("cuda_ipc", is_stock=True),
    "stock nixl": Kind("nixl", is_stock=True, carries_host=True),
}

#: Seconds by arm and case.
Times = dict[tuple[str, str], list[float]]
#: Milliseconds by arm and case.
Figures = dict[tuple[str, str], float]


class ArmEnded(RuntimeError):
    """Error of an arm that can no longer be measured."""


class Arm:
    """A process of ``bench_arm``."""

    def __init__(self, kind: Kind, python: str, device: str):
        self._answers: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            [python, "-m", "ci.gpu.programs.bench_arm", kind.transport, device],
            env={**os.environ, **kind.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_ready(self, limit_s: float) -> None:
        """Return when its actors run. Raises ArmEnded."""
        self._hear(limit_s)

    def measure(self, count: int, nbytes: int) -> list[float]:
        """Return seconds of transfers. Raises RuntimeError, or ArmEnded after the arm ended."""
        order = {"count": count, "nbytes": nbytes, "rounds": ROUNDS, "budget_s": BUDGET_S}
        order["limit_s"] = TURN_LIMIT_S
        assert self._process.stdin is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
        except OSError as error:
            raise ArmEnded(f"the arm has ended: {error}") from error
        seconds: list[float] = self._hear(TURN_LIMIT_S + 5)["seconds"]
        return seconds

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def join(self, limit_s: float) -> None:
        """Wait for its end; kill it if that takes too long."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)
        self.kill()

    def kill(self) -> None:
        """Kill it; the runner kills its child processes."""
        self._process.kill()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(json.dumps({"error": "the arm has ended", "is_over": True}))

    def _hear(self, limit_s: float) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(self._answers.get(timeout=limit_s))
        except queue.Empty:
            self.kill()
            raise ArmEnded(f"no answer within {limit_s:g} s") from None
        if "error" in answer:
            raise (ArmEnded if "is_over" in answer else RuntimeError)(answer["error"])
        return answer


class Bench:
    """All arms, measured in turns."""

    def __init__(self, told: result.Result, arms: dict[str, Arm]):
        self._told = told
        self._arms = arms
        self._deadline = 0.0
        self.times: Times = {}
        self.failures: dict[str, str] = {}

    def start(self) -> None:
        """Wait until all are ready; skip those that do not start."""
        until = time.monotonic() + START_LIMIT_S
        for name, arm in list(self._arms.items()):
            try:
                arm.wait_ready(max(1.0, until - time.monotonic()))
            except ArmEnded as error:
                self._fail(name, "start", error)

    def measure(self, cases: dict[str, tuple[int, int]]) -> None:
        """Measure all cases of all arms repeatedly."""
        self._deadline = time.monotonic() + MEASURE_S
        for _ in range(TURNS):
            for case, (count, nbytes) in cases.items():
                for name in list(self._arms):
                    self._measure(name, case, count, nbytes)

    def close(self) -> None:
        """End them all."""
        for arm in self._arms.values():
            arm.close()
        for arm in self._arms.values():
            arm.join(END_LIMIT_S)

    def _measure(self, name: str, case: str, count: int, nbytes: int) -> None:
        is_over = time.monotonic() > self._deadline
        if is_over or f"{name}, {case}" in self.failures:
            return
        try:
            self.times.setdefault((name, case), []).extend(self._arms[name].measure(count, nbytes))
        except RuntimeError as error:
            self.times.pop((name, case), None)
            self._fail(name, case, error)
        self._told.note(seconds={f"{arm}, {of}": each for (arm, of), each in self.times.items()})

    def _fail(self, name: str, case: str, error: Exception) -> None:
        self.failures[f"{name}, {case}"] = str(error)
        if isinstance(error, ArmEnded):
            del self._arms[name]
        self._told.note(failures=self.failures)
        print(f"{name}, {case}: {error}", flush=True)


def medians(times: Times) -> Figures:
    """Milliseconds."""
    return {key: 1e3 * statistics.median(each) for key, each in times.items() if each}


def table(found: Figures, cases: dict[str, tuple[int, int]]) -> str:
    """Return a table of cases and arms: milliseconds, and GB/s of large tensors."""
    arms = list(dict.fromkeys(name for name, _ in found))
    rows = [f"{'ms (GB/s)':<15}" + "".join(f"{name:>17}" for name in arms)]
    for case, (count, nbytes) in cases.items():
        cells = [_cell(found.get((name, case)), count * nbytes) for name in arms]
        rows.append(f"{case:<15}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(rows)


def _cell(ms: float | None, nbytes: int) -> str:
    if ms is None:
        return "-"
    return f"{ms:.2f} ({nbytes / ms / 1e6:.1f})" if nbytes >= 1 << 20 else f"{ms:.3f}"


def bounds(found: Figures, limits: dict[str, float]) -> list[tuple[str, bool]]:
    """Return the measured bounds: each as text, and whether it is met.

    Args:
        found: Milliseconds.
        limits: The machine's GB/s: ``device`` and ``pinned``, its slower direction.
    """
    rates = [
        (f"{arm}, 1 GiB, in {limit} copy rates", (1 << 30) / found[arm, "1 GiB"] / 1e6, limit)
        for arm, limit in (("auto", "device"), ("staged", "pinned"))
        if (arm, "1 GiB") in found and limit in limits
    ]
    told = [_at_least(text, rate / limits[limit], 0.7) for text, rate, limit in rates]
    ours = ("cuda_ipc", "auto", "staged", "nixl")
    pairs = [("cuda_ipc, 1 GiB in 4 KiB", ("cuda_ipc", "1 GiB"), ("cuda_ipc", "4 KiB"), 1.2)]
    pairs += [(f"{a}, 4 KiB, in plain Ray's", (a, "4 KiB"), ("plain", "4 KiB"), 1.3) for a in ours]
    pairs += [
        (f"{arm}, {case}, in stock's", (arm, case), (f"stock {arm}", case), 1.0)
        for arm in ("cuda_ipc", "nixl")
        for case in CASES
    ]
    return told + [
        _at_most(text, found[one] / found[other], most)
        for text, one, other, most in pairs
        if one in found and other in found
    ]


def _at_most(text: str, value: float, most: float) -> tuple[str, bool]:
    return f"{text}: {value:.2f} of at most {most:g}", value <= most


def _at_least(text: str, value: float, least: float) -> tuple[str, bool]:
    return f"{text}: {value:.2f} of at least {least:g}", value >= least


def main(told: result.Result) -> str:
    """Measure, and compare the figures with the bounds."""
    options = _parse(sys.argv[1:])
    on_gpu = options.device == "cuda"
    limits = {}
    if on_gpu:
        pair.need_gpus()
        pinned = ceilings.pinned_copies()
        limits = {"device": ceilings.device_copy(), "pinned": min(pinned["d2h"], pinned["h2d"])}
        told.note(limits=limits)
    kinds = {
        name: kind
        for name, kind in KINDS.items()
        if (on_gpu or kind.carries_host) and (options.stock_python or not kind.is_stock)
    }
    pythons = {True: options.stock_python, False: sys.executable}
    cases = {name: case for name, case in CASES.items() if case[0] * case[1] <= options.largest}
    arms = {name: Arm(kind, pythons[kind.is_stock], options.device) for name, kind in kinds.items()}
    bench = Bench(told, arms)
    bench.start()
    bench.measure(cases)
    bench.close()
    return conclude(told, bench, cases, limits)


def conclude(
    told: result.Result, bench: Bench, cases: dict[str, tuple[int, int]], limits: dict[str, float]
) -> str:
    """Report the table and the bounds; fail if an arm of ours failed or nothing was measured."""
    found = medians(bench.times)
    judged = bounds(found, limits)
    lines = [table(found, cases), ""]
    lines += [f"{name}: {rate:.1f} GB/s" for name, rate in limits.items()]
    lines += [f"{'reached' if is_reached else 'MISSED':<8} {text}" for text, is_reached in judged]
    lines += [f"failed   {what}: {why}" for what, why in bench.failures.items()]
    told.note(table="\n".join(lines), milliseconds={f"{a}, {c}": t for (a, c), t in found.items()})
    ours = [what for what in bench.failures if not what.startswith(("stock", "plain"))]
    if ours or not found:
        raise AssertionError(f"not measured: {'; '.join(ours) or 'nothing was'}")
    missed = [text for text, is_reached in judged if not is_reached]
    reached = f"{len(judged) - len(missed)} of {len(judged)} bounds reached"
    return f"{len(found)} figures, {reached}" + (f"; missed: {'; '.join(missed)}" if missed else "")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stock-python", default="", help="Python with stock Ray")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--largest", type=int, default=1 << 30, help="bytes of an object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    result.run(main)
