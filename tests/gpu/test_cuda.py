"""CUDA tensors between real processes, over each transport that carries them.

Not run on a GPU so far: no machine of this project has had one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ray
from ray.experimental import set_target_device_for_ref, set_target_for_ref
from ray.experimental.rdt.common import config
from tests.integration.peers import Peer
from tests.support import ROOT, needs_nixl

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
LARGE = 20 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1, reason="torch sees no NVIDIA GPU here"),
]


def _needs(is_there: bool, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_there, reason=reason)


TRANSPORTS = [
    pytest.param("auto", id="auto"),
    pytest.param("cuda_ipc", id="cuda_ipc"),
    pytest.param("nccl", id="nccl", marks=_needs(GPUS >= 2, "nccl needs two NVIDIA GPUs")),
    pytest.param("nixl", id="nixl", marks=needs_nixl()),
    pytest.param("gloo", id="gloo"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
    config.settings.cache_clear()


@pytest.fixture(scope="module", params=TRANSPORTS)
def named(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(cluster: None, named: str) -> Iterator[tuple[Any, Any]]:
    """Two actors: on a GPU each for nccl, else on one. Only gloo may go another way."""
    share = 1 if named == "nccl" else 0.5
    strict = "0" if named == "gloo" else "1"
    environment = {"env_vars": {"RAY_RDT_STRICT_TRANSPORT": strict}}
    made = [Peer.options(num_gpus=share, runtime_env=environment).remote() for _ in range(2)]
    yield made[0], made[1]
    for actor in made:
        ray.kill(actor)


def make(pair: Any, named: str, action: Any, *args: Any) -> Any:
    return pair[0].make.options(tensor_transport=named).remote(action, *args)


@pytest.mark.parametrize("count", [1, 1000, LARGE])
def test_tensor_stays_on_the_gpu(pair: Any, named: str, count: int) -> None:
    def look(_: Peer, tensor: torch.Tensor) -> tuple[str, bool]:
        expected = torch.arange(count, dtype=torch.float32, device="cuda")
        return tensor.device.type, torch.equal(tensor, expected)

    ref = make(pair, named, lambda _: torch.arange(count, dtype=torch.float32, device="cuda"))
    assert ray.get(pair[1].run.remote(look, ref)) == ("cuda", True)


def test_views_stay_views(pair: Any, named: str) -> None:
    def views(_: Peer) -> list[torch.Tensor]:
        base = torch.arange(12.0, device="cuda")
        return [base, base[3:7], base.view(3, 4).t(), torch.empty(0, 3, device="cuda")]

    def look(_: Peer, got: list[torch.Tensor]) -> Any:
        got[0].fill_(7)
        return [tensor.tolist() for tensor in got], got[2].stride()

    values, stride = ray.get(pair[1].run.remote(look, make(pair, named, views)))
    assert values == [[7.0] * 12, [7.0] * 4, [[7.0] * 3] * 4, []]
    assert stride == (1, 4)


def test_many_small_tensors(pair: Any, named: str) -> None:
    ref = make(pair, named, lambda _: [torch.full((50,), i, device="cuda") for i in range(2000)])
    total = pair[1].run.remote(lambda _, tensors: sum(int(t.sum()) for t in tensors), ref)
    assert ray.get(total) == 50 * sum(range(2000))


def test_bytes_are_read_when_the_producers_stream_has_written_them(pair: Any, named: str) -> None:
    def late(_: Peer) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.zeros(LARGE, device="cuda")
            torch.cuda._sleep(1_000_000_000)
            tensor.fill_(5)
            return _hand_over(tensor)

    def _hand_over(tensor: torch.Tensor) -> torch.Tensor:
        # The value is captured on the method's own stream, which has to come after the other.
        torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())
        return tensor

    ref = make(pair, named, late)
    assert ray.get(pair[1].run.remote(lambda _, t: bool(t.eq(5).all()), ref))


def test_host_and_gpu_tensors_in_one_object(cluster: None, pair: Any, named: str) -> None:
    if named not in ("auto", "nixl"):
        pytest.skip(f"{named} carries one of the two, and this test allows no other way")
    ref = make(pair, named, lambda _: (torch.ones(LARGE), torch.full((LARGE,), 2, device="cuda")))

    def look(_: Peer, value: Any) -> list[tuple[str, int]]:
        return [(tensor.device.type, int(tensor.sum())) for tensor in value]

    assert ray.get(pair[1].run.remote(look, ref)) == [("cpu", LARGE), ("cuda", 2 * LARGE)]


def test_same_actor_gets_the_very_tensor(pair: Any, named: str) -> None:
    def keep(peer: Peer) -> torch.Tensor:
        peer.kept["gpu"] = torch.ones(LARGE, device="cuda")
        return peer.kept["gpu"]

    ref = make(pair, named, keep)
    assert ray.get(pair[0].run.remote(lambda peer, t: t is peer.kept.pop("gpu"), ref))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets(pair: Any, named: str, device: str) -> None:
    def receive(_: Peer, refs: list[Any]) -> list[Any]:
        target = torch.zeros(LARGE, device=device)
        set_target_for_ref(refs[0], [target])
        (got,) = ray.get(refs[0])
        return [got is target, bool(target.eq(3).all())]

    ref = make(pair, named, lambda _: [torch.full((LARGE,), 3.0, device="cuda")])
    if named in ("nccl", "cuda_ipc") and device == "cpu":
        pytest.skip(f"{named} writes GPU memory only, and this test allows no other way")
    assert ray.get(pair[1].run.remote(receive, [ref])) == [True, True]


def test_process_without_a_gpu_gets_host_tensors(pair: Any, cluster: None) -> None:
    ref = make(pair, "auto", lambda _: torch.full((LARGE,), 4.0, device="cuda"))
    without = Peer.options(runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}).remote()

    def look(_: Peer, tensor: torch.Tensor) -> tuple[str, bool]:
        return tensor.device.type, bool(tensor.eq(4).all())

    assert ray.get(without.run.remote(look, ref)) == ("cpu", True)
    ray.kill(without)


def test_target_device_cpu(pair: Any, cluster: None) -> None:
    ref = make(pair, "auto", lambda _: torch.full((LARGE,), 4.0, device="cuda"))
    set_target_device_for_ref(ref, "cpu")
    got = ray.get(ref)
    assert (got.device.type, bool(got.eq(4).all())) == ("cpu", True)
