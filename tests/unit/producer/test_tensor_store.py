"""The objects of a producer, by key, by token and by object id, and waits for their release."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray.experimental.rdt.producer.tensor_store import StoredObject, TensorStore
from ray.experimental.rdt.serialization.layout import Captured, lay_out


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def add(
    store: TensorStore, number: int, *tensors: torch.Tensor, object_id: str = ""
) -> StoredObject:
    return store.add(key_of(number), object_id or f"id{number}", lay_out(list(tensors)), "auto")


def test_object_is_found_by_key_and_id_until_it_is_dropped():
    store = TensorStore()
    stored = add(store, 1, torch.ones(3))
    assert store.by_key(key_of(1)) is store.by_id("id1") is stored
    assert store.drop([stored.token]) == [stored]
    assert store.by_key(key_of(1)) is None
    assert store.by_id("id1") is None
    assert len(store) == 0


def test_unknown_tokens_are_ignored():
    store = TensorStore()
    stored = add(store, 1, torch.ones(3))
    assert store.drop([999, stored.token]) == [stored]
    assert store.drop([stored.token]) == []


def test_tensor_dies_with_what_drop_returned():
    store = TensorStore()
    tensor = torch.ones(3)
    weak = weakref.ref(tensor)
    stored = add(store, 1, tensor)
    del tensor
    gc.collect()
    assert weak() is not None
    dropped = store.drop([stored.token])
    assert weak() is not None
    del stored, dropped
    gc.collect()
    assert weak() is None


def test_second_copy_of_an_object_replaces_the_first_by_id_only():
    store = TensorStore()
    first = add(store, 1, torch.ones(3), object_id="same")
    second = add(store, 2, torch.ones(3), object_id="same")
    assert store.by_id("same") is second
    assert store.drop([first.token]) == [first]
    assert store.by_id("same") is second
    assert store.drop([second.token]) == [second]
    assert store.by_id("same") is None


def test_borrowed_object_stays_until_it_is_given_back():
    store = TensorStore()
    stored = add(store, 1, torch.ones(3))
    assert store.borrow(stored.key) is store.borrow(stored.key) is stored
    assert store.drop([stored.token]) == []
    assert store.by_key(stored.key) is stored
    assert store.give_back(stored.key) == []
    assert store.give_back(stored.key) == [stored]
    assert store.borrow(stored.key) is None


def test_borrow_that_ends_before_the_release_drops_nothing():
    store = TensorStore()
    stored = add(store, 1, torch.ones(3))
    store.borrow(stored.key)
    assert store.give_back(stored.key) == []
    assert store.drop([stored.token]) == [stored]


def test_clear_drops_everything_borrowed_or_not():
    store = TensorStore()
    tensors = [torch.ones(3), torch.ones(4)]
    kept = [add(store, number, tensor) for number, tensor in enumerate(tensors)]
    store.borrow(kept[0].key)
    assert store.clear() == kept
    assert len(store) == 0
    store.wait_freed(tensors[0], 0)


@pytest.mark.parametrize("other", [lambda t: t, lambda t: t[2:3], lambda t: t.view(2, 4).t()])
def test_views_count_as_the_tensor_itself(other):
    store = TensorStore()
    tensor = torch.ones(8)
    stored = add(store, 1, other(tensor))
    with pytest.raises(TimeoutError, match="in use"):
        store.wait_freed(tensor, 0)
    store.drop([stored.token])
    store.wait_freed(tensor, 0)


def test_every_object_over_the_storage_counts():
    store = TensorStore()
    tensor = torch.ones(8)
    both = [add(store, 1, tensor, tensor[:2]), add(store, 2, tensor[4:])]
    store.drop([both[0].token])
    with pytest.raises(TimeoutError):
        store.wait_freed(tensor, 0.01)
    store.drop([both[1].token])
    store.wait_freed(tensor, 0)


def test_borrowed_object_is_not_freed():
    store = TensorStore()
    tensor = torch.ones(8)
    stored = add(store, 1, tensor)
    store.borrow(stored.key)
    store.drop([stored.token])
    with pytest.raises(TimeoutError):
        store.wait_freed(tensor, 0)
    store.give_back(stored.key)
    store.wait_freed(tensor, 0)


def test_objects_over_the_same_memory_count_once():
    store = TensorStore()
    tensor = torch.ones(8)
    part, whole = add(store, 1, tensor[:2]), add(store, 2, tensor)
    other = add(store, 3, torch.ones(2))
    assert store.nbytes == 8 * 4 + 2 * 4
    store.drop([whole.token, other.token])
    assert store.nbytes == 8 * 4
    store.drop([part.token])
    assert store.nbytes == 0


def test_other_data_than_tensors_counts_as_nothing():
    store = TensorStore()
    store.add(key_of(1), "id", Captured([b"text"]), "auto")
    assert store.nbytes == 0


def test_there_is_room_up_to_the_limit_and_what_is_stored_needs_none():
    store = TensorStore()
    tensor = torch.ones(8)
    add(store, 1, tensor)
    assert store.await_room(lay_out([torch.ones(2)]), 40, 0)
    assert not store.await_room(lay_out([torch.ones(3)]), 40, 0)
    assert store.await_room(lay_out([tensor[:3]]), 40, 0)


def test_waiting_for_room_ends_as_soon_as_enough_is_freed():
    store = TensorStore()
    kept = [add(store, number, torch.ones(8)) for number in range(3)]
    found = []
    waiter = threading.Thread(
        target=lambda: found.append(store.await_room(lay_out([torch.ones(16)]), 96, 60))
    )
    waiter.start()
    store.drop([kept[0].token])
    waiter.join(0.5)
    assert waiter.is_alive()
    store.drop([kept[1].token])
    waiter.join(30)
    assert found == [True]


def test_a_store_that_nothing_leaves_is_waited_for_once():
    store = TensorStore()
    kept = add(store, 1, torch.ones(8))
    began = time.monotonic()
    assert not store.await_room(lay_out([torch.ones(8)]), 32, 0.3)
    assert time.monotonic() - began >= 0.3
    between = time.monotonic()
    assert not any(store.await_room(lay_out([torch.ones(8)]), 32, 0.3) for _ in range(100))
    assert time.monotonic() - between < 0.3
    store.drop([kept.token])
    add(store, 2, torch.ones(8))
    again = time.monotonic()
    assert not store.await_room(lay_out([torch.ones(8)]), 32, 0.3)
    assert time.monotonic() - again >= 0.3


def test_what_can_never_fit_is_not_waited_for():
    store = TensorStore()
    began = time.monotonic()
    assert not store.await_room(lay_out([torch.ones(9)]), 32, 60)
    assert time.monotonic() - began < 30


def test_another_tensor_is_not_waited_for():
    store = TensorStore()
    add(store, 1, torch.ones(8))
    store.wait_freed(torch.ones(8), 0)


def test_waiter_wakes_as_the_object_goes():
    store = TensorStore()
    tensor = torch.ones(8)
    stored = add(store, 1, tensor)
    has_begun = threading.Event()

    def drop():
        has_begun.wait(10)
        store.drop([stored.token])

    dropper = threading.Thread(target=drop)
    dropper.start()
    has_begun.set()
    store.wait_freed(tensor, 30)
    dropper.join()
    assert len(store) == 0


def test_waiter_for_an_object_gets_it_or_a_timeout():
    store = TensorStore()
    with pytest.raises(TimeoutError, match="id1"):
        store.wait_object("id1", 0.01)
    adder = threading.Thread(target=add, args=(store, 1, torch.ones(2)))
    adder.start()
    assert store.wait_object("id1", 30).key == key_of(1)
    adder.join()


def test_captured_tensors_use_what_shares_a_storage_with_them():
    tensor, other = torch.ones(8), torch.ones(3)
    captured = lay_out([tensor[2:4], other, torch.ones(0)])
    assert captured.uses(tensor[3:].view(5, 1))
    assert captured.uses(torch.from_numpy(tensor.numpy()))
    assert captured.uses(other)
    assert not captured.uses(tensor.clone())
    assert not captured.uses(torch.ones(0))


def test_other_data_is_used_if_it_is_the_same():
    value = [1]
    assert Captured([value]).uses(value)  # type: ignore[list-item]
    assert not Captured([value]).uses([1])  # type: ignore[list-item]


class StoreMachine(RuleBasedStateMachine):
    """Any order of adding, borrowing, giving back and releasing, against a plain model."""

    def __init__(self):
        super().__init__()
        self.store = TensorStore()
        self.memory = [torch.ones(4) for _ in range(3)]
        self.live: dict[bytes, StoredObject] = {}
        self.users: dict[bytes, int] = {}
        self.released: set[bytes] = set()
        self.count = 0

    @rule(which=st.sets(st.integers(0, 2), min_size=1))
    def add(self, which):
        self.count += 1
        stored = add(self.store, self.count, *[self.memory[i] for i in which])
        self.live[stored.key] = stored
        self.users[stored.key] = 0

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def borrow(self, data):
        key = data.draw(st.sampled_from(sorted(self.live)))
        assert self.store.borrow(key) is self.live[key]
        self.users[key] += 1

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def give_back(self, data):
        key = data.draw(st.sampled_from(sorted(k for k, n in self.users.items() if n)))
        self.users[key] -= 1
        self._expect(self.store.give_back(key), {key})

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        keys = set(data.draw(st.lists(st.sampled_from(sorted(self.live)))))
        tokens = [self.live[key].token for key in keys]
        self.released |= keys
        self._expect(self.store.drop(tokens), keys)

    def _expect(self, dropped, keys):
        """Exactly those of ``keys`` that are released and unused have gone."""
        gone = {key for key in keys & self.released if not self.users[key]}
        assert {stored.key for stored in dropped} == gone
        for key in gone:
            del self.live[key], self.users[key]
        self.released -= gone

    @invariant()
    def agrees(self):
        assert len(self.store) == len(self.live)
        in_use = [tensor for stored in self.live.values() for tensor in stored.captured.tensors]
        sets = {stored.captured.layout.storages.tobytes(): stored for stored in self.live.values()}
        kept = sum(stored.captured.table.nbytes for stored in sets.values())
        assert self.store.nbytes == kept
        for tensor in self.memory:
            if any(tensor is used for used in in_use):
                with pytest.raises(TimeoutError):
                    self.store.wait_freed(tensor, 0)
            else:
                self.store.wait_freed(tensor, 0)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=30)
