"""Transports that users write move the bytes themselves, wherever they are found."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectFetchTimedOutError, RayTaskError

import ray
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.common.errors import RDTFetchError
from ray.experimental.rdt.tensor_transport_manager import TensorTransportManager
from tests.integration import user_transports
from tests.integration.peers import Peer, count_up, total
from tests.integration.user_transports import OtherShmTransport, ShmTransport
from tests.support import START, run_driver, wait_until

pytestmark = pytest.mark.usefixtures("users_transports")


#: Of actors that wait a second and a half for their objects.
HASTY = {"env_vars": {"RAY_rdt_fetch_fail_timeout_milliseconds": "1500"}}


@pytest.fixture(scope="module")
def hasty(local_ray: None) -> Any:
    return Peer.options(runtime_env=HASTY).remote()


@pytest.fixture(params=["shm", "pipe"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_goes_wrong(producer: Any, consumer: Any) -> Any:
    yield
    ray.get([each.run.remote(script) for each in (producer, consumer)])


def script(peer: Any, **steps: str) -> None:
    user_transports.SCRIPT.clear()
    user_transports.SCRIPT.update(steps)


def calls(peer: Any) -> dict[str, int]:
    return dict(user_transports.CALLS)


def calls_of(actor: Any, step: str) -> int:
    return int(ray.get(actor.run.remote(calls)).get(step, 0))


def make(actor: Any, transport: str, *args: Any) -> Any:
    return actor.make.options(tensor_transport=transport).remote(*args)


def mixed(peer: Any) -> dict[str, Any]:
    whole = torch.arange(40.0)
    return {
        "whole": whole,
        "view": whole[8:24:2],
        "again": whole,
        "column": torch.arange(12).view(3, 4).t(),
        "empty": torch.empty(0, 3),
        "grad": torch.ones(3, requires_grad=True),
        "weight": torch.nn.Parameter(torch.full((2, 2), 5.0)),
        "halves": torch.ones(5, dtype=torch.bfloat16),
        "conj": torch.tensor([1 + 2j]).conj(),
        "plain": ["text", 7],
    }


def test_its_code_moves_the_tensors(producer: Any, consumer: Any, name: str) -> None:
    received = calls_of(consumer, "receive")
    assert ray.get(consumer.run.remote(total, make(producer, name, count_up, 10))) == 45
    assert calls_of(consumer, "receive") == received + 1


def test_a_value_arrives_as_it_was(producer: Any, name: str) -> None:
    value, expected = ray.get(make(producer, name, mixed)), mixed(None)
    for key in expected:
        left, right = value[key], expected[key]
        if isinstance(right, torch.Tensor):
            assert torch.equal(left, right), key
            assert (type(left), left.dtype) == (type(right), right.dtype)
            assert (left.stride(), left.requires_grad) == (right.stride(), right.requires_grad)
        else:
            assert left == right
    assert value["again"] is value["whole"]
    value["whole"][8] = -1
    assert value["view"][0] == -1


def test_other_data_types(producer: Any, consumer: Any) -> None:
    ref = make(producer, "numpyshm", lambda peer: {"array": np.arange(6).reshape(2, 3), "n": [1]})
    value = ray.get(ref)
    assert np.array_equal(value["array"], [[0, 1, 2], [3, 4, 5]])
    extracted = calls_of(producer, "extract")
    masked = make(producer, "numpyshm", lambda peer: np.ma.array([1, 2], mask=[False, True]))
    assert ray.get(masked).mask.tolist() == [False, True]
    assert calls_of(producer, "extract") == extracted, "its mask would have been lost"
    assert ray.get(consumer.run.remote(lambda peer, value: int(value["array"].sum()), ref)) == 15


def test_jax_arrays(producer: Any, consumer: Any) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    register_tensor_transport("JaxShm", ["cpu"], ShmTransport, jax.Array)

    def arange(peer: Any) -> Any:
        return {"array": importlib.import_module("jax.numpy").arange(8.0)}

    extracted = calls_of(producer, "extract")
    ref = make(producer, "jaxshm", arange)
    assert ray.get(consumer.run.remote(lambda peer, value: float(value["array"].sum()), ref)) == 28
    assert calls_of(producer, "extract") == extracted + 1


def test_nothing_to_move(producer: Any, name: str) -> None:
    assert ray.get(make(producer, name, lambda peer: "no tensor")) == "no tensor"
    received = user_transports.CALLS["receive"]
    assert ray.get(make(producer, name, lambda peer: torch.empty(0, 2))).shape == (0, 2)
    assert user_transports.CALLS["receive"] == received


def test_targets(producer: Any, name: str) -> None:
    ref, target = make(producer, name, count_up, 6), torch.zeros(6)
    ray.experimental.set_target_for_ref(ref, [target])
    into = user_transports.CALLS["into target"]
    assert ray.get(ref) is target
    assert target.sum() == 15
    assert user_transports.CALLS["into target"] == into + (name == "shm")


def test_both_sides_are_told_who_they_are(producer: Any, consumer: Any) -> None:
    ray.get(consumer.run.remote(total, make(producer, "pipe", count_up, 4)))
    pair = f"from {producer._actor_id.hex()} to {consumer._actor_id.hex()}"
    assert calls_of(consumer, pair) >= 1
    ray.get(make(producer, "pipe", count_up, 4))
    assert user_transports.CALLS[f"from {producer._actor_id.hex()} to none"] >= 1


def test_an_object_is_collected_once(producer: Any, consumer: Any) -> None:
    collected = calls_of(producer, "collect")
    refs = [make(producer, "shm", count_up, 10), make(producer, "numpyshm", lambda _: np.ones(3))]
    ray.get([consumer.run.remote(lambda peer, value: None, ref) for ref in refs])
    assert calls_of(producer, "collect") == collected
    del refs
    wait_until(lambda: calls_of(producer, "collect") == collected + 2, "both are given back")


def test_a_task_and_a_borrower_find_it(producer: Any) -> None:
    @ray.remote(num_cpus=0, tensor_transport="shm")
    def task(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1

    @ray.remote(num_cpus=0)
    def borrow(refs: Any) -> float:
        return total(None, *ray.get(refs))  # type: ignore[arg-type]

    ref = task.remote(make(producer, "shm", count_up, 10))
    assert ray.get(borrow.remote([ref])) == 55


def test_an_actor_finds_it_after_its_restart(producer: Any, spawn: Any) -> None:
    actor = spawn(Peer, max_restarts=1, max_task_retries=1)
    ref = make(producer, "shm", count_up, 10)
    assert ray.get(actor.run.remote(total, ref)) == 45
    before = ray.get(actor.pid.remote())
    ray.kill(actor, no_restart=False)
    assert ray.get(actor.run.remote(total, ref), timeout=60) == 45
    assert ray.get(make(actor, "pipe", count_up, 3)).sum() == 3
    assert ray.get(actor.pid.remote()) != before


@pytest.mark.parametrize(
    ("step", "kind", "says"),
    [
        ("raise", RDTFetchError, "scripted to fail in receive"),
        ("lose", RDTFetchError, "received 0 tensors, 1 were sent"),
        ("mistake", RDTFetchError, "was received, one of"),
        ("hang", ObjectFetchTimedOutError, "did not arrive within"),
    ],
)
def test_a_failed_receive_is_told_and_the_next_works(
    producer: Any, hasty: Any, step: str, kind: type[Exception], says: str
) -> None:
    ref = make(producer, "shm", count_up, 10)
    ray.get(hasty.run.remote(script, receive=step))
    with pytest.raises(RayTaskError) as raised:
        ray.get(hasty.run.remote(total, ref), timeout=30)
    assert isinstance(raised.value.cause, kind), raised.value
    assert says in str(raised.value)
    assert "'shm'" in str(raised.value)
    ray.get(hasty.run.remote(script))
    assert ray.get(hasty.run.remote(total, ref), timeout=30) == 45


def test_a_failed_send_ends_the_receive_at_once(producer: Any, consumer: Any) -> None:
    ref = make(producer, "pipe", count_up, 10)
    ray.get(producer.run.remote(script, send="raise"))
    aborts = [calls_of(actor, "abort") for actor in (producer, consumer)]
    with pytest.raises(RayTaskError, match="scripted to fail in send"):
        ray.get(consumer.run.remote(total, ref), timeout=20)
    assert [calls_of(actor, "abort") for actor in (producer, consumer)] == [n + 1 for n in aborts]
    ray.get(producer.run.remote(script))
    assert ray.get(consumer.run.remote(total, ref), timeout=20) == 45


def test_a_send_that_hangs_costs_the_deadline_and_the_next_works(producer: Any, hasty: Any) -> None:
    ref = make(producer, "pipe", count_up, 10)
    ray.get(producer.run.remote(script, send="hang once"))
    with pytest.raises(RayTaskError, match="'pipe'") as raised:
        ray.get(hasty.run.remote(total, ref), timeout=30)
    assert isinstance(raised.value.cause, ObjectFetchTimedOutError), raised.value
    assert ray.get(hasty.run.remote(total, ref), timeout=30) == 45


def test_a_failed_receive_ends_the_send(producer: Any, consumer: Any) -> None:
    ref = make(producer, "pipe", count_up, 10)
    ray.get(consumer.run.remote(script, receive="raise"))
    with pytest.raises(RayTaskError, match="scripted to fail in receive"):
        ray.get(consumer.run.remote(total, ref), timeout=20)
    ray.get(consumer.run.remote(script))
    assert ray.get(consumer.run.remote(total, ref), timeout=20) == 45


def test_a_producer_that_dies_is_known_at_once(spawn: Any, consumer: Any, name: str) -> None:
    doomed = spawn(Peer)
    ref = make(doomed, name, count_up, 10)
    ray.wait([ref], fetch_local=False)
    if name == "pipe":
        ray.get(doomed.run.remote(script, send="die"))
    else:
        pid = ray.get(doomed.pid.remote())
        ray.kill(doomed)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the producer is gone")
    with pytest.raises(RayTaskError) as raised:
        ray.get(consumer.run.remote(total, ref), timeout=20)
    assert isinstance(raised.value.cause, ActorDiedError), raised.value


@ray.remote(num_cpus=0)
class AsyncTaker:
    kept = ()

    async def run(self, action: Any, *args: Any) -> Any:
        return action(self, *args)


@pytest.mark.parametrize("kind", [Peer, AsyncTaker])
def test_a_transport_may_ask_the_consumer_by_a_call(producer: Any, spawn: Any, kind: Any) -> None:
    taker = spawn(kind)
    asked = calls_of(taker, "has")
    ref = make(producer, "alpha", count_up, 10)
    assert ray.get(taker.run.remote(total, ref), timeout=20) == 45
    assert calls_of(taker, "has") == asked + 1


@pytest.mark.parametrize("step", ["init", "has", "communicator"])
def test_a_question_that_hangs_costs_the_deadline_and_the_next_works(
    producer: Any, spawn: Any, step: str
) -> None:
    taker, ref = spawn(Peer, runtime_env=HASTY), make(producer, "alpha", count_up, 10)
    ray.get(taker.run.remote(script, **{step: "hang once"}))
    with pytest.raises(RayTaskError, match=r"(?s)'alpha'.* did not return in time") as raised:
        ray.get(taker.run.remote(total, ref), timeout=10)
    assert isinstance(raised.value.cause, ObjectFetchTimedOutError), raised.value
    assert ray.get(taker.run.remote(total, ref), timeout=10) == 45


def test_an_object_that_hangs_when_it_is_collected_leaves_the_others(spawn: Any) -> None:
    maker = spawn(Peer, runtime_env=HASTY)
    ray.get(maker.run.remote(script, collect="hang once"))
    refs = [make(maker, "shm", count_up, 10) for _ in range(2)]
    ray.wait(refs, num_returns=2)
    del refs
    wait_until(lambda: calls_of(maker, "collect") == 2, "the other is given back")


def test_a_failed_description_is_the_tasks_error(producer: Any) -> None:
    ray.get(producer.run.remote(script, extract="raise"))
    with pytest.raises(Exception, match=r"(?s)'shm'.*scripted to fail in extract"):
        ray.get(make(producer, "shm", count_up, 10), timeout=20)
    ray.get(producer.run.remote(script))
    assert ray.get(make(producer, "shm", count_up, 10)).sum() == 45


def test_metadata_of_a_device_that_it_was_not_registered_for(spawn: Any) -> None:
    producer = spawn()
    ray.get(producer.run.remote(script, extract="elsewhere"))
    with pytest.raises(ValueError, match=r"registered for tensors on cpu, but .* on cuda"):
        ray.get(make(producer, "shm", count_up, 10), timeout=20)
    wait_until(lambda: calls_of(producer, "collect") == 1, "what it took is given back")


def test_names(producer: Any) -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_tensor_transport("SHM", ["cpu"], OtherShmTransport, torch.Tensor)
    with pytest.raises(ValueError, match="already registered"):
        register_tensor_transport("gloo", ["cpu"], OtherShmTransport, torch.Tensor)
    with pytest.raises(ValueError, match="must be a subclass"):
        register_tensor_transport("other", ["cpu"], dict, torch.Tensor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid tensor transport: shn"):
        make(producer, "shn", count_up, 1)

    def register(peer: Any, kind: type[TensorTransportManager]) -> None:
        register_tensor_transport("shm", ["cpu"], kind, torch.Tensor)

    with pytest.raises(ValueError, match="already registered"):
        ray.get(producer.run.remote(register, OtherShmTransport))
    ray.get(producer.run.remote(register, ShmTransport))


def test_registered_in_a_worker_and_used_elsewhere(producer: Any, consumer: Any) -> None:
    def register(peer: Any) -> None:
        register_tensor_transport("from_worker", ["cpu"], ShmTransport, torch.Tensor)

    ray.get(consumer.run.remote(register))
    assert ray.get(make(producer, "from_worker", count_up, 10)).sum() == 45


def test_a_class_of_the_drivers_own_script_and_another_ray(tmp_path: Path) -> None:
    """Pickled by value, registered before Ray, and again where the next Ray begins."""
    source = Path(user_transports.__file__).read_text()
    body = source.partition("from __future__ import annotations")[2]
    printed = run_driver(
        START
        + body
        + """
