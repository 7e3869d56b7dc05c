"""Descriptions of device memory that producers and consumers exchange.

A layout travels as a list of segments and two arrays: the segment of each buffer (uint32) and its
offset in the segment (uint64).
"""

from __future__ import annotations

from array import array
from pathlib import Path

from ray.experimental.rdt.accelerators.shared_memory import Layout, Segment
from ray.experimental.rdt.transports.base import Route

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def encode(layout: Layout) -> Route:
    """Return a layout for another process."""
    return {
        "segments": [list(segment) for segment in layout.segments],
        "indices": layout.indices.tobytes(),
        "offsets": layout.offsets.tobytes(),
    }


def decode(route: Route) -> Layout:
    """Return the layout that ``encode`` described."""
    indices, offsets = array("I"), array("Q")
    indices.frombytes(route["indices"])
    offsets.frombytes(route["offsets"])
    segments = [Segment(*fields) for fields in route["segments"]]
    return Layout(segments, indices, offsets)


def sharing_domain() -> str:
    """Return an ID of the processes that can map each other's memory and watch each other's end.

    It names the running kernel and the namespace of process numbers.
    """
    return f"{_BOOT_ID.read_text().strip()} {_PID_NAMESPACE.stat().st_ino}"
