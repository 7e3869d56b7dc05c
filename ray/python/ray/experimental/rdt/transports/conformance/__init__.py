"""The requirements of transports, as cases that users can run on their own transport.

``check("mine")`` runs all cases in the Ray that this process is connected to. A test suite can run
them one by one: each of ``CASES`` is a function of a ``Stage``, and raises if the transport does
not meet a requirement.

The tensors are torch's, in host memory unless another device is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

import ray
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.real_threads import sleep
from ray.experimental.rdt.transports.conformance import actions
from ray.experimental.rdt.transports.conformance.actions import HUGE, LARGE, LIMIT_S, must_raise

#: The errors that a pull from a process that ends meanwhile may raise.
_LOST = (ObjectLostError, RayActorError, RayTaskError)

Action = Callable[..., Any]


class Member:
    """An actor that runs the actions of a case. An action gets the member first.

    Args:
        device: The device on which actions make their tensors.

    Attributes:
        kept: Values that a case uses in a later action.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.kept: dict[str, Any] = {}
        self._device = torch.device(device)

    @ray.method(tensor_transport="auto")
    def make(self, action: Action, *args: Any) -> Any:
        """Return the result of an action as an RDT object."""
        with self._device:
            return action(self, *args)

    def run(self, action: Action, *args: Any) -> Any:
        """Return the result of an action as a plain object."""
        with self._device:
            return action(self, *args)


@dataclass(frozen=True)
class Stage:
    """The processes of a case.

    Attributes:
        transport: The name of the transport.
        producer: A ``Member``, or an actor with the same methods. No case kills it.
        consumer: Another member.
        third: One more member.
        spawn: Makes a member that the case may kill.
    """

    transport: str
    producer: Any
    consumer: Any
    third: Any
    spawn: Callable[[], Any]

    def make(self, actor: Any, action: Action, *args: Any) -> Any:
        """Return a reference to an object of this transport that an actor makes."""
        return actor.make.options(tensor_transport=self.transport).remote(action, *args)

    def stored(self, actor: Any) -> int:
        """Return how many objects an actor keeps for others."""
        return int(self.run(actor, actions.stored))

    def run(self, actor: Any, action: Action, *args: Any) -> Any:
        """Return the result of an action at an actor, which gets the values of references."""
        return ray.get(actor.run.remote(action, *args), timeout=LIMIT_S)


Case = Callable[[Stage], None]


def check(
    transport: str,
    cases: Sequence[Case] | None = None,
    device: str = "cpu",
    num_gpus: float = 0,
) -> None:
    """Run the cases on a transport and print a line for each.

    The cases run in actors of their own, which may use no other transport or lane.

    Runs on: a driver or another process that is connected to Ray; blocks.

    Args:
        transport: The name of the transport, which this job knows.
        cases: Some of ``CASES``; None for all.
        device: The device of the tensors, for example "cuda".
        num_gpus: The GPUs of each actor. Up to four actors run at a time.

    Raises:
        AssertionError: Cases failed; names all of them. The first failure is the cause.
    """
    failed: dict[str, Exception] = {}
    with _members(device, num_gpus) as spawn:
        producer, consumer, third = actors = [spawn() for _ in range(3)]
        ray.get([each.run.remote(actions.same, None) for each in actors])  # until they run
        stage = Stage(transport, producer, consumer, third, spawn)
        for case in CASES if cases is None else cases:
            began = time.monotonic()
            try:
                case(stage)
            except Exception as error:  # reported with the failures of the other cases
                failed[case.__name__] = error
            told = failed.get(case.__name__, f"passed in {time.monotonic() - began:.1f} s")
            print(f"{transport}: {case.__name__}: {told}", flush=True)
    if failed:
        first = next(iter(failed.values()))
        raise AssertionError(f"transport {transport!r} fails in {', '.join(failed)}") from first


@contextmanager
def _members(device: str, num_gpus: float) -> Iterator[Callable[[], Any]]:
    environment = {"RAY_RDT_STRICT_TRANSPORT": "1", "RAY_RDT_EAGER_BYTES": "0"}
    options: Any = {"num_gpus": num_gpus, "runtime_env": {"env_vars": environment}}
    made = []

    def spawn() -> Any:
        made.append(ray.remote(num_cpus=0, **options)(Member).remote(device))
        return made[-1]

    try:
        yield spawn
    finally:
        for member in made:
            ray.kill(member)


