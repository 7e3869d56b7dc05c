"""Run the conformance suite with tensors on the GPU."""

from __future__ import annotations

import sys

from ci.gpu import result
from ci.gpu.programs.pair import local_ray, need_gpus
from ray.experimental.rdt.transports import conformance

#: Actors at a time. Those of nccl need one GPU each.
MEMBERS = 4
#: GPUs that a transport needs; the others need one.
GPUS = {"gloo": 0, "nccl": MEMBERS}


def main(told: result.Result) -> str:
    """Run all cases; gloo carries host tensors only."""
    transport = sys.argv[1]
    needed = GPUS.get(transport, 1)
    need_gpus(needed)
    device = "cuda" if needed else "cpu"
    with local_ray(num_gpus=needed):
        conformance.check(transport, device=device, num_gpus=needed / MEMBERS)
    return f"{len(conformance.CASES)} cases, tensors on {device}"


if __name__ == "__main__":
    result.run(main)
