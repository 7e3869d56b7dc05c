"""Names of transports: checking what users write, and registering their own."""

from __future__ import annotations

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.tensor_transport_manager import TensorTransportManager
from ray.experimental.rdt.transports import registered
from ray.experimental.rdt.transports.registered import BUILT_IN_TRANSPORTS, RegisteredTransport

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
    """This process's instance of a transport of the user's, made if there is none.

    Raises:
        ValueError: no such transport, or one of RDT's own, which are no such classes.
    """
    import ray

    name = normalize_and_validate_tensor_transport(transport_name)
    users = ray._private.worker.global_worker.rdt_manager.users_transport(name)
    if users is None:
        raise ValueError(f"{transport_name!r} is RDT's own transport and no TensorTransportManager")
    manager: TensorTransportManager = users.manager
    return manager


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
