"""How fast one transport moves GPU tensors from actor to actor. Run by qualify.py."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

import ray

ROUNDS = 20
SIZES = {"4 KiB": 4 << 10, "256 MiB": 256 << 20}


@ray.remote
class Worker:
    """Makes tensors on its GPU, and takes those of others."""

    def make(self, nbytes: int) -> torch.Tensor:
        return torch.ones(nbytes, dtype=torch.uint8, device="cuda")

    def take(self, tensor: torch.Tensor) -> int:
        return int(tensor[-1])


def main(transport: str) -> int:
    """Prints a line for each size."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = 2 if transport == "nccl" else 1
    if gpus < needed:
        print(f"skipped: needs {needed} NVIDIA GPU(s); torch sees {gpus} here")
        return 0
    with ray.init(address="local", include_dashboard=False, log_to_driver=False):
        made: Any = Worker.options(num_gpus=needed / 2)  # type: ignore[attr-defined]
        producer, consumer = made.remote(), made.remote()
        for name, nbytes in SIZES.items():
            times = []
            for _ in range(ROUNDS + 3):
                started = time.perf_counter()
                ref = producer.make.options(tensor_transport=transport).remote(nbytes)
                assert ray.get(consumer.take.remote(ref)) == 1
                times.append(time.perf_counter() - started)
            median = statistics.median(times[3:])
            print(f"{transport} {name}: {1e3 * median:.2f} ms, {nbytes / median / 1e9:.2f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
