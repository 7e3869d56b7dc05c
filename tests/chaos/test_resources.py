"""Connections that break, and what the system runs out of: pulls go on, or say what is missing."""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ray
from ray.experimental.rdt.common.errors import RDTFetchError
from tests.chaos.faults import LONG, agent_port, cut_control, cut_while_pulling, fetch, numbers
from tests.integration import user_transports
from tests.integration.peers import LARGE, Peer, ones, pulls, total_of_refs
from tests.support import wait_until

pytestmark = pytest.mark.slow


def test_connections_that_break_in_a_pull_of_a_gigabyte(
    producer: Any, taker: Any, huge: Any
) -> None:
    """Four times, each time all of them, on every lane."""
    port = ray.get(producer.run.remote(agent_port))
    cut = taker.run.remote(cut_while_pulling, port, 4)
    assert ray.get(taker.run.remote(fetch, [huge]), timeout=90) == "right"
    assert ray.get(cut) > 0


@pytest.mark.usefixtures("users_transports")
@pytest.mark.parametrize("name", ["shm", "pipe"])
def test_a_connection_that_breaks_in_a_transfer_of_a_users(producer: Any, name: str) -> None:
    """It begins anew. The first try would never have ended."""
    ref = producer.make.options(tensor_transport=name).remote(numbers, LARGE)
    called = user_transports.CALLS["receive"]
    user_transports.SCRIPT["receive"] = "hang once"
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(fetch, None, [ref])  # type: ignore[arg-type]
        wait_until(
            lambda: user_transports.CALLS["receive"] == called + 1, "a transfer is under way"
        )
        assert cut_control(None) > 0  # type: ignore[arg-type]
        assert got.result(30) == "right"
    assert user_transports.CALLS["receive"] == called + 2


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """A limit of this process, in force inside."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def starve(peer: Peer, given_s: float) -> threading.Timer:
    """This process may open no file, for so long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    with pytest.raises(OSError, match="Too many open files"):
        os.dup(0)
    restore = threading.Timer(given_s, resource.setrlimit, (resource.RLIMIT_NOFILE, (soft, hard)))
    restore.start()
    return restore


def fetch_starved(peer: Peer, refs: list[Any], given_s: float) -> str:
    restore = starve(peer, given_s)
    got = fetch(peer, refs)
    restore.join()
    return got


@pytest.mark.parametrize("side", ["producer", "consumer"])
def test_a_pull_waits_for_a_free_descriptor(spawn: Any, consumer: Any, side: str) -> None:
    maker, taker = spawn(), spawn()
    ref = maker.make.remote(numbers, LARGE)
    ray.get(taker.run.remote(fetch, [consumer.make.remote(numbers, LARGE)]))
    ray.wait([ref], fetch_local=False)
    if side == "consumer":
        got = taker.run.remote(fetch_starved, [ref], 1.0)
    else:
        ray.get(maker.run.remote(lambda peer: bool(starve(peer, 1.0))))
        got = taker.run.remote(fetch, [ref])
    assert ray.get(got, timeout=60) == "right"


def test_without_shared_memory_the_next_lane_serves(spawn: Any, producer: Any) -> None:
    def fetch_limited(peer: Peer, refs: list[Any]) -> str:
        with limited(resource.RLIMIT_FSIZE, 1 << 20):  # Less than the ring of the shm lane.
            return fetch(peer, refs)

    taker = spawn(runtime_env={"env_vars": {"RAY_RDT_LANES": "shm,tcp"}})
    ref = producer.make.remote(numbers, LARGE)
    assert ray.get(taker.run.remote(fetch_limited, [ref]), timeout=60) == "right"
    assert pulls(taker) == {"map": 0, "cma": 0, "shm": 0, "tcp": 1}
    assert ray.get(taker.run.remote(fetch, [ref])) == "right"


def test_nobody_can_take_the_shared_memory_away(producer: Any, takers: Any) -> None:
    """It has no name to unlink, and is sealed: no process that reads it can fault."""

    def truncate(peer: Peer) -> list[str]:
        errors = []
        for name in os.listdir("/proc/self/fd"):
            path = f"/proc/self/fd/{name}"
            if os.path.islink(path) and "memfd:rdt-ring" in os.readlink(path):
                try:
                    os.truncate(path, 0)
                except PermissionError as error:
                    errors.append(str(error))
        return errors

    ref = producer.make.remote(numbers, LARGE)
    assert ray.get(takers["shm"].run.remote(fetch, [ref])) == "right"
    for end in (producer, takers["shm"]):
        ray.get(end.run.remote(truncate))
    assert ray.get(takers["shm"].run.remote(fetch, [ref])) == "right"
    assert pulls(takers["shm"])["tcp"] == 0


def test_a_full_disk_for_logs_stops_nothing(spawn: Any, producer: Any) -> None:
    def fill_up(peer: Peer) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, sys.stdout.fileno())
        os.dup2(full, sys.stderr.fileno())
        logging.getLogger("ray.rdt").setLevel(logging.DEBUG)
        logging.getLogger("ray.rdt").addHandler(logging.StreamHandler(os.fdopen(full, "w")))

    unlogged = spawn()
    ray.get(unlogged.run.remote(fill_up))
    for _ in range(2):
        one, two = unlogged.make.remote(ones), producer.make.remote(ones)
        assert ray.get(unlogged.run.remote(total_of_refs, [two]), timeout=60) == LARGE
        assert ray.get(producer.run.remote(total_of_refs, [one]), timeout=60) == LARGE
    new = spawn().make.remote(ones)
    assert ray.get(unlogged.run.remote(total_of_refs, [new]), timeout=60) == LARGE


def test_without_memory_a_fetch_says_so_and_the_next_is_served(spawn: Any, producer: Any) -> None:
    def fetch_limited(peer: Peer, refs: list[Any]) -> str:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = LONG * 2  # Half of what the object takes.
        with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + room):
            try:
                ray.get(refs[0])
            except RDTFetchError as error:
                return str(error)
        return "there was memory"

    taker = spawn()
    ref = producer.make.remote(numbers)
    said = ray.get(taker.run.remote(fetch_limited, [ref]), timeout=60)
    assert "memory" in said
    assert ref.hex() in said
    assert ray.get(taker.run.remote(fetch, [ref]), timeout=60) == "right"
