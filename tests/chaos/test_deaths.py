"""Processes die at any moment: what arrives is right, what does not is an error, nothing hangs."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
from typing import Any

import pytest
import torch
from ray.exceptions import RayError

import ray
from tests.integration.peers import LARGE, Peer
from tests.support import wait_until

pytestmark = pytest.mark.slow

ROUNDS = 12
#: More than any death needs to be known, less than RDT's own patience.
LIMIT_S = 45


def full_of(_: Peer, number: int) -> dict[str, torch.Tensor]:
    return {"t": torch.full((LARGE,), float(number)), "small": torch.full((3,), float(number))}


def is_full_of(_: Peer, got: dict[str, torch.Tensor], number: int) -> bool:
    return all(bool(tensor.eq(number).all()) for tensor in got.values())


def are_full_of(peer: Peer, refs: list[Any], numbers: list[int]) -> bool:
    return all(is_full_of(peer, *pair) for pair in zip(ray.get(refs), numbers, strict=True))


def outcome(ref: Any) -> str:
    """Says right, or which error Ray gave; fails on wrong bytes and on what takes too long."""
    try:
        assert ray.get(ref, timeout=LIMIT_S) is True
    except TimeoutError:
        raise
    except RayError as error:
        return type(error).__name__
    return "right"


def kill(actor: Any) -> None:
    with contextlib.suppress(RayError, ProcessLookupError):  # It is dead or comes back just now.
        os.kill(ray.get(actor.pid.remote(), timeout=LIMIT_S), signal.SIGKILL)


def is_up(actor: Any) -> bool:
    try:
        return bool(ray.get(actor.pid.remote(), timeout=LIMIT_S))
    except RayError:
        return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_producers_and_consumers_die_under_load(spawn: Any, transport: str) -> None:
    dice = random.Random(transport)
    makers = [spawn(max_restarts=-1) for _ in range(2)]
    takers = [spawn(max_restarts=-1) for _ in range(2)]
    outcomes = []
    for turn in range(ROUNDS):
        numbers = list(range(turn, turn + 4))
        refs = [
            dice.choice(makers).make.options(tensor_transport=transport).remote(full_of, number)
            for number in numbers
        ]
        used = [
            dice.choice(takers).run.remote(is_full_of, ref, number)
            for ref, number in zip(refs, numbers, strict=True)
        ]
        used.append(dice.choice(takers).run.remote(are_full_of, refs, numbers))
        if turn % 3 == 1:
            kill(dice.choice(makers + takers))
        outcomes += [outcome(ref) for ref in used]
    assert outcomes.count("right") > len(outcomes) // 3, outcomes
    for actor in (*makers, *takers):
        wait_until(lambda actor=actor: is_up(actor), "the actor is back")
    again = makers[0].make.options(tensor_transport=transport).remote(full_of, 7)
    assert ray.get([taker.run.remote(is_full_of, again, 7) for taker in takers]) == [True, True]
    del refs, again

    def assert_idle() -> None:
        gc.collect()  # Errors and the frames that they name hold references in cycles.
        for actor in (*makers, *takers):
            counters = ray.get(actor.stats.remote())
            in_use = ("stored_objects", "directory_rows", "regions", "pinned", "pool_used")
            assert {name: counters[name] for name in in_use if counters.get(name)} == {}

    wait_until(assert_idle, "in use:", limit_s=90)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_consumer_that_ends_while_it_pulls(spawn: Any, number: int) -> None:
    """Its pins go with it, at the latest with its process; others are served meanwhile."""
    maker, doomed, other = spawn(), spawn(), spawn()
    refs = [maker.make.remote(full_of, 3) for _ in range(8)]
    pid = ray.get(doomed.pid.remote())
    waiting = doomed.run.remote(are_full_of, refs, [3] * 8)
    os.kill(pid, number)
    assert ray.get(other.run.remote(are_full_of, refs, [3] * 8), timeout=LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RayError):
        ray.get(waiting, timeout=LIMIT_S)
    del refs

    def assert_idle() -> None:
        counters = ray.get(maker.stats.remote())
        in_use = ("stored_objects", "regions", "pinned")
        assert {name: counters[name] for name in in_use if counters[name]} == {}

    wait_until(assert_idle, "in use:")
