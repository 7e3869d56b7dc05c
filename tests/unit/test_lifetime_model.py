"""Directory and store together, under every order of create, hint, pull, free and death.

The owner's directory and the producer's store are the real ones. What lies between them, the table
of regions and the messages, is modelled as the agents have it: notices arrive in order and perhaps
twice, the region of a running pull is kept, and an owner's death is known some time later.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ray.experimental.rdt.common.descriptor import Location
from ray.experimental.rdt.owner.object_directory import (
    Free,
    Hint,
    Instruction,
    ObjectDirectory,
    Own,
)
from ray.experimental.rdt.producer.tensor_store import TensorStore
from ray.experimental.rdt.serialization.layout import lay_out

PRODUCER, CONSUMER = b"p" * 16, b"c" * 16


class Regions:
    """The keys of the producer's agent: the owner of each, and the number of pulls that read it."""

    def __init__(self, store: TensorStore):
        self._store = store
        self._tokens: dict[bytes, int] = {}
        self.owned: dict[bytes, bool] = {}
        self.pins: Counter[bytes] = Counter()

    def register(self, key: bytes, token: int) -> None:
        self.owned[key] = False
        self._tokens[key] = token

    def own(self, key: bytes) -> None:
        if key in self.owned:
            self.owned[key] = True

    def release(self, key: bytes) -> None:
        if self.owned.pop(key, None) is not None:
            self._drop_unread(key)

    def unpin(self, key: bytes) -> None:
        self.pins[key] -= 1
        self._drop_unread(key)

    def _drop_unread(self, key: bytes) -> None:
        if key not in self.owned and not self.pins[key] and key in self._tokens:
            self._store.drop([self._tokens.pop(key)])


class World:
    """One owner, one producer, one consumer, and what is under way between them."""

    def __init__(self) -> None:
        self.directory = ObjectDirectory()
        self.store = TensorStore()
        self.regions = Regions(self.store)
        self.replies: deque[tuple[str, Location]] = deque()
        self.notices: deque[Own | Free] = deque()
        self.hints: list[Location] = []
        self.refs: set[str] = set()
        self.submitted: set[str] = set()
        self.places: dict[str, Location] = {}
        self.is_owner_alive = self.is_producer_alive = True
        self._copies = 0

    # Owner.

    def submit(self, object_id: str) -> None:
        """Ray gives an id once."""
        if self.is_owner_alive and object_id not in self.submitted:
            self.submitted.add(object_id)
            submit = self.directory.begin_submit()
            self.directory.submitted(object_id, PRODUCER, "auto")
            self.refs.add(object_id)
            assert self.directory.end_submit(submit) == []

    def hear_reply(self) -> None:
        if self.replies:
            object_id, location = self.replies.popleft()
            if self.is_owner_alive:
                if object_id in self.refs:
                    self.places[object_id] = location
                self._carry_out(self.directory.created(object_id, location))

    def pass_on(self, object_id: str) -> None:
        if self.is_owner_alive and object_id in self.refs:
            self._carry_out(self.directory.passed_to(object_id, CONSUMER))

    def drop(self, object_id: str) -> None:
        if self.is_owner_alive and object_id in self.refs:
            self.refs.discard(object_id)
            self._carry_out(self.directory.out_of_scope(object_id))

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Hint):
                self.hints.append(instruction.location)
            else:
                assert isinstance(instruction, (Own, Free))
                self.notices.append(instruction)

    def kill_owner(self) -> None:
        """End the owner. Its notices that have not arrived are lost."""
        self.is_owner_alive = False
        self.refs.clear()
        self.notices.clear()

    # Producer.

    def create(self, object_id: str) -> None:
        """A first time, or again because the reply was lost on its way."""
        if self.is_producer_alive:
            self._copies += 1
            key = self._copies.to_bytes(16, "little")
            stored = self.store.add(key, object_id, lay_out([torch.ones(3)]), "auto")
            self.regions.register(key, stored.token)
            self.replies.append((object_id, Location(b"agent", key, 12)))

    def lose_reply(self) -> None:
        """Ray runs the task again."""
        if self.replies:
            object_id, _ = self.replies.popleft()
            self.create(object_id)

    def hear_notice(self, *, again: bool = False) -> None:
        if not self.notices:
            return
        notice = self.notices[0] if again else self.notices.popleft()
        if self.is_producer_alive:
            tell = self.regions.own if isinstance(notice, Own) else self.regions.release
            tell(notice.location.key)

    def look_for_dead_owner(self) -> None:
        """Release the objects of a dead owner, as ``owners`` does."""
        if not self.is_owner_alive:
            for key in [key for key, is_owned in self.regions.owned.items() if is_owned]:
                self.regions.release(key)

    def look_for_unclaimed(self) -> None:
        """Release the objects that no owner claims, as ``unclaimed`` does."""
        for key in [key for key, is_owned in self.regions.owned.items() if not is_owned]:
            stored = self.store.by_key(key)
            assert stored is not None
            is_wanted = self.is_owner_alive and self.directory.may_own(stored.object_id, key)
            if not is_wanted:
                self.regions.release(key)

    def kill_producer(self) -> None:
        self.is_producer_alive = False
        self.store.clear()
        self.regions = Regions(self.store)

    # Consumer.

    def pull(self, object_id: str) -> None:
        place = self.places.get(object_id)
        if place is not None and place.key in self.regions.owned:
            self.regions.pins[place.key] += 1

    def pull_hinted(self) -> None:
        if self.hints and self.hints[0].key in self.regions.owned:
            self.regions.pins[self.hints.pop(0).key] += 1

    def end_pulls(self) -> None:
        """They are done, or the consumer has died: the agent unpins either way."""
        for key in list(self.regions.pins.elements()):
            self.regions.unpin(key)

    # What must hold.

    def check(self) -> None:
        for key in self.regions.pins.elements():
            assert self.store.by_key(key) is not None, "memory that is read has gone"
        if not (self.is_owner_alive and self.is_producer_alive):
            return
        for object_id in self.refs & self.places.keys():
            key = self.places[object_id].key
            assert key in self.regions.owned, "freed while its owner lives and holds it"
            assert self.store.by_key(key) is not None

    def check_nothing_left(self) -> None:
        """Once all is delivered, all references are gone and both watches have looked."""
        while self.replies:
            self.hear_reply()
        for object_id in list(self.refs):
            self.drop(object_id)
        while self.notices:
            self.hear_notice()
        self.end_pulls()
        self.look_for_dead_owner()
        self.look_for_unclaimed()
        assert len(self.store) == 0
        assert not self.regions.owned
        assert not self.is_owner_alive or len(self.directory) == 0


