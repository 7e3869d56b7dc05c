"""The virtual environments: .venv with our wheel, one with stock Ray, and one for lint."""

import csv
import sys
import zipfile
from pathlib import Path

from ci.build.base import python_tag, read_base
from ci.build.steps import (
    BUILD,
    ROOT,
    BuildError,
    digest,
    is_done,
    mark_done,
    need_disk,
    replace_file,
    run,
    say,
)
from ci.build.wheel import record_of, record_row

VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "ci" / "requirements"
TORCH_BYTES = 6_000_000_000
PIP_FAILED = "it needs a package index; pip's message above names the missing package"


def make_venv(folder: Path, requirements: list[str], *, nbytes: int) -> Path:
    """Create or complete a venv of the running Python; return its python."""
    python = folder / "bin" / "python"
    files = [REQUIREMENTS / name for name in requirements]
    stamp = folder / "installed.txt"
    key = digest(sys.version, *files)
    if is_done(stamp, key):
        return python
    marker = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if folder.exists() and not marker.exists():
        raise BuildError(f"{folder} is not of {python_tag()}: remove it and run again")
    say(f"installing {', '.join(requirements)} into {folder.relative_to(ROOT)}")
    need_disk(nbytes, f"creating {folder.relative_to(ROOT)}")
    if not python.exists():
        run([sys.executable, "-m", "venv", folder], advice="install Python's venv package")
    for file in files:
        alone = ["--no-deps"] if file.name == "alone.txt" else []
        run(
            [python, "-m", "pip", "install", "-qq", *alone, "--requirement", file],
            advice=PIP_FAILED,
        )
    mark_done(stamp, key)
    return python


def test_venv(wheel: Path) -> Path:
    """Create .venv with our wheel and the packages of tests and examples; return its python."""
    python = make_venv(VENV, ["test.txt", "alone.txt"], nbytes=TORCH_BYTES)
    site = next((VENV / "lib").glob("python3*/site-packages"))
    if not lay_wheel(wheel, site):
        run(
            [python, "-m", "pip", "install", "-qq", "--force-reinstall", "--no-deps", wheel],
            advice=PIP_FAILED,
        )
    return python


def lay_wheel(wheel: Path, site: Path) -> bool:
    """Update an installed wheel of the same version, file by file.

    Only changed files are written, each atomically, so Ray processes that run from the venv
    continue. Returns False if another version or none is installed.
    """
    with zipfile.ZipFile(wheel) as archive:
        record = record_of(archive.namelist())
        installed = site / record
        if not installed.is_file():
            return False
        wanted = {row[0]: row for row in csv.reader(archive.read(record).decode().splitlines())}
        rows = list(csv.reader(installed.read_text().splitlines()))
        for name, sha256, _ in wanted.values():
            there = site / name
            if name == record:
                continue
            content = archive.read(name) if not _is_same(there, name, sha256) else None
            if content is not None:
                mode = archive.getinfo(name).external_attr >> 16 & 0o777
                replace_file(there, content, mode)
    kept = [row for row in rows if row[0] not in wanted and not _is_outdated(row[0], record)]
    for row in rows:
        if row[0] not in wanted and row not in kept:
            (site / row[0]).unlink(missing_ok=True)
    lines = [",".join(row) for row in [*wanted.values(), *kept]]
    replace_file(installed, ("\n".join(lines) + "\n").encode())
    return True


def _is_same(path: Path, name: str, sha256: str) -> bool:
    return path.is_file() and record_row(name, path.read_bytes()).split(",")[1] == sha256


def _is_outdated(name: str, record: str) -> bool:
    """Tell whether a file of the old wheel is missing in the new one; pip's own files stay."""
    by_pip = name.startswith(("../", record.rpartition("/")[0])) or "/__pycache__/" in name
    return not by_pip


def stock_venv() -> Path:
    """Create a venv with stock Ray instead of our wheel; return its python."""
    folder = BUILD / f"stock-venv-{python_tag()}"
    python = make_venv(folder, ["test.txt", "alone.txt"], nbytes=TORCH_BYTES)
    release = f"ray=={read_base().version}"
    stamp = folder / "ray.txt"
    if not is_done(stamp, release):
        say(f"installing {release} into {folder.relative_to(ROOT)}")
        run([python, "-m", "pip", "install", "-qq", "--no-deps", release], advice=PIP_FAILED)
        mark_done(stamp, release)
    return python


def lint_venv() -> Path:
    return make_venv(BUILD / f"lint-{python_tag()}", ["lint.txt"], nbytes=500_000_000)
