"""Recovery of objects whose producer died: ask the owner, and fetch the replacement.

A task that runs again may return a different value. The whole value is therefore replaced, and not
only its tensors.

Runs on: consumer, the thread that fetches; blocks without the GIL and holds no lock.
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
from ray.experimental.rdt.consumer.fallback import describe_peer
from ray.experimental.rdt.consumer.fetcher import FetchedValue, Fetcher, Request
from ray.experimental.rdt.owner.reconstruction import (
    ALIVE,
    NOT_OWNER,
    RECONSTRUCTED,
    Outcome,
    Reconstruction,
    borrow,
)
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.rpc.process_directory import ask_all, known_agents
from ray.experimental.rdt.rpc.session import Session
from ray.experimental.rdt.serialization.envelope import open_envelope

#: Pauses between questions to Ray's GCS, which sends no notice of a worker's death. It detects a
#: killed process within milliseconds and a dead node within seconds.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 1.0
_FIRST_WAIT_S = 0.5

#: The shortest time to ask.
_MIN_ASK_S = 2.0

#: Time for owners to answer.
_ANSWER_S = 5.0


@dataclass(frozen=True)
class PlainValue:
    """A value without RDT tensors that replaces an RDT object."""

    value: Any

    def unpickle(self) -> list[Any]:
        return [self.value]


Result: TypeAlias = "FetchedValue | PlainValue | RayError"

#: By position in the batch: the request that failed, and its error.
_Lost = dict[int, tuple[Request, RDTProducerDiedError]]


class Recovery:
    """The recovery of lost objects in one process."""

    def __init__(
        self, reconstruction: Reconstruction, fetcher: Fetcher, session: Callable[[], Session]
    ):
        self._reconstruction = reconstruction
        self._fetcher = fetcher
        self._session = session

    def replace_lost(
        self,
        requests: Sequence[Request],
        results: Sequence[FetchedValue | RayError],
        began: float,
        timeout_s: float | None,
    ) -> list[Result]:
        """Replace the result of each object that was lost with its producer.

        Args:
            began: When the fetch began, by ``time.monotonic``.
            timeout_s: The user's timeout from then on, None or negative for no limit.

        Raises:
            GetTimeoutError: the user's timeout passed first.
            ValueError: a target does not fit the replacement.
        """
        found: list[Result] = list(results)
        deadline = None if timeout_s is None or timeout_s < 0 else Deadline(began).later(timeout_s)
        lost: _Lost = {
            index: (requests[index], error)
            for index, error in enumerate(results)
            if isinstance(error, RDTProducerDiedError)
        }
        while lost:
            lost, began = self._replace(lost, found, began, deadline)
        return found

    def _replace(
        self, lost: _Lost, found: list[Result], began: float, deadline: Deadline | None
    ) -> tuple[_Lost, float]:
        """Recover each object once; return those lost again, and when their fetch began."""
        # If Ray counts a process as alive for as long as a fetch may take, it is taken to be alive,
        # and its task does not run a second time.
        give_up = max(Deadline(began).later(settings().fetch_timeout_s), Deadline.after(_MIN_ASK_S))
        replacements: dict[int, Any] = {}
        for index, (request, error) in lost.items():
            with without_turn():
                outcome = self._await_owner(request, give_up, deadline)
            if outcome.state == RECONSTRUCTED:
                replacements[index] = outcome.ref
            else:
                found[index] = error.because(outcome.reason)
        requests: dict[int, Request] = {}
        values = self._values(list(replacements.values()), deadline)
        for index, value in zip(replacements, values):
            request, _ = lost[index]
            if descriptor.is_rdt(value[1]):
                requests[index] = _request(request, value, replacements[index])
            else:
                found[index] = _plain_value(request, value)
        began = time.monotonic()
        fetched = self._fetcher.fetch(list(requests.values()), _left(deadline))
        again: _Lost = {}
        for (index, request), result in zip(requests.items(), fetched):
            found[index] = result
            if isinstance(result, RDTProducerDiedError):
                again[index] = request, result
        return again, began

    def _await_owner(
        self, request: Request, give_up: Deadline, deadline: Deadline | None
    ) -> Outcome:
        """Ask until the owner decides. The owner waits for Ray to report the producer's death."""
        pause = _FIRST_PAUSE_S
        while True:
            outcome = self._ask(request)
            if outcome.state != ALIVE:
                return outcome
            if give_up.has_passed():
                reason = outcome.reason or "Ray reports its producer as alive"
                return Outcome(ALIVE, reason=reason)
            if deadline is not None and deadline.has_passed():
                peer = describe_peer(request.envelope.head)
                raise GetTimeoutError(
                    f"ray.get timed out before Ray reported whether {peer}, the producer of "
                    f"object {request.object_id}, is alive"
                )
            sleep(pause)
            raise_if_cancelled()
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _ask(self, request: Request) -> Outcome:
        head, waiting_actor = request.envelope.head, _waiting_actor()
        # Without a reference, only the owner may know the id.
        object_id = head.origin.hex() if request.ref is None else request.ref.hex()
        outcome = self._reconstruction.reconstruct(object_id, head.key, waiting_actor)
        if outcome.state != NOT_OWNER:
            return outcome
        session = self._session()
        owner = None if request.ref is None else ray_core.owner_of(request.ref)
        agents = [address for address in known_agents(owner) if address != session.address]
        body = {"object_id": object_id, "key": head.key, "waiting_actor": waiting_actor}
        reason, state = "no process owns it", NOT_OWNER
        for _, answer in ask_all(session, agents, protocol.RECONSTRUCT, body, _ANSWER_S):
            if isinstance(answer, Exception):
                if owner is not None and isinstance(answer, TimeoutError):
                    state = ALIVE  # the owner's Python is busy
                reason = f"no process says that it owns it, and one did not answer ({answer})"
            elif answer["state"] != NOT_OWNER:
                ref = borrow(answer) if answer["state"] == RECONSTRUCTED else None
                return Outcome(answer["state"], ref, answer["reason"])
        return Outcome(state, reason=reason)

    def _values(self, refs: list[Any], deadline: Deadline | None) -> list[Any]:
        """Wait, as ``ray.get`` does, until the objects exist; return their serialized values."""
        if not refs:
            return []
        # A wait that ends cancels the transfers that the core has begun, so each wait is longer.
        longest_s = _FIRST_WAIT_S
        while True:
            left = _left(deadline)
            wait_s = longest_s if left is None else min(longest_s, left)
            try:
                with without_turn():
                    return ray_core.get_objects(refs, int(1e3 * wait_s))
            except GetTimeoutError:
                if wait_s == left:
                    raise
            raise_if_cancelled()
            longest_s *= 2


def _waiting_actor() -> str:
    """Return the id (hex) of this actor if it runs nothing else while it fetches, else ""."""
    actor_id = ray_core.actor_id()
    if actor_id is None or ray_core.actor_is_asyncio() or ray_core.actor_max_concurrency() > 1:
        return ""
    return actor_id.hex()


def _left(deadline: Deadline | None) -> float | None:
    return None if deadline is None else deadline.left_s()


def _request(old: Request, value: Any, ref: Any) -> Request:
    """Return a request for the replacement, into the targets of the lost object."""
    envelope = open_envelope(value[1], value[0])
    if old.target.tensors is not None:
        targets.check_targets(envelope.table, old.target.tensors)
    return Request(old.object_id, envelope, old.target, ref)


def _plain_value(request: Request, value: Any) -> PlainValue | RayError:
    """Return a value without RDT tensors, or the error with which the repeated call ended."""
    with without_turn():
        got = ray_core.deserialize(value, request.ref, {})
    if isinstance(got, RayError):
        return got
    if request.target.tensors is not None:
        raise ValueError(
            f"the reconstructed object {request.object_id} has no tensors to receive into the "
            "given ones"
        )
    return PlainValue(got)
