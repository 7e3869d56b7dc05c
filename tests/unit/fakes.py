"""Stand-ins for Ray's core, a session and the clock, for tests without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

import ray
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.descriptor import Descriptor, encode


class Clock:
    """A clock that only ``sleep`` moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def install(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        """Give modules this clock as their ``time``, and as their ``sleep`` if they have one."""
        for module in modules:
            if hasattr(module, "time"):
                monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=self))
            if hasattr(module, "sleep"):
                monkeypatch.setattr(module, "sleep", self.sleep)


def object_id(number: int) -> str:
    return number.to_bytes(28, "big").hex()


def agent_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def address(number: int) -> bytes:
    """The address of an agent: a mark, its id and the boot id."""
    return b"mark\x01\x00" + agent_id(number) + bytes(16)


def rdt_value(key: bytes, producer: int, **fields: Any) -> tuple[bytes, bytes, None]:
    """A serialized RDT value, as the core returns it."""
    head = Descriptor(key.ljust(16), 64, bytes(16), "auto", address(producer), False, **fields)
    return b"", encode(head), None


class FakeRay:
    """A fake of ``common/ray_core``.

    Attributes:
        records: The GCS key-value store, by namespace and key.
        dead: The ids of dead workers.
        own: The worker id of this process.
        owners: The worker ids of the objects' owners, by object id in hex.
        values: The serialized values of the created objects.
        late: Objects for which a wait in ``get_objects`` passes, and how many more of them.
        callbacks: The functions to call when an object goes out of scope.
        gone: Objects that are out of scope.
        waits_ms: The limits of the waits in ``get_objects``.
        puts: The serialized values that were put, and their transports.
        is_disabled: Whether the job disables object reconstruction.
    """

    def __init__(self) -> None:
        self.records: dict[tuple[bytes, bytes], bytes] = {}
        self.dead: set[bytes] = set()
        self.own = b"own".ljust(28)
        self.owners: dict[str, bytes] = {}
        self.values: dict[str, Any] = {}
        self.late: dict[str, int] = {}
        self.callbacks: dict[str, Callable[[bytes], None]] = {}
        self.gone: set[str] = set()
        self.waits_ms: list[int] = []
        self.puts: list[tuple[Any, str]] = []
        self.is_disabled = False
        self.own_actor: bytes | None = None
        self.is_asyncio = False
        self.concurrency = 1
        self.rdt_manager: Any = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in vars(type(self)):
            if hasattr(ray_core, name) and not name.startswith("_"):
                monkeypatch.setattr(ray_core, name, getattr(self, name))

    def create(self, number: int, value: Any, owner: bytes | None = None) -> Any:
        """Create an object; return a reference to it."""
        name = object_id(number)
        self.owners[name] = owner or self.own
        self.values[name] = value
        return self.ref(name)

    def leave_scope(self, number: int) -> None:
        name = object_id(number)
        self.gone.add(name)
        if name in self.callbacks:
            self.callbacks.pop(name)(bytes.fromhex(name))

    # What ``ray_core`` has.

    def manager(self) -> Any:
        return self.rdt_manager

    def worker_id(self) -> bytes:
        return self.own

    def actor_id(self) -> bytes | None:
        return self.own_actor

    def actor_is_asyncio(self) -> bool:
        return self.is_asyncio

    def actor_max_concurrency(self) -> int:
        return self.concurrency

    def is_worker(self) -> bool:
        return False

    def reconstruction_is_disabled(self) -> bool:
        return self.is_disabled

    def get_objects(self, refs: Any, timeout_ms: int) -> list[Any]:
        self.waits_ms.append(timeout_ms)
        for ref in refs:
            if self.late.get(ref.hex(), 0):
                self.late[ref.hex()] -= 1
                raise GetTimeoutError("not there yet")
        return [self.values[ref.hex()] for ref in refs]

    def put_object(self, serialized: Any, transport: str) -> Any:
        self.puts.append((serialized, transport))
        return self.create(10_000 + len(self.puts), serialized)

    def deserialize(self, value: Any, ref: Any, arrived: Any) -> Any:
        return value[0]

    def is_created(self, ref: Any) -> bool:
        return ref.hex() in self.values

    def ref(self, object_id: str, transport: str | None = None) -> Any:
        return ray.ObjectRef(bytes.fromhex(object_id), tensor_transport=transport)

    def uncounted_ref(self, object_id: str) -> Any:
        return self.ref(object_id)

    def export_ref(self, ref: Any) -> tuple[bytes, bytes, bytes]:
        return ref.binary(), self.owners[ref.hex()], b"status"

    def import_ref(self, object_id: bytes, owner: bytes, status: bytes) -> Any:
        self.owners[object_id.hex()] = owner
        return self.ref(object_id.hex())

    def owner_of(self, ref: Any) -> bytes | None:
        return self.owners.get(ref.hex())

    def call_when_out_of_scope(self, ref: Any, callback: Callable[[bytes], None]) -> bool:
        if self.owners.get(ref.hex()) != self.own:
            raise ValueError("not its owner")
        if ref.hex() in self.gone:
            return False
        self.callbacks.setdefault(ref.hex(), callback)
        return True

    def kv_get(self, key: bytes, namespace: bytes, timeout_s: float | None = None) -> bytes | None:
        return self.records.get((namespace, key))

    def kv_put(
        self,
        key: bytes,
        value: bytes,
        namespace: bytes,
        overwrite: bool = True,
        timeout_s: float | None = None,
    ) -> bool:
        is_new = (namespace, key) not in self.records
        if is_new or overwrite:
            self.records[namespace, key] = value
        return is_new

    def kv_delete(self, key: bytes, namespace: bytes, timeout_s: float | None = None) -> bool:
        return self.records.pop((namespace, key), None) is not None

    def kv_keys(self, prefix: bytes, namespace: bytes) -> list[bytes]:
        return [key for space, key in self.records if space == namespace and key.startswith(prefix)]

    def is_worker_alive(self, worker_id: bytes) -> bool:
        return worker_id not in self.dead