def round_trip(stage: Stage) -> None:
    """Types, dtypes, strides and values arrive unchanged."""
    ref = stage.make(stage.producer, actions.kinds)
    assert stage.run(stage.consumer, actions.differences, ref) == []
    ref = stage.make(stage.producer, actions.ones, 3)
    assert stage.run(stage.consumer, actions.total, ref) == 3
    assert stage.run(stage.third, actions.total, ref) == 3, "a second consumer of the same object"


def zero_tensors(stage: Stage) -> None:
    """A value without tensors arrives as in plain Ray."""
    values: tuple[Any, ...] = ("text", {"n": [1, None]}, [])
    for value in values:
        ref = stage.make(stage.producer, actions.same, value)
        assert stage.run(stage.consumer, actions.same, ref) == value


def zero_bytes(stage: Stage) -> None:
    """Tensors without elements arrive, alone and among others."""
    ref = stage.make(stage.producer, actions.empties)
    shapes = [[0], [3, 0], [0, 4, 2], [LARGE]]
    assert stage.run(stage.consumer, actions.shapes, ref) == shapes
    alone = stage.make(stage.producer, actions.ones, 0)
    assert stage.run(stage.consumer, actions.shapes, [alone]) == [[0]]


def ten_thousand_tensors(stage: Stage) -> None:
    """An object of ten thousand small tensors arrives."""
    ref = stage.make(stage.producer, actions.many, 10_000)
    assert stage.run(stage.consumer, actions.firsts, ref) == list(range(10_000))


def views_and_shared_storage(stage: Stage) -> None:
    """Tensors that share memory at the producer share it at the consumer."""
    ref = stage.make(stage.producer, actions.shared_storage)
    assert stage.run(stage.consumer, actions.sharing_differences, ref) == []


def wrong_target(stage: Stage) -> None:
    """A target that does not fit raises an error, and the object can still be fetched."""
    ref = stage.make(stage.producer, actions.ones, LARGE)
    assert stage.run(stage.consumer, actions.receive_into_targets, [ref]) == LARGE


def two_directions_at_once(stage: Stage) -> None:
    """Two processes send to each other, several objects at a time."""
    _exchange(stage, [(stage.producer, stage.consumer), (stage.consumer, stage.producer)], 8)


def many_pairs_at_once(stage: Stage) -> None:
    """All processes send to all others, and each gets its own objects."""
    actors = [stage.producer, stage.consumer, stage.third]
    pairs = [(one, two) for one in actors for two in actors if one is not two]
    _exchange(stage, pairs, 4)


def abort(stage: Stage) -> None:
    """A pull that is aborted, early or halfway, does not affect other pulls."""
    ref = stage.make(stage.producer, actions.ramp, HUGE)
    others = [
        stage.third.run.remote(actions.total, stage.make(stage.producer, actions.ones))
        for _ in range(3)
    ]
    assert stage.run(stage.consumer, actions.pull_with_timeouts, [ref]) == []
    assert ray.get(others, timeout=LIMIT_S) == [LARGE] * 3


def free_once(stage: Stage) -> None:
    """An object that several processes fetched is freed when the last one drops it."""
    before = stage.stored(stage.producer)
    ref = stage.make(stage.producer, actions.ones)
    shared = [
        each.run.remote(actions.total_of_refs, [ref]) for each in (stage.consumer, stage.third)
    ]
    del ref
    assert ray.get(shared, timeout=LIMIT_S) == [LARGE, LARGE]
    _await(lambda: stage.stored(stage.producer) <= before, "the object is not freed")


