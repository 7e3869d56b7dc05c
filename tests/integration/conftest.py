"""One local Ray for the whole folder, and a few actors that its tests share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ray
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.common import config
from tests.integration.peers import LANE_SETTINGS, Peer
from tests.integration.user_transports import (
    AlphaTransport,
    FilesTransport,
    PipeTransport,
    ShmTransport,
)
from tests.support import ROOT, needs_nixl

#: Enough for every object of these tests that does not stay with its producer.
STORE_BYTES = 200 << 20


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs. The transport that a test names is the one that is used, or it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_RDT_STRICT_TRANSPORT", "1")
        config.settings.cache_clear()
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()
    config.settings.cache_clear()


@pytest.fixture(scope="package")
def producer(local_ray: None) -> Any:
    return Peer.remote()


@pytest.fixture(scope="package")
def consumer(local_ray: None) -> Any:
    return Peer.remote()


@pytest.fixture(scope="package")
def third(local_ray: None) -> Any:
    return Peer.remote()


@pytest.fixture(scope="package")
def users_transports(producer: Any, consumer: Any) -> None:
    """Registered after the actors, which find them all the same."""
    ray.get([producer.pid.remote(), consumer.pid.remote()])
    _register_users_transports()


@functools.cache
def _register_users_transports() -> None:
    """Once in this process: a transport stays registered when Ray is shut down."""
    register_tensor_transport("shm", ["cpu"], ShmTransport, torch.Tensor)
    register_tensor_transport("NumpyShm", ["cpu"], ShmTransport, np.ndarray)
    register_tensor_transport("pipe", ["cpu"], PipeTransport, torch.Tensor)
    register_tensor_transport("files", ["cpu"], FilesTransport, torch.Tensor)
    register_tensor_transport("alpha", ["cpu"], AlphaTransport, torch.Tensor)


@pytest.fixture
def spawn(local_ray: None) -> Iterator[Callable[..., Any]]:
    """Makes actors for one test: ``spawn(Peer)``, ``spawn(Peer, max_restarts=1)``."""
    made = []

    def make(actor_class: Any = Peer, *args: Any, **options: Any) -> Any:
        made.append(actor_class.options(**options).remote(*args))
        return made[-1]

    yield make
    for actor in made:
        ray.kill(actor)


@pytest.fixture(params=["auto", "gloo", pytest.param("nixl", marks=needs_nixl())])
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport that runs without a GPU."""
    return str(request.param)


@pytest.fixture(params=["eager", "pulled"])
def eagerness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whether small tensors that this process puts ride along in the value."""
    if request.param == "pulled":
        monkeypatch.setenv("RAY_RDT_EAGER_BYTES", "0")
    config.settings.cache_clear()
    yield request.param
    monkeypatch.undo()
    config.settings.cache_clear()


@pytest.fixture(scope="module")
def takers(local_ray: None) -> Iterator[dict[str, Any]]:
    """Consumers that use one of the agent's lanes each."""
    made = {
        lane: Peer.options(runtime_env={"env_vars": {"RAY_RDT_LANES": setting}}).remote()
        for lane, setting in LANE_SETTINGS.items()
    }
    yield made
    for actor in made.values():
        ray.kill(actor)
