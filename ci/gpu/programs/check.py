"""Check that the machine can run the other steps: torch, Ray and nixl see the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ray
from ci.gpu import result
from ci.gpu.programs import pair


def main(told: result.Result) -> str:
    """Run all checks; fail with all errors."""
    checks: dict[str, Callable[[], str]] = {
        "imports": imports,
        "nixl": nixl_registers,
        "ray": ray_sees,
    }
    if pair.gpus():
        checks |= {"torch": torch_works, "lanes": lanes_carry}
    pair.run_all(told, checks)
    if not pair.gpus():
        return "torch sees no NVIDIA GPU: imports, nixl and Ray only"
    return f"{told.figures['torch']}; ray: {told.figures['ray']}; lanes: {told.figures['lanes']}"


def imports() -> str:
    """Import the wheel's modules, and nixl's API for the CUDA version of torch."""
    import nixl._api

    import ray.experimental.rdt._agent

    return f"{ray.experimental.rdt._agent.__file__}, {nixl._api.__file__}"


def ray_sees() -> str:
    """Let Ray count the GPUs, and run a task on a CPU."""
    with pair.local_ray(num_gpus=None, shows_logs=False):
        found = int(ray.cluster_resources().get("GPU", 0))
        assert ray.get(ray.remote(_one).remote(), timeout=pair.LIMIT_S) == 1
    if found != pair.gpus():
        raise AssertionError(f"Ray counts {found} GPU(s), torch {pair.gpus()}")
    return f"{found} GPU(s)"


def torch_works() -> str:
    """Compute a product on the GPU."""
    square = torch.ones(256, 256, device="cuda")
    assert float((square @ square).sum()) == 256.0**3
    return torch.cuda.get_device_name()


def nixl_registers() -> str:
    """Register GPU memory with nixl's agent, or host memory without a GPU."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent: Any = nixl_agent("gpu-check", nixl_agent_config(backends=["UCX"]))
    device = "cuda" if pair.gpus() else "cpu"
    memory = torch.ones(16 << 20, dtype=torch.uint8, device=device)
    agent.deregister_memory(agent.register_memory([memory]))
    return f"registers memory of {device}"


def lanes_carry() -> str:
    """Send 4 MiB from actor to actor over each lane."""
    wrong = []
    with pair.local_ray():
        for lane, (producer, consumer) in pair.spawn_pairs(pair.LANES).items():
            try:
                ref = pair.give(producer, lane, pair.filled, 4 << 20, 7)
                pair.receive(consumer, ref, 7)
            except Exception as error:
                wrong.append(f"{lane}: {result.describe(error)}")
    if wrong:
        raise AssertionError("; ".join(wrong))
    return "all carry"


def _one() -> int:
    return 1


if __name__ == "__main__":
    result.run(main)
