"""Calls whose returns are RDT objects while Ray traces calls with OpenTelemetry."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tests.integration import spans
from tests.support import run_driver

#: Makes the same calls without and with a transport, each under a span of that name.
DRIVER = """
import os, signal
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         object_store_memory=100 << 20, _tracing_startup_hook="tests.integration.spans:record")
import torch
from opentelemetry import trace

COUNT = 100_000

def task(count):
    return torch.full((count,), float(os.getpid()))

def items(count):
    for _ in range(2):
        yield torch.ones(count)

def length(tensor, offset=0):
    return len(tensor) + offset

@ray.remote(num_cpus=0)
class Actor:
    def method(self, count):
        return torch.ones(count)

    def length(self, tensor, offset=0):
        return len(tensor) + offset

@ray.remote(num_cpus=0)
class Async:
    async def method(self, count):
        return torch.ones(count)

    async def length(self, tensor, offset=0):
        return len(tensor) + offset

def call_all(name, **options):
    with trace.get_tracer("driver").start_as_current_span(name):
        refs = [ray.remote(task).options(**options).remote(count=COUNT)]
        refs += ray.remote(items).options(**options).remote(COUNT)
        refs += [actor.method.options(**options).remote(COUNT) for actor in actors]
        uses = [actor.length.remote(ref, offset=1) for ref in refs for actor in actors]
        uses += [ray.remote(length).remote(ref, offset=1) for ref in refs]
        assert ray.get(uses, timeout=30) == [COUNT + 1] * 15

actors = Actor.remote(), Async.remote()
call_all("plain")
call_all("with transport", tensor_transport="auto")
lost = ray.remote(task).options(tensor_transport="auto", max_retries=1).remote(COUNT)
os.kill(int(ray.get(lost)[0]), signal.SIGKILL)
print("made again", len(ray.get(lost, timeout=30)))
"""


def spans_under(folder: Path, name: str) -> Counter[tuple[str, str]]:
    """The names and kinds of all spans of the trace that a span of this name begins."""
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    (root,) = (span for span in found if span["name"] == name)
    trace_id = root["context"]["trace_id"]
    return Counter(
        (span["name"], span["kind"])
        for span in found
        if span is not root and span["context"]["trace_id"] == trace_id
    )


def test_traced_calls_give_rdt_objects_and_the_spans_of_plain_ones(tmp_path: Path) -> None:
    folder = tmp_path / "spans"
    folder.mkdir()
    output = run_driver(DRIVER, tmp_path, environment={spans.FOLDER: str(folder)})
    assert "made again 100000" in output
    plain = spans_under(folder, "plain")
    assert plain["__main__.task ray.remote", "SpanKind.PRODUCER"] == 1
    assert plain["__main__.task ray.remote_worker", "SpanKind.CONSUMER"] == 1
    assert spans_under(folder, "with transport") == plain
