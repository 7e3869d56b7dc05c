"""Every walk-through runs by itself, as a user would start it, and says what it shows."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run_program(arguments: list[str | Path], folder: Path, limit_s: float) -> str:
    """Runs a Python program in another folder; returns what it printed.

    Runs in a process group of its own, so that its Ray processes end with it at the limit.
    """
    program = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = program.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        printed, _ = program.communicate()
        pytest.fail(f"still running after {limit_s} s; it printed:\n{printed}")
    assert program.returncode == 0, printed
    return printed


def test_all_walk_throughs_are_here() -> None:
    names = {example.stem for example in EXAMPLES}
    gloo = {"gloo_method", "gloo_groups", "gloo_pass", "gloo_nested"}
    assert names == gloo | {
        "plain_return",
        "same_actor",
        "driver_get",
        "nixl_pass",
        "nccl_pass",
        "cuda_ipc_pass",
        "auto_pass",
        "own_transport",
    }


@pytest.fixture(scope="module")
def printed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[str]]]:
    """What each example that is tested prints. Two run at a time: most of each is Ray's start."""
    wanted = {
        item.callspec.params["name"] if hasattr(item, "callspec") else "nccl_pass"
        for item in request.session.items
        if "printed" in getattr(item, "fixturenames", ())
    }
    with ThreadPoolExecutor(2) as pool:
        yield {
            path.stem: pool.submit(run_program, [path], tmp_path_factory.mktemp(path.stem), 110)
            for path in EXAMPLES
            if path.stem in wanted
        }


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_example_runs_and_prints(name: str, printed: dict[str, Future[str]]) -> None:
    text = printed[name].result()
    assert text.strip()
    assert "Traceback" not in text


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="two GPUs: the example runs for real")
def test_nccl_example_says_why_it_skips(printed: dict[str, Future[str]]) -> None:
    text = printed["nccl_pass"].result()
    assert text.startswith("skipped: ")
    assert "GPU" in text


@pytest.mark.slow
def test_demo_shows_equal_embeddings_and_a_plot(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "sync.png"
    demo = ROOT / "examples" / "demo" / "run.py"
    printed = run_program([demo, "--steps", "1", "--plot", plot], tmp_path, limit_s=110)
    assert "step 1: " in printed
    assert "all embeddings equal" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
