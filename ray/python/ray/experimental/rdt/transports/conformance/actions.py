"""Actions of the members of a conformance case. Each gets the member first."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ray.exceptions import GetTimeoutError, RayError

import ray
from ray.experimental.rdt.common import ray_core

#: Elements of an object that does not travel within the value (1 MiB), and of one that takes a
#: while to move (32 MiB).
LARGE, HUGE = 1 << 18, 1 << 23

#: The limit of waits that end by themselves in a transport that works.
LIMIT_S = 60.0


@contextmanager
def must_raise(
    kinds: type[Exception] | tuple[type[Exception], ...], otherwise: str
) -> Iterator[None]:
    try:
        yield
    except kinds:
        return
    raise AssertionError(otherwise)


def same(_: Any, value: Any) -> Any:
    return value


def ones(_: Any, count: int = LARGE) -> torch.Tensor:
    return torch.ones(count)


def ramp(_: Any, count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


def filled(_: Any, number: int) -> torch.Tensor:
    return torch.full((LARGE,), float(number))


def total(_: Any, *tensors: torch.Tensor) -> float:
    return sum(float(tensor.double().sum()) for tensor in tensors)


def total_of_refs(member: Any, refs: list[Any]) -> float:
    return total(member, *ray.get(refs))


def keep(member: Any, tensor: torch.Tensor) -> None:
    member.kept["tensor"] = tensor


def total_of_kept(member: Any) -> float:
    return total(member, member.kept.pop("tensor"))


def stored(_: Any) -> int:
    gc.collect()  # failed calls have left references in cycles
    return int(ray.experimental.rdt.stats()["stored_objects"])


def kinds(_: Any) -> dict[str, Any]:
    return {
        "large": torch.arange(float(LARGE)),
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


def differences(_: Any, received: dict[str, Any]) -> list[str]:
    sent = kinds(_)
    assert received.pop("text") == sent.pop("text")
    received["nested"], sent["nested"] = received["nested"][0][0], sent["nested"][0][0]
    return [name for name, tensor in sent.items() if not _is_like(received[name], tensor)]


def _is_like(one: torch.Tensor, other: torch.Tensor) -> bool:
    facts = [
        (type(each), each.dtype, each.shape, each.stride(), each.requires_grad)
        for each in (one, other)
    ]
    return facts[0] == facts[1] and torch.equal(one, other)


def empties(_: Any) -> list[torch.Tensor]:
    return [
        torch.empty(0),
        torch.empty(3, 0, dtype=torch.int16),
        torch.empty(0, 4, 2),
        torch.ones(LARGE),
    ]


def shapes(_: Any, tensors: list[Any]) -> list[list[int]]:
    here = [ray.get(each) if isinstance(each, ray.ObjectRef) else each for each in tensors]
    return [list(tensor.shape) for tensor in here]


def many(_: Any, count: int) -> list[torch.Tensor]:
    return [torch.full((16,), float(index)) for index in range(count)]


def firsts(_: Any, tensors: list[torch.Tensor]) -> list[float]:
    return [float(tensor[0]) for tensor in tensors]


def shared_storage(_: Any) -> dict[str, torch.Tensor]:
    base = torch.arange(float(LARGE))
    return {"base": base, "view": base[10:30:3], "again": base, "end": base[-5:]}


def sharing_differences(_: Any, received: dict[str, torch.Tensor]) -> list[str]:
    """Return the differences from the tensors at the producer."""
    sent = shared_storage(_)
    wrong = [name for name, tensor in sent.items() if not _is_like(received[name], tensor)]
    if received["again"] is not received["base"]:
        wrong.append("one tensor arrived as two")
    received["base"][[10, -5]] = -1
    if received["view"][0] != -1 or received["end"][0] != -1:
        wrong.append("a view does not share its base's memory")
    return wrong


def receive_into_targets(_: Any, refs: list[Any]) -> float:
    target = torch.zeros(LARGE)
    ray.experimental.set_target_for_ref(refs[0], [torch.zeros(LARGE + 1)])
    with must_raise(ValueError, "a target of another shape was accepted"):
        ray.get(refs[0])
    ray.experimental.set_target_for_ref(refs[0], [target])
    assert ray.get(refs[0]) is target, "the target was not received into"
    return float(target.double().sum())


def pull_with_timeouts(_: Any, refs: list[Any]) -> list[str]:
    """Pull with longer and longer timeouts; return the errors of the pulls that succeeded."""
    expected, wrong = ramp(None, HUGE), []
    for timeout_s in (0, 0.001, 0.005, 0.02, LIMIT_S):
        try:
            received = ray.get(refs[0], timeout=timeout_s)
        except GetTimeoutError:
            continue
        if not torch.equal(received, expected):
            wrong.append(f"wrong bytes within {timeout_s:g} s")
    return wrong


def close_under_pulls(_: Any, refs: list[Any]) -> list[str]:
    """Shut RDT down in this process while threads pull; return the pulls that ended wrongly."""
    ends: list[Any] = []

    def pull(ref: Any) -> None:
        try:
            ends.append(total(None, ray.get(ref)))
        except Exception as error:  # checked below
            ends.append(error)

    threads = [threading.Thread(target=pull, args=(ref,), daemon=True) for ref in refs]
    for thread in threads:
        thread.start()
    ray_core.manager().shutdown()
    for thread in threads:
        thread.join(LIMIT_S)
    wrong = [f"{end!r}" for end in ends if not isinstance(end, RayError) and end != HUGE]
    return wrong + ["a pull does not end"] * (len(refs) - len(ends))