def double_free(stage: Stage) -> None:
    """An object that is freed twice is freed, and other objects stay."""
    before = stage.stored(stage.producer)
    kept, ref = stage.make(stage.producer, actions.ones), stage.make(stage.producer, actions.ones)
    assert stage.run(stage.consumer, actions.total, ref) == LARGE
    for _ in range(2):
        ray_core.manager().queue_or_free_object_primary_copy(ref.hex())
    _await(lambda: stage.stored(stage.producer) <= before + 1, "the object is not freed")
    with must_raise(RayError, "a freed object can still be fetched"):
        stage.run(stage.consumer, actions.total, ref)
    del ref
    assert stage.run(stage.consumer, actions.total, kept) == LARGE
    del kept
    _await(lambda: stage.stored(stage.producer) <= before, "the other object is not freed")


def peer_dies(stage: Stage) -> None:
    """A producer or consumer is killed before, during and after transfers."""
    doomed, before = stage.spawn(), stage.stored(stage.producer)
    kept, theirs = stage.make(doomed, actions.ones), stage.make(stage.producer, actions.ones)
    stage.run(stage.consumer, actions.keep, kept)
    refs = [stage.make(doomed, actions.ones, HUGE) for _ in range(3)]
    ray.wait(refs, num_returns=3, fetch_local=False, timeout=LIMIT_S)
    from_it = [stage.consumer.run.remote(actions.total, ref) for ref in refs]
    to_it = [doomed.run.remote(actions.total, theirs) for _ in range(3)]
    ray.kill(doomed)
    # During the transfer: each consumer gets all bytes or an error, and none hangs.
    for result, count in [
        *((each, HUGE) for each in from_it),
        *((each, LARGE) for each in to_it),
    ]:
        with suppress(*_LOST):
            assert ray.get(result, timeout=LIMIT_S) == count
    # Before the transfer: an error at once. After it: received tensors stay.
    with must_raise(_LOST, "an object of a dead process can still be fetched"):
        stage.run(stage.consumer, actions.total, kept)
    assert stage.run(stage.consumer, actions.total_of_kept) == LARGE
    # The others continue, and objects that the dead process read are freed.
    assert stage.run(stage.consumer, actions.total, theirs) == LARGE
    del theirs
    _await(
        lambda: stage.stored(stage.producer) <= before,
        "an object that the dead process read is not freed",
    )


def close_with_pulls_pending(stage: Stage) -> None:
    """A process shuts RDT down while it pulls, and while others pull from it."""
    closing, before = stage.third, stage.stored(stage.producer)
    theirs = [stage.make(stage.producer, actions.ones, HUGE) for _ in range(3)]
    from_it = [
        stage.consumer.run.remote(actions.total, stage.make(closing, actions.ones, HUGE))
        for _ in range(3)
    ]
    assert stage.run(closing, actions.close_under_pulls, theirs) == []
    for result in from_it:
        with suppress(*_LOST):
            assert ray.get(result, timeout=LIMIT_S) == HUGE
    # The process can use RDT again, in both directions.
    assert stage.run(closing, actions.total, theirs[0]) == HUGE
    assert stage.run(stage.consumer, actions.total, stage.make(closing, actions.ones)) == LARGE
    del theirs
    stage.stored(closing)  # drops references of failed calls there
    _await(lambda: stage.stored(stage.producer) <= before, "an object that it read is not freed")


def _exchange(stage: Stage, pairs: list[tuple[Any, Any]], count: int) -> None:
    """Move ``count`` different objects for each pair, all at once."""
    jobs = [(pair, index) for index in range(count) for pair in pairs]
    sums = [
        two.run.remote(actions.total, stage.make(one, actions.filled, 1 + number))
        for number, ((one, two), _) in enumerate(jobs)
    ]
    expected = [(1 + number) * LARGE for number in range(len(jobs))]
    assert ray.get(sums, timeout=LIMIT_S) == expected


def _await(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = Deadline.after(LIMIT_S)
    while not is_so():
        if deadline.has_passed():
            raise AssertionError(otherwise)
        sleep(0.02)


#: All cases.
CASES: tuple[Case, ...] = (
    round_trip,
    zero_tensors,
    zero_bytes,
    ten_thousand_tensors,
    views_and_shared_storage,
    wrong_target,
    two_directions_at_once,
    many_pairs_at_once,
    abort,
    free_once,
    double_free,
    peer_dies,
    close_with_pulls_pending,
)
