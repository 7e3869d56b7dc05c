"""Two actors on one GPU: memory that they share, pulls beside other work, and failures.

Not run on a GPU so far: no machine of this project has had one.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ray.exceptions import RayError

import ray
from ray.experimental.rdt.common import config
from tests.gpu.test_cuda import GPUS
from tests.integration.peers import Peer
from tests.support import ROOT, needs_nixl, wait_until

#: About three seconds on GPUs of 1.5 to 2 GHz.
LONG_CYCLES = 5_000_000_000
COUNT = 16 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1, reason="torch sees no NVIDIA GPU here"),
]

Spawn = Callable[..., Any]


@pytest.fixture(scope="module")
def spawn() -> Iterator[Spawn]:
    """Makes actors that share one GPU and whose named transport has to serve."""
    made: list[Any] = []

    def make(**variables: str) -> Any:
        environment = {"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "1", **variables}}
        made.append(Peer.options(num_gpus=0.1, runtime_env=environment).remote())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        ray.init(
            address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False
        )
        yield make
        ray.shutdown()
    config.settings.cache_clear()


@pytest.fixture(scope="module")
def near(spawn: Spawn) -> Any:
    """The producer."""
    return spawn()


@pytest.fixture(scope="module")
def far(spawn: Spawn) -> Any:
    """The consumer."""
    return spawn()


def make(producer: Any, transport: str, action: Any, *args: Any) -> Any:
    ref = producer.make.options(tensor_transport=transport).remote(action, *args)
    ray.wait([ref], fetch_local=False)
    return ref


def ones(_: Peer, count: int = COUNT) -> torch.Tensor:
    return torch.ones(count, device="cuda")


def keep_ones(peer: Peer, count: int = COUNT) -> torch.Tensor:
    peer.kept["tensor"] = torch.ones(count, device="cuda")
    return peer.kept["tensor"]


def loans(_: Peer) -> int:
    gc.collect()
    return len(ray._private.worker.global_worker.rdt_manager.transport("cuda_ipc")._loans)


def mapped(_: Peer) -> int:
    gc.collect()
    return len(ray._private.worker.global_worker.rdt_manager.transport("cuda_ipc")._memory)


def all_is_given_back(near: Any, far: Any) -> None:
    wait_until(lambda: ray.get(far.run.remote(mapped)) == 0, "all is unmapped")
    wait_until(lambda: ray.get(near.run.remote(loans)) == 0, "no loan is left")


# Pulls beside other work.


@pytest.mark.parametrize(
    ("transport", "lanes"),
    [
        pytest.param("auto", "", id="auto"),
        pytest.param("cuda_ipc", "", id="cuda_ipc"),
        pytest.param("auto", "inproc,cma,shm,tcp", id="staged"),
        pytest.param("nixl", "", id="nixl", marks=needs_nixl()),
    ],
)
def test_producer_that_is_busy_delays_no_pull(spawn: Spawn, transport: str, lanes: str) -> None:
    variables = {"RAY_RDT_LANES": lanes} if lanes else {}
    producer, consumer = spawn(**variables), spawn(**variables)

    def pull(_: Peer, refs: list[Any]) -> float:
        started = time.monotonic()
        (tensor,) = ray.get(refs)
        took = time.monotonic() - started
        assert bool(tensor.eq(1).all())
        return took

    def busy(_: Peer) -> None:
        torch.cuda._sleep(LONG_CYCLES)

    def is_busy(_: Peer) -> bool:
        return not torch.cuda.current_stream().query()

    ray.get(consumer.run.remote(pull, [make(producer, transport, ones)]))  # connections, contexts
    ref = make(producer, transport, ones)
    ray.get(producer.run.remote(busy))
    took = ray.get(consumer.run.remote(pull, [ref]))
    assert ray.get(producer.run.remote(is_busy)), "the GPU was not busy for long enough to tell"
    assert took < 1.5
    for actor in (producer, consumer):
        ray.kill(actor)


@pytest.mark.parametrize("lanes", ["", "inproc,cma,shm,tcp"], ids=["cuda_ipc", "staged"])
def test_graph_that_another_thread_captures_survives_pulls(spawn: Spawn, lanes: str) -> None:
    variables = {"RAY_RDT_LANES": lanes} if lanes else {}
    producer, consumer = spawn(**variables), spawn(**variables)

    def pull_while_capturing(_: Peer, refs: list[Any]) -> tuple[float, list[bool]]:
        torch.zeros(1, device="cuda").add_(1)
        capturing, pulled, counted = threading.Event(), threading.Event(), []

        def capture() -> None:
            numbers, graph = torch.zeros(1000, device="cuda"), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(10):
                    numbers.add_(1)
                capturing.set()
                pulled.wait(60)
                for _ in range(10):
                    numbers.add_(1)
            graph.replay()
            torch.cuda.synchronize()
            counted.append(float(numbers[0]))

        thread = threading.Thread(target=capture)
        thread.start()
        try:
            assert capturing.wait(60)
            tensors = [ray.get(ref) for ref in refs]
        finally:
            pulled.set()
            thread.join(60)
        assert counted, "the capture ended with an error"
        return counted[0], [bool(tensor.eq(1).all()) for tensor in tensors]

    refs = [make(producer, "auto", ones) for _ in range(3)]
    result = ray.get(consumer.run.remote(pull_while_capturing, refs))
    assert result == (20.0, [True] * 3)
    for actor in (producer, consumer):
        ray.kill(actor)


# Shared memory.


def test_named_cuda_ipc_gives_the_producers_own_memory(near: Any, far: Any) -> None:
    def double(_: Peer, tensor: torch.Tensor) -> str:
        tensor.mul_(2)
        torch.cuda.synchronize()
        return tensor.device.type

    ref = make(near, "cuda_ipc", keep_ones)
    assert ray.get(far.run.remote(double, ref)) == "cuda"
    assert ray.get(near.run.remote(lambda peer: float(peer.kept["tensor"].sum()))) == 2.0 * COUNT
    all_is_given_back(near, far)


def test_shared_memory_is_kept_until_its_last_tensor_dies(near: Any, far: Any) -> None:
    ref = make(near, "cuda_ipc", ones)
    ray.get(far.run.remote(lambda peer, tensor: peer.kept.update(view=tensor[-100:]), ref))
    assert ray.get(near.run.remote(loans)) == 1
    del ref

    def overwrite(_: Peer) -> None:
        for _ in range(10):
            torch.zeros(COUNT, device="cuda")
        torch.cuda.synchronize()

    time.sleep(1)
    ray.get(near.run.remote(overwrite))
    total = far.run.remote(lambda peer: float(peer.kept["view"].sum()))
    assert ray.get(total) == 100.0
    ray.get(far.run.remote(lambda peer: peer.kept.clear()))
    all_is_given_back(near, far)


def test_hand_over_does_not_wait_for_the_producers_kernels(near: Any, far: Any) -> None:
    def written_late(_: Peer) -> torch.Tensor:
        tensor = torch.zeros(COUNT, device="cuda")
        torch.cuda._sleep(LONG_CYCLES)
        return tensor.fill_(5)

    def take(_: Peer, refs: list[Any]) -> tuple[float, bool]:
        torch.zeros(1, device="cuda")
        started = time.monotonic()
        (tensor,) = ray.get(refs)
        return time.monotonic() - started, bool(tensor.eq(5).all())

    ray.get(far.run.remote(take, [make(near, "cuda_ipc", ones)]))
    took, is_right = ray.get(far.run.remote(take, [make(near, "cuda_ipc", written_late)]))
    assert is_right
    assert took < 1.5
    all_is_given_back(near, far)


@pytest.mark.parametrize("transport", ["cuda_ipc", "auto"])
def test_ten_thousand_tensors(near: Any, far: Any, transport: str) -> None:
    def many(_: Peer) -> list[torch.Tensor]:
        return list(torch.arange(10_000.0, device="cuda").repeat_interleave(8).clone().split(8))

    def apart(_: Peer) -> list[torch.Tensor]:
        return [torch.full((8,), float(i), device="cuda") for i in range(10_000)]

    def total(_: Peer, tensors: list[torch.Tensor]) -> float:
        return float(torch.stack(tensors)[:, 0].double().sum())

    for action in (many, apart):
        ref = make(near, transport, action)
        assert ray.get(far.run.remote(total, ref)) == sum(range(10_000))
    all_is_given_back(near, far)


def test_shared_memory_is_passed_on(near: Any, far: Any) -> None:
    ray.get(
        far.run.remote(lambda peer, t: peer.kept.update(tensor=t), make(near, "cuda_ipc", ones))
    )
    second = make(far, "cuda_ipc", lambda peer: peer.kept["tensor"])
    total = near.run.remote(lambda _, tensor: float(tensor.sum()), second)
    assert ray.get(total) == float(COUNT)
    ray.get(far.run.remote(lambda peer: peer.kept.clear()))
    del second
    all_is_given_back(near, far)


def test_memory_of_cupy_is_shared(near: Any, far: Any) -> None:
    pytest.importorskip("cupy")

    def of_cupy(_: Peer) -> torch.Tensor:
        import cupy

        return torch.from_dlpack(cupy.ones(COUNT, dtype=cupy.float32))

    total = far.run.remote(lambda _, t: float(t.sum()), make(near, "cuda_ipc", of_cupy))
    assert ray.get(total) == float(COUNT)


# Refusals and failures.


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("expandable_segments:True", "expandable segment"),
        ("backend:cudaMallocAsync", "a pool of cudaMallocAsync"),
    ],
)
def test_memory_that_cannot_be_shared_is_named_and_copied_through_the_host(
    spawn: Spawn, far: Any, setting: str, reason: str
) -> None:
    producer = spawn(PYTORCH_CUDA_ALLOC_CONF=setting)

    def total(_: Peer, tensor: torch.Tensor) -> float:
        return float(tensor.sum())

    with pytest.raises(RayError, match=reason):
        ray.get(far.run.remote(total, make(producer, "cuda_ipc", ones)))
    assert ray.get(far.run.remote(total, make(producer, "auto", ones))) == float(COUNT)
    ray.kill(producer)


def test_full_gpu_is_told_with_advice(near: Any, spawn: Any) -> None:
    small = spawn()

    def limit(_: Peer) -> None:
        torch.cuda.set_per_process_memory_fraction(0.002)

    ray.get(small.run.remote(limit))
    ref = make(near, "auto", ones, 512 << 20)
    with pytest.raises(RayError, match=r"device memory.*Tried to allocate 2") as failure:
        ray.get(small.run.remote(lambda _, tensor: 1, ref))
    assert "fetch fewer at a time" in str(failure.value)
    ray.kill(small)


def test_death_of_a_consumer_gives_shared_memory_back(near: Any, spawn: Spawn) -> None:
    dying = spawn()
    ref = make(near, "cuda_ipc", ones)
    ray.get(dying.run.remote(lambda peer, tensor: peer.kept.update(tensor=tensor), ref))
    assert ray.get(near.run.remote(loans)) == 1
    dying.run.remote(lambda _: os._exit(1))
    wait_until(lambda: ray.get(near.run.remote(loans)) == 0, "the loan ends")


def test_death_of_a_producer_is_told_where_its_memory_is_used_next(far: Any, spawn: Spawn) -> None:
    dying = spawn()
    ref = make(dying, "cuda_ipc", ones)
    ray.get(far.run.remote(lambda peer, tensor: peer.kept.update(tensor=tensor), ref))
    pid = ray.get(dying.run.remote(lambda _: os.getpid()))
    dying.run.remote(lambda _: os._exit(1))
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "it has ended")
    passed_on = make(far, "auto", lambda peer: peer.kept["tensor"])
    with pytest.raises(RayError, match=f"process {pid} has ended"):
        ray.get(passed_on, timeout=60)
    ray.get(far.run.remote(lambda peer: peer.kept.clear()))
    wait_until(lambda: ray.get(far.run.remote(mapped)) == 0, "all is unmapped")
