"""What every transport must do, as cases that anybody can run on a transport of their own.

``check("mine")`` runs them all in the Ray that this process is connected to. A test suite rather
takes them one by one: each of ``CASES`` is a function of a ``Stage`` and raises where the transport
does not do what it should.

The tensors are torch's, in host memory unless another device is asked for.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

import ray
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.deadline import Deadline

#: Elements of an object that does not ride along in the value (1 MiB), and of one that takes a
#: while to move (32 MiB).
_LARGE, _HUGE = 1 << 18, 1 << 23

#: Waits that end by themselves in a transport that works.
_LIMIT_S = 60.0

#: What may come of a pull from a process that ends meanwhile.
_LOST = (ObjectLostError, RayActorError, RayTaskError)

Action = Callable[..., Any]


class Member:
    """An actor that does what a case gives it; the action gets the member itself first.

    Args:
        device: Where actions make their tensors.

    Attributes:
        kept: What a case wants to find again.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.kept: dict[str, Any] = {}
        self._device = torch.device(device)

    @ray.method(tensor_transport="auto")
    def make(self, action: Action, *args: Any) -> Any:
        """The result is an RDT object."""
        with self._device:
            return action(self, *args)

    def run(self, action: Action, *args: Any) -> Any:
        """The result is a plain object."""
        with self._device:
            return action(self, *args)


@dataclass(frozen=True)
class Stage:
    """Where a case is played.

    Attributes:
        transport: The name of the transport.
        producer: A ``Member``, or an actor with the same methods. No case ends it.
        consumer: Another one.
        third: One more.
        spawn: Makes one that the case may end.
    """

    transport: str
    producer: Any
    consumer: Any
    third: Any
    spawn: Callable[[], Any]

    def make(self, actor: Any, action: Action, *args: Any) -> Any:
        """A reference to an object over the transport, made by an actor."""
        return actor.make.options(tensor_transport=self.transport).remote(action, *args)

    def run(self, actor: Any, action: Action, *args: Any) -> Any:
        """What an action gives at an actor, which gets references as what they refer to."""
        return ray.get(actor.run.remote(action, *args), timeout=_LIMIT_S)

    def stored(self, actor: Any) -> int:
        """How many objects an actor keeps for others."""
        return int(self.run(actor, _stored))


Case = Callable[[Stage], None]


def check(
    transport: str,
    cases: Sequence[Case] | None = None,
    device: str = "cpu",
    num_gpus: float = 0,
) -> None:
    """Runs the cases on a transport and prints a line for each.

    Its own actors run them, in which any other lane than this transport is forbidden.

    Runs on: a driver or another process that is connected to Ray; blocks.

    Args:
        transport: Its name, which is known to this job.
        cases: Some of ``CASES``; None for all.
        device: Where the tensors are, for instance "cuda".
        num_gpus: What Ray gives to each of the actors, four at a time.

    Raises:
        AssertionError: a case failed; names all that did, the first is the cause.
    """
    failed: dict[str, Exception] = {}
    with _members(device, num_gpus) as spawn:
        producer, consumer, third = actors = [spawn() for _ in range(3)]
        ray.get([each.run.remote(_same, None) for each in actors])  # they take a while to begin
        stage = Stage(transport, producer, consumer, third, spawn)
        for case in CASES if cases is None else cases:
            began = time.monotonic()
            try:
                case(stage)
            except Exception as error:
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


# The cases.


def round_trip(stage: Stage) -> None:
    """Types, dtypes, strides and values arrive as they were."""
    assert stage.run(stage.consumer, _differences, stage.make(stage.producer, _kinds)) == []
    ref = stage.make(stage.producer, _ones, 3)
    assert stage.run(stage.consumer, _total, ref) == 3
    assert stage.run(stage.third, _total, ref) == 3, "the same object, taken by another"


def zero_tensors(stage: Stage) -> None:
    """A value without tensors arrives as in plain Ray."""
    values: tuple[Any, ...] = ("text", {"n": [1, None]}, [])
    for value in values:
        ref = stage.make(stage.producer, _same, value)
        assert stage.run(stage.consumer, _same, ref) == value


