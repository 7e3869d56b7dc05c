"""The owner's state machine: the instructions that each order of events gives."""

from __future__ import annotations

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from ray.experimental.rdt.common.descriptor import Location
from ray.experimental.rdt.owner.object_directory import (
    Free,
    Hint,
    ObjectDirectory,
    Own,
    ReleaseHandle,
    State,
    WarnShared,
)

HERE = Location(b"agent", b"k" * 16, 8)
INSIDE = Location(b"agent", b"i" * 16, 8, is_eager=True)
ELSEWHERE = Location(b"other", b"j" * 16, 8)
ACTOR, OTHER = b"a" * 16, b"b" * 16


def submitted(directory: ObjectDirectory, object_id: str = "o") -> None:
    submit = directory.begin_submit()
    directory.submitted(object_id, ACTOR, "auto")
    assert directory.end_submit(submit) == []


def test_object_is_freed_once_when_it_goes_out_of_scope():
    directory = ObjectDirectory()
    submitted(directory)
    assert directory.row("o").state is State.SUBMITTED
    assert directory.created("o", HERE) == [Own("o", HERE)]
    assert directory.out_of_scope("o") == [Free(HERE)]
    assert directory.out_of_scope("o") == []
    assert len(directory) == 0


def test_reply_before_remote_returns_is_kept():
    directory = ObjectDirectory()
    submit = directory.begin_submit()
    assert directory.created("o", HERE) == [Own("o", HERE)]
    directory.submitted("o", ACTOR, "auto")
    assert directory.end_submit(submit) == []
    assert directory.row("o").location == HERE
    assert directory.row("o").producer == ACTOR


def test_handle_is_kept_until_the_object_is_gone():
    directory = ObjectDirectory()
    directory.submitted("o", ACTOR, "auto", "handle")
    assert directory.created("o", HERE) == [Own("o", HERE)]
    assert directory.row("o").handle == "handle"
    assert directory.out_of_scope("o") == [Free(HERE), ReleaseHandle("handle", is_last=True)]


def test_handle_is_let_go_with_an_object_that_was_never_made():
    directory = ObjectDirectory()
    directory.submitted("o", ACTOR, "auto", "handle")
    assert directory.out_of_scope("o") == [ReleaseHandle("handle", is_last=True)]


@pytest.mark.parametrize("location", [None, INSIDE])
def test_handle_is_not_kept_for_what_the_value_has_inside(location):
    directory = ObjectDirectory()
    directory.submitted("o", ACTOR, "auto", "handle")
    assert directory.created("o", location)[-1] == ReleaseHandle("handle", is_last=False)
    assert ReleaseHandle not in map(type, directory.out_of_scope("o"))


def test_handle_comes_after_the_reply():
    for location, kept in ((HERE, "handle"), (INSIDE, None)):
        directory = ObjectDirectory()
        submit = directory.begin_submit()
        directory.created("o", location)
        directory.submitted("o", ACTOR, "auto", "handle")
        assert directory.end_submit(submit) == []
        assert directory.row("o").handle == kept


def test_handles_are_let_go_at_the_end():
    directory = ObjectDirectory()
    directory.submitted("o", ACTOR, "auto", "handle")
    directory.created("o", HERE)
    assert directory.close() == [Free(HERE), ReleaseHandle("handle", is_last=True)]


def test_freed_before_created_is_freed_on_creation():
    directory = ObjectDirectory()
    submitted(directory)
    assert directory.out_of_scope("o") == []
    assert directory.created("o", HERE) == [Free(HERE)]
    assert len(directory) == 0


def test_freed_before_created_during_another_submit_is_freed_when_that_ends():
    directory = ObjectDirectory()
    submitted(directory)
    directory.out_of_scope("o")
    submit = directory.begin_submit()
    assert directory.created("o", HERE) == [Own("o", HERE)]
    assert directory.end_submit(submit) == [Free(HERE)]
    assert len(directory) == 0


def test_later_submits_do_not_keep_an_orphan_alive():
    directory = ObjectDirectory()
    first = directory.begin_submit()
    directory.created("o", HERE)
    second = directory.begin_submit()
    assert directory.end_submit(first) == [Free(HERE)]
    assert directory.end_submit(second) == []


