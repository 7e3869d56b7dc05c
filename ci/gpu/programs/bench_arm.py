"""One arm of the benchmark: a separate Ray with a producer and a consumer that wait for orders.

Runs with our wheel and with stock Ray. Orders are lines of JSON on stdin, each with a case and a
time budget. Each answer is a line on stdout with the seconds of the transfers or an error. The
first line, before any order, reports that the arm is ready. An arm exits at a time limit.

The consumer makes the call and times only ``ray.get`` of a reference to an existing object, because
Ray's own RDT also lets an owner get its object. The time ends when the consumer's device is idle.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from ray.exceptions import GetTimeoutError

import ray
from ci.gpu import result
from ci.gpu.programs import pair

#: Plain Ray must hold the largest object and the previous one, which may not be freed yet.
PLAIN_STORE_BYTES = 3 << 30


def main(arguments: list[str]) -> None:
    """Serve orders until stdin ends."""
    transport, device = arguments
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output is no answer

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    is_plain = transport == "plain"
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0.5 if device == "cuda" else 0}
    if not is_plain:
        options["enable_tensor_transport"] = True
    store = PLAIN_STORE_BYTES if is_plain else 200 << 20
    with pair.local_ray(object_store=store, shows_logs=False):
        make: Any = ray.remote(**options)(pair.Worker)
        producer, consumer = make.remote(), make.remote()
        for actor in (producer, consumer):
            ray.get(actor.run.remote(start, device), timeout=pair.LIMIT_S)
        answer(ready=True)
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer(seconds=_measure(producer, consumer, transport, device, order))
            except GetTimeoutError as error:  # its actors may hang while other arms wait
                answer(error=result.describe(error), is_over=True)
                break
            except Exception as error:
                answer(error=result.describe(error))


def _measure(
    producer: Any, consumer: Any, transport: str, device: str, order: dict[str, Any]
) -> list[float]:
    limit_s = order["limit_s"]
    held = producer.run.remote(hold, order["count"], order["nbytes"], device)
    ray.get(held, timeout=limit_s)
    times = consumer.run.remote(hand_over, producer, transport, device, order)
    seconds: list[float] = ray.get(times, timeout=limit_s)
    for actor in (producer, consumer):
        ray.get(actor.run.remote(drop), timeout=limit_s)
    return seconds


# Actions.


def start(_: pair.Worker, device: str) -> None:
    """Create the process's context."""
    torch.zeros(1, device=device)


def value_of(index: int) -> int:
    """Return the byte value of the tensor with a number."""
    return index * 31 % 251 + 1


def hold(worker: pair.Worker, count: int, nbytes: int, device: str) -> None:
    """Create the tensors to transfer, before anything is timed."""
    worker.kept["tensors"] = [
        torch.full((nbytes,), value_of(index), dtype=torch.uint8, device=device)
        for index in range(count)
    ]
    _synchronize(device)


def given(worker: pair.Worker) -> Any:
    """Return these tensors."""
    return worker.kept["tensors"]


def drop(worker: pair.Worker) -> None:
    """Return the memory for the other arms."""
    worker.kept.clear()
    torch.cuda.empty_cache()


def hand_over(
    _: pair.Worker, producer: Any, transport: str, device: str, order: dict[str, Any]
) -> list[float]:
    """Return seconds of each transfer, up to a count and within the time budget."""
    rounds, limit_s = order["rounds"], order["limit_s"]
    give = producer.run
    if transport != "plain":
        give = producer.run.options(tensor_transport=transport)
    times: list[float] = []
    started = time.monotonic()
    while len(times) <= rounds:
        ref = give.remote(given)
        ray.wait([ref], timeout=limit_s, fetch_local=False)
        _synchronize(device)
        begun = time.perf_counter()
        (tensors,) = ray.get([ref], timeout=limit_s)
        _synchronize(device)
        times.append(time.perf_counter() - begun)
        is_over = len(times) > 1 and time.monotonic() - started > order["budget_s"]
        if len(times) == 1 or is_over or len(times) > rounds:
            _verify(tensors, order["count"], order["nbytes"])
        del ref, tensors
        if is_over:
            break
    return times[1:]


def _verify(tensors: list[torch.Tensor], count: int, nbytes: int) -> None:
    sizes = {tensor.numel() for tensor in tensors}
    if len(tensors) != count or sizes != {nbytes}:
        raise AssertionError(f"{len(tensors)} tensors of {sizes} bytes, not {count} of {nbytes}")
    wrong = sum(
        pair.wrong_bytes(tensor, value_of(index)) != 0 for index, tensor in enumerate(tensors)
    )
    if wrong:
        raise AssertionError(f"{wrong} of {count} tensors have wrong bytes")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