def zero_bytes(stage: Stage) -> None:
    """Tensors without a single element, alone and among others."""
    ref = stage.make(stage.producer, _empties)
    shapes = [[0], [3, 0], [0, 4, 2], [_LARGE]]
    assert stage.run(stage.consumer, _shapes, ref) == shapes
    alone = stage.make(stage.producer, _ones, 0)
    assert stage.run(stage.consumer, _shapes, [alone]) == [[0]]


def ten_thousand_tensors(stage: Stage) -> None:
    """An object of very many small tensors."""
    ref = stage.make(stage.producer, _many, 10_000)
    assert stage.run(stage.consumer, _firsts, ref) == list(range(10_000))


def views_and_shared_storage(stage: Stage) -> None:
    """Tensors that shared memory share it where they arrive."""
    assert stage.run(stage.consumer, _untied, stage.make(stage.producer, _tied)) == []


def wrong_target(stage: Stage) -> None:
    """A target that does not fit is an error of its own; the object can be had all the same."""
    ref = stage.make(stage.producer, _ones, _LARGE)
    assert stage.run(stage.consumer, _into_targets, [ref]) == _LARGE


def two_directions_at_once(stage: Stage) -> None:
    """Two processes send to each other, several objects at a time."""
    _exchange(stage, [(stage.producer, stage.consumer), (stage.consumer, stage.producer)], 8)


def many_pairs_at_once(stage: Stage) -> None:
    """All processes send to all others, and nothing is mixed up."""
    actors = [stage.producer, stage.consumer, stage.third]
    pairs = [(one, two) for one in actors for two in actors if one is not two]
    _exchange(stage, pairs, 4)


def abort(stage: Stage) -> None:
    """A pull that is given up, early or halfway, costs nobody else anything."""
    ref = stage.make(stage.producer, _ramp, _HUGE)
    others = [stage.third.run.remote(_total, stage.make(stage.producer, _ones)) for _ in range(3)]
    assert stage.run(stage.consumer, _impatient, [ref]) == []
    assert ray.get(others, timeout=_LIMIT_S) == [_LARGE] * 3


def free_once(stage: Stage) -> None:
    """An object that several have had is freed when the last of them lets go."""
    before = stage.stored(stage.producer)
    ref = stage.make(stage.producer, _ones)
    shared = [each.run.remote(_total_of_refs, [ref]) for each in (stage.consumer, stage.third)]
    del ref
    assert ray.get(shared, timeout=_LIMIT_S) == [_LARGE, _LARGE]
    _await(lambda: stage.stored(stage.producer) <= before, "the object is not freed")


def double_free(stage: Stage) -> None:
    """An object that is freed twice is freed; others stay."""
    before = stage.stored(stage.producer)
    kept, ref = stage.make(stage.producer, _ones), stage.make(stage.producer, _ones)
    assert stage.run(stage.consumer, _total, ref) == _LARGE
    for _ in range(2):
        ray_core.manager().queue_or_free_object_primary_copy(ref.hex())
    _await(lambda: stage.stored(stage.producer) <= before + 1, "the object is not freed")
    try:
        stage.run(stage.consumer, _total, ref)
    except RayError:
        pass
    else:
        raise AssertionError("an object that was freed can still be had")
    del ref
    assert stage.run(stage.consumer, _total, kept) == _LARGE
    del kept
    _await(lambda: stage.stored(stage.producer) <= before, "the other object is not freed")


