"""Adapter to Ray's worker, core and GCS: the only module that uses Ray's private state.

The functions keep nothing and add nothing, so that tests can replace them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# ``import ray`` imports this module through the package before it has loaded the worker, so the
# worker is looked up at each call.
import ray

#: The keyword under which a call of a generator carries its ``StreamSpec`` or ``DynamicSpec``.
STREAM_KEYWORD = "_ray_rdt_stream"

# Process.


def manager() -> Any:
    """Return the ``RDTManager`` of this process."""
    return ray._private.worker.global_worker.rdt_manager


def is_driver() -> bool:
    """Tell whether this process is a driver that is connected."""
    return bool(ray._private.worker.global_worker.mode == ray.SCRIPT_MODE)


def is_worker() -> bool:
    """Tell whether this process runs tasks or an actor."""
    return bool(ray._private.worker.global_worker.mode == ray.WORKER_MODE)


def check_connected() -> None:
    """Raise Ray's error if ``ray.init`` has not been called."""
    ray._private.worker.global_worker.check_connected()


def call_after_init(hook: Callable[[], None]) -> None:
    """Call a function after each ``ray.init`` of this process."""
    hooks = ray._private.worker._post_init_hooks
    if hook not in hooks:
        hooks.append(hook)


def node() -> Any:
    """Return Ray's object for the connection of this process, None without one."""
    return ray._private.worker.global_worker.node


def node_ip_address() -> str:
    """Return the address at which other nodes reach this one."""
    return str(ray._private.worker.global_worker.node_ip_address)


def cluster_and_job() -> Any:
    return ray._private.worker.global_worker.current_cluster_and_job


def worker_id() -> bytes:
    return bytes(ray._private.worker.global_worker.worker_id)


# Actor and task.


def actor_id() -> bytes | None:
    """Return the id of this process's actor, None if it runs none."""
    own_id = ray._private.worker.global_worker.actor_id
    return None if own_id.is_nil() else bytes(own_id.binary())


def actor() -> Any:
    """Return the instance of this process's actor, None if there is none."""
    worker = ray._private.worker.global_worker
    return worker.actors.get(worker.actor_id)


def own_actor_handle() -> Any:
    """Return a handle of this process's actor, None if it runs none."""
    own_id = ray._private.worker.global_worker.actor_id
    return None if own_id.is_nil() else actor_handle(own_id)


def actor_handle(actor_id: Any) -> Any:
    """Return a handle of an actor that this process knows."""
    return _core_worker().get_actor_handle(actor_id)


def actor_is_asyncio() -> bool:
    return bool(_core_worker().current_actor_is_asyncio())


def actor_max_concurrency() -> int:
    """Return how many tasks this process's actor runs at a time."""
    return int(_core_worker().current_actor_max_concurrency())


def actor_state(actor_id: str) -> str:
    """Return the state of an actor in Ray's GCS, "" if the GCS does not know the actor."""
    info = ray._private.state.actors(actor_id)
    return str(info.get("State", "")) if info else ""


def task_id() -> bytes:
    return bytes(ray._private.worker.global_worker.current_task_id.binary())


def task_function_name() -> str:
    """Return Ray's name for the function of this thread's task."""
    return str(ray._private.worker.global_worker.current_task_function_name)


def task_is_canceled() -> bool:
    return bool(_core_worker().is_canceled())


def loaded_functions() -> list[Any]:
    """Return the task functions that this process has loaded, oldest first."""
    manager = ray._private.worker.global_worker.function_actor_manager
    return list(manager._function_execution_info.values())


def reconstruction_is_disabled() -> bool:
    """Tell whether the job is configured without object reconstruction."""
    return bool(_core_worker().get_disable_job_level_lineage_reconstruction())


# Objects.


def get_objects(refs: Sequence[Any], timeout_ms: int) -> list[Any]:
    """Wait for serialized values: (data, metadata, transport) each. -1 waits without a limit.

    Raises:
        GetTimeoutError: a value was not there in time.
    """
    return list(_core_worker().get_objects(list(refs), timeout_ms))


def put_object(serialized: Any, transport: str) -> Any:
    """Put a serialized value as an object that the core flags as an RDT object."""
    return _core_worker().put_object(
        serialized,
        pin_object=True,
        inline_small_object=True,
        _is_experimental_channel=False,
        tensor_transport=transport,
    )


