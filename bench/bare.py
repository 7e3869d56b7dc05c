"""What the machine itself can do, measured without Ray: the yardsticks.

Those that take two processes start the second one from this file:
`python -m bench.bare NAME ...` with a name of SECOND_PROCESSES.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.hosts import TwoHosts
from bench.protocol import Scenario, Skip


class Memcpy:
    """One thread copies warm memory to warm memory.

    Args:
        nbytes: Bytes of one copy.
        count: Copies in one sample.
    """

    def __init__(self, nbytes: int, count: int) -> None:
        self._nbytes, self._count = nbytes, count
        self._source = torch.ones(nbytes, dtype=torch.uint8)
        self._target = torch.zeros(nbytes, dtype=torch.uint8)

    def sample(self) -> list[float]:
        """Seconds of each copy."""
        return [self._copy() for _ in range(self._count)]

    def _copy(self) -> float:
        start = time.perf_counter()
        ctypes.memmove(self._target.data_ptr(), self._source.data_ptr(), self._nbytes)
        return time.perf_counter() - start

    def close(self) -> None:
        """Gives the memory back."""
        del self._source, self._target


class SecondProcess:
    """A second Python process that talks in lines, with the first one's environment.

    Args:
        arguments: Its name in SECOND_PROCESSES, and what follows.
        prefix: A command that runs it elsewhere.
    """

    def __init__(self, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, "-m", "bench.bare", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, line: str) -> None:
        """Sends a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        """Waits for a line.

        Raises:
            Skip: The process ended; what it printed last is on standard error.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Skip(f"the second process ended with status {self._process.wait()}")
        return line.rstrip("\n")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


class RawGloo:
    """torch.distributed sends a tensor to a second process, into memory that was used before.

    Args:
        nbytes: Bytes of the tensor.
    """

    def __init__(self, nbytes: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rdt-bench-gloo-")
        self._second = SecondProcess("gloo", self._folder.name, str(nbytes))
        _join_gloo(self._folder.name, rank=0)
        self._tensor, self._receipt = torch.ones(nbytes // 4), torch.zeros(1)

    def sample(self) -> list[float]:
        """Seconds until the second process says that all has come in."""
        start = time.perf_counter()
        torch.distributed.send(self._tensor, dst=1)
        torch.distributed.recv(self._receipt, src=1)
        return [time.perf_counter() - start]

    def close(self) -> None:
        """Ends the group and the second process."""
        torch.distributed.destroy_process_group()
        self._second.close()
        self._folder.cleanup()


def receive_over_gloo(folder: str, nbytes: str) -> None:
    """Second process of RawGloo."""
    _join_gloo(folder, rank=1)
    tensor, receipt = torch.ones(int(nbytes) // 4), torch.ones(1)
    while True:
        torch.distributed.recv(tensor, src=0)
        torch.distributed.send(receipt, dst=0)


def _join_gloo(folder: str, rank: int) -> None:
    store = torch.distributed.FileStore(str(Path(folder, "store")), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)


class BareNixl:
    """NIXL reads a registered tensor of a second process into a registered one.

    Args:
        nbytes: Bytes of the tensor.
    """

    def __init__(self, nbytes: int) -> None:
        if importlib.util.find_spec("nixl") is None:
            raise Skip("the nixl package is not installed")
        self._agent = _nixl_agent("reader")
        self._target = torch.zeros(nbytes // 4)
        self._agent.register_memory([self._target])
        self._second = SecondProcess("nixl", str(nbytes))
        self._peer = self._agent.add_remote_agent(bytes.fromhex(_last_word(self._second, "agent")))
        there = self._agent.deserialize_descs(bytes.fromhex(_last_word(self._second, "memory")))
        here = self._agent.get_xfer_descs([self._target])
        self._transfer = self._agent.initialize_xfer("READ", here, there, self._peer, b"read")

    def sample(self) -> list[float]:
        """Seconds of one read."""
        start = time.perf_counter()
        state = self._agent.transfer(self._transfer)
        while state == "PROC":
            state = self._agent.check_xfer_state(self._transfer)
        if state != "DONE":
            raise RuntimeError(f"the NIXL read ended in state {state}")
        return [time.perf_counter() - start]

    def close(self) -> None:
        """Ends the second process."""
        self._agent.release_xfer_handle(self._transfer)
        self._second.close()


def hold_nixl_memory(nbytes: str) -> None:
    """Second process of BareNixl."""
    agent, tensor = _nixl_agent("holder"), torch.ones(int(nbytes) // 4)
    agent.register_memory([tensor])
    descriptors = agent.get_serialized_descs(agent.get_xfer_descs([tensor]))
    print("agent", agent.get_agent_metadata().hex())
    print("memory", descriptors.hex(), flush=True)
    sys.stdin.readline()


def _nixl_agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def _last_word(second: SecondProcess, label: str) -> str:
    """The word after a label; NIXL itself prints lines as well."""
    while True:
        first, _, rest = second.hear().partition(" ")
        if first == label:
            return rest


class Iperf:
    """iperf3 from one test host to the other.

    Args:
        nbytes: What the rate is turned into: the seconds for so many bytes.
        streams: TCP streams.
        seconds: How long iperf3 measures for one sample.
    """

    def __init__(self, nbytes: int, streams: int, seconds: int = 2) -> None:
        self._hosts, self._nbytes = TwoHosts(), nbytes
        self._server = subprocess.Popen(
            [*self._hosts.inside(0), "iperf3", "--server"], stdout=subprocess.DEVNULL
        )
        self._client = [
            *self._hosts.inside(1),
            *("iperf3", "--client", self._hosts.address(0), "--reverse", "--json"),
            *("--parallel", str(streams), "--time", str(seconds)),
        ]
        self._wait_for_server()

    def _wait_for_server(self) -> None:
        for _ in range(50):
            if self._run().returncode == 0:
                return
            time.sleep(0.1)
        raise Skip("iperf3 does not answer from the other test host")

    def _run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._client, capture_output=True, text=True, check=False)

    def sample(self) -> list[float]:
        """Seconds that the bytes would take at iperf3's rate."""
        report = json.loads(self._run().stdout)
        return [8 * self._nbytes / report["end"]["sum_received"]["bits_per_second"]]

    def close(self) -> None:
        """Ends the server and the hosts."""
        self._server.terminate()
        self._server.wait()
        self._hosts.close()


