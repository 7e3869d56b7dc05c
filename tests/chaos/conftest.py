"""The local Ray of the integration tests, for processes that die."""

from tests.integration.conftest import local_ray, spawn

__all__ = ["local_ray", "spawn"]
