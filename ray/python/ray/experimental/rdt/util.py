"""What Ray's alpha has under this name: transports by name, and what nixl's users call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.nixl_api import (
    deregister_nixl_memory,
    register_nixl_memory,
    register_nixl_memory_pool,
    set_nixl_cuda_stream,
)
from ray.experimental.rdt.tensor_transport_manager import (
    TensorTransportManager,
    TensorTransportMetadata,
)
from ray.experimental.rdt.transports.user import registered
from ray.experimental.rdt.transports.user.registered import BUILT_IN_TRANSPORTS, RegisteredTransport

if TYPE_CHECKING:
    import torch

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

#: Those of Ray's alpha.
DEFAULT_TRANSPORTS = ["NIXL", "GLOO", "NCCL", "CUDA_IPC"]

#: By name of RDT's own transports, the devices that they carry tensors of.
_OWN_DEVICES = {
    "AUTO": ("cpu", "cuda"),
    "NIXL": ("cuda", "cpu"),
    "GLOO": ("cpu",),
    "NCCL": ("cuda",),
    "CUDA_IPC": ("cuda",),
}

#: Spellings that mean another name.
_ALIASES = {"TORCH_GLOO": "GLOO"}


@PublicAPI(stability="alpha")
def register_tensor_transport(
    transport_name: str,
    devices: list[str],
    transport_manager_class: type[TensorTransportManager],
    data_type: type,
) -> None:
    """Makes a transport of the user's usable by name, in every process of the job.

    Actors and tasks find it whether they began before or after. Without Ray, it is kept until
    ``ray.init``.

    Args:
        transport_name: The name for ``tensor_transport``, in any case.
        devices: Types of the devices that it moves data from and to.
        transport_manager_class: Does the work; made once in each process that needs it.
        data_type: The class of the values that it moves, for instance ``torch.Tensor``.

    Raises:
        ValueError: the name is taken, or the class is no ``TensorTransportManager``.
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
    """This process's instance of a transport, made if there is none.

    Of RDT's own, nixl, gloo and nccl have one, for programs that call it; RDT does not.

    Raises:
        ValueError: no such transport, or one that is no such class.
    """
    import ray

    name = normalize_and_validate_tensor_transport(transport_name)
    users = ray._private.worker.global_worker.rdt_manager.users_transport(name)
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


#: Instances of the classes that stand for RDT's own transports.
_stand_ins: dict[str, TensorTransportManager] = {}


class TransportManagerInfo(NamedTuple):
    """What is known of a transport.

    Attributes:
        transport_manager_class: Does the work; ``TensorTransportManager`` itself for a transport of
            RDT's own that has no such class.
        devices: Types of the devices that it moves data from and to.
        data_type: The class of the values that it moves.
    """

    transport_manager_class: type[TensorTransportManager]
    devices: list[str]
    data_type: type


def _info(name: str) -> TransportManagerInfo:
    """What is known of a transport, by its upper-case name. Raises ValueError for an unknown."""
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
    """Whether the consumer alone acts, and not the producer as well. ValueError for an unknown."""
    if tensor_transport in _OWN_DEVICES:
        return tensor_transport not in ("GLOO", "NCCL")
    return _info(tensor_transport).transport_manager_class.is_one_sided()


def device_match_transport(device: str, tensor_transport: str) -> bool:
    """Whether a transport moves data from and to a type of device. ValueError for an unknown."""
    return device in _info(tensor_transport).devices


def get_transport_data_type(tensor_transport: str) -> type:
    """The class of the values that a transport moves. Raises ValueError for an unknown one."""
    return _info(tensor_transport).data_type


def create_empty_tensors_from_metadata(
    tensor_transport_meta: TensorTransportMetadata, device: str | None = None
) -> list[torch.Tensor]:
    """Uninitialized tensors to receive an object into.

    Args:
        tensor_transport_meta: The object.
        device: Where; None for the type of device that the object is on.
    """
    import torch

    place = tensor_transport_meta.tensor_device if device is None else device
    return [
        torch.empty(shape, dtype=dtype, device=place)
        for shape, dtype in tensor_transport_meta.tensor_meta
    ]


def __getattr__(name: str) -> Any:
    """What changes as users register transports."""
    if name == "has_custom_transports":
        return bool(registered.known_names())
    if name == "transport_manager_info":
        return {known: _info(known) for known in (*DEFAULT_TRANSPORTS, *registered.known_names())}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def normalize_and_validate_tensor_transport(tensor_transport: str) -> str:
    """The upper-case name of a transport.

    Raises:
        ValueError: no such transport; lists those that there are.
    """
    if not isinstance(tensor_transport, str):
        raise ValueError(f"Invalid tensor transport: {tensor_transport!r} is not a string")
    name = tensor_transport.upper()
    name = _ALIASES.get(name, name)
    if name not in BUILT_IN_TRANSPORTS and registered.find(name) is None:
        known = [known.lower() for known in (*BUILT_IN_TRANSPORTS, *registered.known_names())]
        raise ValueError(
            f"Invalid tensor transport: {tensor_transport}. Known transports are {known}; "
            "your own becomes known by ray.experimental.register_tensor_transport."
        )
    return name
