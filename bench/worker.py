"""Worker process that measures on request; run.py starts one for each side.

Run: python -m bench.worker ray|bare. It reads one JSON object a line and answers each with one
line. Output of libraries goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.protocol import Scenario, Skip

OBJECT_STORE_BYTES = 2 << 30

Request = dict[str, Any]
Reply = dict[str, object]


class Server:
    """Worker that holds the open scenarios and handles requests."""

    def __init__(self, scenarios: Mapping[str, Callable[..., Scenario]]) -> None:
        self._scenarios = scenarios
        self._open: dict[str, Scenario] = {}

    def answer(self, request: Request) -> Reply:
        """Handle one request; return a failure as an answer."""
        try:
            return self._do(request)
        except Skip as skip:
            return {"failure": f"skipped: {skip}"}
        except Exception as error:
            traceback.print_exc()
            cause = getattr(error, "cause", None) or error
            return {"failure": f"{type(cause).__name__}: {cause}".splitlines()[0][:200]}

    def _do(self, request: Request) -> Reply:
        arm = request["arm"]
        match request["do"]:
            case "open":
                self._open[arm] = self._scenarios[request["scenario"]](**request["options"])
                return {}
            case "sample":
                return {"samples": self._open[arm].sample()}
            case "close":
                self._open.pop(arm).close()
                return {}
            case other:
                raise ValueError(f"unknown request {other!r}")

    def close(self) -> None:
        """Close all open scenarios; ignore errors."""
        for scenario in self._open.values():
            with contextlib.suppress(Exception):
                scenario.close()


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Run a Ray cluster for this process alone."""
    import ray

    folder = tempfile.mkdtemp(prefix="rdtb")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def serve(scenarios: Mapping[str, Callable[..., Scenario]]) -> None:
    """Answer every line until standard input ends."""
    server = Server(scenarios)
    with os.fdopen(os.dup(1), "w") as answers, contextlib.closing(server):
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


def main() -> None:
    """Serve one side."""
    if sys.argv[1] == "bare":
        from bench import bare, libraries

        serve(bare.SCENARIOS | libraries.SCENARIOS)
        return
    from bench.scenarios import SCENARIOS

    with local_ray():
        serve(SCENARIOS)


if __name__ == "__main__":
    main()