class AgentOverTcp:
    """Our agent's tcp lane alone, from one test host to the other, into memory used before.

    Args:
        nbytes: Bytes of one pull.
        streams: TCP streams.
    """

    def __init__(self, nbytes: int, streams: int) -> None:
        if importlib.util.find_spec("ray.experimental.rdt._agent") is None:
            raise Skip("this Ray has no agent")
        self._hosts = TwoHosts()
        shape = str(nbytes), str(streams)
        self._holder = SecondProcess(
            "agent", self._hosts.address(0), *shape, prefix=self._hosts.inside(0)
        )
        address, key = _last_word(self._holder, "region").split()
        self._puller = SecondProcess(
            "puller", self._hosts.address(1), *shape, address, key, prefix=self._hosts.inside(1)
        )

    def sample(self) -> list[float]:
        """Seconds of one pull."""
        self._puller.tell("pull")
        return [float(_last_word(self._puller, "seconds"))]

    def close(self) -> None:
        """Ends both processes and the hosts."""
        self._puller.close()
        self._holder.close()
        self._hosts.close()


AGENT_SECRET = bytes(32)
AGENT_KEY = bytes(range(16))


def hold_agent_region(ip: str, nbytes: str, streams: str) -> None:
    """Second process of AgentOverTcp: has the tensor."""
    agent, tensor = _tcp_agent(ip, streams), torch.ones(int(nbytes) // 4)
    agent.register(AGENT_KEY, *_span(tensor), 1)
    print("region", agent.address.hex(), AGENT_KEY.hex(), flush=True)
    sys.stdin.readline()
    agent.stop()


def pull_agent_region(ip: str, nbytes: str, streams: str, address: str, key: str) -> None:
    """Third process of AgentOverTcp: pulls the tensor once for every line it reads."""
    agent, tensor = _tcp_agent(ip, streams), torch.zeros(int(nbytes) // 4)
    for _ in sys.stdin:
        start = time.perf_counter()
        agent.pull(bytes.fromhex(address), bytes.fromhex(key), *_span(tensor)).wait(60.0)
        print("seconds", time.perf_counter() - start, flush=True)
    agent.stop()


def _tcp_agent(ip: str, streams: str) -> Any:
    from ray.experimental.rdt._agent import Agent

    return Agent(
        secret=AGENT_SECRET,
        bind_ip=ip,
        lanes=frozenset({"tcp"}),
        copy_threads=2,
        tcp_streams=int(streams),
        pool_bytes=0,
        connect_timeout_s=5.0,
        peer_timeout_s=30.0,
        clear_tcp=True,
    )


def _span(tensor: torch.Tensor) -> tuple[Any, Any]:
    from array import array

    return array("Q", [tensor.data_ptr()]), array("Q", [tensor.nbytes])


SCENARIOS: dict[str, Callable[..., Scenario]] = {
    "memcpy": Memcpy,
    "raw_gloo": RawGloo,
    "bare_nixl": BareNixl,
    "iperf": Iperf,
    "agent_over_tcp": AgentOverTcp,
}

SECOND_PROCESSES: dict[str, Callable[..., None]] = {
    "gloo": receive_over_gloo,
    "nixl": hold_nixl_memory,
    "agent": hold_agent_region,
    "puller": pull_agent_region,
}

if __name__ == "__main__":
    SECOND_PROCESSES[sys.argv[1]](*sys.argv[2:])
