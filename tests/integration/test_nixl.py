"""The nixl transport between real actors and the driver."""

import logging
import sys
import time

import pytest
import torch

import ray
from ray.experimental import (
    deregister_nixl_memory,
    register_nixl_memory,
    set_nixl_cuda_stream,
)
from tests.integration.peers import LARGE, count_up, ones, total
from tests.support import needs_nixl, wait_until

pytestmark = needs_nixl()


def make(actor, action, *args):
    """An RDT object over nixl, made by an actor."""
    return actor.make.options(tensor_transport="nixl").remote(action, *args)


def odd_tensors(peer):
    grid = torch.arange(LARGE, dtype=torch.float32).view(512, -1)
    return [grid.t(), grid[::2, ::3], torch.empty(0, 3), grid[3:4, 5:6].expand(4, 4)]


def filled(peer, value):
    return torch.full((LARGE,), float(value))


def reads(peer):
    """How many exposures of other processes this one has read over nixl."""
    transport = ray._private.worker.global_worker.rdt_manager.transport("nixl")
    endpoint = transport._endpoint
    return sum(len(remote.exposures) for remote in endpoint._remotes._known.values())


def test_an_object_goes_from_actor_to_actor_over_nixl(producer, consumer):
    ref = make(producer, count_up)
    assert ray.get(consumer.run.remote(total, ref)) == LARGE * (LARGE - 1) / 2
    assert ray.get(consumer.run.remote(reads)) >= 1


def test_tensors_of_all_layouts(producer):
    for got, expected in zip(ray.get(make(producer, odd_tensors)), odd_tensors(None), strict=True):
        assert torch.equal(got, expected)


def test_many_pulls_at_once(producer, consumer):
    refs = [make(producer, filled, value) for value in range(12)]
    sums = [consumer.run.remote(total, ref) for ref in refs]
    assert [tensor[0].item() for tensor in ray.get(refs)] == list(range(12))
    assert ray.get(sums) == [float(value * LARGE) for value in range(12)]


def test_memory_that_is_freed_and_taken_again_is_never_stale(producer, consumer):
    for value in range(10):
        ref = make(producer, filled, value)
        assert ray.get(consumer.run.remote(total, ref)) == value * LARGE
        del ref


def register_and_forget(peer):
    tensor = torch.ones(LARGE)
    register_nixl_memory(tensor)
    register_nixl_memory(tensor[5:])
    deregister_nixl_memory(tensor)
    peer.kept["weights"] = tensor


def kept(peer):
    return peer.kept["weights"]


def deregister(peer):
    for _ in range(2):
        deregister_nixl_memory(peer.kept["weights"])


def test_memory_that_a_user_registers_is_sent(producer):
    ray.get(producer.run.remote(register_and_forget))
    assert torch.equal(ray.get(make(producer, kept)), torch.ones(LARGE))
    ray.get(producer.run.remote(deregister))


def block_library(peer):
    sys.modules["nixl"] = None


def use_library(peer):
    tensor = torch.ones(LARGE)
    register_nixl_memory(tensor)
    deregister_nixl_memory(tensor)
    set_nixl_cuda_stream(None)


def test_a_missing_library_is_named(producer, spawn):
    ref, without = make(producer, ones), spawn()
    ray.get(without.run.remote(block_library))
    with pytest.raises(ImportError, match="pip install nixl"):
        ray.get(without.run.remote(use_library))
    with pytest.raises(Exception, match="pip install nixl"):
        ray.get(without.run.remote(total, ref))
    assert torch.equal(ray.get(ref), torch.ones(LARGE))
    over_gloo = producer.make.options(tensor_transport="gloo").remote(ones)
    assert ray.get(without.run.remote(total, over_gloo)) == LARGE


def listen(peer):
    block_library(peer)
    peer.kept["said"] = said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ray.rdt").addHandler(handler)


def test_where_the_library_is_missing_another_lane_serves_and_is_said_once(producer, spawn):
    without = spawn(runtime_env={"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "0"}})
    ray.get(without.run.remote(listen))
    ray.get(without.run.remote(use_library))
    for _ in range(2):
        assert ray.get(without.run.remote(total, make(producer, ones))) == LARGE
    said = ray.get(without.run.remote(lambda peer: peer.kept["said"]))
    assert [line.partition(" ")[0] for line in said if "had no effect in this process" in line] == [
        "register_nixl_memory",
        "deregister_nixl_memory",
        "set_nixl_cuda_stream",
    ]
    (line,) = [line for line in said if "'nixl'" in line]
    assert "pip install nixl" in line
    assert "Falling back to the next transport or lane" in line


def has_engine():
    nixl = ray._private.worker.global_worker.rdt_manager._find_nixl()
    return nixl is not None and nixl._endpoint is not None


@ray.remote(num_cpus=0)
class Announced:
    """Its methods say that it will use nixl; its constructor may still say how."""

    def __init__(self):
        time.sleep(0.3)
        self.had_engine = has_engine()

    @ray.method(tensor_transport="nixl")
    def make(self):
        return torch.ones(LARGE)

    def engine(self):
        return self.had_engine, has_engine()


def test_the_engine_begins_after_the_constructor_of_an_actor_whose_methods_name_nixl(spawn):
    actor, other = spawn(Announced), spawn()
    wait_until(lambda: ray.get(actor.engine.remote()) == (False, True), "the engine did not begin")
    assert not ray.get(other.run.remote(lambda peer: has_engine()))
    assert torch.equal(ray.get(actor.make.remote()), torch.ones(LARGE))
