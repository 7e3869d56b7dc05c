"""Check NCCL as far as the GPUs allow."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed

import ray
from ci.gpu import result
from ci.gpu.programs import pair

NBYTES = 4 << 20


def main(told: result.Result) -> str:
    """Check one rank, two processes on one GPU (refused), and a transfer between two GPUs."""
    pair.need_gpus()
    if not torch.distributed.is_nccl_available():
        raise result.Skip("this torch has no NCCL")
    told.note(one_rank=one_rank())
    with pair.local_ray(num_gpus=2):
        told.note(one_gpu=refused_on_one_gpu())
        if pair.gpus() >= 2:
            told.note(two_gpus=between_gpus())
    two = told.figures.get("two_gpus", "needs two GPUs")
    return f"one rank: {told.figures['one_rank']}; one GPU: {told.figures['one_gpu']}; two: {two}"


def one_rank() -> str:
    """Create a communicator of one rank in this process."""
    torch.cuda.set_device(0)
    store = torch._C._distributed_c10d.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        tensor = torch.full((1024,), 3.0, device="cuda")
        torch.distributed.all_reduce(tensor)
        torch.cuda.synchronize()
        assert bool((tensor == 3).all())
    finally:
        torch.distributed.destroy_process_group()
    return "right"


def refused_on_one_gpu() -> str:
    """Check that RDT refuses first: NCCL would wait for its own timeout."""
    producer, consumer = (pair.spawn(pair.STRICT) for _ in range(2))
    started = time.monotonic()
    try:
        _hand_over(producer, consumer)
    except Exception as error:
        if "one GPU" not in str(error):
            raise
        return f"refused within {time.monotonic() - started:.1f} s"
    finally:
        for actor in (producer, consumer):
            ray.kill(actor)
    raise AssertionError("NCCL carried between two processes of one GPU")


def between_gpus() -> str:
    """Send from GPU to GPU."""
    producer, consumer = (pair.spawn(pair.STRICT, share=1) for _ in range(2))
    _hand_over(producer, consumer)
    return "arrived"


def _hand_over(producer: Any, consumer: Any) -> None:
    ref = producer.run.options(tensor_transport="nccl").remote(pair.filled, NBYTES, 9)
    pair.receive(consumer, ref, 9)


if __name__ == "__main__":
    result.run(main)
