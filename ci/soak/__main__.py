"""``ci/soak.sh [MINUTES] [--seed N]``: random work over all paths, with random faults.

Five actors and the driver exchange objects along every path of work.py, in four threads.
Meanwhile, processes are killed, stopped and disconnected. Each received tensor is compared to the
last bit. The soak fails on

- a tensor with wrong bytes,
- an error that is not Ray's, or that occurs without a fault at a participant,
- a call that takes longer than its bound,
- an actor that exits without being killed by the soak,
- counters of RDT that do not return to zero, or leaked descriptors, threads and memory.

The seed determines the choices, not how the threads interleave.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

from ray.exceptions import GetTimeoutError, RayError
from rich.console import Console
from rich.table import Table

import ray
from ci.leaks import EXACT, ROUGH, TRANSPORTS
from ci.soak.actors import Worker, counters_here
from ci.soak.faults import DRIVER, Faults
from ci.soak.work import BOUND_S, PATHS, Job
from ray.experimental.rdt.common import config

#: All can use tcp, so that each pair has a lane.
ACTORS = {
    "any lane": {},
    "cma and tcp": {"RAY_RDT_LANES": "inproc,cma,tcp"},
    "shm and tcp": {"RAY_RDT_LANES": "inproc,shm,tcp", "RAY_RDT_CHECKSUM": "1"},
    "tcp": {"RAY_RDT_LANES": "inproc,tcp"},
}
#: Is never killed, so that growth until the end is a leak.
WITNESS = "witness"

SETTINGS = {
    "RAY_RDT_POOL_BYTES": str(64 << 20),
    "RAY_rdt_fetch_fail_timeout_milliseconds": "20000",
}
THREADS = 4
GAP_S = 0.4
SETTLES_WITHIN_S = 60.0
#: Allowed growth of a process since its warm-up. Pools of eight threads each answer requests and
#: send.
MORE = ROUGH | {"threads": 16, "native_threads": 24, "resident": 128 << 20}

Counts = dict[str, dict[str, int]]


class Soak:
    """One run.

    Attributes:
        jobs: By path, the number of correct jobs and of jobs with an expected error.
        errors: The expected errors by type.
        problems: The reasons to fail the run, as text.
    """

    def __init__(self, seed: int, transports: list[str]):
        self.seed = seed
        self.transports = transports
        actor_class: Any = Worker
        self.actors: dict[str, Any] = {
            name: actor_class.options(
                max_task_retries=2 * (number % 2),
                runtime_env={"env_vars": {**SETTINGS, **own}},
            ).remote()
            for number, (name, own) in enumerate([*ACTORS.items(), (WITNESS, {})])
        }
        self.jobs: Counter[tuple[str, str]] = Counter()
        self.errors: Counter[str] = Counter()
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def work(self, seconds: float, faults: Faults) -> None:
        """Run all threads for a time."""
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._work, args=(until, faults, number), name=f"soak-{number}")
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, until: float, faults: Faults, number: int) -> None:
        pick = random.Random(f"{self.seed} thread {number} {until}")
        while time.monotonic() < until:
            (path,) = pick.choices(list(PATHS), list(PATHS.values()))
            job = Job(self.actors, self.transports, faults, pick)
            began = time.monotonic()
            try:
                outcome = "right" if path(job) else "wrong bytes"
            except Exception as error:  # every error is judged here
                outcome = self._judge(error, job, began)
            with self._lock:
                self.jobs[path.__name__, "right" if outcome == "right" else "failed"] += 1
                if outcome not in ("right", "due"):
                    took = time.monotonic() - began
                    self.problems.append(f"{path.__name__}, {job}, {took:.1f} s: {outcome}")

    def _judge(self, error: Exception, job: Job, began: float) -> str:
        if type(error) is GetTimeoutError or isinstance(error, TimeoutError):
            return f"hung: {error}"
        if not isinstance(error, RayError) or not job.faults.explain(job.members, began):
            return f"no fault explains {type(error).__name__}: {error}"
        with self._lock:
            self.errors[type(getattr(error, "cause", None) or error).__name__] += 1
        return "due"

    def counts(self) -> Counts:
        asked = {name: actor.counters.remote() for name, actor in self.actors.items()}
        found = {name: ray.get(ref, timeout=BOUND_S) for name, ref in asked.items()}
        return {DRIVER: counters_here(), **found}

    def settled(self, before: Counts | None) -> tuple[Counts, list[str]]:
        """Return the counters when all are zero, or the remaining ones after a minute."""
        deadline = time.monotonic() + SETTLES_WITHIN_S
        while True:
            counts = self.counts()
            left = _left(counts, before)
            if not left or time.monotonic() > deadline:
                return counts, left
            time.sleep(0.5)

    def restarts(self) -> int:
        found = ray._private.state.actors()
        return sum(
            int(found[actor._actor_id.hex()]["NumRestarts"]) for actor in self.actors.values()
        )


def _left(counts: Counts, before: Counts | None) -> list[str]:
    left = [
        f"{process} has {name} {counters[name]}"
        for process, counters in counts.items()
        for name in EXACT
        if counters.get(name, 0)
    ]
    if before is None:
        return left
    for process in (DRIVER, WITNESS):
        for name, more in MORE.items():
            was, is_now = before[process][name], counts[process][name]
            if is_now > was + more:
                left.append(f"{process} had {name} {was} and has {is_now}")
    return left


def _report(soak: Soak, faults: Faults, before: Counts, after: Counts, seconds: float) -> Table:
    table = Table("what", "how many", title=f"soak of {seconds:.0f} s, seed {soak.seed}")
    for path in PATHS:
        right, failed = (soak.jobs[path.__name__, how] for how in ("right", "failed"))
        table.add_row(path.__name__.replace("_", " "), f"{right} right, {failed} failed")
    table.add_section()
    for names in (faults.counts, soak.errors):
        for name, count in names.most_common():
            table.add_row(name, str(count))
        table.add_section()
    for process in (DRIVER, WITNESS):
        for name in MORE:
            table.add_row(
                f"{process}: {name}", f"{before[process][name]} -> {after[process][name]}"
            )
    return table


def run(seconds: float, seed: int, gap_s: float) -> list[str]:
    """Return the problems, and print the figures."""
    os.environ.update(SETTINGS)
    config.settings.cache_clear()
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        soak = Soak(seed, ["auto", *TRANSPORTS])
        soak.counts()  # All actors have started.
        faults = Faults(soak.actors, list(ACTORS), random.Random(f"{seed} faults"), gap_s)
        warm_up_s = min(60.0, seconds / 5)
        soak.work(warm_up_s, faults)
        before, left = soak.settled(None)
        soak.problems += [f"after the warm-up, {what}" for what in left]
        faults.start()
        soak.work(seconds - warm_up_s, faults)
        faults.stop()
        after, left = soak.settled(before)
        soak.problems += left
        killed, restarts = faults.counts["process killed"], soak.restarts()
        if restarts != killed:
            soak.problems.append(f"{killed} actors' processes were killed and {restarts} ended")
        console = Console(width=120)
        console.print(_report(soak, faults, before, after, seconds))
        for problem in soak.problems:
            console.print(problem, markup=False)
        console.print(f"{sum(faults.counts.values())} faults, {len(soak.problems)} problems")
        return soak.problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/soak.sh", description="random work, random faults")
    parser.add_argument("minutes", type=float, nargs="?", default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--gap", type=float, default=GAP_S, help="mean seconds between faults")
    chosen = parser.parse_args()
    return 1 if run(60 * chosen.minutes, chosen.seed, chosen.gap) else 0


if __name__ == "__main__":
    sys.exit(main())
