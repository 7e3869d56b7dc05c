"""Name of Ray's alpha in this module: the error for a full memory pool."""

from ray.experimental.rdt.common.errors import NixlOutOfMemoryError

__all__ = ["NixlOutOfMemoryError"]