def peer_dies(stage: Stage) -> None:
    """A process is killed before, in and after transfers, as their producer and consumer."""
    doomed, before = stage.spawn(), stage.stored(stage.producer)
    kept, theirs = stage.make(doomed, _ones), stage.make(stage.producer, _ones)
    stage.run(stage.consumer, _keep, kept)
    refs = [stage.make(doomed, _ones, _HUGE) for _ in range(3)]
    ray.wait(refs, num_returns=3, fetch_local=False, timeout=_LIMIT_S)
    from_it = [stage.consumer.run.remote(_total, ref) for ref in refs]
    to_it = [doomed.run.remote(_total, theirs) for _ in range(3)]
    ray.kill(doomed)
    # In the middle: each gets all of it or an error, and none waits.
    for result, count in [
        *((each, _HUGE) for each in from_it),
        *((each, _LARGE) for each in to_it),
    ]:
        with suppress(*_LOST):
            assert ray.get(result, timeout=_LIMIT_S) == count
    # Before: it is an error at once. After: what was received stays.
    try:
        stage.run(stage.consumer, _total, kept)
    except _LOST:
        pass
    else:
        raise AssertionError("an object of a dead process can still be had")
    assert stage.run(stage.consumer, _total_of_kept) == _LARGE
    # The others go on, and what the dead one read is freed.
    assert stage.run(stage.consumer, _total, theirs) == _LARGE
    del theirs
    _await(lambda: stage.stored(stage.producer) <= before, "what the dead one read is not freed")


def close_with_pulls_pending(stage: Stage) -> None:
    """A process ends its part in RDT under pulls of its own and of its objects."""
    closing, before = stage.third, stage.stored(stage.producer)
    theirs = [stage.make(stage.producer, _ones, _HUGE) for _ in range(3)]
    from_it = [
        stage.consumer.run.remote(_total, stage.make(closing, _ones, _HUGE)) for _ in range(3)
    ]
    assert stage.run(closing, _close_under_pulls, theirs) == []
    for result in from_it:
        with suppress(*_LOST):
            assert ray.get(result, timeout=_LIMIT_S) == _HUGE
    # It begins anew, both ways.
    assert stage.run(closing, _total, theirs[0]) == _HUGE
    assert stage.run(stage.consumer, _total, stage.make(closing, _ones)) == _LARGE
    del theirs
    stage.stored(closing)  # it lets go of what failed there
    _await(lambda: stage.stored(stage.producer) <= before, "what it read is not freed")


#: All that a transport must do.
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


def _exchange(stage: Stage, pairs: list[tuple[Any, Any]], count: int) -> None:
    """Each pair moves ``count`` objects, all at once; no two objects are alike."""
    jobs = [(pair, index) for index in range(count) for pair in pairs]
    sums = [
        two.run.remote(_total, stage.make(one, _filled, 1 + number))
        for number, ((one, two), _) in enumerate(jobs)
    ]
    expected = [(1 + number) * _LARGE for number in range(len(jobs))]
    assert ray.get(sums, timeout=_LIMIT_S) == expected


