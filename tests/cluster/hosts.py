"""Test hosts: network namespaces of this machine, a cable between them, a Ray node in each."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT, wait_until

#: A silent peer is given up after this.
PEER_TIMEOUT_S = 3

#: Of every process of the cluster, which has a token of its own.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_RDT_PEER_TIMEOUT_S": str(PEER_TIMEOUT_S),
}

_PORT = 6391
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_OPTIONS = [
    "--num-cpus=1",
    f"--object-store-memory={100 << 20}",
    "--disable-usage-stats",
    "--block",
]


class HostsUnavailable(Exception):
    """This machine does not let us make network namespaces; says why."""


@dataclass(frozen=True)
class Host:
    """One namespace.

    Attributes:
        name: The namespace's.
        ip: Its address on the cable.
        device: Its end of the cable.
    """

    name: str
    ip: str
    device: str

    def command(self, *arguments: str | Path) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]

    def run(self, *arguments: str | Path) -> None:
        subprocess.run(self.command(*arguments), check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Makes both and the cable; takes them away, with all that still runs in them.

    Raises:
        HostsUnavailable: not root, no iproute2, or the kernel forbids it.
    """
    if os.geteuid() != 0:
        raise HostsUnavailable("only root makes network namespaces")
    if shutil.which("ip") is None:
        raise HostsUnavailable("there is no `ip`: install iproute2")
    mark = f"{os.getpid():x}"
    hosts = (
        Host(f"rdt-{mark}-a", "198.18.77.1", f"rdt{mark}a"),
        Host(f"rdt-{mark}-b", "198.18.77.2", f"rdt{mark}b"),
    )
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.name)
            stack.callback(_remove, host)
        _ip("link", "add", hosts[0].device, "type", "veth", "peer", "name", hosts[1].device)
        for host in hosts:
            _ip("link", "set", host.device, "netns", host.name)
            host.run("ip", "address", "add", f"{host.ip}/24", "dev", host.device)
            host.run("ip", "link", "set", host.device, "up")
            host.run("ip", "link", "set", "lo", "up")
        yield hosts


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsUnavailable(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")


def pids_in(host: Host) -> list[int]:
    listed = subprocess.run(
        ["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listed.stdout.split()]


def _remove(host: Host) -> None:
    _signal_all(host, signal.SIGKILL)
    wait_until(lambda: not pids_in(host), f"{host.name} is empty")
    subprocess.run(["ip", "netns", "delete", host.name], check=True)


@contextmanager
def ray_on(hosts: tuple[Host, Host]) -> Iterator[str]:
    """A Ray node in each host, with the resources "a" and "b"; gives the cluster's address."""
    head, other = hosts
    address = f"{head.ip}:{_PORT}"
    folder = Path(tempfile.mkdtemp(prefix="rdt", dir="/tmp"))
    try:
        _start(
            head,
            folder,
            "a",
            "--head",
            f"--port={_PORT}",
            f"--temp-dir={folder}",
            "--include-dashboard=false",
        )
        _start(other, folder, "b", f"--address={address}")
        yield address
    finally:
        for host in hosts:
            _signal_all(host, signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)


def _signal_all(host: Host, number: int) -> None:
    for pid in pids_in(host):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _start(host: Host, folder: Path, resource: str, *arguments: str) -> None:
    """Starts a node and waits until Ray says that it runs."""
    log = folder / f"start-{resource}.log"
    resources = ["--resources", f'{{"{resource}": 9}}', f"--node-ip-address={host.ip}"]
    with open(log, "w") as out:
        subprocess.Popen(
            host.command(*_RAY, "start", *_OPTIONS, *resources, *arguments),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
        )

    def assert_started() -> None:
        assert "Ray runtime started" in log.read_text(), log.read_text()

    wait_until(assert_started, f"node {resource} does not run:", limit_s=90)
