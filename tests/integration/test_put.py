"""ray.put with a transport works in every process; without one RDT has no part in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import LARGE, SMALL, Peer, total, total_of_refs
from tests.support import run_driver

SIZES = pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "large"])


def put_ones(_: Any, count: int, transport: str) -> list[Any]:
    return [ray.put({"t": torch.ones(count), "n": 1}, _tensor_transport=transport)]


def total_of_puts(peer: Peer, refs: list[Any]) -> float:
    return total(peer, *[value["t"] for value in ray.get(refs)])


@SIZES
def test_put_in_driver(consumer: Any, transport: str, count: int) -> None:
    ref = ray.put({"t": torch.ones(count), "n": 1}, _tensor_transport=transport)
    assert ray.get(consumer.run.remote(lambda peer, v: total(peer, v["t"]), ref)) == count
    assert ray.get(consumer.run.remote(total_of_puts, [ref])) == count


@SIZES
def test_put_in_actor(producer: Any, consumer: Any, transport: str, count: int) -> None:
    refs = ray.get(producer.run.remote(put_ones, count, transport))
    assert ray.get(consumer.run.remote(total_of_puts, refs)) == count
    assert ray.get(refs)[0]["n"] == 1
    assert torch.equal(ray.get(refs[0])["t"], torch.ones(count))


@SIZES
def test_put_in_task(consumer: Any, transport: str, count: int) -> None:
    refs = ray.get(ray.remote(put_ones).remote(None, count, transport))
    assert ray.get(consumer.run.remote(total_of_puts, refs)) == count
    assert torch.equal(ray.get(refs[0])["t"], torch.ones(count))


def test_get_where_it_was_put_gives_the_very_tensor(transport: str) -> None:
    tensor = torch.ones(LARGE)
    ref = ray.put([tensor], _tensor_transport=transport)
    assert ray.get(ref)[0] is tensor


def test_put_keeps_the_tensor_and_copies_nothing(consumer: Any) -> None:
    tensor = torch.ones(LARGE)
    ref = ray.put(tensor, _tensor_transport="auto")
    tensor.fill_(2)
    assert ray.get(consumer.run.remote(total, ref)) == 2 * LARGE


@pytest.mark.parametrize("value", [None, 5, [], {"a": "b"}, b"raw", b""], ids=repr)
def test_put_of_a_value_without_tensors(consumer: Any, transport: str, value: Any) -> None:
    ref = ray.put(value, _tensor_transport=transport)
    assert ray.get(ref) == value
    assert ray.get(consumer.run.remote(lambda _, got: got, ref)) == value


@pytest.mark.parametrize("name", ["AUTO", "Gloo", "torch_gloo"])
def test_transports_are_named_in_any_case(consumer: Any, name: str) -> None:
    ref = ray.put(torch.ones(LARGE), _tensor_transport=name)
    assert ray.get(consumer.run.remote(total_of_refs, [ref])) == LARGE


@pytest.mark.parametrize("name", ["carrier_pigeon", "", 7])
def test_unknown_transport_is_refused_with_the_known_ones(local_ray: None, name: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Invalid tensor transport.*(auto.*gloo.*nixl|not a string)"
    ):
        ray.put(torch.ones(3), _tensor_transport=name)


def test_value_that_cannot_be_pickled_is_refused_as_in_plain_ray(local_ray: None) -> None:
    before = ray.experimental.rdt.stats()["stored_objects"]
    for options in ({}, {"_tensor_transport": "auto"}):
        with pytest.raises(TypeError, match="generator"):
            ray.put([torch.ones(LARGE), (i for i in range(3))], **options)
    assert ray.experimental.rdt.stats()["stored_objects"] == before


def test_plain_put_imports_nothing_of_rdt(tmp_path: Path) -> None:
    source = """
        import importlib.util
        import sys
        import ray

        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        assert ray.get(ray.put({"x": [1, 2]})) == {"x": [1, 2]}
        worker = ray._private.worker.global_worker
        print("manager", worker._rdt_manager)
        ours = ["_agent", "_tensors", "manager", "owner", "producer", "rpc", "serialization"]
        heavy = ["torch", *("ray.experimental.rdt." + name for name in ours)]
        print("modules", [name for name in heavy if name in sys.modules])
        print("missing", [name for name in heavy if not importlib.util.find_spec(name)])
        ray.shutdown()
    """
    printed = run_driver(source, tmp_path)
    assert "manager None" in printed
    assert "modules []" in printed
    assert "missing []" in printed
