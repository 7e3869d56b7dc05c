"""Capture a CUDA graph in global mode in user code, at the producer or consumer of a pull.

In that mode, CUDA ends the capture if any thread of the process makes a call that could disturb
it, for example an allocation. Calls of RDT's threads must not end it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import ray
from ci.gpu import result
from ci.gpu.programs import pair

NBYTES = 32 << 20
WAIT_S = 15.0


def main(told: result.Result) -> str:
    """Check each lane, with the capture at either end."""
    pair.need_gpus()
    with pair.local_ray():
        pairs = pair.spawn_pairs(pair.LANES)
        checks: dict[str, Callable[[], Any]] = {}
        for lane, (producer, consumer) in pairs.items():
            for side, capturing in (("producer", producer), ("consumer", consumer)):
                ends = producer, consumer, capturing
                checks[f"{lane}, {side} captures"] = partial(_pull, lane, *ends)
        pair.run_all(told, checks)
    return f"{len(checks)} pulls under a capture, all lanes, both ends"


def _pull(lane: str, producer: Any, consumer: Any, capturing: Any) -> str:
    for _ in range(2):  # the second time, connections and pools exist
        ref = pair.give(producer, lane, pair.filled, NBYTES, 8)
        pair.call(capturing, prepare)
        captured = capturing.run.remote(capture)
        pair.call(capturing, wait_for_capture)
        pull = consumer.run.remote(get_only, [ref])
        failure = ""
        try:
            ray.get(pull, timeout=WAIT_S)
        except Exception as error:
            failure = f"the pull: {result.describe(error)}; "
        pair.call(capturing, end_capture)
        broken = ray.get(captured, timeout=pair.LIMIT_S)
        if failure or broken:
            raise AssertionError(f"{failure}{broken}")
        wrong = pair.call(consumer, check_kept)
        if wrong:
            raise AssertionError(wrong)
    return "right"


# Actions.


def prepare(worker: pair.Worker) -> None:
    """Create the events that report the progress of the capture."""
    worker.kept["begun"], worker.kept["over"] = threading.Event(), threading.Event()


def capture(worker: pair.Worker) -> str:
    """Capture a graph that ``end_capture`` completes; return its error."""
    source = torch.full((1 << 20,), 3.0, device="cuda")
    target = torch.zeros_like(source)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="global"):
            target.copy_(source * 2)
            worker.kept["begun"].set()
            worker.kept["over"].wait(WAIT_S)
            target.add_(1)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        return f"the capture: {result.describe(error)}"
    finally:
        worker.kept["begun"].set()
    return "" if bool((target == 7).all()) else "the graph computes something else"


def wait_for_capture(worker: pair.Worker) -> None:
    """Return when the capture has begun."""
    assert worker.kept["begun"].wait(WAIT_S)


def end_capture(worker: pair.Worker) -> None:
    """Let the capture go on to its end."""
    worker.kept["over"].set()


def get_only(worker: pair.Worker, refs: list[Any]) -> None:
    """Get a tensor without using it: work on it could disturb a capture."""
    (worker.kept["tensor"],) = ray.get(refs, timeout=WAIT_S)


def check_kept(worker: pair.Worker) -> str:
    """Return the error of that tensor."""
    wrong = pair.wrong_bytes(worker.kept.pop("tensor"), 8)
    return f"{wrong} bytes are wrong" if wrong else ""


if __name__ == "__main__":
    result.run(main)
