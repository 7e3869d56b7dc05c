"""A program of ordinary Ray calls that writes down what they give, a line of JSON for each.

test_no_surprise.py runs it under stock Ray and under the wheel, and what it writes has to be the
same. It knows nothing of RDT, and leaves out what differs from run to run (ids, ports, processes).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray.util import ActorPool, inspect_serializability, register_serializer
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.queue import Queue

import ray

#: Large enough for Ray's object store.
LARGE = 1 << 18

CHECKS: dict[str, Callable[[], Any]] = {}


def check(action: Callable[[], Any]) -> Callable[[], Any]:
    """What ``action`` returns is written down under its name."""
    CHECKS[action.__name__] = action
    return action


SHARED: dict[Any, Any] = {}


def shared(kind: Any, **options: Any) -> Any:
    """An actor that the checks share."""
    key = (kind.__ray_metadata__.class_name, *options.items())
    if key not in SHARED:
        SHARED[key] = kind.options(**options).remote()
    return SHARED[key]


def forever() -> None:
    """Until it is cancelled: a long sleep would not notice."""
    while True:
        time.sleep(0.02)


@dataclass
class Point:
    x: Any
    y: Any


class OwnError(Exception):
    """A user's."""

    def __init__(self, text: str, code: int):
        super().__init__(text, code)
        self.code = code


def told(value: Any) -> Any:
    """A value in words, as far as users can tell values apart."""
    for kind, tell in TELLERS.items():
        if isinstance(value, kind):
            return tell(value)
    return f"{type(value).__name__} {plain(repr(value))}"


def tell_tensor(tensor: torch.Tensor) -> Any:
    found = [type(tensor).__name__, str(tensor.dtype), list(tensor.shape), str(tensor.layout)]
    found += [tensor.requires_grad, tensor.is_leaf, tensor.is_quantized]
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return [*found, plain(str(tensor))]
    storage = tensor.untyped_storage()
    found += [list(tensor.stride()), tensor.storage_offset(), storage.nbytes(), tensor.is_shared()]
    return [*found, str(tensor.detach().sum())]


def tell_array(array: np.ndarray) -> Any:
    flags = [array.flags.writeable, array.flags.c_contiguous, array.flags.owndata]
    return ["array", str(array.dtype), list(array.shape), *flags, repr(array.ravel()[:3])]


def failure(error: BaseException) -> list[Any]:
    """An error in words: what it is, what it says, and what it can be caught as."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return [names, plain(str(error)), told(getattr(error, "cause", None)) if error.args else None]


#: In words, by class.
TELLERS: dict[Any, Callable[[Any], Any]] = {
    torch.Tensor: tell_tensor,
    np.ndarray: tell_array,
    BaseException: failure,
    dict: lambda value: {str(key): told(each) for key, each in value.items()},
    list | tuple | set: lambda value: [type(value).__name__, *map(told, value)],
    Point: lambda value: ["Point", told(value.x), told(value.y)],
}


def plain(text: str) -> str:
    """A text without what differs from run to run, or from one installation to the other."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text.partition("\nChecking Serializability")[0])
    text = re.sub(r"\b[0-9a-f]{8,}(-[0-9a-f]{4,})*\b", "ID", text)
    text = re.sub(r"pid[=:] ?\d+|\b\d+\.\d+\.\d+\.\d+(:\d+)?|0x[0-9a-f]+", "...", text)
    text = re.sub(r'File "[^"]*/([^/"]+)", line \d+', r'File "\1"', text)
    text = text.replace("'tensor_transport', ", "")  # what RDT adds to the options of tasks
    # Of the connection's end and the news of the restart, either may come first.
    text = re.sub(
        r"(?<=temporarily unavailable: )(IOError|RpcError): .*?\.(?= The task)", "...", text
    )
    return re.sub(r"\d{4}-\d\d-\d\d [\d:,.]+|port \d+", "...", text)


def caught(action: Callable[[], Any]) -> Any:
    """What an action gives, or how it fails."""
    try:
        return told(action())
    except BaseException as error:
        return failure(error)


# Values.


