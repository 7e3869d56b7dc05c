"""Unpack the GPU kit: ``python -m ci.gpu.kit PATH`` prints the new folder.

``./build.sh gpu-kit`` creates the kit. It is unpacked to:

* ``site/``: our wheel, nixl, and those of their dependencies that this Python lacks.
* ``stock/``: stock Ray, mostly the same files; ``stock-python`` is a Python that uses it.
* ``checkout/``: ``ci/`` and the tests.

Runs on: the machine with the GPU, with the Python that has torch. Needs only Python.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARCHIVES = ("stock.tar.xz", "ours.tar.xz")


class KitError(Exception):
    """The kit cannot be used; the text names the remedy."""


def find(path: Path) -> Path:
    """Return the kit of a folder, or the kit itself.

    Raises:
        KitError: There is no kit, or there are several.
    """
    if path.is_file():
        return path
    found = sorted(path.glob("gpu-kit-*.tar"))
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise KitError(f"{path} must be a GPU kit or a folder with one; kits there: {names}")
    return found[0]


def unpack(kit: Path, scratch: Path) -> Path:
    """Unpack a kit, once for each content; return the folder."""
    digest = hashlib.sha256(kit.read_bytes()).hexdigest()[:16]
    folder = scratch / f"gpu-kit-{digest}"
    if folder.is_dir():
        return folder
    scratch.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix="gpu-kit-", dir=scratch))
    try:
        with tarfile.open(kit) as outer:
            facts = _read_facts(outer)
            for name in ARCHIVES:
                with tarfile.open(fileobj=outer.extractfile(name)) as inner:
                    inner.extractall(fresh, filter="data")
        take_what_is_missing(fresh, facts["needs"])
        compileall.compile_dir(fresh / "site" / "ray", quiet=2, workers=0)
        complete_stock(fresh, facts["ours"])
        fresh.joinpath("kit.json").write_text(json.dumps(facts))
        fresh.chmod(0o755)
        _write_stock_python(fresh / "stock-python", folder / "stock")
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _read_facts(outer: tarfile.TarFile) -> dict[str, Any]:
    stream = outer.extractfile("kit.json")
    assert stream is not None
    facts: dict[str, Any] = json.load(stream)
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if facts["python"] != here:
        raise KitError(
            f"this kit is for {facts['python']}, and {sys.executable} is {here}: name another "
            "Python, as in PYTHON=python3.12 ci/gpu/run.sh --kit ..."
        )
    return facts


def take_what_is_missing(folder: Path, needs: dict[str, list[str]]) -> None:
    """Make packages of ``needs/`` importable, unless this Python already has them."""
    for name, modules in needs.items():
        if not all(map(_is_here, modules)):
            shutil.copytree(folder / "needs" / name, folder / "site", dirs_exist_ok=True)


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def complete_stock(folder: Path, ours: Iterable[str]) -> None:
    """Complete ``stock/``: link the files that it shares with our wheel."""
    site, not_stock = folder / "site", set(ours)
    for file in sorted((site / "ray").rglob("*")):
        name = file.relative_to(site).as_posix()
        if file.is_dir() or name in not_stock or "__pycache__" in file.parts:
            continue
        link = folder / "stock" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, link)
    compileall.compile_dir(folder / "stock" / "ray", quiet=2, workers=0)


def _write_stock_python(script: Path, stock: Path) -> None:
    path = f'{shlex.quote(str(stock))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    script.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {shlex.quote(sys.executable)} "$@"\n')
    script.chmod(0o755)


def main(arguments: list[str]) -> int:
    """Print the folder, or an error on stderr."""
    try:
        print(unpack(find(Path(arguments[0])), Path(tempfile.gettempdir())))
    except (KitError, OSError) as error:
        print(f"ci/gpu/run.sh: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
