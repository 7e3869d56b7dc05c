"""Helpers of all build steps: user errors, running tools, stamps, the build lock."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"


class BuildError(Exception):
    """Error that stops the build; its text names the problem, the file, and the remedy."""


def say(text: str) -> None:
    print(f"build.sh: {text}", file=sys.stderr, flush=True)


def run(
    command: Sequence[str | Path],
    *,
    advice: str,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
) -> None:
    """Run a tool with its output shown; `advice` is what the user reads if it fails."""
    arguments = [str(part) for part in command]
    environment = {**os.environ, **(env or {})}
    status = subprocess.run(arguments, cwd=cwd, env=environment, check=False).returncode
    if status:
        raise BuildError(f"'{' '.join(arguments[:4])} ...' exited with {status}: {advice}")


def capture(command: Sequence[str | Path], *, advice: str) -> str:
    """Run a tool and return its standard output."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise BuildError(
            f"'{' '.join(arguments[:4])} ...' exited with {done.returncode}: {advice}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done.stdout


def digest(*parts: str | bytes | Path) -> str:
    """Return a stamp key over all parts; a Path counts as its file's content."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            content = part.read_bytes()
        else:
            content = part.encode() if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()


def sha256_of(content: bytes) -> str:
    """Return the sha256 of content, as sha256sum prints it."""
    return hashlib.sha256(content).hexdigest()


def is_done(stamp: Path, key: str) -> bool:
    """Return whether the step that leaves `stamp` was already done for the same input."""
    return stamp.is_file() and stamp.read_text() == key


def mark_done(stamp: Path, key: str) -> None:
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)


def replace_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace a file atomically: a reader sees the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.chmod(mode)
    fresh.replace(path)


def need_disk(nbytes: int, what: str) -> None:
    BUILD.mkdir(exist_ok=True)
    free = shutil.disk_usage(BUILD).free
    if free < nbytes:
        raise BuildError(
            f"{what} needs {nbytes / 1e9:.1f} GB of disk and {BUILD} has {free / 1e9:.1f} GB: "
            "make room, or move the checkout"
        )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the checkout's build lock: two builds at once would write the same files."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another build in this checkout")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
