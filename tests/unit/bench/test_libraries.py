"""Libraries of the benchmark: each runs in two processes, which end with the arm."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

import pytest

from bench.libraries import LibraryTransfer
from bench.protocol import Skip

ROOT = Path(__file__).resolve().parents[3]
NBYTES = 1 << 20
MARK = f"RDT_BENCH_TEST={uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(*MARK.split("="))


@pytest.mark.parametrize("library", ["memcpy, 2 threads", "torch gloo", "torch RPC"])
def test_each_transfer_is_timed(library: str) -> None:
    with contextlib.closing(LibraryTransfer(library, NBYTES, count=3)) as transfer:
        assert len(transfer.sample()) == 3
        assert all(seconds > 0 for seconds in transfer.sample())
        assert len(running_processes()) == 2
    assert not running_processes()


def test_library_that_cannot_be_imported_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libibverbs.so.1 is missing')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(Skip, match=r"mooncake cannot be imported: libibverbs\.so\.1 is missing"):
        LibraryTransfer("mooncake", NBYTES, count=1)
    assert not running_processes()


def running_processes() -> list[str]:
    """Return the commands of running processes that this test's environment reached."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if MARK.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found
