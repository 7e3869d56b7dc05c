"""The base: stock Ray's wheel, pinned by sha256, downloaded once and unpacked."""

import platform
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ci.build.steps import (
    BUILD,
    ROOT,
    BuildError,
    is_done,
    mark_done,
    need_disk,
    run,
    say,
    sha256_of,
)

BASE_FILE = ROOT / "patches" / "BASE"
UNPACK_BYTES = 1_000_000_000
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]


@dataclass(frozen=True)
class Base:
    """Content of patches/BASE: the release, and the sha256 of each of its wheels by file name."""

    version: str
    commit: str
    wheels: dict[str, str]

    def wheel_name(self, python_tag: str, machine: str) -> str:
        for name in self.wheels:
            if f"-{python_tag}-" in name and name.endswith(f"_{machine}.whl"):
                return name
        raise BuildError(
            f"patches/BASE has no wheel for {python_tag} on {machine}: Ray {self.version} is built "
            f"for {', '.join(sorted(self.wheels))}"
        )


def python_tag() -> str:
    return f"cp{sys.version_info.major}{sys.version_info.minor}"


def read_base(path: Path = BASE_FILE) -> Base:
    fields: dict[str, str] = {}
    wheels: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        first, _, second = line.partition(" ")
        if second.endswith(".whl"):
            wheels[second.strip()] = first
        else:
            fields[first] = second
    return Base(version=fields["version"], commit=fields["commit"], wheels=wheels)


def fetch(base: Base, cache: Path = BUILD / "base") -> Path:
    """Return the verified base wheel for this Python and machine, downloading it if needed."""
    name = base.wheel_name(python_tag(), platform.machine())
    wheel = cache / name
    if not wheel.exists():
        say(f"downloading the base, {name}")
        need_disk(UNPACK_BYTES, "unpacking the base")
        cache.mkdir(parents=True, exist_ok=True)
        run(
            [*PIP_DOWNLOAD, "--dest", str(cache), f"ray=={base.version}"],
            advice=f"it needs a package index; without one, put {name} into {cache}/",
        )
    if not wheel.exists():
        raise BuildError(f"pip did not download {name}: see {cache}/")
    found, stated = sha256_of(wheel.read_bytes()), base.wheels[name]
    if found != stated:
        raise BuildError(
            f"wrong base: {wheel} has sha256 {found}, patches/BASE says {stated}: remove the file "
            "and build again; if the error remains, the package index now serves another file"
        )
    return wheel


def unpack(wheel: Path, sha256: str, work: Path = BUILD) -> Path:
    """Unpack the base as a source tree, `<tree>/python/ray/...`; return `<tree>`."""
    tree = work / f"stock-{python_tag()}"
    stamp = work / f"stock-{python_tag()}.done"
    if not is_done(stamp, sha256):
        shutil.rmtree(tree, ignore_errors=True)
        stamp.unlink(missing_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree / "python")
        mark_done(stamp, sha256)
    return tree
