"""The machine's own speed, measured without Ray.

Scenarios with two processes start the second one from this file:
`python -m bench.bare NAME ...` with a name of SECOND_PROCESSES.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.protocol import Scenario, Skip


class Memcpy:
    """Copy between warm buffers with one thread.

    Args:
        nbytes: Bytes of one copy.
        count: Copies in one sample.
    """

    def __init__(self, nbytes: int, count: int) -> None:
        self._nbytes, self._count = nbytes, count
        self._source = torch.ones(nbytes, dtype=torch.uint8)
        self._target = torch.zeros(nbytes, dtype=torch.uint8)

    def sample(self) -> list[float]:
        """Return seconds of each copy."""
        return [self._copy() for _ in range(self._count)]

    def _copy(self) -> float:
        start = time.perf_counter()
        ctypes.memmove(self._target.data_ptr(), self._source.data_ptr(), self._nbytes)
        return time.perf_counter() - start

    def close(self) -> None:
        """Free the memory."""
        del self._source, self._target


FINISH_LIMIT_S = 10


class SecondProcess:
    """A second Python process that exchanges lines, with the first one's environment.

    Args:
        arguments: Its name in SECOND_PROCESSES and its arguments.
        prefix: A command that runs it on another host.
        module: The module that it runs.
    """

    def __init__(
        self, *arguments: str, prefix: tuple[str, ...] = (), module: str = "bench.bare"
    ) -> None:
        command = [*prefix, sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, line: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear_after(self, label: str) -> str:
        """Wait for a line that begins with a label; libraries print lines of their own.

        Raises:
            RuntimeError: The process ended; its last output is on standard error.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            first, _, rest = line.rstrip("\n").partition(" ")
            if first == label:
                return rest
        raise RuntimeError(f"the second process ended with status {self._process.wait()}")

    def finish(self) -> None:
        """Close the process's input, so that it ends what it started; kill it if it stays."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=FINISH_LIMIT_S)
        self.close()

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


class RawGloo:
    """Send a tensor to a second process with torch.distributed, into used memory.

    Args:
        nbytes: Bytes of the tensor.
        count: Transfers in one sample.
    """

    def __init__(self, nbytes: int, count: int) -> None:
        self._count = count
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rdt-bench-gloo-"))
            stack.enter_context(contextlib.closing(SecondProcess("gloo", folder, str(nbytes))))
            join_gloo(folder, rank=0)
            stack.callback(torch.distributed.destroy_process_group)
            self._tensor, self._receipt = torch.ones(nbytes // 4), torch.zeros(1)
            self.close = stack.pop_all().close

    def sample(self) -> list[float]:
        """Return seconds of each transfer, until the second process confirms it."""
        return [self._send() for _ in range(self._count)]

    def _send(self) -> float:
        start = time.perf_counter()
        torch.distributed.send(self._tensor, dst=1)
        torch.distributed.recv(self._receipt, src=1)
        return time.perf_counter() - start


def receive_over_gloo(folder: str, nbytes: str) -> None:
    """Second process of RawGloo."""
    join_gloo(folder, rank=1)
    tensor, receipt = torch.ones(int(nbytes) // 4), torch.ones(1)
    while True:
        torch.distributed.recv(tensor, src=0)
        torch.distributed.send(receipt, dst=0)


def join_gloo(folder: str, rank: int) -> None:
    """Join the default process group of two processes that share a folder."""
    store = torch.distributed.FileStore(str(Path(folder, "store")), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)


NIXL_POLL_S = 1e-4


class BareNixl:
    """Read a registered tensor of a second process into a registered one with NIXL.

    Args:
        nbytes: Bytes of the tensor.
    """

    def __init__(self, nbytes: int) -> None:
        try:
            importlib.import_module("nixl._api")
        except ImportError as error:
            raise Skip(f"nixl cannot be imported: {error}") from error
        agent = self._agent = nixl_agent_over_ucx("reader")
        self._target = torch.zeros(nbytes // 4)
        agent.register_memory([self._target])
        with contextlib.ExitStack() as stack:
            second = stack.enter_context(contextlib.closing(SecondProcess("nixl", str(nbytes))))
            peer = agent.add_remote_agent(bytes.fromhex(second.hear_after("agent")))
            there = agent.deserialize_descs(bytes.fromhex(second.hear_after("memory")))
            here = agent.get_xfer_descs([self._target])
            self._transfer = agent.initialize_xfer("READ", here, there, peer, b"read")
            stack.callback(agent.release_xfer_handle, self._transfer)
            self.close = stack.pop_all().close

    def sample(self) -> list[float]:
        """Return seconds of one read."""
        start = time.perf_counter()
        run_nixl_transfer(self._agent, self._transfer)
        return [time.perf_counter() - start]


def run_nixl_transfer(agent: Any, transfer: Any) -> None:
    """Start a prepared NIXL transfer and wait for its end."""
    state = agent.transfer(transfer)
    while state == "PROC":
        time.sleep(NIXL_POLL_S)  # yields the core to NIXL's thread
        state = agent.check_xfer_state(transfer)
    if state != "DONE":
        raise RuntimeError(f"the NIXL transfer ended in state {state}")


def hold_nixl_memory(nbytes: str) -> None:
    """Second process of BareNixl."""
    agent, tensor = nixl_agent_over_ucx("holder"), torch.ones(int(nbytes) // 4)
    agent.register_memory([tensor])
    descriptors = agent.get_serialized_descs(agent.get_xfer_descs([tensor]))
    print("agent", agent.get_agent_metadata().hex())
    print("memory", descriptors.hex(), flush=True)
    sys.stdin.readline()


def nixl_agent_over_ucx(name: str) -> Any:
    """Create a NIXL agent with the UCX backend."""
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


_numbers = itertools.count()


class TwoHosts:
    """Two test hosts on this machine: network namespaces that a virtual cable connects.

    Raises:
        Skip: The machine does not allow them; the text names the missing part.
    """

    def __init__(self) -> None:
        if shutil.which("ip") is None:
            raise Skip("the ip command is missing (Debian: apt-get install iproute2)")
        number = next(_numbers)
        self._names = [f"rdtb{os.getpid()}-{number}{end}" for end in "ab"]
        self._subnet = f"10.77.{number % 250}"
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.close()
            raise Skip(f"no network namespaces here: {error.stderr.strip()}") from None

    def _make(self) -> None:
        first, second = self._names
        for name in self._names:
            _ip("netns", "add", name)
        ends = "type", "veth", "peer", "name", "eth0", "netns", second
        _ip("link", "add", "eth0", "netns", first, *ends)
        for index, name in enumerate(self._names):
            _ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def address(self, index: int) -> str:
        """Return the address of host 0 or 1."""
        return f"{self._subnet}.{index + 1}"

    def inside(self, index: int) -> tuple[str, ...]:
        """Return the prefix of a command that runs on host 0 or 1."""
        return "ip", "netns", "exec", self._names[index]

    def close(self) -> None:
        """Remove both hosts."""
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


#: Duration of one sample of the tcp case.
TCP_SAMPLE_S = 2


class Iperf:
    """Run iperf3 from one test host to the other.

    Args:
        nbytes: The bytes for which the rate is converted to seconds.
        streams: TCP streams.
    """

    def __init__(self, nbytes: int, streams: int) -> None:
        if shutil.which("iperf3") is None:
            raise Skip("iperf3 is missing (Debian: apt-get install iperf3)")
        self._nbytes = nbytes
        with contextlib.ExitStack() as stack:
            hosts = stack.enter_context(contextlib.closing(TwoHosts()))
            server = [*hosts.inside(0), "iperf3", "--server"]
            stack.callback(_end, subprocess.Popen(server, stdout=subprocess.DEVNULL))
            self._client = [
                *hosts.inside(1),
                *("iperf3", "--client", hosts.address(0), "--reverse", "--json"),
                *("--parallel", str(streams), "--time", str(TCP_SAMPLE_S)),
            ]
            self._wait_for_server()
            self.close = stack.pop_all().close

    def _wait_for_server(self) -> None:
        for _ in range(50):
            if self._run().returncode == 0:
                return
            time.sleep(0.1)
        raise Skip("iperf3 does not answer from the other test host")

    def _run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._client, capture_output=True, text=True, check=False)

    def sample(self) -> list[float]:
        """Return the seconds of these bytes at iperf3's rate."""
        report = json.loads(self._run().stdout)
        return [8 * self._nbytes / report["end"]["sum_received"]["bits_per_second"]]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