class FakeAgent:
    """The memory that one process serves, by key: the id of the owner's agent, b"" for none."""

    def __init__(self, number: int):
        self.agent_id = agent_id(number)
        self.owner_of: dict[bytes, bytes] = {}

    def owned(self, owner: bytes) -> int:
        return sum(each == owner for each in self.owner_of.values())

    def unowned(self, keys: list[bytes]) -> list[bytes]:
        return [key for key in keys if self.owner_of.get(key) == b""]

    def release(self, key: bytes) -> None:
        self.owner_of.pop(key, None)

    def release_owned(self, owner: bytes) -> int:
        return self._release([key for key, each in self.owner_of.items() if each == owner])

    def release_unowned(self, keys: list[bytes]) -> int:
        return self._release(self.unowned(keys))

    def _release(self, keys: list[bytes]) -> int:
        for key in keys:
            del self.owner_of[key]
        return len(keys)


class FakeSession:
    """One process's session. Sessions reach each other through ``Network``; requests run at once.

    Attributes:
        silent: Addresses whose processes do not answer, with the error of a request.
        requests: The op and the body of each request that other processes answered.
    """

    def __init__(self, network: dict[bytes, FakeSession], number: int):
        self.address = address(number)
        self.agent = FakeAgent(number)
        self.worker_id = (b"worker %d" % number).ljust(28)
        self.silent: dict[bytes, Exception] = {}
        self.requests: list[tuple[bytes, str, Any]] = []
        self._handlers: dict[str, Callable[[bytes, Any], Any]] = {}
        self._ticks: list[Callable[[], None]] = []
        self._lost: list[Callable[[bytes], None]] = []
        self._network = network
        network[self.address] = self

    def serve(self, op: str, handler: Callable[[bytes, Any], Any], **options: Any) -> None:
        self._handlers[op] = handler

    def on_tick(self, callback: Callable[[], None]) -> None:
        self._ticks.append(callback)

    def on_peer_lost(self, callback: Callable[[bytes], None]) -> None:
        self._lost.append(callback)

    def run_in_background(self, action: Callable[..., None], *args: Any) -> None:
        action(*args)

    def send_oneway(self, peer: bytes, op: str, body: Any, idempotent: bool = True) -> None:
        self._ask(peer, op, body)

    def call(self, peer: bytes, op: str, body: Any, timeout_s: float) -> Any:
        return self._ask(peer, op, body)

    def is_asker_lost(self) -> bool:
        return False

    def start_call(self, peer: bytes, op: str, body: Any) -> Callable[[float], Any]:
        def wait(timeout_s: float) -> Any:
            return self._ask(peer, op, body)

        return wait

    def _ask(self, peer: bytes, op: str, body: Any) -> Any:
        self.requests.append((peer, op, body))
        if peer in self.silent:
            raise self.silent[peer]
        return self._network[peer]._handlers[op](self.agent.agent_id, body)

    # What tests make happen.

    def tick(self) -> None:
        for callback in self._ticks:
            callback()

    def lose(self, peer: FakeSession) -> None:
        """Break the connection to a peer."""
        for callback in self._lost:
            callback(peer.agent.agent_id)
