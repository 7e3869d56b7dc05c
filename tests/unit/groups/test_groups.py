"""Making and ending groups between nodes that are no Ray actors."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from ray.util.collective import types

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.groups import entered_groups, ray_group, service
from ray.experimental.rdt.groups.membership import Group, Member
from ray.experimental.rdt.groups.service import GroupService, MemberFailed
from ray.experimental.rdt.rpc import protocol
from tests.support import wait_until
from tests.unit.transports.process_group.gloo_peers import Node, blanks, pattern, same


@pytest.fixture
def nodes(monkeypatch):
    # Ray's collective module is one per process and takes each name once; these nodes share one.
    monkeypatch.setattr(service, "register_collectives", lambda group, transport: None)
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
    deadline = Deadline.after(timeout_s)
    creator.service.form(group_id, name, "gloo", members_of(nodes), deadline)


def assert_nothing_left(nodes):
    assert [n.groups.all() for n in nodes] == [[]] * len(nodes)
    end = Deadline.after(5)
    while any(n.transport._links._by_id or n.transport._pending._groups for n in nodes):
        assert not end.has_passed()
        time.sleep(0.01)


def test_all_are_connected_when_it_returns(nodes):
    creator, *members = nodes(5)
    form(creator, members)
    assert [len(n.transport._links._by_id) for n in members] == [6] * 4
    assert not creator.transport._links._by_id
    assert [n.groups.get("1").rank for n in members] == [0, 1, 2, 3]


def test_creator_can_be_a_member(nodes):
    members = nodes(3)
    form(members[1], members)
    assert [len(n.transport._links._by_id) for n in members] == [4] * 3


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
    assert {link.scope for link in a.transport._links._by_id.values()} == {"2"}


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
    members[1].session.serve(protocol.GROUP_CONNECT, lambda peer, body: {})  # and never reports
    threading.Timer(0.3, creator.session.lose, (members[1].peer.agent_id,)).start()
    started = time.monotonic()
    with pytest.raises(MemberFailed, match="gone") as failure:
        form(creator, members)
    assert failure.value.rank == 1
    assert time.monotonic() - started < 2


def test_silent_member_is_named_at_the_deadline(nodes):
    creator, *members = nodes(4)
    members[2].session.serve(protocol.GROUP_CONNECT, lambda peer, body: {})
    with pytest.raises(MemberFailed, match="in time") as failure:
        form(creator, members, timeout_s=2)
    assert failure.value.rank == 2
    assert_nothing_left(members)


def test_report_of_a_stranger_is_ignored(nodes):
    creator, stranger, *members = nodes(4)
    members[1].session.serve(protocol.GROUP_CONNECT, lambda peer, body: {})
    report = {"id": "1", "rank": 1, "error": ""}
    tell = threading.Timer(
        0.2, stranger.session.call, (creator.peer.address, protocol.GROUP_REPORT, report, 5)
    )
    tell.start()
    with pytest.raises(MemberFailed, match="in time"):
        form(creator, members, timeout_s=1.5)


class RayCollective:
    """A fake of ``ray.util.collective``: groups by name, made and ended under one lock."""

    def __init__(self):
        self.lock = threading.Lock()
        self.groups = {}

    def init_collective_group(self, size, rank, backend, name):
        with self.lock:
            if name in self.groups:
                raise RuntimeError("Trying to initialize a group a second time.")
            self.groups[name] = ray_group.RDTGroup(size, rank, name)

    def is_group_initialized(self, name):
        with self.lock:
            return name in self.groups

    def destroy_collective_group(self, name):
        with self.lock:
            self.groups.pop(name).destroy_group()


@pytest.fixture
def ray_collective(monkeypatch):
    made = RayCollective()
    monkeypatch.setattr(service, "_ray_collective", lambda: made)
    monkeypatch.setattr(entered_groups, "by_name", {})
    monkeypatch.setattr(ray_group, "_TIMEOUT_S", 15.0)
    return made


_enter = service.register_collectives


def only_one_enters(monkeypatch, node):
    """Ray's collectives are one per process, and take each name once."""

    def enter(group, transport):
        if transport is node.transport:
            _enter(group, transport)

    monkeypatch.setattr(service, "register_collectives", enter)


def wait_in_barrier(group):
    group.barrier()


def wait_in_recv(group):
    options = types.RecvOptions()
    options.src_rank = 1
    group.recv([torch.zeros(1)], options)


@pytest.mark.parametrize("operate", [wait_in_barrier, wait_in_recv])
def test_member_that_waits_in_its_first_operation_leaves_at_once(
    nodes, ray_collective, monkeypatch, operate
):
    creator, *members = nodes(3)
    only_one_enters(monkeypatch, members[0])
    form(creator, members)
    entered, errors = ray_collective.groups["one"], []

    def wait_for_the_other():
        try:
            operate(entered)
        except Exception as error:
            errors.append(error)

    waiting = threading.Thread(target=wait_for_the_other, daemon=True)
    waiting.start()
    process_groups = entered._of_all, *entered._pairs
    wait_until(lambda: any(each._lock.locked() for each in process_groups), "the member waits")
    started = time.monotonic()
    creator.service.dissolve("1", members_of(members), "destroyed")
    assert time.monotonic() - started < 3
    assert not ray_collective.groups
    waiting.join(5)
    assert "destroyed" in str(errors[0])


def test_name_that_is_taken_stays_with_the_user(nodes, ray_collective):
    (node,) = nodes(1)
    group = Group("1", "one", "gloo", 0, tuple(members_of([node])))
    ray_collective.groups["one"] = users = object()
    with pytest.raises(RuntimeError, match="second time"):
        _enter(group, node.transport)
    service.unregister_collectives(group)
    assert ray_collective.groups == {"one": users}


def test_group_that_is_left_before_it_is_entered_leaves_its_name_free(
    nodes, ray_collective, monkeypatch
):
    creator, member = nodes(2)
    only_one_enters(monkeypatch, member)
    connect = member.transport.connect

    def connect_and_leave(group, deadline):
        connect(group, deadline)
        creator.service.dissolve("1", members_of([member]), "destroyed")

    monkeypatch.setattr(member.transport, "connect", connect_and_leave)
    with pytest.raises(MemberFailed, match="destroyed meanwhile"):
        form(creator, [member])
    assert not ray_collective.groups
    assert not entered_groups.by_name
