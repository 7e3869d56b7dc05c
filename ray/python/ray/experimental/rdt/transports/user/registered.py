"""Transports that users registered in any process of the job.

The process that registers one publishes its class where Ray keeps the functions of a job, in the
GCS, and a process that meets an unknown name looks there. Ray drops the entry when the job and its
detached actors have ended, as it does with functions.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from ray import cloudpickle
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.tensor_transport_manager import TensorTransportManager

#: The transports that users can name without registering them.
BUILT_IN_TRANSPORTS = ("AUTO", "GLOO", "NCCL", "NIXL", "CUDA_IPC")

#: These, and RDT's own transports that users cannot name.
OWN_TRANSPORTS = (*BUILT_IN_TRANSPORTS, "STAGED")

#: How long one request to the GCS may take.
GCS_TIMEOUT_S = 10.0

#: Ray removes the entries of a job in this namespace that begin so.
_NAMESPACE = b"fun"
_KEY_TYPE = b"RemoteFunction"


@dataclass(frozen=True)
class RegisteredTransport:
    """A transport that a user registered.

    Attributes:
        name: In upper case.
        devices: Types of the devices that it moves data from and to.
        manager_class: Does the work.
        data_type: The class of what it moves.
    """

    name: str
    devices: tuple[str, ...]
    manager_class: type[TensorTransportManager]
    data_type: type

    def __str__(self) -> str:
        devices = ", ".join(self.devices)
        return f"{_full_name(self.manager_class)} for {_full_name(self.data_type)} on {devices}"

    def __reduce__(self) -> Any:
        data_type = _public_name(self.data_type) or self.data_type
        return _restore, (self.name, self.devices, self.manager_class, data_type)


def _restore(
    name: str,
    devices: tuple[str, ...],
    manager_class: type[TensorTransportManager],
    data_type: type | tuple[str, str],
) -> RegisteredTransport:
    if isinstance(data_type, tuple):
        module, attribute = data_type
        data_type = getattr(importlib.import_module(module), attribute)
    return RegisteredTransport(name, devices, manager_class, data_type)  # type: ignore[arg-type]


def _public_name(kind: type) -> tuple[str, str] | None:
    """Return where a type can be imported from. The name of jax.Array, for one, is not valid."""
    if kind.__module__ == "__main__":
        return None
    name = kind.__qualname__.rpartition(".")[2]
    homes = [home for home, module in list(sys.modules.items()) if vars(module).get(name) is kind]
    if not homes:
        return None
    return min(homes, key=lambda home: (home != kind.__module__, len(home), home)), name


_lock = threading.Lock()
_registered: dict[str, RegisteredTransport] = {}
#: The published records of these, until ``refresh`` compares them.
_published: dict[str, bytes] = {}
#: By cluster and job, and name: another job may use the same name for another transport.
_found: dict[tuple[Any, str], RegisteredTransport] = {}


def register(entry: RegisteredTransport) -> None:
    """Make a transport known to this process, and to its job once it has one.

    Raises:
        ValueError: the name is taken.
    """
    with _lock:
        if entry.name in _registered or entry.name in OWN_TRANSPORTS:
            raise ValueError(f"Transport {entry.name} already registered.")
        _registered[entry.name] = entry
        ray_core.call_after_init(_publish_all)
    if _is_connected():
        try:
            _publish(entry)
        except ValueError:
            with _lock:
                del _registered[entry.name]
            raise


def refresh(name: str) -> None:
    """Publish a transport of this process again if its class is now pickled differently.

    After ``register``, a user may have told cloudpickle to pickle the module of the class by value.
    So the first call or put that names the transport checks once more. The name is in upper case.

    Runs on: the thread that makes the call or put.
    """
    entry, published = _registered.get(name), _published.pop(name, None)
    if entry is None or published is None or (record := _record_of(entry)) == published:
        return
    ray_core.kv_put(_key(name), record, _NAMESPACE, timeout_s=GCS_TIMEOUT_S)


def find(name: str) -> RegisteredTransport | None:
    """Return a transport that a process of the job registered, by its name in upper case.

    Asks the GCS at most once. Runs on: any thread.

    Raises:
        ImportError: its class needs a module that this process cannot import.
    """
    entry = _registered.get(name)
    if entry is not None or name in BUILT_IN_TRANSPORTS or not _is_connected():
        return entry
    job = ray_core.cluster_and_job()
    if (job, name) not in _found:
        _, data = _read(name)
        if not data:
            return None
        _found[job, name] = cloudpickle.loads(data)
    return _found[job, name]


def known_names() -> list[str]:
    """Return the names of the user transports that this process and its job are known to have."""
    job = ray_core.cluster_and_job() if _is_connected() else None
    return sorted({*_registered, *(name for of_job, name in _found if of_job == job)})


def publish_note(name: str, value: Any) -> None:
    """Keep a value for other processes of the job until ``drop_note``."""
    ray_core.kv_put(_key(name), cloudpickle.dumps(value), _NAMESPACE, timeout_s=GCS_TIMEOUT_S)


def read_note(name: str) -> Any:
    """Return a value of ``publish_note``. Raises KeyError if it was dropped."""
    data = ray_core.kv_get(_key(name), _NAMESPACE, GCS_TIMEOUT_S)
    if data is None:
        raise KeyError(f"nothing is kept under {name!r} in Ray's GCS")
    return cloudpickle.loads(data)


def drop_note(name: str) -> None:
    """Drop a value of ``publish_note``."""
    ray_core.kv_delete(_key(name), _NAMESPACE, GCS_TIMEOUT_S)


def _publish_all() -> None:
    """Runs on: the thread of ``ray.init``."""
    for entry in list(_registered.values()):
        _publish(entry)


def _record_of(entry: RegisteredTransport) -> bytes:
    """Return the record of a transport that is published."""
    try:
        data: bytes = cloudpickle.dumps(entry)
    except TypeError as error:
        raise TypeError(
            f"the class of transport {entry.name} cannot be pickled for other processes: {error}. "
            "Move it, or what it uses, into a module that workers can import."
        ) from error
    # The description comes first, as text. Other processes compare it without loading the class,
    # because cloudpickle would overwrite a class of the process with the loaded one.
    return str(entry).encode() + b"\n" + data


def _publish(entry: RegisteredTransport) -> None:
    record = _record_of(entry)
    ray_core.kv_put(_key(entry.name), record, _NAMESPACE, False, GCS_TIMEOUT_S)
    text, _ = _read(entry.name)
    if text != str(entry):
        raise ValueError(
            f"Transport {entry.name} already registered by another process, as {text}."
        )
    _published[entry.name] = record


def _read(name: str) -> tuple[str, bytes]:
    """Return a published transport, as text and pickled. Both are empty if there is none."""
    record = ray_core.kv_get(_key(name), _NAMESPACE, GCS_TIMEOUT_S) or b""
    text, _, data = record.partition(b"\n")
    return text.decode(), data


def _key(name: str) -> bytes:
    from ray._private.function_manager import make_function_table_key

    _, job_id = ray_core.cluster_and_job()
    return bytes(make_function_table_key(_KEY_TYPE, job_id, b"rdt-" + name.encode()))


def _is_connected() -> bool:
    import ray

    return bool(ray.is_initialized())


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
