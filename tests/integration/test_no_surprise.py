"""Using RDT changes nothing else: threads, signals, environment, pickling, torch, imports.

And without it all is as in stock Ray, which the same program of ordinary calls shows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import LARGE, Peer, ones, total
from tests.support import MAKER, ROOT, START, run_driver, run_program


@ray.remote(num_cpus=0)
class Watched:
    """Tells what it sees of its process, from its first line on."""

    def __init__(self) -> None:
        self.threads = [threading.current_thread() is threading.main_thread()]
        self.environment = dict(os.environ)
        self.signals: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _: self.signals.append(number))

    @ray.method(tensor_transport="auto")
    def make(self) -> torch.Tensor:
        self.threads.append(threading.current_thread() is threading.main_thread())
        return torch.ones(LARGE)

    def take(self, tensor: torch.Tensor) -> float:
        self.threads.append(threading.current_thread() is threading.main_thread())
        return float(tensor.sum())

    def raise_signal(self) -> list[int]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return self.signals

    def report(self) -> dict[str, Any]:
        changed = dict(os.environ.items() ^ self.environment.items())
        return {"threads": self.threads, "changed": changed}


def test_user_code_stays_on_the_main_thread_and_handles_signals(
    spawn: Any, producer: Any, transport: str
) -> None:
    watched = spawn(Watched)
    made = watched.make.options(tensor_transport=transport).remote()
    assert ray.get(producer.run.remote(total, made)) == LARGE
    other = producer.make.options(tensor_transport=transport).remote(ones)
    assert ray.get(watched.take.remote(other)) == LARGE
    assert ray.get(watched.raise_signal.remote()) == [signal.SIGUSR1]
    assert ray.get(watched.report.remote()) == {"threads": [True] * 3, "changed": {}}


def reducers_of_tensor(_: Any) -> dict[str, Any]:
    import copyreg

    from ray import cloudpickle

    tables = [copyreg.dispatch_table, cloudpickle.CloudPickler.dispatch]
    tables.append(getattr(cloudpickle.CloudPickler, "_extra_reducers", {}))
    tables.append(cloudpickle.CloudPickler.dispatch_table)
    return {
        "registered": [
            kind.__name__
            for table in tables
            for kind in list(table)
            if isinstance(kind, type) and issubclass(kind, torch.Tensor)
        ]
    }


def test_no_serializer_is_registered_for_tensors(producer: Any, consumer: Any) -> None:
    ref = producer.make.remote(ones)
    ray.get([ref, consumer.run.remote(total, ref)])
    ray.get(ray.put(torch.ones(LARGE), _tensor_transport="auto"))
    assert reducers_of_tensor(None) == {"registered": []}
    for peer in (producer, consumer):
        assert ray.get(peer.run.remote(reducers_of_tensor)) == {"registered": []}


def test_plain_objects_are_no_rdt_objects_in_a_process_that_has_used_rdt(
    producer: Any, consumer: Any
) -> None:
    ray.get(consumer.run.remote(total, producer.make.remote(ones)))
    before = ray.get(producer.stats.remote())
    plain = producer.run.remote(ones)
    assert ray.get(consumer.run.remote(total, plain)) == LARGE
    assert ray.get(producer.stats.remote())["stored_objects"] <= before["stored_objects"]
    assert not ray._private.worker.global_worker.rdt_manager.is_managed_object(plain.hex())


def test_users_own_serializer_keeps_working(tmp_path: Path) -> None:
    source = (
        START
        + MAKER
        + """
start()
import torch
from ray.util import register_serializer

used = []
def undo(numbers):
    return torch.tensor(numbers)
def do(tensor):
    used.append(tensor)
    return tensor.tolist()
