"""Where Ray's alpha has the error of a full memory pool."""

from ray.experimental.rdt.errors import NixlOutOfMemoryError

__all__ = ["NixlOutOfMemoryError"]
