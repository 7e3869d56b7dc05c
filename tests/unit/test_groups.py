"""Making and ending groups between nodes that are no Ray actors."""

from __future__ import annotations

import threading
import time

import pytest

from ray.experimental.rdt.groups import collectives
from ray.experimental.rdt.groups.membership import Member
from ray.experimental.rdt.groups.service import GroupService, MemberFailed
from tests.unit.gloo_peers import Node, blanks, pattern, same


@pytest.fixture
def nodes(monkeypatch):
    # Ray's collective module is one per process and takes each name once; these nodes share one.
    monkeypatch.setattr(collectives, "enter", lambda group, transport: None)
    made = []

    def make(count):
        for _ in range(count):
            node = Node()
            node.service = GroupService(node.session, lambda name, n=node: n.transport, node.groups)
            made.append(node)
        return made[-count:]

    yield make
    for node in made:
        node.close()


def members_of(nodes):
    return [Member(n.peer.agent_id, n.peer.address, f"actor{i}") for i, n in enumerate(nodes)]


def form(creator, nodes, group_id="1", name="one", timeout_s=20):
    deadline = time.monotonic() + timeout_s
    creator.service.form(group_id, name, "gloo", members_of(nodes), deadline)


def assert_nothing_left(nodes):
    assert [n.groups.all() for n in nodes] == [[]] * len(nodes)
    end = time.monotonic() + 5
    while any(n.transport._links or n.transport._meetings for n in nodes):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_are_connected_when_it_returns(nodes):
    creator, *members = nodes(5)
    form(creator, members)
    assert [len(n.transport._links) for n in members] == [6] * 4
    assert not creator.transport._links
    assert [n.groups.get("1").rank for n in members] == [0, 1, 2, 3]


def test_creator_can_be_a_member(nodes):
    members = nodes(3)
    form(members[1], members)
    assert [len(n.transport._links) for n in members] == [4] * 3


def test_group_of_one(nodes):
    creator, member = nodes(2)
    form(creator, [member])
    assert member.groups.get("1").others == ()


def test_end_and_make_again_under_the_same_name(nodes):
    creator, *members = nodes(4)
    for group_id in ("1", "2", "3"):
        form(creator, members, group_id)
        creator.service.dissolve(group_id, members_of(members), "destroyed")
        assert_nothing_left(members)


def test_overlapping_groups_end_one_by_one(nodes):
    creator, a, b, c = nodes(4)
    form(creator, [a, b], "1", "one")
    form(creator, [a, b, c], "2", "two")
    creator.service.dissolve("1", members_of([a, b]), "destroyed")
    assert [g.name for g in a.groups.all()] == ["two"]
    b.objects["x"] = pattern([1000], 1)
    buffers = blanks([1000])
    a.fetch(b.peer, "x", buffers)
    assert same(buffers, b.objects["x"])
    assert {link.scope for link in a.transport._links.values()} == {"2"}


def test_many_groups_at_once_do_not_wait_for_each_other(nodes):
    *creators, a, b, c = nodes(15)
    errors = []

    def make(creator, index):
        try:
            form(creator, [a, b, c], str(index), f"group {index}")
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=make, args=(creator, i)) for i, creator in enumerate(creators)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not errors
    assert len(a.groups.all()) == 12


def test_unreachable_member_is_named_and_nothing_is_left(nodes):
    creator, *members = nodes(4)
    members[2].session.close()
    with pytest.raises(MemberFailed) as failure:
        form(creator, members)
    assert failure.value.rank == 2
    assert_nothing_left(members[:2])


def test_member_that_cannot_connect_is_named_and_nothing_is_left(nodes):
    creator, *members = nodes(3)
    members[1].transport._backend.make = None
    with pytest.raises(MemberFailed, match="NoneType"):
        form(creator, members)
    assert_nothing_left(members)


def test_member_lost_meanwhile_is_named_at_once(nodes):
    creator, *members = nodes(3)
    members[1].session.serve("rdt.group.connect", lambda peer, body: {})  # and never reports
    threading.Timer(0.3, creator.session.lose, (members[1].peer.agent_id,)).start()
    started = time.monotonic()
    with pytest.raises(MemberFailed, match="gone") as failure:
        form(creator, members)
    assert failure.value.rank == 1
    assert time.monotonic() - started < 2


def test_silent_member_is_named_at_the_deadline(nodes):
    creator, *members = nodes(4)
    members[2].session.serve("rdt.group.connect", lambda peer, body: {})
    with pytest.raises(MemberFailed, match="in time") as failure:
        form(creator, members, timeout_s=2)
    assert failure.value.rank == 2
    assert_nothing_left(members)


def test_report_of_a_stranger_is_ignored(nodes):
    creator, stranger, *members = nodes(4)
    members[1].session.serve("rdt.group.connect", lambda peer, body: {})
    report = {"id": "1", "rank": 1, "error": ""}
    tell = threading.Timer(
        0.2, stranger.session.call, (creator.peer.address, "rdt.group.report", report, 5)
    )
    tell.start()
    with pytest.raises(MemberFailed, match="in time"):
        form(creator, members, timeout_s=1.5)