register_serializer(torch.Tensor, serializer=do, deserializer=undo)
maker = Maker.remote()
assert ray.get(ray.put(torch.ones(3))).tolist() == [1, 1, 1]
assert len(used) == 1
made = ray.put(torch.ones(100_000), _tensor_transport="auto")
assert ray.get(maker.total.remote(made)) == 100_000
assert len(used) == 1, "RDT carries its tensors itself"
assert ray.get(maker.make.remote(100_000)).sum() == 100_000
assert ray.get(ray.put(torch.ones(3))).tolist() == [1, 1, 1]
assert len(used) == 2
print("passed")
"""
    )
    assert "passed" in run_driver(source, tmp_path)


def test_users_own_default_process_group_keeps_working(spawn: Any, transport: str) -> None:
    def join(peer: Peer, file: str, rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{file}", rank=rank, world_size=2
        )

    def reduce(_: Peer, tensor: torch.Tensor) -> float:
        torch.distributed.all_reduce(tensor)
        return float(tensor.sum())

    def groups(_: Peer) -> tuple[int, str]:
        return torch.distributed.get_world_size(), torch.distributed.get_backend()

    import tempfile

    one, two = spawn(), spawn()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/rendezvous"
        ray.get([peer.run.remote(join, file, rank) for rank, peer in enumerate((one, two))])
    make = one.make.options(tensor_transport=transport)
    for _ in range(2):
        assert ray.get(two.run.remote(total, make.remote(ones))) == LARGE
        sums = [peer.run.remote(reduce, torch.ones(2)) for peer in (one, two)]
        assert ray.get(sums) == [4.0, 4.0]
    assert ray.get(one.run.remote(groups)) == (2, "gloo")


def test_no_default_process_group_is_made(spawn: Any, consumer: Any, transport: str) -> None:
    peer = spawn()
    ref = peer.make.options(tensor_transport=transport).remote(ones)
    ray.get(consumer.run.remote(total, ref))

    def is_initialized(_: Peer) -> bool:
        return torch.distributed.is_initialized()

    assert not ray.get(peer.run.remote(is_initialized))
    assert not ray.get(consumer.run.remote(is_initialized))


def test_import_ray_loads_neither_torch_nor_the_agent(tmp_path: Path) -> None:
    source = """
import os, sys, threading
before = dict(os.environ)
import ray
import ray.experimental
from ray.experimental import TensorTransportManager, set_target_for_ref, wait_tensor_freed
heavy = ("torch", "ray.experimental.rdt._agent", "ray.experimental.rdt.rpc.session")
print("loaded", [name for name in heavy if name in sys.modules])
print("threads", threading.active_count())
changed = before.items() ^ dict(os.environ).items()
print("environment", {name for name, _ in changed if "RDT" in name.upper()})
"""
    printed = run_driver(source, tmp_path)
    assert printed.splitlines() == ["loaded []", "threads 1", "environment set()"]


def test_worker_that_never_sees_a_tensor_loads_no_torch(tmp_path: Path) -> None:
    source = (
        START
        + """
start()

@ray.remote(num_cpus=0)
class Plain:
    @ray.method(tensor_transport="auto")
    def number(self):
        return 5

    def loaded(self):
        from ray._private.worker import global_worker
        modules = ("torch", "ray.experimental.rdt.rpc.session")
        return *(name in sys.modules for name in modules), global_worker._rdt_manager is None

plain = Plain.remote()
print(ray.get(plain.loaded.remote()), ray.get(plain.number.remote()))
print("torch", ray.get(plain.loaded.remote())[0])
"""
    )
    # Ray may log lines of its own first.
    printed = run_driver(source, tmp_path).splitlines()[-2:]
    assert printed == ["(False, False, True) 5", "torch False"]


def test_ray_can_be_shut_down_and_started_again(tmp_path: Path) -> None:
    source = (
        START
        + MAKER
        + """
import threading
kept = []
for turn in range(3):
    start()
    import torch
    if turn:
        maker = Maker.remote()
        ref = maker.make.remote(100_000)
        own = ray.put(torch.full((100_000,), float(turn)), _tensor_transport="auto")
        kept.append(ray.get(ref))
        assert ray.get(maker.total.remote(own)) == turn * 100_000
        assert ray.experimental.rdt.stats()["stored_objects"] == 1
    ray.shutdown()
    left = [thread for thread in threading.enumerate() if thread.name.startswith("rdt")]
    for thread in left:
        thread.join(20)
    assert not any(thread.is_alive() for thread in left), left