def _await(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = Deadline.after(_LIMIT_S)
    while not is_so():
        if deadline.has_passed():
            raise AssertionError(otherwise)
        time.sleep(0.02)


# What members do. Each gets the member first.


def _same(_: Any, value: Any) -> Any:
    return value


def _ones(_: Any, count: int = _LARGE) -> torch.Tensor:
    return torch.ones(count)


def _ramp(_: Any, count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


def _filled(_: Any, number: int) -> torch.Tensor:
    return torch.full((_LARGE,), float(number))


def _total(_: Any, *tensors: torch.Tensor) -> float:
    return sum(float(tensor.double().sum()) for tensor in tensors)


def _total_of_refs(member: Any, refs: list[Any]) -> float:
    return _total(member, *ray.get(refs))


def _keep(member: Any, tensor: torch.Tensor) -> None:
    member.kept["tensor"] = tensor


def _total_of_kept(member: Any) -> float:
    return _total(member, member.kept.pop("tensor"))


def _stored(_: Any) -> int:
    gc.collect()  # calls that failed have left references in cycles
    return int(ray.experimental.rdt.stats()["stored_objects"])


def _kinds(_: Any) -> dict[str, Any]:
    return {
        "large": torch.arange(float(_LARGE)),
        "column": torch.arange(12).view(3, 4).t(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "halves": torch.ones(3, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]).conj(),
        "weight": torch.nn.Parameter(torch.ones(2)),
        "grad": torch.ones(3, requires_grad=True),
        "nested": [(torch.tensor(7),)],
        "text": "no tensor",
    }


def _differences(_: Any, received: dict[str, Any]) -> list[str]:
    sent = _kinds(_)
    assert received.pop("text") == sent.pop("text")
    received["nested"], sent["nested"] = received["nested"][0][0], sent["nested"][0][0]
    return [name for name, tensor in sent.items() if not _is_like(received[name], tensor)]


def _is_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    facts = [
        (type(each), each.dtype, each.shape, each.stride(), each.requires_grad)
        for each in (one, other)
    ]
    return facts[0] == facts[1] and torch.equal(one, other)


def _empties(_: Any) -> list[torch.Tensor]:
    return [
        torch.empty(0),
        torch.empty(3, 0, dtype=torch.int16),
        torch.empty(0, 4, 2),
        torch.ones(_LARGE),
    ]


def _shapes(_: Any, tensors: list[Any]) -> list[list[int]]:
    here = [ray.get(each) if isinstance(each, ray.ObjectRef) else each for each in tensors]
    return [list(tensor.shape) for tensor in here]


def _many(_: Any, count: int) -> list[torch.Tensor]:
    return [torch.full((16,), float(index)) for index in range(count)]


def _firsts(_: Any, tensors: list[torch.Tensor]) -> list[float]:
    return [float(tensor[0]) for tensor in tensors]


def _tied(_: Any) -> dict[str, torch.Tensor]:
    base = torch.arange(float(_LARGE))
    return {"base": base, "view": base[10:30:3], "again": base, "end": base[-5:]}


def _untied(_: Any, received: dict[str, torch.Tensor]) -> list[str]:
    """What is not as it was at the producer."""
    sent = _tied(_)
    wrong = [name for name, tensor in sent.items() if not _is_like(received[name], tensor)]
    if received["again"] is not received["base"]:
        wrong.append("one tensor arrived as two")
    received["base"][[10, -5]] = -1
    if received["view"][0] != -1 or received["end"][0] != -1:
        wrong.append("a view does not share its base's memory")
    return wrong


def _into_targets(_: Any, refs: list[Any]) -> float:
    target = torch.zeros(_LARGE)
    ray.experimental.set_target_for_ref(refs[0], [torch.zeros(_LARGE + 1)])
    try:
        ray.get(refs[0])
    except ValueError:
        pass
    else:
        raise AssertionError("a target of another shape was taken")
    ray.experimental.set_target_for_ref(refs[0], [target])
    assert ray.get(refs[0]) is target, "the target was not received into"
    return float(target.double().sum())


def _impatient(_: Any, refs: list[Any]) -> list[str]:
    """Gives pulls up after ever longer times; what was wrong with those that came."""
    expected, wrong = _ramp(None, _HUGE), []
    for timeout_s in (0, 0.001, 0.005, 0.02, _LIMIT_S):
        try:
            received = ray.get(refs[0], timeout=timeout_s)
        except GetTimeoutError:
            continue
        if not torch.equal(received, expected):
            wrong.append(f"wrong bytes within {timeout_s:g} s")
    return wrong


def _close_under_pulls(_: Any, refs: list[Any]) -> list[str]:
    """Ends this process's part in RDT while threads pull; says which of them had no good end."""
    ends: list[Any] = []

    def pull(ref: Any) -> None:
        try:
            ends.append(_total(None, ray.get(ref)))
        except Exception as error:
            ends.append(error)

    threads = [threading.Thread(target=pull, args=(ref,), daemon=True) for ref in refs]
    for thread in threads:
        thread.start()
    ray_core.manager().shutdown()
    for thread in threads:
        thread.join(_LIMIT_S)
    wrong = [f"{end!r}" for end in ends if not isinstance(end, RayError) and end != _HUGE]
    return wrong + ["a pull does not end"] * (len(refs) - len(ends))
