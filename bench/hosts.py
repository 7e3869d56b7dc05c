"""Two test hosts on this machine: network namespaces that a virtual cable connects."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess

from bench.protocol import Skip

_numbers = itertools.count()


class TwoHosts:
    """Two network namespaces of this process, with one address each.

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
