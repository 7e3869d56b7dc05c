"""Libraries without Ray that transfer a tensor between two processes of one host.

The worker starts a sender for each arm: `python -m bench.libraries send LIBRARY NBYTES`. The sender
starts its receiver from this file too, and measures. A transfer ends when the sender knows that the
receiver has the bytes in its own memory and has read one element. When the arm is closed, both
processes end: threads of NIXL and of torch RPC keep a core busy while they live.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.bare import SecondProcess, join_gloo, nixl_agent_over_ucx, run_nixl_transfer
from bench.protocol import Scenario, Skip

MODULE = "bench.libraries"
READY = "ready"
LOCALHOST = "127.0.0.1"


class LibraryTransfer:
    """Transfer an existing tensor with a library, between two new processes.

    Args:
        library: Its name in SENDERS.
        nbytes: Bytes of the tensor.
        count: Transfers in one sample.

    Raises:
        Skip: The library cannot be imported here.
    """

    def __init__(self, library: str, nbytes: int, count: int) -> None:
        self._count = count
        self._sender = SecondProcess("send", library, str(nbytes), module=MODULE)
        state = self._sender.hear_after("state")
        if state != READY:
            self._sender.finish()
            raise Skip(state)

    def sample(self) -> list[float]:
        """Return seconds of each transfer."""
        self._sender.tell(str(self._count))
        seconds: list[float] = json.loads(self._sender.hear_after("seconds"))
        return seconds

    def close(self) -> None:
        """End both processes."""
        self._sender.finish()


class Sender(Protocol):
    """One library in the sender's process; its constructor also starts the receiver."""

    def transfer(self) -> None:
        """Transfer the tensor; return when the receiver has confirmed it."""

    def close(self) -> None:
        """End the receiver."""


def send(library: str, nbytes: str) -> None:
    """Run the sender: answer each line, a number of transfers, with their seconds."""
    try:
        sender = SENDERS[library](int(nbytes))
    except ImportError as error:
        print("state", f"{library} cannot be imported: {error}".splitlines()[0], flush=True)
        return
    with contextlib.closing(sender):
        print("state", READY, flush=True)
        for line in sys.stdin:
            seconds = [_seconds_of(sender.transfer) for _ in range(int(line))]
            print("seconds", json.dumps(seconds), flush=True)
    os._exit(0)  # The libraries' exit handlers wait for the receiver, which is gone.


def _seconds_of(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Pulled:
    """Base of the senders whose receiver pulls: one line asks for it, one confirms it.

    Args:
        puller: The receiver's name in PULLERS.
        arguments: Its arguments.
    """

    def __init__(self, puller: str, *arguments: str) -> None:
        self._receiver = SecondProcess("pull", puller, *arguments, module=MODULE)
        self._receiver.hear_after(READY)

    def transfer(self) -> None:
        """Let the receiver pull once."""
        self._receiver.tell("pull")
        self._receiver.hear_after("pulled")

    def close(self) -> None:
        """End the receiver."""
        self._receiver.close()


def pull(puller: str, *arguments: str) -> None:
    """Run a receiver that pulls: once for each line, and read one element."""
    pull_once, target = PULLERS[puller](*arguments)
    print(READY, flush=True)
    for _ in sys.stdin:
        pull_once()
        print("pulled", float(target[0]), flush=True)


Puller = tuple[Callable[[], None], torch.Tensor]


class Memcpy(Pulled):
    """The receiver copies out of memory that both processes map.

    Args:
        nbytes: Bytes of the tensor.
        threads: Threads that copy.
    """

    def __init__(self, nbytes: int, threads: int) -> None:
        self._file = os.memfd_create("rdt-bench")
        os.truncate(self._file, nbytes)
        self._tensor = _map_tensor(self._file, nbytes)
        self._tensor.fill_(1)
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        super().__init__("memcpy", path, str(nbytes), str(threads))


def pull_by_memcpy(path: str, nbytes: str, threads: str) -> Puller:
    """Receiver of Memcpy."""
    with Path(path).open("r+b") as file:
        source = _map_tensor(file.fileno(), int(nbytes))
    target, count = torch.zeros_like(source), int(threads)
    share = source.nbytes // count
    pool = ThreadPoolExecutor(count)

    def copy(index: int) -> None:
        start = index * share
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, share)

    def pull_once() -> None:
        list(pool.map(copy, range(count)))

    return pull_once, target


def _map_tensor(file: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.float32)


