"""Ray Direct Transport (RDT): tensors move from their producer directly to their consumers.

See doc/architecture.md of the project for the data path and the layout of the code.
"""

from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.api import (
    freeze,
    receive_into,
    set_target_device_for_ref,
    set_target_for_ref,
    shareable,
    stats,
    wait_tensor_freed,
)
from ray.experimental.rdt.explain_api import explain
from ray.experimental.rdt.nixl_api import (
    deregister_nixl_memory,
    register_nixl_memory,
    register_nixl_memory_pool,
    set_nixl_cuda_stream,
)
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)
from ray.experimental.rdt.util import register_tensor_transport

if TYPE_CHECKING:
    from ray.experimental.rdt.manager import RDTManager

__all__ = [
    "CommunicatorMetadata",
    "RDTManager",
    "TensorTransportManager",
    "TensorTransportMetadata",
    "deregister_nixl_memory",
    "explain",
    "freeze",
    "receive_into",
    "register_nixl_memory",
    "register_nixl_memory_pool",
    "register_tensor_transport",
    "set_nixl_cuda_stream",
    "set_target_device_for_ref",
    "set_target_for_ref",
    "shareable",
    "stats",
    "wait_tensor_freed",
]


def __getattr__(name: str) -> Any:
    # The manager needs ray.exceptions, which is not there yet while ``import ray`` runs.
    if name == "RDTManager":
        from ray.experimental.rdt.manager import RDTManager

        return RDTManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
