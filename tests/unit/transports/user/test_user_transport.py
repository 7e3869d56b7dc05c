"""A transport that a user wrote: what its code is asked, and how transfers end."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.transports.base import Peer, UserDescription, UserObject
from ray.experimental.rdt.transports.user import registered, transfers
from ray.experimental.rdt.transports.user.registered import RegisteredTransport
from ray.experimental.rdt.transports.user.transfers import TransferEnded
from ray.experimental.rdt.transports.user.transport import UserTransport
from tests.unit.fakes import FakeRay, FakeSession

LONG = 20.0


class Code:
    """The user's code. It waits for ``go`` where ``hangs`` says so, and raises ``error``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.changed = threading.Condition()
        self.go = threading.Event()
        self.hangs = False
        self.error: Exception | None = None
        self.device = "cpu"
        self.communicator: Any = None

    def note(self, *call: Any) -> None:
        with self.changed:
            self.calls.append(call)
            self.changed.notify_all()
        if self.error is not None:
            raise self.error

    def work(self, *call: Any) -> None:
        self.note(*call)
        if self.hangs:
            assert self.go.wait(LONG)

    def wait_for(self, name: str) -> tuple[Any, ...]:
        def find() -> tuple[Any, ...] | None:
            return next((call for call in self.calls if call[0] == name), None)

        with self.changed:
            assert self.changed.wait_for(lambda: find() is not None, LONG)
        return find() or ()


def transport_of(code: Code, session: FakeSession, *, one_sided: bool = False) -> UserTransport:
    class Manager:
        @staticmethod
        def is_one_sided() -> bool:
            return one_sided

        @staticmethod
        def can_abort_transport() -> bool:
            return True

        def extract_tensor_transport_metadata(self, obj_id: str, tensors: list[Any]) -> Any:
            code.note("extract", obj_id, tensors)
            return SimpleNamespace(tensor_meta=[1], tensor_device=code.device)

        def get_communicator_metadata(self, *actors: Any) -> Any:
            from ray.experimental.rdt.tensor_transport_manager import CommunicatorMetadata

            return code.communicator or CommunicatorMetadata()

        def send_multiple_tensors(self, tensors: Any, metadata: Any, communicator: Any) -> None:
            code.work("send", tensors, metadata, communicator)

        def fetch_multiple_tensors(self, *arguments: Any) -> Any:
            code.work("fetch", *arguments)
            return "request"

        def wait_fetch_complete(self, request: Any, timeout_s: float) -> Any:
            return ["received"]

        def abort_transport(self, obj_id: str, communicator: Any) -> None:
            code.calls.append(("abort", obj_id))
            code.go.set()

        def garbage_collect(self, *arguments: Any) -> None:
            code.note("free", *arguments)

    entry = RegisteredTransport("MINE", ("cpu",), Manager, list)  # type: ignore[arg-type]
    return UserTransport(session, entry)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "own_actor_for_calls", lambda: None)
    monkeypatch.setattr(transfers, "actor_of", lambda serialized: None)


@pytest.fixture
def here(process: Callable[[int], FakeSession]) -> FakeSession:
    return process(1)


@pytest.fixture
def there(process: Callable[[int], FakeSession]) -> FakeSession:
    return process(2)


@pytest.fixture
def code() -> Code:
    return Code()


@pytest.fixture
def transport(code: Code, here: FakeSession) -> Iterator[UserTransport]:
    transport = transport_of(code, here)
    yield transport
    code.go.set()
    transport.close()


DESCRIPTION = UserDescription("its id", "metadata", 1, None, False)


def pull(
    transport: UserTransport,
    peer: FakeSession,
    ask: Callable[[str, Any], Any] = lambda op, body: {},
    user_description: UserDescription = DESCRIPTION,
    timeout_s: float = LONG,
) -> list[Any]:
    return transport.pull(
        Peer(peer.address, peer.agent.agent_id),
        user_description,
        None,
        ask,
        Deadline.after(timeout_s),
    )


def route_to(consumer: FakeSession, note: str = "") -> dict[str, Any]:
    return {"transfer": "its transfer", "note": note, "consumer": consumer.address}


# Producer.


