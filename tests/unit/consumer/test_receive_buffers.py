"""The places that receive the bytes of an object if the user gives target tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit import values
from tests.unit.consumer.test_fetcher import World, value_of


@pytest.fixture
def world() -> World:
    return World()


def fetch_into(world: World, sent: Any, targets: list[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Fetches; the addresses and lengths that the agent was given."""
    arrival = world.fetch(world.send(sent), tensors=targets)
    assert all(got is target for got, target in zip(value_of(*arrival), targets, strict=True))
    (pull,) = world.agent.pulls
    return list(pull.addresses), list(pull.lengths)


class Weight(torch.nn.Parameter):
    """A user's subclass of Parameter."""


@pytest.mark.parametrize(
    "make", [torch.nn.Parameter, Weight, torch.Tensor.requires_grad_], ids=["p", "sub", "leaf"]
)
@pytest.mark.parametrize("wrap", [torch.Tensor.clone, torch.nn.Parameter], ids=["plain", "param"])
def test_parameters_are_received_into_at_once(
    world: World, make: Callable[..., torch.Tensor], wrap: Callable[..., torch.Tensor]
) -> None:
    target = make(torch.zeros(100))
    addresses, lengths = fetch_into(world, [wrap(torch.ones(100))], [target])
    assert (addresses, lengths) == ([target.data_ptr()], [400])
    assert target.eq(1).all()
    assert target.requires_grad
    assert target.is_leaf


@pytest.mark.parametrize("shape", [(100,), (10, 10)])
def test_what_is_received_into_counts_as_changed(world: World, shape: tuple[int, ...]) -> None:
    """So that autograd does not take it for what it has saved."""
    target = torch.nn.Parameter(torch.ones(shape))
    product = (target * target).sum()
    fetch_into(world, [torch.zeros(shape)], [target])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("is_parameter", [True, False])
def test_tensors_of_inference_mode_are_filled(
    world: World, is_contiguous: bool, is_parameter: bool
) -> None:
    with torch.inference_mode():
        target = torch.zeros(100) if is_contiguous else torch.zeros(200)[::2]
        target = torch.nn.Parameter(target) if is_parameter else target
    assert target.is_inference()
    fetch_into(world, [torch.ones(100)], [target])
    assert target.sum() == 100


def test_rows_of_one_weight_land_in_their_targets(world: World) -> None:
    weight = torch.arange(60.0).view(6, 10)
    targets = [torch.zeros(10) for _ in range(6)]
    addresses, lengths = fetch_into(world, list(weight), targets)
    assert addresses == [target.data_ptr() for target in targets]
    assert lengths == [40] * 6
    assert torch.equal(torch.stack(targets), weight)


def test_views_of_one_bucket_land_in_their_targets(world: World) -> None:
    bucket = torch.arange(100.0)
    views = [bucket[40:], bucket[3:10], bucket[10:40].view(5, 6)]
    targets = [torch.nn.Parameter(torch.zeros_like(view)) for view in views]
    addresses, _ = fetch_into(world, views, targets)
    order = [targets[1], targets[2], targets[0]]
    assert addresses[1:] == [target.data_ptr() for target in order]
    assert all(torch.equal(one, two) for one, two in zip(targets, views))


def test_a_tie_lands_once_and_is_copied(world: World) -> None:
    weight = torch.arange(100.0)
    targets = [torch.zeros(100), torch.zeros(100)]
    addresses, _ = fetch_into(world, [weight, weight.view(-1)], targets)
    assert addresses == [targets[0].data_ptr()]
    assert all(torch.equal(target, weight) for target in targets)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_targets_get_what_tensors_hold(data: st.DataObject) -> None:
    """Whatever shares memory at the producer, and however the targets lie."""
    sent = data.draw(values.shared() | values.blocks())
    lay_outs = [
        lambda view: torch.zeros(view.shape, dtype=view.dtype),
        lambda view: torch.zeros((*view.shape, 2), dtype=view.dtype)[..., 0],
        lambda view: torch.nn.Parameter(torch.zeros(view.shape, dtype=view.dtype), False),
    ]
    distinct = list({id(view): view for view in sent}.values())
    targets = [data.draw(st.sampled_from(lay_outs))(view) for view in distinct]
    world = World()
    world.fetch(world.send(distinct), tensors=targets)
    for target, view in zip(targets, distinct):
        assert values.bytes_of(target) == values.bytes_of(view)