def values() -> dict[str, Any]:
    base = torch.arange(100.0)
    return {
        "none": None,
        "bytes": b"raw",
        "text": "text",
        "number": 5,
        "nested": [1, {"a": (2, {3})}, Point(1, 2)],
        "array": np.arange(10),
        "large array": np.ones(LARGE),
        "array of objects": np.array([1, "x", None], dtype=object),
        "tensor": torch.ones(10),
        "large tensor": torch.ones(LARGE),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "view": base[10:20],
        "views": [base[:5], base[5:]],
        "tied": [base, base],
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(3, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "requires grad": torch.ones(3, requires_grad=True),
        "module": dict(torch.nn.Linear(3, 2, bias=False).state_dict()).keys(),
        "error": OwnError("mine", 7),
    }


@check
def round_trips() -> Any:
    found = {name: caught(lambda v=value: ray.get(ray.put(v))) for name, value in values().items()}
    identity = ray.remote(num_cpus=0)(lambda value: value)
    for name, value in values().items():
        found[f"{name} through a task"] = caught(lambda v=value: ray.get(identity.remote(v)))
    return found


@check
def round_trips_through_an_actor() -> Any:
    actor = shared(Sync)
    found = {}
    for name, value in values().items():
        found[name] = caught(lambda v=value: ray.get(actor.give.remote(v)))
        found[f"{name} by reference"] = caught(
            lambda v=value: ray.get(actor.tell.remote(ray.put(v), key=ray.put(v)))
        )
    return found


@check
def what_cannot_be_pickled() -> Any:
    generator = (i for i in range(3))
    return [
        caught(lambda: ray.put(generator)),
        caught(lambda: ray.put(ray.put(1))),
        caught(lambda: ray.get(shared(Sync).give.remote(threading.Lock()))),
        caught(lambda: ray.get(shared(Sync).run.remote(lambda: (i for i in range(3))))),
        caught(lambda: ray.get(5)),
        caught(lambda: ray.wait([ray.put(1)], num_returns=2)),
        inspect_serializability(generator, print_file=open(os.devnull, "w"))[0],
    ]


@check
def users_serializers() -> Any:
    import copyreg

    used = []
    register_serializer(
        Point, serializer=lambda p: used.append(1) or (p.x, p.y), deserializer=lambda p: Point(*p)
    )
    first = told(ray.get(ray.put(Point(torch.ones(3), 1))))

    class Sub(torch.Tensor):
        pass

    copyreg.pickle(Sub, lambda t: used.append(2) or (torch.tensor, (t.tolist(),)))
    second = told(ray.get(ray.put(torch.ones(3).as_subclass(Sub))))
    return [first, second, used]


# Tasks.


@ray.remote(num_cpus=0)
def task(*args: Any, **kwargs: Any) -> Any:
    return [told(args), told(kwargs)]


@ray.remote(num_cpus=0, max_retries=0)
def fail(text: str = "on purpose") -> None:
    raise OwnError(text, 3)


@ray.remote(num_cpus=0)
def items(count: int) -> Iterator[Any]:
    for index in range(count):
        yield torch.full((3,), float(index))
    raise OwnError("after the items", 1)


@check
def tasks() -> Any:
    array, tensor = ray.put(np.ones(LARGE)), ray.put(torch.ones(3))
    pair = ray.remote(num_cpus=0, num_returns=2)(lambda: (1, torch.ones(2)))
    return [
        told(ray.get(task.remote(1, array, tensor, key=tensor, nested=[5]))),
        told(ray.get(ray.get(ray.remote(num_cpus=0)(lambda r: r[0]).remote([tensor])))),
        told(ray.get(pair.remote())),
        told(ray.get(pair.options(num_returns=1).remote())),
        told(pair.options(num_returns=0).remote()),
        caught(lambda: ray.get(pair.options(num_returns=3).remote())),
        caught(lambda: ray.get(fail.remote())),
        caught(lambda: ray.get(task.remote(fail.remote("as an argument")))),
        caught(lambda: ray.get([tensor, fail.remote()])),
        caught(lambda: task.remote.__self__.options(num_cpus=-1).remote()),
        caught(lambda: task.options(nothing=1)),
        caught(lambda: ray.remote(nothing=1)(len)),
        caught(lambda: ray.remote(lambda a: a).remote()),
        caught(lambda: task(1)),
        caught(
            lambda: ray.get(ray.remote(num_cpus=0, max_retries=0)(lambda: os._exit(1)).remote())
        ),
    ]


@check
def retries() -> Any:
    import tempfile

    marker = os.path.join(tempfile.mkdtemp(), "tried")

    @ray.remote(num_cpus=0, max_retries=1, retry_exceptions=[OwnError])
    def once() -> str:
        if not os.path.exists(marker):
            open(marker, "w").close()
            raise OwnError("once", 1)
        return "second"

    return told(ray.get(once.remote()))


@check
def generators() -> Any:
    def drain(generator: Any) -> list[Any]:
        return [caught(lambda r=ref: ray.get(r)) for ref in generator]

    async def drain_async(generator: Any) -> list[Any]:
        found = []
        async for ref in generator:
            try:
                found.append(told(await ref))
            except Exception as error:
                found.append(failure(error))
        return found

    actor, loop = shared(Sync), shared(Async)
    dynamic = items.options(num_returns="dynamic").remote(2)
    ready, rest = ray.wait([items.remote(1), items.remote(1)], num_returns=2)
    finished = loop.items.remote(1)
    return [
        drain(items.remote(2)),
        drain(ray.get(dynamic)),
        drain(actor.items.remote(2)),
        drain(ray.get(actor.items.options(num_returns="dynamic").remote(2))),
        drain(loop.items.remote(2)),
        asyncio.run(drain_async(loop.items.remote(2))),
        [len(ready), len(rest)],
        [type(finished).__name__, len(drain(finished)), finished.is_finished()],
        caught(lambda: finished.send(1)),
        caught(lambda: ray.put(actor.items.remote(1))),
        caught(lambda: actor.give.options(num_returns="streaming").remote(1)),
    ]


@check
def cancelled() -> Any:
    waiting = ray.remote(num_cpus=0)(forever).remote()
    queued = ray.remote(num_cpus=64)(forever).remote()
    sleeping = shared(Async).sleep.remote(60)
    ray.wait([waiting, sleeping], timeout=1)
    found = []
    for ref in (waiting, queued, sleeping):
        ray.cancel(ref)
        found.append(caught(lambda r=ref: ray.get(r, timeout=30)))
    return found


# Actors.


def where() -> list[Any]:
    """On which thread the caller runs; its number is the pool's."""
    thread = threading.current_thread()
    name = re.sub(r"\d+", "N", thread.name)
    return [name, thread is threading.main_thread(), thread.daemon]


def threads() -> list[str]:
    return sorted({re.sub(r"\d+", "N", thread.name) for thread in threading.enumerate()})


def process() -> dict[str, Any]:
    """What user code can see of its process."""
    handlers = {s.name: str(type(signal.getsignal(s)).__name__) for s in signal.Signals}
    modules = ("torch.distributed", "ray.experimental.collective", "uvloop", "asyncio")
    variables = sorted(name for name in os.environ if name.startswith(("RAY_", "OMP_", "TORCH")))
    return {
        "handlers": handlers,
        "modules": [name for name in modules if name in sys.modules],
        "variables": [name for name in variables if name != "RAY_RAYLET_PID"],
        "threads": threads(),
        "switch interval": sys.getswitchinterval(),
        "start method": __import__("multiprocessing").get_start_method(allow_none=True),
        "torch threads": torch.get_num_threads(),
    }


@ray.remote(num_cpus=0)
class Sync:
    def __init__(self, value: Any = None):
        self.value = value

    def give(self, value: Any) -> Any:
        return value

    def tell(self, value: Any, key: Any = None) -> Any:
        return [told(value), told(key)]

    def run(self, action: Callable[[], Any]) -> Any:
        return action()

    def fail(self) -> None:
        raise OwnError("in an actor", 2)

    def items(self, count: int) -> Iterator[Any]:
        yield from (torch.full((3,), float(index)) for index in range(count))

    @ray.method(num_returns=2)
    def pair(self) -> Any:
        return 1, torch.ones(3)

    def leave(self) -> None:
        ray.actor.exit_actor()


@ray.remote(num_cpus=0)
class Async:
    async def give(self, value: Any) -> Any:
        return value

    async def where(self) -> Any:
        return where()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def items(self, count: int) -> Any:
        for index in range(count):
            yield torch.full((3,), float(index))

    async def awaits(self, refs: list[Any]) -> Any:
        return told([await refs[0], *await asyncio.gather(*refs)])

    async def process(self) -> Any:
        return process()

    def plain(self) -> Any:
        return where()


@ray.remote(num_cpus=0, concurrency_groups={"io": 1, "compute": 2})
class Grouped:
    @ray.method(concurrency_group="io")
    def io(self) -> Any:
        return where()

    @ray.method(concurrency_group="compute")
    def compute(self) -> Any:
        return where()

    def default(self) -> Any:
        return where()


@ray.remote(num_cpus=0)
class Broken:
    def __init__(self) -> None:
        raise OwnError("in a constructor", 4)

    def call(self) -> None: ...


@check
def actors() -> Any:
    actor = Sync.options(name="named").remote(ray.put(torch.ones(3)))
    return [
        told(ray.get(actor.run.remote(lambda: 5))),
        told(ray.get(ray.get_actor("named").give.remote(torch.ones(3)))),
        told(ray.get(actor.pair.remote())),
        told(ray.get(actor.give.options(name="other", concurrency_group=None).remote(1))),
        told(ray.get(actor.__ray_call__.remote(lambda self: self.value))),
        told(ray.get(ray.remote(num_cpus=0)(lambda a: ray.get(a.give.remote(3))).remote(actor))),
        caught(lambda: ray.get(actor.fail.remote())),
        caught(lambda: ray.get(actor.give.remote(actor.fail.remote()))),
        caught(actor.give.remote),
        caught(lambda: actor.nothing),
        caught(lambda: actor.give(1)),
        caught(lambda: actor.give.options(nothing=1)),
        caught(Sync),
        caught(lambda: Sync.options(name="named").remote()),
        caught(lambda: ray.get_actor("nobody")),
        caught(lambda: ray.get(shared(Broken).call.remote())),
        told(list(ActorPool([actor]).map(lambda a, v: a.give.remote(v), [1, 2]))),
        caught(lambda: ray.get(actor.leave.remote())),
        caught(lambda: ray.get(actor.give.remote(1))),
    ]


@check
def restarts() -> Any:
    actor = Sync.options(max_restarts=1, max_task_retries=1).remote()
    first = ray.get(actor.run.remote(os.getpid))
    died = caught(
        lambda: ray.get(actor.run.options(max_task_retries=0).remote(lambda: os._exit(1)))
    )
    second = ray.get(actor.run.remote(os.getpid))
    ray.kill(actor)

    def until_it_has_ended() -> None:
        while True:  # a call that comes before the kill is answered
            ray.get(actor.run.remote(os.getpid), timeout=30)

    return [died, first != second, caught(until_it_has_ended)]


@check
def threads_of_user_code() -> Any:
    plain_actor, threaded = shared(Sync), shared(Sync, max_concurrency=3)
    coroutines, grouped, ref = shared(Async), shared(Grouped), ray.put(torch.ones(3))
    on_callback, done = [], threading.Event()

    def callback(value: Any) -> None:
        on_callback.append([told(value), where()])
        done.set()

    ref._on_completed(callback)
    done.wait(30)
    return [
        ray.get(ray.remote(num_cpus=0)(where).remote()),
        ray.get(plain_actor.run.remote(where)),
        ray.get(threaded.run.remote(where)),
        ray.get([coroutines.where.remote(), coroutines.plain.remote()]),
        ray.get([grouped.io.remote(), grouped.compute.remote(), grouped.default.remote()]),
        on_callback,
    ]


@check
def processes_of_user_code() -> Any:
    return [
        ray.get(ray.remote(num_cpus=0)(process).remote()),
        ray.get(shared(Sync).run.remote(process)),
        ray.get(shared(Async).process.remote()),
        process(),
    ]


@check
def signals_in_an_actor() -> Any:
    def hear() -> list[int]:
        heard: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        return heard

    return ray.get(shared(Sync).run.remote(hear))


@check
def awaiting() -> Any:
    async def wait_for(refs: list[Any]) -> list[Any]:
        return list(await asyncio.gather(*refs))

    actor = shared(Async)
    refs = [actor.give.remote(value) for value in (1, torch.ones(LARGE), np.ones(3))]
    return [
        told(asyncio.run(wait_for(refs))),
        told(refs[1].future().result(timeout=30)),
        ray.get(actor.awaits.remote(refs)),
        caught(lambda: asyncio.run(wait_for([fail.remote("awaited")]))),
    ]


# The rest.


@check
def waiting() -> Any:
    slow = ray.remote(num_cpus=0)(forever).remote()
    refs = [ray.put(1), task.remote(1), slow]
    done = [
        [len(part) for part in ray.wait(refs, num_returns=2, timeout=30)],
        [len(part) for part in ray.wait(refs, num_returns=3, timeout=0.2, fetch_local=False)],
        caught(lambda: ray.get(slow, timeout=0.2)),
        caught(lambda: ray.wait([refs[0], refs[0]])),
    ]
    ray.cancel(slow)
    return done


@check
def placement_groups_and_queues() -> Any:
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    remove_placement_group(group)
    queue = Queue()
    queue.put(torch.ones(3))
    return told(queue.get())


@check
def runtime_environments() -> Any:
    mine = ray.remote(num_cpus=0, runtime_env={"env_vars": {"MINE": "yes"}})(
        lambda: os.environ["MINE"]
    )
    return told(ray.get(mine.remote()))


@check
def faces() -> Any:
    """Names and signatures of the calls; what RDT adds is left out by the test."""
    import inspect

    calls = (ray.init, ray.get, ray.put, ray.wait, ray.kill, ray.cancel, ray.method, ray.remote)
    return {
        "ray": sorted(name for name in dir(ray) if not name.startswith("__")),
        "signatures": {call.__name__: str(inspect.signature(call)) for call in calls},
        "reference": sorted(name for name in dir(ray.put(1)) if not name.startswith("__")),
        "version": ray.__version__,
    }


def main(results: str) -> None:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
    )
    with open(results, "w") as file:
        for name, action in CHECKS.items():
            print(json.dumps([name, result_of(action)]), file=file, flush=True)
        ray.shutdown()
        print(json.dumps(["threads after the end", threads()]), file=file)
        print(json.dumps(["where Ray is", ray.__file__]), file=file)


def result_of(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        return ["the check itself failed", failure(error)]


if __name__ == "__main__":
    main(sys.argv[1])