import torch

ray.experimental.register_tensor_transport("own", ["cpu"], ShmTransport, torch.Tensor)

@ray.remote(num_cpus=0)
class Actor:
    @ray.method(tensor_transport="own")
    def make(self):
        return torch.ones(3)

    def total(self, tensor):
        return float(tensor.sum())

    def put(self):
        return [ray.put(torch.ones(4), _tensor_transport="own")]

for _ in range(2):
    start()
    one, two = Actor.remote(), Actor.remote()
    print(ray.get(two.total.remote(one.make.remote())))
    [put] = ray.get(one.put.remote())
    print(float(ray.get(put).sum()), CALLS["receive"])
    kept = ray.put(torch.ones(2), _tensor_transport="own")
    ray.shutdown()
    print("collected", CALLS["collect"])
""",
        tmp_path,
    )
    lines = [line for line in printed.splitlines() if line.startswith(("c", "3", "4"))]
    assert lines == [
        "3.0",
        "4.0 1",
        "collected 1",
        "3.0",
        "4.0 2",
        "collected 2",
    ], printed


def test_class_that_is_pickled_by_value_only_after_it_was_registered(
    producer: Any, consumer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text(
        "from tests.integration.user_transports import ShmTransport\n"
        "class Late(ShmTransport):\n"
        "    def tensor_transport_backend(self):\n"
        "        return 'late'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("only_here")
    register_tensor_transport("late", ["cpu"], module.Late, torch.Tensor)
    ray.cloudpickle.register_pickle_by_value(module)
    assert ray.get(consumer.run.remote(total, make(producer, "late", count_up, 10))) == 45


def test_items_of_a_generator(local_ray: None) -> None:
    @ray.remote(num_cpus=0, tensor_transport="shm")
    def count() -> Any:
        yield from (torch.full((4,), float(number)) for number in range(3))

    received = user_transports.CALLS["receive"]
    assert [float(ray.get(item).sum()) for item in count.remote()] == [0, 4, 8]
    assert user_transports.CALLS["receive"] == received + 3