def test_retry_frees_the_first_copy():
    directory = ObjectDirectory()
    submitted(directory)
    directory.created("o", HERE)
    assert directory.created("o", ELSEWHERE) == [Free(HERE), Own("o", ELSEWHERE)]
    assert directory.out_of_scope("o") == [Free(ELSEWHERE)]


def test_same_reply_twice_frees_nothing():
    directory = ObjectDirectory()
    submitted(directory)
    directory.created("o", HERE)
    assert directory.created("o", HERE) == []


def test_object_without_tensors_needs_no_free():
    directory = ObjectDirectory()
    submitted(directory)
    assert directory.created("o", None) == []
    assert directory.out_of_scope("o") == []


def test_close_frees_what_was_created():
    directory = ObjectDirectory()
    submitted(directory, "made")
    submitted(directory, "unmade")
    directory.created("made", HERE)
    assert directory.close() == [Free(HERE)]
    assert len(directory) == 0


def test_sharing_with_the_producer_is_news_once():
    directory = ObjectDirectory()
    submitted(directory)
    assert directory.passed_to("o", OTHER) == []
    assert directory.passed_to("o", ACTOR) == [WarnShared("o")]
    assert directory.passed_to("o", OTHER) == []
    assert directory.passed_to("unknown", ACTOR) == []


def test_created_object_is_hinted_to_the_actor_it_goes_to():
    directory = ObjectDirectory()
    submitted(directory)
    directory.created("o", HERE)
    assert directory.passed_to("o", OTHER) == [Hint(OTHER, HERE)]


def test_object_passed_on_before_it_exists_is_hinted_when_it_does():
    directory = ObjectDirectory()
    submitted(directory)
    assert directory.passed_to("o", OTHER) == []
    assert directory.created("o", HERE) == [Own("o", HERE), Hint(OTHER, HERE)]


class Interleavings(RuleBasedStateMachine):
    """Every order of submit, reply, retry and free: each created copy is freed exactly once."""

    submits = Bundle("submits")

    def __init__(self) -> None:
        super().__init__()
        self.directory = ObjectDirectory()
        self.copies = 0
        self.held: set[str] = set()
        self.live: dict[Location, str] = {}
        self.open_submits: dict[int, str] = {}

    def carry_out(self, frees: list[Free]) -> None:
        for free in frees:
            if isinstance(free, Own):
                assert free.location in self.live
                continue
            assert self.live.pop(free.location, None) is not None, "freed twice or never made"

    @rule(target=submits)
    def begin(self) -> int:
        submit = self.directory.begin_submit()
        self.open_submits[submit] = f"o{submit}"
        self.held.add(f"o{submit}")
        return submit

    @rule(submit=submits, is_retry=st.booleans())
    def reply(self, submit: int, is_retry: bool) -> None:
        object_id = f"o{submit}"
        if not is_retry and object_id in self.live.values():
            return
        self.copies += 1
        location = Location(b"agent", self.copies.to_bytes(16, "little"), 1)
        self.live[location] = object_id
        self.carry_out(self.directory.created(object_id, location))

    @rule(submit=submits)
    def name_and_end(self, submit: int) -> None:
        object_id = self.open_submits.pop(submit, None)
        if object_id is not None:
            self.directory.submitted(object_id, ACTOR, "auto")
            self.carry_out(self.directory.end_submit(submit))

    @rule(submit=consumes(submits))
    def drop(self, submit: int) -> None:
        if submit not in self.open_submits:
            self.held.discard(f"o{submit}")
            self.carry_out(self.directory.out_of_scope(f"o{submit}"))

    @invariant()
    def nothing_outlives_its_reference(self) -> None:
        if not self.open_submits:
            assert set(self.live.values()) <= self.held

    @invariant()
    def nothing_held_is_freed(self) -> None:
        for object_id in self.held:
            row = self.directory.row(object_id)
            if row is not None and row.location is not None:
                assert row.location in self.live

    def teardown(self) -> None:
        for submit in list(self.open_submits):
            self.name_and_end(submit)
        self.carry_out(self.directory.close())
        assert not self.live


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = hypothesis_settings(max_examples=200, deadline=None)
