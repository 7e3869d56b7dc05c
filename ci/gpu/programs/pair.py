"""Shared parts of programs: a local Ray, and two actors on one GPU that exchange tensors."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import ray
from ci.gpu.result import Result, Skip, describe

#: How each lane is forced: the named transport, and the environment of both actors.
LANES: dict[str, tuple[str, dict[str, str]]] = {
    "cuda_ipc": ("cuda_ipc", {}),
    "auto": ("auto", {}),
    "staged": ("auto", {"RAY_RDT_LANES": "inproc,cma,shm,tcp"}),
    "nixl": ("nixl", {}),
}
STRICT = {"RAY_RDT_STRICT_TRANSPORT": "1"}
LENIENT = {"RAY_RDT_STRICT_TRANSPORT": "0"}

#: Upper limit of each call when all is well.
LIMIT_S = 40.0
#: Limit while eight processes import torch and create a context.
START_LIMIT_S = 60.0

#: Bytes that are checked at a time.
_PART = 16 << 20

Action = Callable[..., Any]


def gpus() -> int:
    """Return the number of GPUs that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def need_gpus(count: int = 1) -> None:
    """Raise Skip if there are fewer."""
    if gpus() < count:
        raise Skip(f"needs {count} NVIDIA GPU(s); torch sees {gpus()} here")


def store_bytes(wanted: int) -> int:
    """Return an object store size that fits into shared memory."""
    free = shutil.disk_usage("/dev/shm").free
    return max(80 << 20, min(wanted, free * 6 // 10))


@contextmanager
def local_ray(
    num_gpus: int | None = 1, object_store: int = 200 << 20, shows_logs: bool = True
) -> Iterator[None]:
    """Run a local Ray with at most this many GPUs. Works with stock Ray too.

    Without a number, Ray counts the GPUs. The workers' logs go into the report, except during
    measurements.
    """
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=None if num_gpus is None else min(num_gpus, gpus()),
        include_dashboard=False,
        log_to_driver=shows_logs,
        object_store_memory=store_bytes(object_store),
    )
    try:
        yield
    finally:
        ray.shutdown()


class Worker:
    """Actor that runs a program's actions; an action gets the actor as its first argument.

    Attributes:
        kept: Objects that actions keep.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def run(self, action: Action, *args: Any) -> Any:
        """Run an action; the result is a plain object unless the options name a transport."""
        return action(self, *args)


def spawn(environment: dict[str, str] | None = None, share: float = 0.5, **options: Any) -> Any:
    """Return an actor on a share of a GPU."""
    env = {"env_vars": environment or {}}
    made: Any = ray.remote(num_cpus=0, num_gpus=share, runtime_env=env, **options)(Worker)
    return made.remote()


def spawn_pairs(lanes: Iterable[str], **environment: str) -> dict[str, tuple[Any, Any]]:
    """Return a ready producer and consumer for each lane; other lanes are forbidden."""
    names = list(lanes)
    share = 1 / (2 * len(names))
    pairs = {}
    for lane in names:
        env = {**STRICT, **LANES[lane][1], **environment}
        pairs[lane] = spawn(env, share, max_concurrency=4), spawn(env, share, max_concurrency=4)
    started = [actor.run.remote(start_cuda) for pair in pairs.values() for actor in pair]
    ray.get(started, timeout=START_LIMIT_S)
    return pairs


def spawn_pair(lane: str, **environment: str) -> tuple[Any, Any]:
    """Return the producer and the consumer of one lane."""
    return spawn_pairs([lane], **environment)[lane]


def call(actor: Any, action: Action, *args: Any) -> Any:
    """Return the result of an action at an actor."""
    return ray.get(actor.run.remote(action, *args), timeout=LIMIT_S)


def give(actor: Any, lane: str, action: Action, *args: Any) -> Any:
    """Return a reference to the result of an action, over a lane; the object exists."""
    ref = actor.run.options(tensor_transport=LANES[lane][0]).remote(action, *args)
    ready, _ = ray.wait([ref], timeout=LIMIT_S, fetch_local=False)
    if not ready:
        raise TimeoutError(f"the producer did not return within {LIMIT_S:g} s")
    return ref


def receive(consumer: Any, ref: Any, value: int) -> str:
    """Let an actor get a tensor; raise AssertionError if its bytes or its device are wrong."""
    wrong = call(consumer, take, [ref], value)
    if wrong:
        raise AssertionError(wrong)
    return "arrived"


def run_all(told: Result, checks: Mapping[str, Callable[[], Any]]) -> None:
    """Run checks in sequence and record their results; raise AssertionError with all errors."""
    wrong = []
    for name, check in checks.items():
        try:
            told.note(**{name: check()})
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{name}: {describe(error)}")
            told.note(**{name: describe(error)})
    if wrong:
        raise AssertionError("; ".join(wrong))


# Actions.


def start_cuda(_: Worker) -> str:
    """Create the process's context; return the name of its GPU."""
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    return torch.cuda.get_device_name()


def filled(_: Worker, nbytes: int, value: int) -> torch.Tensor:
    """Return a new tensor of one value."""
    return torch.full((nbytes,), value, dtype=torch.uint8, device="cuda")


def wrong_bytes(tensor: torch.Tensor, value: int) -> int:
    """Return how many bytes differ from a value, with little extra memory."""
    parts = (tensor[start : start + _PART] for start in range(0, tensor.numel(), _PART))
    return sum(int(torch.count_nonzero(part - value)) for part in parts)


def take(_: Worker, refs: list[Any], value: int) -> str:
    """Get the tensor of a reference; return its error, or ""."""
    (tensor,) = ray.get(refs, timeout=LIMIT_S)
    wrong = wrong_bytes(tensor, value)
    if tensor.device.type != "cuda":
        return f"it arrived on {tensor.device}"
    return f"{wrong} of {tensor.numel()} bytes are wrong" if wrong else ""
