"""Measure the agent alone, lane by lane, between two processes, without Ray.

`python -m bench.native_lanes [LANE ...]` prints for each lane: the rate of large pulls into
recycled memory and of one object in many pieces, the time of small pulls, the cost of checksums,
and the added memory of producer and consumer. Rates are also printed as a share of one thread's
memcpy of warm memory, measured right before.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from ray.experimental.rdt import _agent

LANES = ("inproc", "map", "cma", "shm", "tcp")
LARGE = 256 << 20
PIECE, PIECES = 20_000, 10_000
SMALL = (4 << 10, 64 << 10)
KEYS = {"large": b"L" * 16, "pieces": b"P" * 16, "one": b"O" * 16}
TIMEOUT_S = 60
VERIFIED_PULLS = 30


def make_agent(lanes: frozenset[str]) -> _agent.Agent:
    """Return an agent with a session's defaults except for the lanes."""
    return _agent.Agent(secret=b"bench", bind_ip="127.0.0.1", lanes=lanes, pool_bytes=1 << 30)


def small_key(nbytes: int) -> bytes:
    """Return the key of the small object of this size."""
    return nbytes.to_bytes(16, "little")


def serve(agent: _agent.Agent) -> list[_agent.Block]:
    """Register all objects; the blocks keep their memory."""
    large = agent.allocate(LARGE)
    ctypes.memset(large.address, 1, LARGE)
    base = large.address
    register(agent, KEYS["large"], [base], [LARGE])
    register(agent, KEYS["one"], [base], [PIECE * PIECES])
    starts = [base + i * PIECE for i in range(PIECES)]
    register(agent, KEYS["pieces"], starts, [PIECE] * PIECES)
    for nbytes in SMALL:
        register(agent, small_key(nbytes), [base], [nbytes])
    return [large]


def register(agent: _agent.Agent, key: bytes, addrs: list[int], lens: list[int]) -> None:
    """Register spans given as plain lists."""
    agent.register(key, array("Q", addrs), array("Q", lens), 0)


@contextmanager
def producer(lane: str) -> Iterator[subprocess.Popen[str]]:
    """Run a second process that serves until the block ends."""
    command = [sys.executable, "-m", "bench.native_lanes", "--serve", lane]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.communicate("\n")


def serve_until_told(lane: str) -> None:
    """Run the second process: print its address, then its memory at intervals."""
    agent = make_agent(frozenset({lane}))
    blocks = serve(agent)
    print(agent.address.hex(), flush=True)
    before = resident_bytes()
    sys.stdin.readline()
    print(resident_bytes() - before, flush=True)
    sys.stdin.readline()
    agent.stop()
    del blocks


def resident_bytes() -> int:
    """Return the memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pull_times(
    agent: _agent.Agent,
    address: bytes,
    key: bytes,
    nbytes: int,
    count: int,
    is_verified: bool = False,
) -> list[float]:
    """Return seconds of each pull into a pool block, with or without checksums."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        asked = agent.ask_checksum(address, key) if is_verified else None
        block = agent.allocate(nbytes)
        where = array("Q", [block.address]), array("Q", [nbytes])
        pull = agent.pull(address, key, *where, is_verified)
        pull.wait(TIMEOUT_S)
        if asked is not None:
            assert int.from_bytes(asked.wait(TIMEOUT_S), "little") == pull.checksum
        times.append(time.perf_counter() - start)
        del block
    return times


def report_checksums(agent: _agent.Agent, address: bytes) -> None:
    """Print the cost of checksums for large pulls; both kinds of pull alternate."""
    plain: list[float] = []
    verified: list[float] = []
    for _ in range(VERIFIED_PULLS):
        plain += pull_times(agent, address, KEYS["large"], LARGE, 1)
        verified += pull_times(agent, address, KEYS["large"], LARGE, 1, True)
    rates = [LARGE / statistics.median(times[2:]) / 1e9 for times in (plain, verified)]
    cost = 1 - rates[1] / rates[0]
    print(f"  checksums {rates[0]:5.2f} GB/s without, {rates[1]:5.2f} with: {cost:.0%} less")


def memcpy_rate(agent: _agent.Agent) -> float:
    """Return bytes a second of one thread between warm buffers; the best of some."""
    source, target = agent.allocate(LARGE), agent.allocate(LARGE)
    ctypes.memset(source.address, 1, LARGE)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        ctypes.memmove(target.address, source.address, LARGE)
        times.append(time.perf_counter() - start)
    return LARGE / min(times)


def report(lane: str, agent: _agent.Agent, address: bytes) -> None:
    """Measure and print one lane."""
    yardstick = memcpy_rate(agent)
    print(f"{lane}: one thread's memcpy {yardstick / 1e9:.1f} GB/s")
    for name, nbytes in (("large", LARGE), ("one", PIECE * PIECES), ("pieces", PIECE * PIECES)):
        times = pull_times(agent, address, KEYS[name], nbytes, 12)[2:]
        best, middle = nbytes / min(times), nbytes / statistics.median(times)
        print(
            f"  {name:6} {nbytes / 1e6:5.0f} MB  median {middle / 1e9:5.2f} GB/s, best"
            f" {best / 1e9:5.2f} GB/s = {best / yardstick:.2f} of memcpy"
        )
    for nbytes in SMALL:
        times = pull_times(agent, address, small_key(nbytes), nbytes, 2000)
        middle, best = statistics.median(times) * 1e6, min(times) * 1e6
        print(f"  small  {nbytes / 1024:5.0f} KiB median {middle:5.0f} us, best {best:5.0f} us")
    report_checksums(agent, address)


def consumer_growth(agent: _agent.Agent, address: bytes) -> float:
    """Return the memory that a large pull into fresh memory adds, as a multiple of its bytes."""
    agent.trim()
    before = resident_bytes()
    pull_times(agent, address, KEYS["large"], LARGE, 1)
    return (resident_bytes() - before) / LARGE


def measure(lane: str) -> None:
    """Measure one lane between two processes, or inproc within this one."""
    agent = make_agent(frozenset({lane}))
    if lane == "inproc":
        blocks = serve(agent)
        report(lane, agent, agent.address)
        del blocks
    else:
        with producer(lane) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            address = bytes.fromhex(process.stdout.readline())
            growth = consumer_growth(agent, address)
            report(lane, agent, address)
            process.stdin.write("\n")
            process.stdin.flush()
            added = int(process.stdout.readline())
            print(f"  memory: producer +{added / 1e6:.1f} MB, consumer {growth:.3f}x the bytes")
    agent.stop()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lanes", nargs="*", metavar="LANE")
    parser.add_argument("--serve", choices=LANES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_until_told(args.serve)
        return
    for lane in args.lanes or LANES:
        measure(lane)


if __name__ == "__main__":
    main()