def deserialize(value: Any, ref: Any, arrived: dict[int, Any]) -> Any:
    """Deserialize one value as Ray's worker does.

    Args:
        value: What ``get_objects`` returned for it.
        arrived: The tensors of RDT objects, by index in the batch.
    """
    return ray._private.worker.global_worker.deserialize_objects([value], [ref], arrived)[0]


def is_created(ref: Any) -> bool:
    """Tell whether an object that this process owns has been created. Does not block."""
    return bool(_core_worker().wait([ref], 1, 0, False)[0])


# References.


def ref(object_id: str, transport: str | None = None) -> Any:
    """Return a new reference to an object that this process owns."""
    return ray.ObjectRef(bytes.fromhex(object_id), tensor_transport=transport)


def uncounted_ref(object_id: str) -> Any:
    """Return a name for calls of the core. It does not keep the object in scope."""
    name = ray.ObjectRef.__new__(ray.ObjectRef)
    name._set_id(bytes.fromhex(object_id))
    return name


def export_ref(ref: Any) -> tuple[bytes, bytes, bytes]:
    """Return the object id, the owner's address and the status that ``import_ref`` takes.

    Counts the reference as one that leaves this process.
    """
    object_id, owner, status = _core_worker().serialize_object_ref(ref)
    return object_id.binary(), owner, status


def import_ref(object_id: bytes, owner: bytes, status: bytes) -> Any:
    """Return a reference to another owner's object.

    It does not report to the owner, which has to keep the object by itself.
    """
    ref = ray.ObjectRef(object_id, owner)
    _core_worker().deserialize_and_register_object_ref(
        object_id, ray.ObjectRef.nil(), owner, status
    )
    return ref


def owner_of(ref: Any) -> bytes | None:
    """Return the worker id of an object's owner, None if this process does not know the object."""
    from ray.core.generated import common_pb2

    try:
        address = _core_worker().get_owner_address(ref)
    except ValueError:
        return None
    return bytes(common_pb2.Address.FromString(address).worker_id)


def call_when_out_of_scope(ref: Any, callback: Callable[[bytes], None]) -> bool:
    """Call back with an object's id when its last reference is gone; False if it is gone already.

    Raises:
        ValueError: this process does not own the object.
    """
    return bool(_core_worker().add_object_out_of_scope_callback(ref, callback))


# GCS.


def kv_get(key: bytes, namespace: bytes, timeout_s: float | None = None) -> bytes | None:
    """Return a record of Ray's GCS key-value store."""
    found: bytes | None = _gcs().internal_kv_get(key, namespace, timeout_s)
    return found


def kv_put(
    key: bytes,
    value: bytes,
    namespace: bytes,
    overwrite: bool = True,
    timeout_s: float | None = None,
) -> bool:
    """Write a record; return whether the key is new. An old one stays without ``overwrite``."""
    return bool(_gcs().internal_kv_put(key, value, overwrite, namespace, timeout_s))


def kv_delete(key: bytes, namespace: bytes, timeout_s: float | None = None) -> bool:
    """Delete a record; return whether there was one."""
    return bool(_gcs().internal_kv_del(key, False, namespace, timeout_s))


def kv_keys(prefix: bytes, namespace: bytes) -> list[bytes]:
    return list(_gcs().internal_kv_keys(prefix, namespace))


def is_worker_alive(worker_id: bytes) -> bool:
    """Tell whether Ray's GCS counts a worker, and its node, as alive. Blocks for its answers."""
    from ray._private import state
    from ray._raylet import WorkerID
    from ray.core.generated import gcs_pb2

    accessor = state.state._connect_and_get_accessor()
    info = accessor.get_worker_info(WorkerID(worker_id))
    worker = gcs_pb2.WorkerTableData.FromString(info or b"")
    if not worker.is_alive:
        return False
    # The GCS does not mark the workers of a dead node as dead.
    node_id = worker.worker_address.node_id.hex()
    return all(each["Alive"] for each in state.state.node_table() if each["NodeID"] == node_id)


def _core_worker() -> Any:
    return ray._private.worker.global_worker.core_worker


def _gcs() -> Any:
    return ray._private.worker.global_worker.gcs_client
