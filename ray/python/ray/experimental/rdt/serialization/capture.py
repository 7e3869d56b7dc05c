"""Capture: takes the tensors out of a value.

The value is pickled with Ray's own pickler. Each tensor that RDT carries becomes a call of
``next_tensor()`` in the stream; the result is the skeleton. The compiled module ``_tensors`` does
the work per tensor. Tensors of other kinds are pickled as plain Ray pickles them. Nothing is
registered with a pickler of the process.

Tensors on a device that ``accelerators`` supports are carried as those on the CPU are. An event on
the stream that made them tells when their bytes may be read.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray import cloudpickle
from ray.experimental.rdt._tensors import Pickler
from ray.experimental.rdt.serialization.array_reducers import ArrayPickler, are_arrays_wanted
from ray.experimental.rdt.serialization.layout import Captured, lay_out
from ray.experimental.rdt.transports.base import UserDescription


class Skeleton(NamedTuple):
    """A pickled value whose tensors are placeholders."""

    inband: bytes
    buffers: list[Any]
    contained_refs: Any


@dataclass(frozen=True)
class Wanted:
    """The data that a user-defined transport takes out of values.

    Attributes:
        data_type: The type of the data, for example torch.Tensor.
        devices: For torch tensors, the torch device types.
    """

    data_type: type
    devices: frozenset[str]

    @property
    def is_torch(self) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and self.data_type is torch.Tensor

    def takes(self, value: Any) -> bool:
        """Tell whether a value other than a torch tensor is taken out.

        A subclass of a concrete type is not: a masked array would lose its mask. A type with its
        own instance check, for example jax.Array, includes all its instances.
        """
        if type(value) is self.data_type:
            return True
        has_own_check = type(self.data_type).__instancecheck__ is not type.__instancecheck__
        return has_own_check and isinstance(value, self.data_type)


def take(context: Any, value: Any, wanted: Wanted | None = None) -> tuple[Skeleton, Captured]:
    """Pickle ``value`` and take its tensors out.

    Runs on: producer, the thread that runs the user's task. Holds the GIL; copies no tensor.

    Args:
        context: The worker's ``SerializationContext``, which collects contained ObjectRefs.
        wanted: The data that a user-defined transport takes out, None for a built-in transport.

    Raises:
        TypeError: The value cannot be pickled, as in plain Ray.
    """
    buffers: list[Any] = []
    stream = _Stream()
    kind = ArrayPickler if wanted is None and are_arrays_wanted() else Pickler
    pickler = kind(stream, buffers.append, wanted)
    refs = _dump(context, pickler, [value])
    skeleton = Skeleton(stream.join(), buffers, refs)
    return skeleton, arrange(pickler.tensors, pickler.is_parameter, wanted)


def arrange(
    tensors: list[Any], is_parameter: list[bool] | None = None, wanted: Wanted | None = None
) -> Captured:
    """Return the layout of an object's tensors, before the object is stored."""
    if wanted is not None and not wanted.is_torch:
        return Captured(tensors)
    # A user-defined transport gets each region as a tensor over the user's memory.
    captured = lay_out(tensors, is_parameter, may_gather=wanted is None)
    if wanted is not None and not all(tensor.is_cpu for tensor in tensors):
        captured.addresses = array("Q")
    return captured


def pickle_user_description(
    context: Any, skeleton: Skeleton, user_description: UserDescription
) -> bytes:
    """Pickle a description for the value, which then contains the description's references."""
    stream = _Stream()
    refs = _dump(context, cloudpickle.CloudPickler(stream, protocol=5), user_description)
    skeleton.contained_refs.update(refs)
    return stream.join()


def _dump(context: Any, pickler: Any, value: Any) -> Any:
    """Pickle as a part of a Ray value; return the ObjectRefs in it."""
    context.set_in_band_serialization()
    try:
        pickler.dump(value)
    except Exception:  # the user's classes are pickled, and may raise any
        context.get_and_clear_contained_object_refs()
        raise
    finally:
        context.set_out_of_band_serialization()
    return context.get_and_clear_contained_object_refs()


class _Stream:
    """The output of a pickler, collected without a copy of large frames."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def join(self) -> bytes:
        return b"".join(self._parts)
