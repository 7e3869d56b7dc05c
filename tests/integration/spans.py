"""A startup hook of Ray's tracing, which writes the spans of each process into a folder."""

from __future__ import annotations

import os
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

#: The environment variable that names the folder.
FOLDER = "RDT_TEST_SPANS"


def record() -> None:
    """Runs on: every process of Ray's, at its start."""
    file = (Path(os.environ[FOLDER]) / f"{os.getpid()}.json").open("a")
    provider = TracerProvider()
    provider.add_span_processor(
        SimpleSpanProcessor(ConsoleSpanExporter(out=file, formatter=_line_of))
    )
    trace.set_tracer_provider(provider)


def _line_of(span: ReadableSpan) -> str:
    return str(span.to_json(indent=None)) + "\n"
