"""A serialized value that Ray's core stores unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray._raylet import RawSerializedObject


class SerializedValue(RawSerializedObject):
    """A copy of a result of ``SerializationContext.serialize``."""

    def __init__(self, data: Any, metadata: bytes, contained_refs: Sequence[Any]):
        self.data = bytes(data)
        super().__init__(self.data)
        self._own_metadata = metadata
        self._contained_refs = list(contained_refs)

    @property
    def metadata(self) -> bytes:
        return self._own_metadata

    @property
    def contained_object_refs(self) -> list[Any]:
        return self._contained_refs
