"""Names of Ray's alpha in this module: the manager and functions for users."""

from ray.experimental.rdt.api import (
    set_target_device_for_ref,
    set_target_for_ref,
    wait_tensor_freed,
)
from ray.experimental.rdt.manager import RDTManager

__all__ = ["RDTManager", "set_target_device_for_ref", "set_target_for_ref", "wait_tensor_freed"]
