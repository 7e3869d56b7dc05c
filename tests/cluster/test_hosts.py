"""Two test hosts and a network: the tcp lane carries the tensors, and its loss is known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.faults import FREED_WITHIN_S
from tests.cluster.hosts import (
    ENVIRONMENT,
    PEER_TIMEOUT_S,
    Host,
    HostsUnavailable,
    ray_on,
    two_hosts,
)
from tests.support import BUSY_S, KNOWN_WITHIN_S, ROOT

pytestmark = [pytest.mark.netns, pytest.mark.slow]


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, Any]]:
    """What one driver saw that did everything."""
    try:
        with two_hosts() as hosts, ray_on(hosts) as address:
            yield run_driver_on(hosts, address)
    except HostsUnavailable as error:
        pytest.skip(str(error))


def run_driver_on(hosts: tuple[Host, Host], address: str) -> dict[str, Any]:
    host, other = hosts
    driver = ROOT / "tests" / "cluster" / "driver_on_hosts.py"
    done = subprocess.run(
        host.command(sys.executable, driver, address, host.device, other.name, other.device),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


@pytest.mark.parametrize("way", ["there", "back"])
def test_tensors_cross_the_network_over_tcp(report: dict[str, Any], way: str) -> None:
    assert report[way] == {"right": True, "pulls": {"map": 0, "cma": 0, "shm": 0, "tcp": 2}}


def test_driver_pulls_over_tcp(report: dict[str, Any]) -> None:
    assert report["driver"]
    assert report["driver_pulls"] == 1


def test_targets_receive_over_tcp(report: dict[str, Any]) -> None:
    assert report["target"]


def test_gloo_crosses_the_network(report: dict[str, Any]) -> None:
    assert report["gloo"]


@pytest.mark.parametrize("fault", ["reset", "stalled", "congested", "half_open"])
def test_a_pull_survives_what_happens_to_the_network(report: dict[str, Any], fault: str) -> None:
    """Connections that are reset, lost frames, late ones, and a peer that has forgotten all."""
    seen = report["faults"][fault]
    assert seen["got"] == "right"
    if fault != "stalled":
        assert seen["happened"] > 0, "no connection was there to reset, no frame lost"


def test_frees_of_a_cut_off_owner_arrive_when_it_is_back(report: dict[str, Any]) -> None:
    assert report["faults"]["freed"]["after_s"] < FREED_WITHIN_S


def test_killed_producer_on_the_other_host_is_known_soon(report: dict[str, Any]) -> None:
    killed = report["killed"]
    assert killed["after_s"] < KNOWN_WITHIN_S + BUSY_S
    assert killed["is_death"]
    assert killed["id"] in killed["text"]


def test_cut_network_is_known_within_the_peer_timeout(report: dict[str, Any]) -> None:
    cut = report["cut"]
    assert cut["after_s"] < PEER_TIMEOUT_S + KNOWN_WITHIN_S + BUSY_S
    assert cut["id"] in cut["text"]
