"""The gloo transport between nodes of one process, over real sockets."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.groups.membership import Group, Member
from ray.experimental.rdt.rpc import protocol
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.process_group.link import (
    LinkClosed,
    TransferFailed,
    TransferRefused,
    TransferTimedOut,
)
from tests.support import wait_until
from tests.unit.transports.process_group.gloo_peers import Node, blanks, open_links, pattern, same

KB, MB = 1 << 10, 1 << 20


@pytest.fixture
def nodes():
    made = []

    def make(count=2):
        made.extend(Node() for _ in range(count))
        return made[-count:]

    yield make
    for node in made:
        node.close()


def round_trip(consumer, producer, sizes, name="x", seed=1):
    producer.objects[name] = pattern(sizes, seed)
    buffers = blanks(sizes)
    consumer.fetch(producer.peer, name, buffers)
    assert same(buffers, producer.objects[name])


def run_all(actions, timeout_s=60):
    """Run all at once. Raise the error of the first one that fails."""
    errors = []

    def guarded(action):
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(a,), daemon=True) for a in actions]
    for thread in threads:
        thread.start()
    end = Deadline.after(timeout_s)
    for thread in threads:
        thread.join(end.left_s())
        assert not thread.is_alive(), "a transfer hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [0, 5, 0],
        [64 * KB],
        [MB, 3, 300 * KB, 7, 8, 0],
        [33 * MB],
        [20_000] * 700,
    ],
    ids=lambda sizes: f"{len(sizes)}x{max(sizes, default=0)}",
)
def test_round_trip(nodes, sizes):
    round_trip(*nodes(), sizes)


def test_one_link_serves_many_transfers(nodes):
    consumer, producer = nodes()
    for seed in range(5):
        round_trip(consumer, producer, [100 * KB], seed=seed)
    assert len(open_links(consumer)) == len(open_links(producer)) == 1


def test_link_is_made_once_when_many_ask(nodes):
    consumer, producer = nodes()
    run_all([lambda i=i: round_trip(consumer, producer, [KB], f"o{i}", i) for i in range(8)])
    assert len(open_links(consumer)) == 1


def test_both_directions_at_once(nodes):
    a, b = nodes()
    there = [lambda i=i: round_trip(a, b, [i * KB + 1, MB], f"o{i}", i) for i in range(6)]
    back = [lambda i=i: round_trip(b, a, [i * KB + 1, MB], f"o{i}", i) for i in range(6)]
    run_all(there + back)


def test_refusal_reaches_the_consumer_and_keeps_the_link(nodes):
    consumer, producer = nodes()
    producer.objects["x"] = [torch.empty(4, dtype=torch.uint8, device="meta")]
    with pytest.raises(TransferRefused, match="CPU tensors only"):
        consumer.fetch(producer.peer, "x", blanks([4]))
    links = open_links(consumer)
    round_trip(consumer, producer, [4])
    assert open_links(consumer) == links


def test_a_failed_transfer_keeps_no_buffer(nodes):
    consumer, producer = nodes()
    producer.objects["x"] = [torch.empty(4, dtype=torch.uint8, device="meta")]

    def fetch(buffers):
        with pytest.raises(TransferRefused):
            consumer.fetch(producer.peer, "x", buffers)

    buffers = blanks([4])
    kept = weakref.ref(buffers[0])
    gc.disable()
    try:
        fetch(buffers)
        del buffers
        wait_until(lambda: kept() is None, "the buffer is freed without the collector")
    finally:
        gc.enable()


def test_refusal_of_the_consumer_closes_the_link_and_is_not_tried_again(nodes):
    consumer, producer = nodes()
    producer.objects["x"] = pattern([4], 1)
    with pytest.raises(TransferRefused, match="CPU tensors only") as refused:
        consumer.fetch(producer.peer, "x", [torch.empty(4, dtype=torch.uint8, device="meta")])
    assert isinstance(refused.value, TransportUnavailable)
    assert not refused.value.retryable
    wait_until(lambda: not open_links(consumer), "the producer must not send for long")
    round_trip(consumer, producer, [4])


def test_route_that_the_producer_refused_gives_the_link_back(nodes):
    consumer, producer = nodes()
    route = consumer.transport.route(producer.peer, Deadline.after(20))
    consumer.transport.abandon(route, may_send=False)
    assert [link.leased_until for link in open_links(consumer)] == [None]
    round_trip(consumer, producer, [4])
    assert [link.id for link in open_links(consumer)] == [route["link"]]


def test_route_that_is_given_up_ends_the_send(nodes):
    consumer, producer = nodes()
    producer.objects["x"] = pattern([MB], 1)
    route = consumer.transport.route(producer.peer, Deadline.after(20))
    body = {"name": "x", "route": route, "timeout_s": 20}
    consumer.session.call(producer.peer.address, "send", body, 20)
    consumer.transport.abandon(route, may_send=True)
    wait_until(lambda: bool(producer.send_errors), "the send ends", 5)
    assert "gave a transfer up" in str(producer.send_errors[0])
    round_trip(consumer, producer, [4])


@pytest.mark.parametrize("may_send", [False, True])
def test_route_whose_link_is_gone_can_be_given_up(nodes, may_send):
    consumer, producer = nodes()
    route = consumer.transport.route(producer.peer, Deadline.after(20))
    consumer.transport._find(route).close("the connection broke")
    consumer.transport.abandon(route, may_send)
    assert not open_links(consumer)


def test_other_sizes_are_an_error_and_nobody_dies(nodes):
    consumer, producer = nodes()
    producer.objects["x"] = pattern([MB], 1)
    with pytest.raises(TransferFailed, match="expected"):
        consumer.fetch(producer.peer, "x", blanks([100]))
    round_trip(consumer, producer, [MB])


def test_deadline_ends_the_transfer_and_the_next_one_works(nodes):
    consumer, producer = nodes()
    round_trip(consumer, producer, [KB])
    producer.objects["x"] = pattern([MB], 1)
    producer.send_delay_s = 1.0
    started = time.monotonic()
    with pytest.raises(TransferTimedOut):
        consumer.fetch(producer.peer, "x", blanks([MB]), timeout_s=0.3)
    assert time.monotonic() - started < 0.9
    producer.send_delay_s = 0.0
    round_trip(consumer, producer, [MB], "y")


def test_nothing_is_written_after_a_failure(nodes):
    consumer, producer = nodes()
    round_trip(consumer, producer, [1])  # the link is made
    producer.objects["x"] = [torch.full((256 * MB,), 7, dtype=torch.uint8)]
    buffers = blanks([256 * MB])
    with pytest.raises(TransferTimedOut):
        consumer.fetch(producer.peer, "x", buffers, timeout_s=0.05)
    before = buffers[0].clone()
    time.sleep(0.3)
    assert torch.equal(before, buffers[0])


def test_who_closes_a_link_second_waits_until_nothing_is_written(nodes, monkeypatch):
    """The deadline of a transfer passes while another thread closes its link."""
    consumer, producer = nodes()
    producer.objects["x"] = pattern([MB], 1)
    producer.send_delay_s = 30.0
    route = consumer.transport.route(producer.peer, Deadline.after(20))
    link = consumer.transport._find(route)
    killing, gate, ends = threading.Event(), threading.Event(), []
    kill = link._backend.kill

    def slow_kill(group):
        killing.set()
        gate.wait(10)
        kill(group)

    def receive():
        try:
            consumer.transport.receive(route, blanks([MB]), Deadline.after(0.3))
        except TransferFailed as error:
            ends.append((error, gate.is_set()))

    monkeypatch.setattr(link._backend, "kill", slow_kill)
    threads = [
        threading.Thread(target=link.close, args=("the first",)),
        threading.Thread(target=receive),
    ]
    for thread in reversed(threads):
        thread.start()
        wait_until(lambda: bool(link._transfers), "the transfer is under way")
    assert killing.wait(5)
    threads[1].join(1)
    gate.set()
    for thread in threads:
        thread.join(5)
    ((error, was_over),) = ends
    assert isinstance(error, TransferTimedOut)
    assert was_over


def test_loss_of_the_connection_fails_its_waiters_at_once(nodes):
    consumer, producer, other = nodes(3)
    round_trip(consumer, other, [KB])
    producer.objects["x"] = pattern([MB], 1)
    producer.send_delay_s = 30.0
    lose = threading.Timer(0.3, consumer.session.lose, (producer.peer.agent_id,))
    lose.start()
    started = time.monotonic()
    with pytest.raises(LinkClosed, match="broke") as failure:
        consumer.fetch(producer.peer, "x", blanks([MB]))
    assert time.monotonic() - started < 1.5
    assert failure.value.retryable
    round_trip(consumer, other, [KB])


def test_loss_of_the_connection_at_the_producer_fails_the_consumer(nodes):
    consumer, producer = nodes()
    producer.objects["x"] = pattern([MB], 1)
    producer.send_delay_s = 30.0
    lose = threading.Timer(0.3, producer.session.lose, (consumer.peer.agent_id,))
    lose.start()
    started = time.monotonic()
    with pytest.raises(LinkClosed, match=r"other end.*broke"):
        consumer.fetch(producer.peer, "x", blanks([MB]))
    assert time.monotonic() - started < 1.5
    producer.send_delay_s = 0.0
    round_trip(consumer, producer, [MB])


def test_close_ends_transfers_and_refuses_new_ones(nodes):
    consumer, producer = nodes()
    producer.objects["x"] = pattern([MB], 1)
    producer.send_delay_s = 30.0
    threading.Timer(0.3, consumer.transport.close).start()
    with pytest.raises(LinkClosed, match="shut down"):
        consumer.fetch(producer.peer, "x", blanks([MB]))
    with pytest.raises(TransportUnavailable, match="shut down"):
        consumer.fetch(producer.peer, "x", blanks([MB]))


def test_unreachable_peer_is_not_tried_for_each_transfer(nodes):
    consumer, producer = nodes()
    peer = producer.peer
    producer.session.close()
    with pytest.raises(TransportUnavailable, match="no gloo connection"):
        consumer.transport.route(peer, Deadline.after(20))
    started = time.monotonic()
    with pytest.raises(TransportUnavailable, match="no gloo connection"):
        consumer.transport.route(peer, Deadline.after(20))
    assert time.monotonic() - started < 0.05


def test_route_keeps_its_deadline(nodes):
    consumer, producer = nodes()
    producer.session.serve(protocol.LINK_OPEN, lambda peer, body: time.sleep(2) or {})
    started = time.monotonic()
    with pytest.raises(TransportUnavailable, match="in time"):
        consumer.transport.route(producer.peer, Deadline.after(0.3))
    assert time.monotonic() - started < 0.8


def test_route_gives_up_when_the_peer_is_lost_meanwhile(nodes):
    consumer, producer = nodes()
    producer.session.serve(protocol.LINK_OPEN, lambda peer, body: {})  # and never joins
    threading.Timer(0.2, consumer.session.lose, (producer.peer.agent_id,)).start()
    with pytest.raises(TransportUnavailable):
        consumer.transport.route(producer.peer, Deadline.after(1.5))


def group_of(nodes, group_id="g1", name="group"):
    members = tuple(
        Member(n.peer.agent_id, n.peer.address, f"actor{i}") for i, n in enumerate(nodes)
    )
    for rank, node in enumerate(nodes):
        node.groups.add(Group(group_id, name, "gloo", rank, members))
    run_all(
        [lambda n=n: n.transport.connect(n.groups.get(group_id), Deadline.after(20)) for n in nodes]
    )


def test_group_has_all_its_links_before_the_first_transfer(nodes):
    members = nodes(4)
    group_of(members)
    assert [len(open_links(n)) for n in members] == [6] * 4
    for consumer in members:
        for producer in members:
            if consumer is not producer:
                round_trip(consumer, producer, [KB])
    assert [len(open_links(n)) for n in members] == [6] * 4


def test_destroyed_group_fails_its_transfers_and_leaves_others(nodes):
    a, b, c = nodes(3)
    group_of([a, b], "g1", "one")
    group_of([a, c], "g2", "two")
    b.objects["x"] = pattern([MB], 1)
    b.send_delay_s = 30.0

    def end():
        for node in (a, b):
            node.groups.remove("g1")
            node.transport.disconnect("g1", "collective group 'one' was destroyed")

    threading.Timer(0.3, end).start()
    with pytest.raises(LinkClosed, match="'one' was destroyed"):
        a.fetch(b.peer, "x", blanks([MB]))
    b.send_delay_s = 0.0
    round_trip(a, c, [KB])
    round_trip(a, b, [KB])  # as a pair
    assert sorted(link.scope for link in open_links(a)) == ["", "g2", "g2"]


def test_connect_names_the_member_that_cannot_be_reached(nodes):
    a, b = nodes()
    members = (
        Member(a.peer.agent_id, a.peer.address, "actor0"),
        Member(b.peer.agent_id, b.peer.address, "actor1"),
    )
    a.groups.add(Group("g1", "group", "gloo", 0, members))
    with pytest.raises(TransportUnavailable, match=r"actor1.*group was destroyed"):
        a.transport.connect(a.groups.get("g1"), Deadline.after(20))


def test_tls_without_permission_is_refused(nodes, monkeypatch):
    consumer, producer = nodes()
    settings.cache_clear()
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(TransportUnavailable, match="TLS"):
        consumer.transport.route(producer.peer, Deadline.after(1))
    monkeypatch.undo()
    settings.cache_clear()


def test_default_process_group_is_left_alone(nodes):
    round_trip(*nodes(), [KB])
    assert not torch.distributed.is_initialized()
