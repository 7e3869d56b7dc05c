"""The faults of a soak: kind, time and target."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

import ray
from ci.soak.actors import break_connections_here

#: A killed process may fail calls until it has restarted.
RESTARTS_WITHIN_S = 30.0
LONGEST_STOP_S = 1.5
CALL_S = 30.0

#: The driver's name among the actors'.
DRIVER = "driver"


@dataclass
class Faults:
    """Thread that injects one fault after another and records them.

    Attributes:
        actors: Actors by name that may be stopped and disconnected.
        mortal: Names of actors that may also be killed.
        pick: The random generator of this thread.
        gap_s: Mean time between two faults.
        counts: Number of faults by kind. The sender counts a task that kills itself.
    """

    actors: dict[str, Any]
    mortal: list[str]
    pick: random.Random
    gap_s: float
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._killed: list[tuple[float, str]] = []
        self._pids = {name: actor.pid.remote() for name, actor in self.actors.items()}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Return when the last one is over."""
        self._is_over.set()
        self._thread.join()

    def count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def killed(self, name: str) -> None:
        """Record that a process is killed about now."""
        with self._lock:
            self._killed.append((time.monotonic(), name))

    def explain(self, members: set[str], began: float) -> bool:
        """Return whether one of these was killed since then, or was still restarting."""
        with self._lock:
            killed = list(self._killed)
        return any(at > began - RESTARTS_WITHIN_S and name in members for at, name in killed)

    def _run(self) -> None:
        kinds = [self._kill, self._stop, self._break]
        while not self._is_over.wait(self.pick.expovariate(1 / self.gap_s)):
            act = self.pick.choices(kinds, [2, 3, 5])[0]
            with suppress(RayError):  # The target is restarting: choose the next one.
                act()

    def _kill(self) -> None:
        name = self.pick.choice(self.mortal)
        pid = self._pid(name)
        if pid is None:
            return
        self.killed(name)
        os.kill(pid, signal.SIGKILL)
        self._pids[name] = self.actors[name].pid.remote()
        self.count("process killed")

    def _stop(self) -> None:
        pid = self._pid(self.pick.choice(list(self.actors)))
        if pid is None:
            return
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.pick.uniform(0.02, LONGEST_STOP_S))
        os.kill(pid, signal.SIGCONT)
        self.count("process stopped for a while")

    def _break(self) -> None:
        name = self.pick.choice([*self.actors, DRIVER])
        if name == DRIVER:
            break_connections_here()
        else:
            ray.get(self.actors[name].break_connections.remote(), timeout=CALL_S)
        self.count("all connections broken")

    def _pid(self, name: str) -> int | None:
        """Return the pid, or None while the actor starts."""
        ready, _ = ray.wait([self._pids[name]], timeout=0)
        return int(ray.get(self._pids[name])) if ready else None
