"""Names of transports: checking what users write, and registering their own."""

from __future__ import annotations

import threading
from typing import NamedTuple

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.tensor_transport_manager import TensorTransportManager

#: What a user can name without registering anything.
BUILT_IN_TRANSPORTS = ("AUTO", "GLOO", "NCCL", "NIXL", "CUDA_IPC")

#: Spellings that mean another name.
_ALIASES = {"TORCH_GLOO": "GLOO"}


class UserTransport(NamedTuple):
    """A transport that a user registered."""

    manager_class: type[TensorTransportManager]
    devices: tuple[str, ...]
    data_type: type


_user_transports: dict[str, UserTransport] = {}
_lock = threading.Lock()


@PublicAPI(stability="alpha")
def register_tensor_transport(
    transport_name: str,
    devices: list[str],
    transport_manager_class: type[TensorTransportManager],
    data_type: type,
) -> None:
    """Makes a transport of the user's usable by name.

    Args:
        transport_name: The name for ``tensor_transport``, in any case.
        devices: Types of the devices that it moves data from and to.
        transport_manager_class: Does the work; made once in each process that needs it.
        data_type: The class of the values that it moves, for instance ``torch.Tensor``.

    Raises:
        ValueError: the name is taken, or the class is no ``TensorTransportManager``.
    """
    name = transport_name.upper()
    if not issubclass(transport_manager_class, TensorTransportManager):
        raise ValueError(
            f"{transport_manager_class.__name__} must be a subclass of TensorTransportManager"
        )
    with _lock:
        if name in _user_transports or name in BUILT_IN_TRANSPORTS:
            raise ValueError(f"Transport {name} already registered.")
        _user_transports[name] = UserTransport(transport_manager_class, tuple(devices), data_type)


def normalize_and_validate_tensor_transport(tensor_transport: str) -> str:
    """The upper-case name of a transport.

    Raises:
        ValueError: no such transport; lists those that there are.
    """
    if not isinstance(tensor_transport, str):
        raise ValueError(f"Invalid tensor transport: {tensor_transport!r} is not a string")
    name = tensor_transport.upper()
    name = _ALIASES.get(name, name)
    if name not in BUILT_IN_TRANSPORTS and name not in _user_transports:
        known = [known.lower() for known in (*BUILT_IN_TRANSPORTS, *sorted(_user_transports))]
        raise ValueError(
            f"Invalid tensor transport: {tensor_transport}. Known transports are {known}; "
            "your own becomes known by ray.experimental.register_tensor_transport."
        )
    return name