assert [float(t.sum()) for t in kept] == [100_000, 100_000]
start()
assert ray.experimental.rdt.stats()["stored_objects"] == 0
del ref, own
print("passed")
"""
    )
    assert "passed" in run_driver(source, tmp_path)


def test_exit_without_shutdown_is_quiet(tmp_path: Path) -> None:
    source = (
        START
        + MAKER
        + """
os.dup2(1, 2)  # so that what is logged at the end comes after what is printed before
start()
import torch
maker = Maker.remote()
ref = maker.make.remote(100_000)
got = ray.get(ref)
own = ray.put(torch.ones(100_000), _tensor_transport="auto")
ray.get(maker.total.remote(own))
print("end of the driver", flush=True)
"""
    )
    printed = run_driver(source, tmp_path)
    assert printed.rstrip().endswith("end of the driver"), printed


def test_exit_while_a_pull_waits_for_a_silent_producer(tmp_path: Path) -> None:
    """It would end only with the fetch timeout, a minute later."""
    source = (
        START
        + MAKER
        + """
import signal
start()
maker = Maker.remote()
pid = ray.get(maker.__ray_call__.remote(lambda self: os.getpid()))
ref = maker.make.remote(1 << 20)
ray.wait([ref], fetch_local=False)
os.kill(pid, signal.SIGSTOP)
future = ref.future()
time.sleep(1)
assert not future.done()
print("end of the driver")
"""
    )
    assert "end of the driver" in run_driver(source, tmp_path, limit_s=45)


def test_fork_after_use_of_rdt(tmp_path: Path) -> None:
    source = (
        START
        + MAKER
        + """
import multiprocessing
start()
maker = Maker.remote()
ref = maker.make.remote(100_000)
tensor = ray.get(ref)

def child():
    assert float(tensor.sum()) == 100_000
    os._exit(7)

for _ in range(3):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 7, process.exitcode
pid = os.fork()
if not pid:
    del tensor, ref
    os._exit(0)  # Plain Ray's own exit handlers hang in a forked child.
assert os.waitpid(pid, 0)[1] == 0
assert float(ray.get(ref).sum()) == 100_000
assert float(ray.get(maker.make.remote(200_000)).sum()) == 200_000
print("passed")
"""
    )
    assert "passed" in run_driver(source, tmp_path)


def test_data_loader_with_forked_workers_in_an_actor(spawn: Any, consumer: Any) -> None:
    def load(_: Peer, tensor: torch.Tensor) -> float:
        data = torch.utils.data.TensorDataset(tensor)
        loader = torch.utils.data.DataLoader(
            data, batch_size=len(tensor) // 4, num_workers=1, multiprocessing_context="fork"
        )
        return sum(float(batch.sum()) for (batch,) in loader)

    peer = spawn()
    ref = consumer.make.remote(ones)
    assert ray.get(peer.run.remote(load, ref)) == LARGE
    assert ray.get(peer.run.remote(load, ref)) == LARGE
    assert ray.get(peer.run.remote(total, consumer.make.remote(ones))) == LARGE


@pytest.fixture
def stock_ray(tmp_path: Path) -> Path:
    """A folder with stock Ray, to be put before ours on the path: all else stays the same."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = list((ROOT / "build" / "base").glob(f"ray-{ray.__version__}-{tag}-*.whl"))
    if not wheels:
        pytest.skip("stock Ray's wheel is not in build/base, where ./build.sh puts it")
    folder = tmp_path / "stock"
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ordinary_calls_are_as_in_stock_ray(stock_ray: Path, tmp_path: Path) -> None:
    def results(name: str, *folders: Path) -> dict[str, Any]:
        path = os.pathsep.join(map(str, [*folders, ROOT]))
        program = ROOT / "tests" / "integration" / "ordinary_calls.py"
        environment = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        run_program([program, tmp_path / name], tmp_path, 190, environment)
        lines = (tmp_path / name).read_text().splitlines()
        return dict(json.loads(line) for line in lines)

    stock, ours = results("stock.jsonl", stock_ray), results("ours.jsonl")
    assert stock.pop("where Ray is").startswith(str(stock_ray))
    assert not ours.pop("where Ray is").startswith(str(stock_ray))
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        assert "the check itself failed" not in expected, (name, expected)
        assert ours[name] == expected, name