class AgentOverTcp:
    """Pull over our agent's tcp lane from one test host to the other, into used memory.

    Args:
        nbytes: Bytes of one pull.
        streams: TCP streams.
    """

    def __init__(self, nbytes: int, streams: int) -> None:
        if importlib.util.find_spec("ray.experimental.rdt._agent") is None:
            raise Skip("this Ray has no agent")
        shape = str(nbytes), str(streams)
        with contextlib.ExitStack() as stack:
            hosts = stack.enter_context(contextlib.closing(TwoHosts()))

            def start(name: str, host: int, *more: str) -> SecondProcess:
                arguments = name, hosts.address(host), *shape, *more
                second = SecondProcess(*arguments, prefix=hosts.inside(host))
                return stack.enter_context(contextlib.closing(second))

            region = start("agent", 0).hear_after("region")
            self._puller = start("puller", 1, *region.split())
            self.close = stack.pop_all().close

    def sample(self) -> list[float]:
        """Return seconds of a pull, averaged over pulls in sequence."""
        took: list[float] = []
        while sum(took) < TCP_SAMPLE_S:
            self._puller.tell("pull")
            took.append(float(self._puller.hear_after("seconds")))
        return [sum(took) / len(took)]


AGENT_SECRET = bytes(32)
AGENT_KEY = bytes(range(16))


def hold_agent_region(ip: str, nbytes: str, streams: str) -> None:
    """Second process of AgentOverTcp, with the tensor."""
    agent, tensor = _tcp_agent(ip, streams), torch.ones(int(nbytes) // 4)
    agent.register(AGENT_KEY, *_span(tensor), 1)
    print("region", agent.address.hex(), AGENT_KEY.hex(), flush=True)
    sys.stdin.readline()
    agent.stop()


def pull_agent_region(ip: str, nbytes: str, streams: str, address: str, key: str) -> None:
    """Third process of AgentOverTcp: pull the tensor once for each line."""
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
