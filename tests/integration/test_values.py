"""The oracle with real Ray: a consumer gets through RDT what it gets through plain Ray."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

import ray
from tests.integration.peers import LARGE, Peer, count_up
from tests.support import stopped
from tests.unit import values

#: Each example sends a batch, and the fixtures that it shares with the others hold no state.
few = settings(max_examples=12, suppress_health_check=list(HealthCheck))
batches = st.lists(values.values, min_size=3, max_size=10)


def compare(_: Peer, rdt_refs: list[Any], plain: list[Any]) -> None:
    """Runs on: consumer. The batch came through RDT by reference, and plain with the call."""
    for got, expected in zip(ray.get(rdt_refs), plain):
        values.assert_same(got, expected)


def overlaps(_: Any, views: list[torch.Tensor]) -> list[list[bool]]:
    """Which tensors of a list share memory."""
    return [
        [extent(one)[0] < extent(two)[1] and extent(two)[0] < extent(one)[1] for one in views]
        for two in views
    ]


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@few
@given(batch=batches)
def test_consumer_gets_what_plain_ray_gives(
    consumer: Any, transport: str, eagerness: str, batch: list[Any]
) -> None:
    refs = [ray.put(value, _tensor_transport=transport) for value in batch]
    ray.get(consumer.run.remote(compare, refs, batch))


@few
@given(batch=batches)
def test_driver_gets_what_plain_ray_gives(producer: Any, batch: list[Any]) -> None:
    plain = ray.put(batch)
    got = ray.get(producer.make.remote(lambda _, value: value, plain))
    values.assert_same(got, ray.get(plain))


@few
@given(views=values.shared())
def test_views_of_one_memory_stay_views_of_one_memory(
    consumer: Any, eagerness: str, views: list[torch.Tensor]
) -> None:
    ref = ray.put(views, _tensor_transport="auto")
    assert ray.get(consumer.run.remote(overlaps, ref)) == overlaps(None, views)


@pytest.mark.parametrize("dtype", values.DTYPES + values.FLOAT8, ids=str)
def test_large_tensor_of_each_dtype_arrives(consumer: Any, dtype: torch.dtype) -> None:
    tensor = values.filled((257, 1031), dtype)
    ref = ray.put(tensor, _tensor_transport="auto")
    assert ray.get(consumer.run.remote(lambda _, got: values.bytes_of(got), ref)) == (
        values.bytes_of(tensor)
    )


def test_large_tensor_arrives_over_each_transport(
    producer: Any, consumer: Any, transport: str
) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(count_up)
    expected = count_up(None)  # type: ignore[arg-type]
    is_equal = consumer.run.remote(lambda _, got, want: torch.equal(got, want), ref, expected)
    assert ray.get(is_equal)
    assert torch.equal(ray.get(ref), expected)


def test_storages_that_begin_at_one_address(producer: Any, consumer: Any, transport: str) -> None:
    """As data frames and ``torch.from_numpy`` of a part and of the whole have them."""

    def make(_: Any) -> list[torch.Tensor]:
        memory = np.arange(LARGE, dtype=np.float32)
        parts = [memory[: LARGE // 2], memory[:100], memory, memory[10 : LARGE // 3]]
        return [torch.from_numpy(part) for part in parts]

    ref = producer.make.options(tensor_transport=transport).remote(make)
    same = consumer.run.remote(lambda _, got: values.assert_same(got, make(None)), ref)
    ray.get(same, timeout=60)


def test_the_users_default_device_is_for_the_users_tensors(producer: Any, transport: str) -> None:
    def make(_: Any) -> list[torch.Tensor]:
        host = torch.arange(float(LARGE), device="cpu")
        return [host, host[3:7], torch.empty(0, 2, device="cpu")]

    ref = producer.make.options(tensor_transport=transport).remote(make)
    with torch.device("meta"):
        got, targets = ray.get(ref), [tensor.clone() for tensor in make(None)]
        ray.experimental.set_target_for_ref(ref, targets)
        assert ray.get(ref)[0] is targets[0]
        put = ray.put(make(None), _tensor_transport=transport)
    values.assert_same([got, targets], [make(None)] * 2)
    assert (
        ray.get(producer.run.remote(lambda _, got: [str(one.device) for one in got], put))
        == ["cpu"] * 3
    )


@pytest.mark.parametrize("count", [0, 1, LARGE])
def test_mixed_python_data_keeps_its_place(
    producer: Any, consumer: Any, transport: str, count: int
) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(
        lambda _: {
            "t": torch.ones(count),
            "n": np.arange(count),
            "deep": [(1, {"x": "y"})],
            "e": None,
        }
    )
    kept = ray.get(consumer.run.remote(lambda _, got: {**got, "t": got["t"].numpy()}, ref))
    assert kept["deep"] == [(1, {"x": "y"})]
    assert kept["e"] is None
    assert kept["t"].tolist() == [1.0] * count
    assert kept["n"].tolist() == list(range(count))


def make_model(_: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 300)
    )
    model.head = torch.nn.Linear(300, 200, bias=False)
    model.head.weight = model[0].weight
    return model


def test_module_arrives_with_tied_weights_and_works(
    producer: Any, consumer: Any, transport: str
) -> None:
    def check(_: Peer, model: torch.nn.Module) -> bool:
        values.assert_same(dict(model.state_dict()), dict(make_model(None).state_dict()))
        is_trainable = all(parameter.requires_grad for parameter in model.parameters())
        model[2](model[0](torch.ones(300)).relu()).sum().backward()
        return is_trainable and model.head.weight is model[0].weight

    ref = producer.make.options(tensor_transport=transport).remote(make_model)
    assert ray.get(consumer.run.remote(check, ref))


def test_optimizer_and_state_dict_arrive_in_order(producer: Any, consumer: Any) -> None:
    def state(_: Any) -> dict[str, Any]:
        model = make_model(None)
        optimizer = torch.optim.Adam(model.parameters())
        model[2](model[0](torch.ones(300))).sum().backward()
        optimizer.step()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def check(_: Any, got: dict[str, Any]) -> None:
        expected = state(None)
        assert list(got["model"]) == list(expected["model"])
        values.assert_same(got["optimizer"], expected["optimizer"])

    ray.get(consumer.run.remote(check, producer.make.remote(state)))


def test_tensordict_arrives(producer: Any, consumer: Any, transport: str) -> None:
    def make(_: Any) -> TensorDict:
        inner = {"a": torch.arange(LARGE).view(2, -1), "b": {"c": torch.ones(2, 3)}}
        return TensorDict(inner, batch_size=[2])

    def check(_: Any, got: TensorDict) -> bool:
        assert type(got) is TensorDict
        assert got.batch_size == torch.Size([2])
        return bool((got == make(None)).all())

    ref = producer.make.options(tensor_transport=transport).remote(make)
    assert ray.get(consumer.run.remote(check, ref))


class Output(OrderedDict[str, Any]):
    """A dict whose fields are attributes as well, as Hugging Face's model outputs are."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            super().__setitem__(field.name, getattr(self, field.name))

    def __reduce__(self) -> Any:
        _, _, *rest = super().__reduce__()
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return type(self), tuple(values), *rest


