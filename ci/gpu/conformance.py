"""What every transport must do, with GPU tensors. Run by qualify.py."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import torch

import ray
from ray.experimental.rdt.transports import conformance

#: Actors at a time. Those of nccl need a GPU each.
MEMBERS = 4


def main(transport: str) -> int:
    """Runs the cases; gloo carries tensors in host memory only."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = {"gloo": 0, "nccl": MEMBERS}.get(transport, 1)
    if gpus < needed:
        print(f"skipped: needs {needed} NVIDIA GPU(s); torch sees {gpus} here")
        return 0
    device = "cuda" if needed else "cpu"
    with (
        ray.init(address="local", include_dashboard=False, log_to_driver=False),
        redirect_stdout(sys.stderr),
    ):
        conformance.check(transport, device=device, num_gpus=needed / MEMBERS)
    print(f"{len(conformance.CASES)} cases, tensors on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
