"""Pull with less than 1 GiB free on the device: objects that fit arrive, others are errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ci.gpu import result
from ci.gpu.programs import pair

FREE_NBYTES = 900 << 20
SMALL, LARGE = 128 << 20, 2 << 30
#: torch keeps large blocks and a last smaller one, so that other processes cannot take them.
BLOCK_NBYTES = 4 << 30


def main(told: result.Result) -> str:
    """Check all lanes; ``cuda_ipc`` shares the large object, of which no copy would fit."""
    pair.need_gpus()
    with pair.local_ray():
        pairs = pair.spawn_pairs(pair.LANES)
        refs = {}
        for lane, (producer, consumer) in pairs.items():
            _pull(consumer, pair.give(producer, lane, pair.filled, 1 << 20, 1), 1)
            refs[lane] = pair.give(producer, lane, pair.filled, SMALL, 3)
        shared = pair.give(pairs["cuda_ipc"][0], "cuda_ipc", pair.filled, LARGE, 4)
        copied = pair.give(pairs["auto"][0], "auto", pair.filled, LARGE, 4)
        told.note(free_mib=pair.call(pairs["auto"][0], fill_device) >> 20)
        checks: dict[str, Callable[[], Any]] = {
            lane: partial(_pull, pairs[lane][1], refs[lane], 3) for lane in pairs
        }
        checks["2 GiB shared"] = lambda: _pull(pairs["cuda_ipc"][1], shared, 4)
        checks["2 GiB copied"] = lambda: _does_not_fit(pairs["auto"][1], copied)
        checks["after it"] = lambda: _pull(pairs["auto"][1], refs["auto"], 3)
        pair.run_all(told, checks)
    return f"{told.figures['free_mib']} MiB free: all lanes carry, 2 GiB are shared"


def _pull(consumer: Any, ref: Any, value: int) -> str:
    try:
        return pair.receive(consumer, ref, value)
    finally:
        pair.call(consumer, release)


def _does_not_fit(consumer: Any, ref: Any) -> str:
    """Check that the error names the memory."""
    try:
        pair.call(consumer, pair.take, [ref], 4)
    except Exception as error:
        if "memory" not in str(error):
            raise
        return result.describe(error)
    return "arrived: the card has enough memory"


# Actions.


def release(_: pair.Worker) -> None:
    """Return torch's cached memory to the device: other processes need it."""
    torch.cuda.empty_cache()


def fill_device(worker: pair.Worker) -> int:
    """Allocate GPU memory until little is left; return how much that is."""
    worker.kept["blocks"] = []
    while (spare := _free() - FREE_NBYTES) >= 2 << 20:
        nbytes = min(spare, BLOCK_NBYTES) >> 21 << 21
        block = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        worker.kept["blocks"].append(block)
    return _free()


def _free() -> int:
    free, _ = torch.cuda.mem_get_info()
    return int(free)


if __name__ == "__main__":
    result.run(main)
