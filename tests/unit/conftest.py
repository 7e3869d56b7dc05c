"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ray.experimental.rdt.rpc import process_directory
from tests.unit.fakes import Clock, FakeRay, FakeSession


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def process(fake_ray: FakeRay) -> Callable[[int], FakeSession]:
    """Start a process of the cluster: its session, published in the GCS."""
    network: dict[bytes, FakeSession] = {}

    def start(number: int) -> FakeSession:
        session = FakeSession(network, number)
        process_directory.publish_worker(session, session.worker_id)  # type: ignore[arg-type]
        return session

    return start