class Nixl(Pulled):
    """The receiver reads registered memory with NIXL over UCX.

    Args:
        nbytes: Bytes of the tensor.
    """

    def __init__(self, nbytes: int) -> None:
        self._agent, self._tensor = nixl_agent_over_ucx("sender"), torch.ones(nbytes // 4)
        self._agent.register_memory([self._tensor])
        there = self._agent.get_serialized_descs(self._agent.get_xfer_descs([self._tensor]))
        metadata = self._agent.get_agent_metadata()
        super().__init__("nixl", metadata.hex(), there.hex(), str(nbytes))


def pull_over_nixl(metadata: str, there: str, nbytes: str) -> Puller:
    """Receiver of Nixl."""
    agent, target = nixl_agent_over_ucx("receiver"), torch.zeros(int(nbytes) // 4)
    agent.register_memory([target])
    peer = agent.add_remote_agent(bytes.fromhex(metadata))
    descriptors = agent.get_xfer_descs([target]), agent.deserialize_descs(bytes.fromhex(there))
    transfer = agent.initialize_xfer("READ", *descriptors, peer, b"read")
    return lambda: run_nixl_transfer(agent, transfer), target


class Mooncake(Pulled):
    """The receiver reads registered memory with Mooncake's transfer engine over tcp.

    Args:
        nbytes: Bytes of the tensor.
    """

    def __init__(self, nbytes: int) -> None:
        self._tensor = torch.ones(nbytes // 4)
        self._engine = _mooncake_engine(self._tensor)
        session = f"{LOCALHOST}:{self._engine.get_rpc_port()}"
        super().__init__("mooncake", session, str(self._tensor.data_ptr()), str(nbytes))


def pull_over_mooncake(session: str, source: str, nbytes: str) -> Puller:
    """Receiver of Mooncake."""
    target = torch.zeros(int(nbytes) // 4)
    engine = _mooncake_engine(target)

    def pull_once() -> None:
        status = engine.transfer_sync_read(session, target.data_ptr(), int(source), int(nbytes))
        if status != 0:
            raise RuntimeError(f"Mooncake's read ended with status {status}")

    return pull_once, target


def _mooncake_engine(tensor: torch.Tensor) -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize(LOCALHOST, "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("Mooncake's transfer engine does not start")
    if engine.register_memory(tensor.data_ptr(), tensor.nbytes) != 0:
        raise RuntimeError("Mooncake's transfer engine refuses the memory")
    return engine


class Pushed:
    """Base of the senders that push: the receiver's program is a function of torch.distributed.

    Args:
        receiver: Its name in PROGRAMS.
        nbytes: Bytes of the tensor.
        join: Connects this process with the receiver, given the folder that both know.
    """

    def __init__(self, receiver: str, nbytes: int, join: Callable[[str], None]) -> None:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rdt-bench-"))
            second = SecondProcess(receiver, folder, str(nbytes), module=MODULE)
            stack.enter_context(contextlib.closing(second))
            self._tensor = torch.ones(nbytes // 4)
            join(folder)
            self.close = stack.pop_all().close


class Gloo(Pushed):
    """Send with torch.distributed over gloo; the receiver answers with one element."""

    def __init__(self, nbytes: int) -> None:
        super().__init__("receive_gloo", nbytes, lambda folder: join_gloo(folder, rank=0))
        self._receipt = torch.zeros(1)

    def transfer(self) -> None:
        """Send the tensor and receive one element of it."""
        torch.distributed.send(self._tensor, dst=1)
        torch.distributed.recv(self._receipt, src=1)


def receive_gloo(folder: str, nbytes: str) -> None:
    """Receiver of Gloo."""
    join_gloo(folder, rank=1)
    tensor = torch.zeros(int(nbytes) // 4)
    while True:
        torch.distributed.recv(tensor, src=0)
        torch.distributed.send(tensor[:1].clone(), dst=0)


class Rpc(Pushed):
    """Call a function of the receiver with the tensor, over torch RPC (TensorPipe)."""

    def __init__(self, nbytes: int) -> None:
        super().__init__("receive_rpc", nbytes, lambda folder: _join_rpc("sender", folder, 0))

    def transfer(self) -> None:
        """Call the function and wait for its result."""
        torch.distributed.rpc.rpc_sync("receiver", first_element, args=(self._tensor,))


def receive_rpc(folder: str, _: str) -> None:
    """Receiver of Rpc."""
    _join_rpc("receiver", folder, 1)
    sys.stdin.readline()
    os._exit(0)  # Without a graceful shutdown, which waits for the sender.


def _join_rpc(name: str, folder: str, rank: int) -> None:
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(init_method=Path(folder, "store").as_uri())
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


def first_element(tensor: torch.Tensor) -> float:
    """Touch one element of a received tensor."""
    return float(tensor[0])


SENDERS: dict[str, Callable[[int], Sender]] = {
    "memcpy, 1 thread": lambda nbytes: Memcpy(nbytes, 1),
    "memcpy, 2 threads": lambda nbytes: Memcpy(nbytes, 2),
    "torch gloo": Gloo,
    "torch RPC": Rpc,
    "nixl": Nixl,
    "mooncake": Mooncake,
}
PULLERS: dict[str, Callable[..., Puller]] = {
    "memcpy": pull_by_memcpy,
    "nixl": pull_over_nixl,
    "mooncake": pull_over_mooncake,
}
PROGRAMS: dict[str, Callable[..., None]] = {
    "send": send,
    "pull": pull,
    "receive_gloo": receive_gloo,
    "receive_rpc": receive_rpc,
}
SCENARIOS: dict[str, Callable[..., Scenario]] = {"library": LibraryTransfer}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
