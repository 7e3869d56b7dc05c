"""The driver of test_hosts.py; runs in the first host. Prints what it saw as one line of JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import ActorDiedError, ObjectLostError

import ray
from tests.cluster import network_faults
from tests.integration.peers import LARGE, SMALL, Peer, count_up, ones, pulls, total, total_of_refs
from tests.support import wait_until

MANY = 16 << 20  # floats: 64 MiB


def check_bytes(_: Peer, refs: list[Any]) -> bool:
    big, odd, tiny = ray.get(refs)
    expected = torch.arange(MANY, dtype=torch.float32)
    return (
        torch.equal(big, expected)
        and torch.equal(odd[0], expected[: LARGE + 1])
        and len(odd[1]) == 2000
        and all(torch.equal(one, torch.full((33,), float(i))) for i, one in enumerate(odd[1]))
        and bool(tiny.sum() == SMALL)
    )


def make_odd(_: Peer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return count_up(_, LARGE + 1), [torch.full((33,), float(i)) for i in range(2000)]


def transfer(maker: Any, taker: Any) -> dict[str, Any]:
    refs = [
        maker.make.remote(count_up, MANY),
        maker.make.remote(make_odd),
        maker.make.remote(ones, SMALL),
    ]
    return {"right": ray.get(taker.run.remote(check_bytes, refs)), "pulls": pulls(taker)}


def get_into(peer: Peer, refs: list[Any]) -> bool:
    target = torch.zeros(LARGE)
    ray.experimental.set_target_for_ref(refs[0], [target])
    return ray.get(refs[0]) is target and torch.equal(target, count_up(peer))


def lose(ref: Any, cut: Any) -> dict[str, Any]:
    ray.wait([ref], fetch_local=False)
    cut()
    began = time.monotonic()
    try:
        ray.get(ref, timeout=60)
    except ObjectLostError as error:
        return {
            "after_s": time.monotonic() - began,
            "text": str(error),
            "is_death": isinstance(error, ActorDiedError),
            "id": ref.hex(),
        }
    return {}


def kill(pid: int) -> None:
    """Both hosts are on this machine."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the process has ended")


def main(address: str, device: str, other: str, other_device: str) -> None:
    ray.init(address=address, log_to_driver=False)
    here, there, spare = (Peer.options(resources={host: 1}).remote() for host in ("a", "b", "b"))
    report: dict[str, Any] = {"there": transfer(here, there), "back": transfer(there, here)}
    report["driver"] = ray.get(there.make.remote(count_up, MANY)).sum().item() > 0
    report["driver_pulls"] = ray.experimental.rdt.stats()["pulls_tcp"]
    report["target"] = ray.get(there.run.remote(get_into, [here.make.remote(count_up)]))
    gloo = here.make.options(tensor_transport="gloo").remote(ones)
    report["gloo"] = ray.get(there.run.remote(total, gloo)) == LARGE
    report["both"] = ray.get(here.run.remote(total_of_refs, [there.make.remote(ones)])) == LARGE
    cable = network_faults.Cable(device, other, other_device)
    report["faults"] = network_faults.report(cable, here, there)
    ref = spare.make.remote(ones)
    pid = ray.get(spare.pid.remote())
    report["killed"] = lose(ref, lambda: kill(pid))
    ref = there.make.remote(count_up, MANY)
    report["cut"] = lose(
        ref, lambda: subprocess.run(["ip", "link", "set", device, "down"], check=True)
    )
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