@dataclasses.dataclass
class ModelOutput(Output):
    loss: Any = None
    logits: Any = None
    states: Any = None


def test_model_output_arrives(producer: Any, consumer: Any, transport: str) -> None:
    def make(_: Any) -> ModelOutput:
        states = (torch.ones(3), torch.zeros(LARGE))
        return ModelOutput(loss=torch.tensor(1.0), logits=torch.ones(LARGE), states=states)

    def check(_: Any, got: ModelOutput) -> bool:
        assert type(got) is ModelOutput
        assert list(got) == ["loss", "logits", "states"]
        assert got.logits is got["logits"]
        values.assert_same(dict(got), dict(make(None)))
        return True

    ref = producer.make.options(tensor_transport=transport).remote(make)
    assert ray.get(consumer.run.remote(check, ref))
    assert check(None, ray.get(ref))


def test_thousands_of_tensors_arrive(producer: Any, consumer: Any, transport: str) -> None:
    def make(_: Any) -> list[torch.Tensor]:
        return [torch.full((i % 50,), i, dtype=torch.int32) for i in range(3000)]

    def check(_: Any, got: list[torch.Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(got, make(None), strict=True))

    ref = producer.make.options(tensor_transport=transport).remote(make)
    assert ray.get(consumer.run.remote(check, ref))


def test_what_arrives_is_writable_and_the_consumers_own(producer: Any, consumer: Any) -> None:
    def overwrite(_: Any, got: torch.Tensor) -> None:
        got.zero_()

    for count in (16, LARGE):
        ref = producer.make.remote(count_up, count)
        ray.get(consumer.run.remote(overwrite, ref))
        assert torch.equal(ray.get(ref), torch.arange(count, dtype=torch.float32))


def test_what_was_received_can_be_sent_on(producer: Any, consumer: Any, third: Any) -> None:
    def pass_on(_: Any, got: torch.Tensor) -> list[torch.Tensor]:
        return [got, got[10:20], got * 2]

    first = producer.make.remote(count_up)
    second = consumer.make.remote(pass_on, first)
    same, part, double = ray.get(third.run.remote(lambda _, got: got, second))
    assert torch.equal(same, count_up(None))  # type: ignore[arg-type]
    assert torch.equal(part, same[10:20])
    assert torch.equal(double, same * 2)


def test_tensor_outlives_its_reference_and_its_producer(spawn: Any, consumer: Any) -> None:
    maker = spawn()
    ref = maker.make.remote(count_up)
    kept = ray.get(ref)
    ray.get(consumer.run.remote(lambda peer, got: peer.kept.update(t=got), ref))
    del ref
    ray.kill(maker)
    assert torch.equal(kept, count_up(None))  # type: ignore[arg-type]
    arrived = ray.get(consumer.run.remote(lambda peer: peer.kept.pop("t")))
    assert torch.equal(arrived, kept)


def test_a_stopped_producer_does_not_block_other_gets(spawn: Any) -> None:
    def start_get(peer: Peer, refs: list[Any]) -> None:
        import threading

        peer.kept["thread"] = threading.Thread(
            target=lambda: peer.kept.update(got=ray.get(refs[0])), daemon=True
        )
        peer.kept["thread"].start()

    def plain_get(peer: Peer, plain: Any) -> bool:
        assert ray.get(ray.put([1, torch.ones(2)]))[0] == 1
        return peer.kept["thread"].is_alive()

    def join(peer: Peer) -> float:
        peer.kept["thread"].join(30)
        return float(peer.kept["got"].sum())

    maker, taker = spawn(), spawn()
    ref = maker.make.remote(lambda _: torch.ones(LARGE))
    ray.wait([ref])
    pid = ray.get(maker.pid.remote())
    with stopped(pid):
        ray.get(taker.run.remote(start_get, [ref]))
        assert ray.get(taker.run.remote(plain_get, ray.put(torch.ones(3))), timeout=20)
    assert ray.get(taker.run.remote(join)) == LARGE


def test_small_tensors_begin_where_any_dtype_may(producer: Any) -> None:
    """Vector instructions fault on complex numbers that do not begin at a multiple of 16."""

    def make(_: Peer, count: int) -> list[torch.Tensor]:
        kinds = [torch.int8, torch.complex128, torch.float64, torch.complex64]
        return [torch.arange(count + i, dtype=torch.int8).to(kind) for i, kind in enumerate(kinds)]

    for count in range(1, 40):
        got = ray.get(producer.make.remote(make, count))
        assert [tensor.data_ptr() % 64 for tensor in got] == [0, 0, 0, 0]
        for tensor, expected in zip(got, make(None, count), strict=True):  # type: ignore[arg-type]
            assert torch.equal(tensor.clone(), expected)
