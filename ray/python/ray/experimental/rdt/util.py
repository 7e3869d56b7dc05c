"""Names of Ray's alpha in this module: registered transports and the functions for nixl."""

from __future__ import annotations

from typing import Any, NamedTuple

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.nixl_api import (
    deregister_nixl_memory,
    register_nixl_memory,
    register_nixl_memory_pool,
    set_nixl_cuda_stream,
)
from ray.experimental.rdt.tensor_transport_manager import (
    TensorTransportManager,
    create_empty_tensors_from_metadata,
)
from ray.experimental.rdt.transports.user import registered
from ray.experimental.rdt.transports.user.registered import BUILT_IN_TRANSPORTS, RegisteredTransport

__all__ = [
    "DEFAULT_TRANSPORTS",
    "TransportManagerInfo",
    "create_empty_tensors_from_metadata",
    "deregister_nixl_memory",
    "device_match_transport",
    "get_tensor_transport_manager",
    "get_transport_data_type",
    "is_one_sided_transport",
    "normalize_and_validate_tensor_transport",
    "register_nixl_memory",
    "register_nixl_memory_pool",
    "register_tensor_transport",
    "set_nixl_cuda_stream",
]

#: The names that Ray's alpha lists.
DEFAULT_TRANSPORTS = ["NIXL", "GLOO", "NCCL", "CUDA_IPC"]

#: For each built-in transport, the device types that it carries.
_OWN_DEVICES = {
    "AUTO": ("cpu", "cuda"),
    "NIXL": ("cuda", "cpu"),
    "GLOO": ("cpu",),
    "NCCL": ("cuda",),
    "CUDA_IPC": ("cuda",),
}

#: Alternative names.
_ALIASES = {"TORCH_GLOO": "GLOO"}


@PublicAPI(stability="alpha")
def register_tensor_transport(
    transport_name: str,
    devices: list[str],
    transport_manager_class: type[TensorTransportManager],
    data_type: type,
) -> None:
    """Register a user-defined transport by name for every process of the job.

    Actors and tasks find it even if they started before the call. Before ``ray.init``, the
    registration is kept until Ray starts.

    Args:
        transport_name: The name to use as ``tensor_transport``. Case does not matter.
        devices: The device types that the transport moves data from and to.
        transport_manager_class: The implementation. Each process that needs it creates one
            instance.
        data_type: The class of the values that it moves, for example ``torch.Tensor``.

    Raises:
        ValueError: The name is taken, or the class is not a subclass of
            ``TensorTransportManager``.
    """
    if not issubclass(transport_manager_class, TensorTransportManager):
        raise ValueError(
            f"{transport_manager_class.__name__} must be a subclass of TensorTransportManager"
        )
    name = transport_name.upper()
    registered.register(
        RegisteredTransport(name, tuple(devices), transport_manager_class, data_type)
    )


def get_tensor_transport_manager(transport_name: str) -> TensorTransportManager:
    """Return this process's instance of a transport; create it on the first call.

    Of the built-in transports, nixl, gloo and nccl have an instance. It serves programs that call
    it directly. RDT does not use it.

    Raises:
        ValueError: The transport is unknown or has no instance.
    """
    name = normalize_and_validate_tensor_transport(transport_name)
    users = ray_core.manager().producer.user_transport(name)
    if users is not None:
        manager: TensorTransportManager = users.manager
        return manager
    if name not in _stand_ins:
        kind = _info(name).transport_manager_class
        if kind is TensorTransportManager:
            raise ValueError(
                f"{transport_name!r} is RDT's own transport and no TensorTransportManager"
            )
        _stand_ins.setdefault(name, kind())
    return _stand_ins[name]


#: Instances of the classes that represent built-in transports.
_stand_ins: dict[str, TensorTransportManager] = {}


class TransportManagerInfo(NamedTuple):
    """Description of a transport.

    Attributes:
        transport_manager_class: The implementation. A built-in transport without one has
            ``TensorTransportManager`` itself.
        devices: The device types that the transport moves data from and to.
        data_type: The class of the values that it moves.
    """

    transport_manager_class: type[TensorTransportManager]
    devices: list[str]
    data_type: type


def _info(name: str) -> TransportManagerInfo:
    """Return the description of a transport by its upper-case name. Raises ValueError."""
    entry = registered.find(name)
    if entry is not None:
        return TransportManagerInfo(entry.manager_class, list(entry.devices), entry.data_type)
    if name not in _OWN_DEVICES:
        raise ValueError(f"Unsupported tensor transport protocol: {name}")
    import torch

    from ray.experimental.rdt.collective_tensor_transport import (
        GLOOTensorTransport,
        NCCLTensorTransport,
    )
    from ray.experimental.rdt.nixl_tensor_transport import NixlTensorTransport

    classes: dict[str, type[TensorTransportManager]] = {
        "GLOO": GLOOTensorTransport,
        "NCCL": NCCLTensorTransport,
        "NIXL": NixlTensorTransport,
    }
    kind = classes.get(name, TensorTransportManager)
    return TransportManagerInfo(kind, list(_OWN_DEVICES[name]), torch.Tensor)


def is_one_sided_transport(tensor_transport: str) -> bool:
    """Tell whether only the consumer acts in a transfer.

    Raises:
        ValueError: The transport is unknown.
    """
    if tensor_transport in _OWN_DEVICES:
        return tensor_transport not in ("GLOO", "NCCL")
    return _info(tensor_transport).transport_manager_class.is_one_sided()


def device_match_transport(device: str, tensor_transport: str) -> bool:
    """Tell whether a transport moves data from and to a device type.

    Raises:
        ValueError: The transport is unknown.
    """
    return device in _info(tensor_transport).devices


def get_transport_data_type(tensor_transport: str) -> type:
    """Return the class of the values that a transport moves.

    Raises:
        ValueError: The transport is unknown.
    """
    return _info(tensor_transport).data_type


def __getattr__(name: str) -> Any:
    """Compute the module attributes that depend on registered transports."""
    if name == "has_custom_transports":
        return bool(registered.known_names())
    if name == "transport_manager_info":
        return {known: _info(known) for known in (*DEFAULT_TRANSPORTS, *registered.known_names())}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def normalize_and_validate_tensor_transport(tensor_transport: str) -> str:
    """Return the upper-case name of a transport.

    Raises:
        ValueError: The transport is unknown. The message lists the known transports.
    """
    if not isinstance(tensor_transport, str):
        raise ValueError(f"Invalid tensor transport: {tensor_transport!r} is not a string")
    name = tensor_transport.upper()
    name = _ALIASES.get(name, name)
    if name not in BUILT_IN_TRANSPORTS and registered.find(name) is None:
        known = [known.lower() for known in (*BUILT_IN_TRANSPORTS, *registered.known_names())]
        raise ValueError(
            f"Invalid tensor transport: {tensor_transport}. Known transports are {known}; "
            "register others with ray.experimental.register_tensor_transport."
        )
    return name
