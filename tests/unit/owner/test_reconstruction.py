"""Reconstruction by an owner: once, with the object's arguments, and if a retry is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ray.experimental.rdt.owner.reconstruction import (
    ALIVE,
    NOT_OWNER,
    RECONSTRUCTED,
    REFUSED,
    Outcome,
    Reconstruction,
)
from tests.unit.fakes import FakeRay, FakeSession, object_id, rdt_value

KEY = b"lost".ljust(16)


class Owner:
    """An owner, with calls that return one object each."""

    def __init__(self, ray: FakeRay):
        self.ray = ray
        self.reconstruction = Reconstruction(lambda key: "")
        self.calls: list[tuple[int, Any, Any]] = []
        self.returned = 100

    def call(
        self, number: int, *args: Any, retries: int = 1, key: bytes = KEY, actor: str = ""
    ) -> Any:
        """Submit a call that returns the object ``number``, made by process 2."""

        def repeat(args: Any, kwargs: Any) -> Any:
            self.calls.append((number, args, kwargs))
            self.returned += 1
            return self.ray.create(self.returned, rdt_value(b"new", 3))

        recipe, _, _ = self.reconstruction.begin(repeat, retries, args, {}, actor)
        ref = self.ray.create(number, rdt_value(key, 2))
        self.reconstruction.keep(recipe, [ref])
        return ref

    def reconstruct(self, number: int, key: bytes = KEY, waiting_actor: str = "") -> Outcome:
        return self.reconstruction.reconstruct(object_id(number), key, waiting_actor)


@pytest.fixture
def owner(fake_ray: FakeRay, producer: FakeSession) -> Owner:
    fake_ray.dead.add(producer.worker_id)
    return Owner(fake_ray)


@pytest.fixture
def producer(process: Callable[[int], FakeSession]) -> FakeSession:
    process(3)
    return process(2)


def test_a_lost_object_is_reconstructed_once(owner: Owner) -> None:
    kept = owner.call(1, 7)
    first, second = owner.reconstruct(1), owner.reconstruct(1)
    assert first == second == Outcome(RECONSTRUCTED, owner.ray.ref(object_id(101)))
    assert owner.calls == [(1, [7], {})]
    del kept


def test_an_object_of_a_producer_that_is_alive_is_not(owner: Owner) -> None:
    owner.ray.dead.clear()
    owner.call(1)
    assert owner.reconstruct(1).state == ALIVE
    assert not owner.calls


def test_a_copy_that_is_not_the_lost_one_is_taken_as_it_is(owner: Owner) -> None:
    ref = owner.call(1)
    assert owner.reconstruct(1, b"an older copy") == Outcome(RECONSTRUCTED, ref)
    assert not owner.calls


def test_other_owners_objects_are_theirs(owner: Owner) -> None:
    owner.ray.create(1, rdt_value(KEY, 2), owner=b"another")
    assert owner.reconstruct(1).state == NOT_OWNER
    assert owner.reconstruction.reconstruct("", KEY).state == NOT_OWNER


def test_an_object_without_an_id_is_found_by_its_key(owner: Owner) -> None:
    owner.call(1)
    owner.reconstruction._find = {KEY: object_id(1)}.__getitem__
    assert owner.reconstruction.reconstruct("", KEY).state == RECONSTRUCTED


def test_calls_without_a_recipe_are_refused(owner: Owner) -> None:
    owner.ray.create(1, rdt_value(KEY, 2))
    assert owner.reconstruct(1) == Outcome(REFUSED, reason="its call may not be retried")


def test_jobs_can_disable_it(owner: Owner) -> None:
    owner.ray.is_disabled = True
    owner.call(1)
    assert "disables" in owner.reconstruct(1).reason
    assert not owner.calls


def test_without_retries_it_is_refused(owner: Owner) -> None:
    owner.call(1, retries=0)
    assert owner.reconstruct(1) == Outcome(REFUSED, reason="all its retries are used up")


def test_errors_of_a_call_are_a_refusal(owner: Owner) -> None:
    def fail(args: Any, kwargs: Any) -> Any:
        raise ValueError("on purpose")

    recipe, _, _ = owner.reconstruction.begin(fail, 1, (), {})
    owner.reconstruction.keep(recipe, [owner.ray.create(1, rdt_value(KEY, 2))])
    assert owner.reconstruct(1) == Outcome(REFUSED, reason="ValueError: on purpose")


def test_lost_arguments_are_reconstructed_first(owner: Owner) -> None:
    argument = owner.call(1)
    owner.call(2, argument)
    assert owner.reconstruct(2).state == RECONSTRUCTED
    assert [number for number, _, _ in owner.calls] == [1, 2]
    assert owner.calls[1][1] == [owner.ray.ref(object_id(101))]
    assert owner.reconstruct(1).ref == owner.ray.ref(object_id(101))
    assert len(owner.calls) == 2


def test_arguments_that_exist_are_passed_again(owner: Owner) -> None:
    argument = owner.call(1)
    owner.ray.values[object_id(1)] = rdt_value(b"alive", 3)
    owner.call(2, argument)
    owner.reconstruct(2)
    assert owner.calls == [(2, [argument], {})]


def test_arguments_out_of_scope_are_reconstructed_by_their_recipe(owner: Owner) -> None:
    owner.call(2, owner.call(1))
    owner.ray.leave_scope(1)
    assert owner.reconstruct(2).state == RECONSTRUCTED
    assert [number for number, _, _ in owner.calls] == [1, 2]


def test_arguments_out_of_scope_without_a_recipe_are_a_refusal(owner: Owner) -> None:
    tensor = owner.ray.create(1, rdt_value(b"put", 2))
    owner.call(2, owner.ray.ref(tensor.hex(), "auto"))
    owner.ray.leave_scope(1)
    outcome = owner.reconstruct(2)
    assert outcome.state == REFUSED
    assert f"took object {object_id(1)}" in outcome.reason


def test_other_references_are_kept_alive(owner: Owner) -> None:
    plain = owner.ray.create(1, (b"", b"PYTHON", None))
    owner.call(2, plain)
    recipe, _ = owner.reconstruction._recipes.of(object_id(2))  # type: ignore[misc]
    assert recipe.pins == {object_id(1): plain}
    owner.ray.leave_scope(2)
    assert not recipe.pins
    assert len(owner.reconstruction) == 0


def test_an_actor_that_would_wait_for_itself_is_refused(owner: Owner) -> None:
    owner.call(1, actor="a")
    assert "waits for the object itself" in owner.reconstruct(1, waiting_actor="a").reason
    assert not owner.calls
    assert owner.reconstruct(1, waiting_actor="b").state == RECONSTRUCTED


def test_a_dependency_on_an_actor_that_waits_is_refused(owner: Owner) -> None:
    owner.call(2, owner.call(1, actor="a"))
    assert "waits for the object itself" in owner.reconstruct(2, waiting_actor="a").reason
    assert not owner.calls


def test_a_replacement_that_does_not_exist_yet_is_refused_to_its_own_actor(owner: Owner) -> None:
    owner.call(1, actor="a")
    replacement = owner.reconstruct(1).ref
    assert owner.reconstruct(1, waiting_actor="a").ref == replacement
    del owner.ray.values[replacement.hex()]
    assert owner.reconstruct(1, waiting_actor="a").state == REFUSED


def test_a_recipe_goes_with_its_object(owner: Owner) -> None:
    owner.call(1)
    assert len(owner.reconstruction) == 1
    owner.ray.leave_scope(1)
    assert len(owner.reconstruction) == 0


def test_an_object_that_is_out_of_scope_before_keep_leaves_no_recipe(owner: Owner) -> None:
    owner.ray.gone.add(object_id(1))
    owner.call(1)
    assert len(owner.reconstruction) == 0


def test_the_replacement_inherits_the_retries_that_are_left(owner: Owner) -> None:
    def repeat(args: Any, kwargs: Any) -> Any:
        return owner.call(owner.returned, retries=9, key=b"new")

    recipe, _, _ = owner.reconstruction.begin(repeat, 3, (), {})
    owner.reconstruction.keep(recipe, [owner.ray.create(1, rdt_value(KEY, 2))])
    replacement = owner.reconstruct(1).ref
    assert owner.reconstruction._recipes.of(replacement.hex())[0].retries == 2  # type: ignore[index]
