"""Where Ray's alpha has the error of a full memory pool."""

from ray.experimental.rdt.common.errors import NixlOutOfMemoryError

__all__ = ["NixlOutOfMemoryError"]
