"""The groups of a process."""

from __future__ import annotations

import pytest

from ray.experimental.rdt.groups.membership import Group, GroupEnded, Member, Membership
from ray.experimental.rdt.rpc import protocol

A, B, C = (Member(bytes([n]) * 16, b"at%d" % n, f"actor{n}") for n in range(3))


def group(group_id="1", name="one", backend="gloo", rank=0, members=(A, B)):
    return Group(group_id, name, backend, rank, members)


def test_common_group_is_found_by_the_other_process():
    groups = Membership()
    groups.add(group())
    assert groups.find_common("gloo", B.agent_id).id == "1"
    assert groups.find_common("gloo", C.agent_id) is None
    assert groups.find_common("nccl", B.agent_id) is None


def test_process_has_no_group_in_common_with_itself():
    groups = Membership()
    groups.add(group())
    assert groups.find_common("gloo", A.agent_id) is None


def test_oldest_common_group_serves():
    groups = Membership()
    groups.add(group("1", "one"))
    groups.add(group("2", "two", members=(A, B, C)))
    assert groups.find_common("gloo", B.agent_id).id == "1"
    assert groups.find_common("gloo", C.agent_id).id == "2"
    groups.remove("1")
    assert groups.find_common("gloo", B.agent_id).id == "2"


def test_left_group_is_not_joined_by_a_late_request():
    groups = Membership()
    assert groups.remove("1") is None
    with pytest.raises(GroupEnded, match="'one'"):
        groups.add(group())


def test_same_name_again_after_leaving():
    groups = Membership()
    groups.add(group("1"))
    with pytest.raises(ValueError, match="'one'"):
        groups.add(group("2"))
    groups.remove("1")
    groups.add(group("2"))
    assert [g.id for g in groups.all()] == ["2"]


def test_others_are_in_rank_order():
    assert group(rank=1, members=(A, B, C)).others == (A, C)


def test_member_survives_being_sent():
    assert Member(*protocol.unpack(protocol.pack(A))) == A