def test_an_object_is_described_by_the_users_code(transport: UserTransport, code: Code) -> None:
    user_object = transport.describe(["a tensor"])
    assert code.calls == [("extract", user_object.object_id, ["a tensor"])]
    assert len(user_object.object_id) == 56


def test_code_that_cannot_describe_an_object_is_named(transport: UserTransport, code: Code) -> None:
    code.error = ValueError("on purpose")
    with pytest.raises(RDTError, match="extract_tensor_transport_metadata raised ValueError"):
        transport.describe([])


def test_a_device_that_is_not_registered_is_refused_and_the_object_freed(
    transport: UserTransport, code: Code
) -> None:
    code.device = "tpu"
    with pytest.raises(ValueError, match="registered for tensors on cpu"):
        transport.describe(["a tensor"])
    assert code.wait_for("free")[3] == ["a tensor"]


def test_objects_are_freed_once(transport: UserTransport, code: Code) -> None:
    first, second = transport.describe(["first"]), transport.describe(["second"])
    transport.withdraw(first)
    transport.withdraw(first)
    transport.withdraw(second)
    transport.close()
    assert [call[3] for call in code.calls if call[0] == "free"] == [["first"], ["second"]]


def test_code_that_cannot_free_an_object_is_asked_for_the_next(
    transport: UserTransport, code: Code
) -> None:
    first, second = transport.describe(["first"]), transport.describe(["second"])
    code.error = ValueError("on purpose")
    transport.withdraw(first)
    code.wait_for("free")
    transport.withdraw(second)
    transport.close()
    assert [call[3] for call in code.calls if call[0] == "free"] == [["first"], ["second"]]


def test_a_freed_object_is_not_kept_alive(transport: UserTransport, code: Code) -> None:
    class Tensor:
        pass

    tensor = Tensor()
    is_alive = weakref.ref(tensor)
    transport.withdraw(transport.describe([tensor]))
    transport.close()
    code.calls.clear()
    del tensor
    gc.collect()
    assert is_alive() is None


def test_closing_frees_all_objects(transport: UserTransport, code: Code) -> None:
    transport.describe(["a tensor"])
    transport.close()
    assert code.wait_for("free")[3] == ["a tensor"]


def test_the_producer_sends(
    transport: UserTransport, code: Code, there: FakeSession, fake_ray: FakeRay
) -> None:
    user_object = UserObject("its id", "metadata", ["a tensor"])
    transport.send(route_to(there), user_object, Deadline.after(LONG))
    assert code.calls[0][:3] == ("send", ["a tensor"], "metadata")


def test_the_communicator_comes_from_the_consumer(
    transport: UserTransport,
    code: Code,
    there: FakeSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registered, "read_note", {"its transfer": "the communicator"}.__getitem__)
    user_object = UserObject("its id", "metadata", [])
    transport.send(route_to(there, "its transfer"), user_object, Deadline.after(LONG))
    assert code.calls[0][3] == "the communicator"


def test_a_send_that_fails_ends_the_receive(
    transport: UserTransport, code: Code, here: FakeSession, there: FakeSession
) -> None:
    consumer_code = Code()
    consumer_code.hangs = True
    consumer = transport_of(consumer_code, there)
    code.error = ValueError("on purpose")

    def ask(op: str, body: dict[str, Any]) -> dict[str, Any]:
        assert op == "rdt.send"
        threading.Thread(target=send, args=(body,)).start()
        return {}

    failures: list[BaseException] = []

    def send(route: dict[str, Any]) -> None:
        consumer_code.wait_for("fetch")
        try:
            transport.send(route, UserObject("its id", "metadata", []), Deadline.after(LONG))
        except ValueError as error:
            failures.append(error)

    with pytest.raises(TransferEnded, match="ValueError: on purpose"):
        pull(consumer, here, ask)
    assert ("abort", "its id") in consumer_code.calls
    consumer.close()


# Consumer.


def test_the_consumer_receives(transport: UserTransport, code: Code, there: FakeSession) -> None:
    asked: list[Any] = []
    assert pull(transport, there, lambda op, body: asked.append((op, body))) == ["received"]
    ((op, body),) = asked
    assert op == "rdt.send"
    assert body["note"] == ""
    assert body["consumer"] == transport._session.address
    assert code.calls[0][:3] == ("fetch", "its id", "metadata")


