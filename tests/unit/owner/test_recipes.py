"""The calls that an owner may repeat, and the arguments that it keeps for them."""

from __future__ import annotations

from typing import Any

import pytest

from ray.experimental.rdt.owner.recipes import Recipe, Recipes


def recipe(retries: int = 1, **fields: Any) -> Recipe:
    return Recipe(lambda args, kwargs: None, [], {}, retries, **fields)


@pytest.fixture
def recipes() -> Recipes:
    return Recipes()


def test_each_return_knows_its_recipe(recipes: Recipes):
    made = recipe()
    recipes.add(["a", "b"], made)
    assert (recipes.of("a"), recipes.of("b"), recipes.of("c")) == ((made, 0), (made, 1), None)
    assert len(recipes) == 2


def test_retries_are_counted_down_to_none():
    made = recipe(2)
    assert [made.use_retry(), made.refusal()] == [1, ""]
    assert [made.use_retry(), made.refusal()] == [0, "all its retries are used up"]


def test_endless_retries_stay_so():
    made = recipe(-1)
    assert [made.use_retry(), made.use_retry(), made.refusal()] == [-1, -1, ""]


def test_an_unavailable_reason_is_told_first():
    assert recipe(0, unavailable_reason="it is Monday").refusal() == "it is Monday"


def test_an_object_that_goes_takes_its_recipe_and_its_replacement_along(recipes: Recipes):
    made = recipe()
    recipes.add(["a", "b"], made)
    made.replacements = ["new a", "new b"]
    assert recipes.drop("b") == [made, "new b"]
    assert made.replacements == ["new a", None]
    assert recipes.of("b") is None
    assert recipes.drop("b") == []
    assert recipes.drop("a") == [made, "new a"]
    assert len(recipes) == 0


def test_arguments_are_pinned_until_the_last_return_goes(recipes: Recipes):
    made = recipe(pins={"argument": "ref"})
    recipes.add(["a", "b"], made)
    assert recipes.drop("a") == [made]
    assert made.pins
    assert recipes.drop("b") == [made, {"argument": "ref"}]
    assert not made.pins
    # As an dependency of another it is of no use any more.
    assert "out of scope" in made.refusal()


def test_a_recipe_without_pins_stays_of_use_as_an_dependency(recipes: Recipes):
    first, second = recipe(), recipe()
    recipes.add(["first"], first)
    second.depend_on("first", (first, 0))
    recipes.drop("first")
    assert second.dependencies["first"] == (first, 0)
    assert first.refusal() == ""


def test_chains_of_recipes_have_an_end():
    last = recipe()
    longest = 0
    for _ in range(1000):
        following = recipe()
        following.depend_on("before", (last, 0))
        last = following
        longest = max(longest, last.depth)
    assert longest == 100


def test_calls_of_an_actor_are_known():
    assert recipe(actor="a").runs_on("a")
    assert not recipe(actor="a").runs_on("b")
    assert not recipe().runs_on("")


def test_clear_gives_back_everything(recipes: Recipes):
    made = recipe()
    recipes.add(["a"], made)
    assert recipes.clear() == [{"a": (made, 0)}]
    assert len(recipes) == 0
