"""Check that no pull waits for work that the producer queues after it returned the object.

When the object exists, the producer's default stream gets some seconds of work. The pull must end
long before that work.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import ray
from ci.gpu import result
from ci.gpu.programs import pair

#: A kernel of torch's own tests that runs for a number of cycles.
_sleep: Any = torch.cuda._sleep

NBYTES = 64 << 20
BUSY_S = 4.0
#: Two processes share the GPU by time slices, which slows the pull slightly.
ENOUGH_S = BUSY_S / 4


def main(told: result.Result) -> str:
    """Pull from an idle and from a busy producer."""
    lane = sys.argv[1]
    pair.need_gpus()
    with pair.local_ray():
        producer, consumer = pair.spawn_pair(lane)
        idle = [_pull(producer, consumer, lane, busy_s=0.0)[0] for _ in range(3)]
        told.note(first_s=idle[0], idle_s=min(idle[1:]))
        busy_s, is_still_busy = _pull(producer, consumer, lane, BUSY_S)
        told.note(busy_s=busy_s, is_still_busy=is_still_busy)
    remark = f"busy producer {1e3 * busy_s:.1f} ms, idle {1e3 * min(idle[1:]):.1f} ms"
    if busy_s > ENOUGH_S or not is_still_busy:
        raise AssertionError(f"the pull waited for the producer's queue: {remark}")
    return remark


def _pull(producer: Any, consumer: Any, lane: str, busy_s: float) -> tuple[float, bool]:
    """Return seconds of the pull, and whether the producer still had work at its end."""
    ref = pair.give(producer, lane, pair.filled, NBYTES, 5)
    pair.call(producer, queue_work, busy_s)
    seconds, wrong = pair.call(consumer, timed_take, [ref])
    is_still_busy = pair.call(producer, is_busy)
    if wrong:
        raise AssertionError(wrong)
    return seconds, is_still_busy


# Actions.


def queue_work(worker: pair.Worker, seconds: float) -> None:
    """Queue some seconds of work on the current stream, in kernels of about 20 ms."""
    if "cycles" not in worker.kept:
        worker.kept["cycles"] = _cycles_per_second()
    for _ in range(int(seconds * 50)):
        _sleep(int(worker.kept["cycles"] / 50))
    worker.kept["end"] = torch.cuda.Event()
    worker.kept["end"].record()


def is_busy(worker: pair.Worker) -> bool:
    """Tell whether that work is still running."""
    return not worker.kept["end"].query()


def timed_take(_: pair.Worker, refs: list[Any]) -> tuple[float, str]:
    """Return seconds until the bytes of a reference arrive, and their error."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    (tensor,) = ray.get(refs, timeout=pair.LIMIT_S)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    wrong = pair.wrong_bytes(tensor, 5)
    return seconds, f"{wrong} bytes are wrong" if wrong else ""


def _cycles_per_second() -> float:
    cycles = 20_000_000
    _sleep(cycles)
    torch.cuda.synchronize()
    started = time.perf_counter()
    _sleep(cycles)
    torch.cuda.synchronize()
    return cycles / (time.perf_counter() - started)


if __name__ == "__main__":
    result.run(main)