STEPS: dict[str, Callable[[World], None]] = {
    "create": lambda world: world.create("o"),
    "reply": World.hear_reply,
    "notice": World.hear_notice,
    "hint": lambda world: (world.pass_on("o"), world.pull_hinted())[0],
    "pull": lambda world: world.pull("o"),
    "free": lambda world: world.drop("o"),
}
DEATHS: dict[str, Callable[[World], None]] = {
    "owner": World.kill_owner,
    "producer": World.kill_producer,
    "consumer": World.end_pulls,
    "reply": World.lose_reply,
}


@pytest.mark.parametrize("death", DEATHS)
def test_every_order_of_create_hint_pull_free_and_death(death: str) -> None:
    """Each order of the six steps and one death, with the watches looking in between."""
    steps = [*STEPS.values(), DEATHS[death]]
    for order in itertools.permutations(steps):
        world = World()
        world.submit("o")
        for step in order:
            step(world)
            world.check()
            world.look_for_dead_owner()
            world.look_for_unclaimed()
            world.check()
        world.check_nothing_left()


IDS = st.sampled_from(["a", "b", "c"])


class Lifetimes(RuleBasedStateMachine):
    """Three objects, any number of steps of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.unmade: set[str] = set()

    @rule(object_id=IDS)
    def submit(self, object_id: str) -> None:
        if object_id not in self.world.refs and object_id not in self.world.places:
            self.world.submit(object_id)
            self.unmade.add(object_id)

    @rule(object_id=IDS)
    def create(self, object_id: str) -> None:
        if object_id in self.unmade:
            self.unmade.discard(object_id)
            self.world.create(object_id)

    @rule(
        act=st.sampled_from(
            [
                World.hear_reply,
                World.lose_reply,
                World.hear_notice,
                World.look_for_dead_owner,
                World.look_for_unclaimed,
                World.pull_hinted,
                World.end_pulls,
            ]
        )
    )
    def happen(self, act: Callable[[World], None]) -> None:
        act(self.world)

    @rule()
    def hear_a_notice_twice(self) -> None:
        self.world.hear_notice(again=True)

    @rule(act=st.sampled_from([World.pass_on, World.pull, World.drop]), object_id=IDS)
    def use(self, act: Callable[[World, str], None], object_id: str) -> None:
        act(self.world, object_id)

    @rule(kill=st.sampled_from([World.kill_owner, World.kill_producer]), dice=st.integers(0, 9))
    def die(self, kill: Callable[[World], None], dice: int) -> None:
        if not dice:
            kill(self.world)

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        for object_id in sorted(self.unmade):
            self.world.create(object_id)
        self.world.check_nothing_left()


TestLifetimes = Lifetimes.TestCase
TestLifetimes.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
