"""Run the arms of a case in rounds; every other round runs in reverse order."""

from __future__ import annotations

from collections.abc import Callable

from bench.arms import Arm, Samples
from bench.link import WorkerFailed, Workers

QUICK_ROUNDS = 2


class Rounds:
    """The means by which a case measures.

    Args:
        workers: The worker processes.
        repeat: Number of rounds; 0 means the case's own number.
        is_quick: Whether to run only two rounds.
        say: Receives the progress text.
    """

    def __init__(
        self, workers: Workers, repeat: int, is_quick: bool, say: Callable[[str], None]
    ) -> None:
        self._workers, self._say = workers, say
        self._repeat, self._is_quick = repeat, is_quick
        self.measured: dict[str, tuple[Arm, Samples]] = {}

    def measure(self, arms: dict[str, Arm], rounds: int) -> dict[str, Samples]:
        """Measure arms that stay set up; each is idle while others run.

        Args:
            arms: Name to arm; names are unique within the case.
            rounds: Number of measurements of each arm, after one sample that is dropped.

        Returns:
            The samples under the same names.
        """
        found = self._begin(arms)
        for name, arm in arms.items():
            self._try(found[name], self._open, name, arm)
        for number in range(self._count(rounds)):
            for name in _in_turn(arms, number):
                self._try(found[name], self._take, found[name], name, arms[name])
        for name, arm in arms.items():
            self._try(found[name], self._workers.close, name, arm)
        return found

    def measure_alone(self, arms: dict[str, Arm], rounds: int) -> dict[str, Samples]:
        """Measure arms that are set up and closed in each round.

        For arms that are not idle between their turns: a thread of NIXL keeps a core busy as
        long as its process lives. Arguments and result are those of measure.
        """
        found = self._begin(arms)
        for number in range(self._count(rounds)):
            for name in _in_turn(arms, number):
                self._try(found[name], self._take_alone, found[name], name, arms[name])
        return found

    def _begin(self, arms: dict[str, Arm]) -> dict[str, Samples]:
        found = {name: Samples() for name in arms}
        self.measured |= {name: (arm, found[name]) for name, arm in arms.items()}
        return found

    def _count(self, rounds: int) -> int:
        return self._repeat or (min(rounds, QUICK_ROUNDS) if self._is_quick else rounds)

    def _open(self, name: str, arm: Arm) -> None:
        self._say(f"{name}: starting")
        self._workers.open(name, arm)
        self._workers.sample(name, arm)

    def _take(self, found: Samples, name: str, arm: Arm) -> None:
        self._say(f"{name}: {len(found.values)} samples")
        found.values += self._workers.sample(name, arm)

    def _take_alone(self, found: Samples, name: str, arm: Arm) -> None:
        self._open(name, arm)
        try:
            self._take(found, name, arm)
        finally:
            self._workers.close(name, arm)

    def _try(self, found: Samples, work: Callable[..., None], *arguments: object) -> None:
        """Run a part of an arm's work; skip an arm that failed before."""
        if not found.failure:
            try:
                work(*arguments)
            except WorkerFailed as failure:
                found.failure = str(failure)


def _in_turn(arms: dict[str, Arm], number: int) -> list[str]:
    return list(arms) if number % 2 == 0 else list(reversed(arms))