def test_the_producer_of_a_one_sided_transport_only_holds_the_object(
    code: Code, here: FakeSession, there: FakeSession
) -> None:
    asked: list[Any] = []
    transport = transport_of(code, here, one_sided=True)
    pull(transport, there, lambda op, body: asked.append((op, body)))
    assert asked == [("rdt.expose", {})]
    transport.close()


def test_the_communicator_is_published_for_the_transfer(
    transport: UserTransport, code: Code, there: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: dict[str, Any] = {}
    monkeypatch.setattr(registered, "publish_note", notes.__setitem__)
    monkeypatch.setattr(registered, "drop_note", notes.__delitem__)
    code.communicator = "the communicator"
    seen: list[Any] = []
    pull(transport, there, lambda op, body: seen.append(notes[body["note"]]))
    assert seen == ["the communicator"]
    assert not notes


def test_another_number_of_tensors_is_an_error(
    transport: UserTransport, there: FakeSession
) -> None:
    with pytest.raises(ValueError, match="received 1 tensors, 2 were sent"):
        pull(transport, there, user_description=DESCRIPTION._replace(size=2))


def test_a_receive_that_hangs_ends_at_the_deadline_and_is_aborted(
    transport: UserTransport, code: Code, there: FakeSession
) -> None:
    transport_of(Code(), there)
    code.hangs = True
    with pytest.raises(TimeoutError):
        pull(transport, there, timeout_s=0.2)
    assert ("abort", "its id") in code.calls


def test_a_lost_connection_ends_the_receive(
    transport: UserTransport, code: Code, here: FakeSession, there: FakeSession
) -> None:
    code.hangs = True

    def break_connection() -> None:
        code.wait_for("fetch")
        here.lose(there)

    threading.Thread(target=break_connection).start()
    with pytest.raises(TransferEnded, match="connection to the other process broke"):
        pull(transport, there)


def test_closing_ends_the_receive_and_refuses_the_next(
    transport: UserTransport, code: Code, there: FakeSession
) -> None:
    code.hangs = True

    def close() -> None:
        code.wait_for("fetch")
        transport.close()

    threading.Thread(target=close).start()
    for _ in range(2):
        with pytest.raises(TransferEnded, match="shutting down"):
            pull(transport, there)


def test_the_cause_of_a_failed_receive_is_the_failed_send(
    transport: UserTransport, code: Code, here: FakeSession, there: FakeSession
) -> None:
    producer_code = Code()
    producer_code.error = OSError("no memory")
    producer = transport_of(producer_code, there)
    code.error = ValueError("a consequence")

    def ask(op: str, route: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(OSError, match="no memory"):
            producer.send(route, UserObject("its id", "metadata", []), Deadline.after(LONG))
        return {}

    with pytest.raises(TransferEnded, match="OSError: no memory"):
        pull(transport, there, ask)
    producer.close()


def test_a_receive_that_fails_by_itself_ends_the_send(
    transport: UserTransport, code: Code, there: FakeSession
) -> None:
    producer_code = Code()
    producer_code.hangs = True
    producer = transport_of(producer_code, there)
    code.error = ValueError("on purpose")
    ended: list[BaseException] = []
    threads: list[threading.Thread] = []

    def send(route: dict[str, Any]) -> None:
        try:
            producer.send(route, UserObject("its id", "metadata", []), Deadline.after(LONG))
        except TransferEnded as error:
            ended.append(error)

    def ask(op: str, route: dict[str, Any]) -> dict[str, Any]:
        threads.append(threading.Thread(target=send, args=(route,)))
        threads[0].start()
        producer_code.wait_for("send")
        return {}

    with pytest.raises(ValueError, match="on purpose"):
        pull(transport, there, ask)
    threads[0].join(LONG)
    assert "ValueError: on purpose" in str(ended[0])
    producer.close()


def test_only_the_other_side_ends_a_transfer(
    transport: UserTransport,
    code: Code,
    here: FakeSession,
    there: FakeSession,
    process: Callable[[int], FakeSession],
) -> None:
    stranger = process(3)

    def ask(op: str, route: dict[str, Any]) -> dict[str, Any]:
        body = {"transfer": route["transfer"], "reason": "because"}
        stranger.send_oneway(here.address, "rdt.user.end/MINE", body)
        return {}

    assert pull(transport, there, ask) == ["received"]
