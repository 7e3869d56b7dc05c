"""Send memory of expandable segments: it is shared, or named as the reason for a fallback."""

from __future__ import annotations

from typing import Any

import ray
from ci.gpu import result
from ci.gpu.programs import pair

NBYTES = 64 << 20
SETTING = "expandable_segments:True"


def main(told: result.Result) -> str:
    """Force cuda_ipc first, which shows the reason; then allow all transports."""
    pair.need_gpus()
    allocator = {"PYTORCH_CUDA_ALLOC_CONF": SETTING}
    with pair.local_ray():
        strict = pair.spawn_pair("cuda_ipc", **allocator)
        told.note(cuda_ipc=_forced(*strict))
        for actor in strict:
            ray.kill(actor)
        for lane in ("auto", "staged", "nixl"):
            pairs = pair.spawn_pair(lane, **allocator, **pair.LENIENT)
            told.note(**{lane: _pull(*pairs, lane)})
            for actor in pairs:
                ray.kill(actor)
    return f"cuda_ipc: {told.figures['cuda_ipc']}; auto, staged, nixl: arrived"


def _forced(producer: Any, consumer: Any) -> str:
    try:
        return _pull(producer, consumer, "cuda_ipc")
    except Exception as error:
        if "expandable" not in str(error):
            raise
        return "not shared, and the error names expandable segments"


def _pull(producer: Any, consumer: Any, lane: str) -> str:
    ref = pair.give(producer, lane, pair.filled, NBYTES, 6)
    wrong = pair.call(consumer, pair.take, [ref], 6)
    if wrong:
        raise AssertionError(f"{lane}: {wrong}")
    return "arrived"


if __name__ == "__main__":
    result.run(main)
