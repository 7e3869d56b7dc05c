"""Takes anew what was lost with its producer: asks the owner, and fetches what it made instead.

A task that runs again may return something else, so the whole value is taken, and not only its
tensors. Runs on: consumer, the thread that fetches; blocks without the GIL and holds no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ray.exceptions import GetTimeoutError, RayError

from ray.experimental.rdt.common import descriptor, ray_core
from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.errors import RDTProducerDiedError
from ray.experimental.rdt.common.real_threads import sleep
from ray.experimental.rdt.common.thread_role import without_turn
from ray.experimental.rdt.consumer import targets
from ray.experimental.rdt.consumer.fetcher import Arrival, Fetcher, Request
from ray.experimental.rdt.owner import recipes as lineage
from ray.experimental.rdt.owner.recipes import ALIVE, MADE, UNKNOWN, Lineage, Outcome
from ray.experimental.rdt.rpc.process_directory import ask_all, known_agents
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.serialization.envelope import open_envelope

#: Ray's GCS tells nobody of a worker's end, so it is asked again. It knows of a killed process in
#: milliseconds, of a dead node in a while.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 1.0
_FIRST_WAIT_S = 0.5

#: How long it is asked at least.
_LEAST_S = 2.0

#: How long owners may take to answer.
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Whole:
    """A value that is no RDT object, in place of one that was."""

    value: Any

    def unpickle(self) -> list[Any]:
        return [self.value]


Result: TypeAlias = "Arrival | Whole | RayError"


@dataclass(frozen=True)
class _Lost:
    """An object that is to be taken anew.

    Attributes:
        request: As it was to be fetched.
        ref: Of the lost copy, None where its value came without one.
        error: What became of the fetch.
    """

    request: Request
    ref: Any
    error: RDTProducerDiedError

    @property
    def object_id(self) -> str:
        """Its id in hex, "" if only its owner knows."""
        if self.ref is not None and not self.ref.is_nil():
            return str(self.ref.hex())
        return self.request.envelope.head.origin.hex()


class Remakes:
    """Takes lost objects anew, for one process.

    Args:
        lineage: What this process makes again itself.
        fetcher: Fetches.
        session: Gives what asks other owners.
    """

    def __init__(self, lineage: Lineage, fetcher: Fetcher, session: Callable[[], Session]):
        self._lineage = lineage
        self._fetcher = fetcher
        self._session = session

    def replace_lost(
        self,
        requests: Sequence[Request],
        refs: Sequence[Any],
        results: Sequence[Arrival | RayError],
        began: float,
        timeout_s: float | None,
    ) -> list[Result]:
        """Puts something in the place of each object that was lost with its producer.

        Args:
            requests: What was fetched.
            refs: Their references; None where there is none.
            results: What came of it.
            began: When the fetch began, by ``time.monotonic``.
            timeout_s: The user's patience from then on, if it has an end.

        Raises:
            GetTimeoutError: the user's timeout passed first.
            ValueError: a target does not fit what the object is now.
        """
        found: list[Result] = list(results)
        deadline = None if timeout_s is None or timeout_s < 0 else Deadline(began).later(timeout_s)
        lost = {
            index: _Lost(requests[index], refs[index], error)
            for index, error in enumerate(results)
            if isinstance(error, RDTProducerDiedError)
        }
        while lost:
            lost, began = self._replace(lost, found, began, deadline)
        return found

    def _replace(
        self,
        lost: dict[int, _Lost],
        found: list[Result],
        began: float,
        deadline: Deadline | None,
    ) -> tuple[dict[int, _Lost], float]:
        """One round for all; returns what was lost once more, and since when it was fetched."""
        # A process that Ray counts as alive for as long as a fetch may take is taken to live, and
        # its task is not run a second time.
        give_up = max(Deadline(began).later(settings().fetch_timeout_s), Deadline.after(_LEAST_S))
        made: dict[int, Any] = {}
        for index, one in lost.items():
            with without_turn():
                outcome = self._made_again(one, give_up, deadline)
            if outcome.state == MADE:
                made[index] = outcome.ref
            else:
                found[index] = one.error.because(outcome.reason)
        requests: dict[int, Request] = {}
        for index, value in zip(made, self._values(list(made.values()), deadline)):
            one = lost[index]
            if descriptor.is_rdt(value[1]):
                requests[index] = _request(one.request, value)
            else:
                found[index] = _whole(one, value)
        began = time.monotonic()
        fetched = self._fetcher.fetch(list(requests.values()), _left(deadline))
        again = {}
        for (index, request), result in zip(requests.items(), fetched):
            found[index] = result
            if isinstance(result, RDTProducerDiedError):
                again[index] = _Lost(request, made[index], result)
        return again, began

    def _made_again(self, one: _Lost, give_up: Deadline, deadline: Deadline | None) -> Outcome:
        pause = _FIRST_PAUSE_S
        while True:
            outcome = self._ask(one)
            if outcome.state != ALIVE:
                return outcome
            if give_up.has_passed():
                reason = outcome.reason or "Ray counts the process that made it as alive"
                return Outcome(ALIVE, reason=reason)
            if deadline is not None and deadline.has_passed():
                raise GetTimeoutError(
                    f"ray.get timed out before Ray knew what became of {one.error.context.peer}, "
                    f"which made object {one.request.object_id}"
                )
            sleep(pause)
            raise_if_cancelled()
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _ask(self, one: _Lost) -> Outcome:
        key, busy = one.request.envelope.head.key, _busy_actor()
        outcome = self._lineage.remake(one.object_id, key, busy)
        if outcome.state != UNKNOWN:
            return outcome
        session = self._session()
        owner = None if one.ref is None or one.ref.is_nil() else ray_core.owner_of(one.ref)
        agents = [address for address in known_agents(owner) if address != session.address]
        body = {"object_id": one.object_id, "key": key.hex(), "busy": busy}
        reason, state = "no process says that it owns it", UNKNOWN
        for _, answer in ask_all(session, agents, "rdt.remake", body, _ANSWER_S):
            if isinstance(answer, Exception):
                if owner is not None and isinstance(answer, TimeoutError):
                    state = ALIVE  # the owner's Python is busy
                reason = f"no process says that it owns it, and one did not answer ({answer})"
            elif answer["state"] != UNKNOWN:
                ref = lineage.borrow(answer) if answer["state"] == MADE else None
                return Outcome(answer["state"], ref, answer["reason"])
        return Outcome(state, reason=reason)

    def _values(self, refs: list[Any], deadline: Deadline | None) -> list[Any]:
        """What Ray has for the objects: waits, as ``ray.get`` does, until they are made."""
        if not refs:
            return []
        # A wait that ends gives up what the core has begun to bring, so each is longer.
        patience_s = _FIRST_WAIT_S
        while True:
            left = _left(deadline)
            wait_s = patience_s if left is None else min(patience_s, left)
            try:
                with without_turn():
                    return ray_core.get_objects(refs, int(1e3 * wait_s))
            except GetTimeoutError:
                if wait_s == left:
                    raise
            raise_if_cancelled()
            patience_s *= 2


def _busy_actor() -> str:
    """The id (hex) of this actor if it runs nothing else while it fetches, else ""."""
    actor_id = ray_core.actor_id()
    if actor_id is None or ray_core.actor_is_asyncio() or ray_core.actor_max_concurrency() > 1:
        return ""
    return actor_id.hex()


def _left(deadline: Deadline | None) -> float | None:
    return None if deadline is None else deadline.left_s()


def _request(old: Request, value: Any) -> Request:
    """A request for what an object is now, into the targets of what it was."""
    envelope = open_envelope(value[1], value[0])
    if old.target.tensors is not None:
        targets.check_targets(envelope.table, old.target.tensors)
    return Request(old.object_id, envelope, old.target)


def _whole(one: _Lost, value: Any) -> Whole | RayError:
    """A value without RDT tensors, or the error that the call ended with."""
    with without_turn():
        got = ray_core.deserialize(value, one.ref, {})
    if isinstance(got, RayError):
        return got
    if one.request.target.tensors is not None:
        raise ValueError(
            f"object {one.request.object_id}, which was made again, has no tensors to receive into "
            "the given ones"
        )
    return Whole(got)
