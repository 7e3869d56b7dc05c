"""The GPU kit: one archive to run ``ci/gpu`` on a machine with a GPU and without a network.

It holds what such a machine lacks; Python, torch for CUDA and pytest have to be there. Inside are
``kit.json`` and two archives:

* ``stock.tar.xz``: the stock files of the wheel that the checks need, nixl with UCX, and what Ray
  and the tests need, each package in a folder of its own. Compressed once and kept.
* ``ours.tar.xz``: the files of the wheel that differ from stock Ray's, stock Ray's versions of
  them, tests and ``ci/``.

``ci/gpu/kit.py`` unpacks it. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from ci.build import base
from ci.build.steps import (
    BUILD,
    ROOT,
    BuildError,
    digest,
    is_done,
    mark_done,
    replace_file,
    run,
    say,
)
from ci.build.wheel import DIST, EPOCH_2020

PYTHON_TAG = "cp312"
LIMIT_BYTES = 60_000_000
REQUIREMENTS = ROOT / "ci" / "requirements"
REQUIRED = [REQUIREMENTS / name for name in ("gpu-kit.txt", "test.txt", "alone.txt")]

#: Excluded parts of the wheel: other languages, libraries on top of Ray, dashboard pages.
NOT_OF_RAY = (
    "ray/air/",
    "ray/core/libjemalloc.so",
    "ray/cpp/",
    "ray/dashboard/client/",
    "ray/data/",
    "ray/jars/",
    "ray/llm/",
    "ray/rllib/",
    "ray/serve/",
    "ray/train/",
    "ray/tune/",
)

#: nixl libraries that are loaded by name. The libraries they are linked to are included. The
#: rest is excluded: one GPU of one host does not need InfiniBand or storage.
LOADED_OF_NIXL = (
    "*/_bindings.*.so",
    "*/_utils.*.so",
    "*/libplugin_UCX.so",
    "*/ucx/libucm_cuda.so*",
    "*/ucx/libuct_cma.so*",
    "*/ucx/libuct_cuda.so*",
)

#: Content of the checkout that runs on the machine.
CHECKOUT = ("ci/**/*", "tests/**/*", "pyproject.toml")

Files = dict[str, tuple[bytes, int]]  # content and mode, by path in the archive


def build_kit(wheel: Path, work: Path = BUILD, dist: Path = DIST) -> Path:
    """Return the kit for the running Python, with this wheel in it."""
    release = base.read_base()
    base_wheel = base.fetch(release)
    ours, left_out = difference(wheel, base_wheel)
    stock = pack_stock(base_wheel, left_out, work).read_bytes()
    theirs = members(base_wheel, lambda name: name in left_out)
    packed = compose(wheel.name, ours, theirs, stock, imports_of(wheels_of_needs(work)))
    kit = dist / f"gpu-kit-{base.python_tag()}.tar"
    replace_file(kit, packed)
    say(f"{kit.name}: {len(packed) / 1e6:.1f} MB of {LIMIT_BYTES / 1e6:.0f}")
    return kit


def compose(
    wheel: str, ours: Files, theirs: Files, stock: bytes, needs: dict[str, list[str]]
) -> bytes:
    """The kit.

    Args:
        wheel: The name of our wheel.
        ours: Its files that differ from stock Ray's.
        theirs: Stock Ray's versions of them, and what we have removed.
        stock: The archive of the rest.
        needs: What each of the packages in it is imported as.

    Raises:
        BuildError: it is too large.
    """
    changed = prefixed("site", ours) | prefixed("stock", theirs)
    changed |= prefixed("checkout", checkout(ROOT))
    facts = {
        "python": base.python_tag(),
        "wheel": wheel,
        "commit": commit(ROOT),
        "ours": sorted(ours),
        "needs": needs,
    }
    content = {
        "kit.json": (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode(),
        "stock.tar.xz": stock,
        "ours.tar.xz": archive(changed, "w:xz"),
    }
    packed = archive({name: (part, 0o644) for name, part in content.items()}, "w:")
    check_size(packed, {name: len(part) for name, part in content.items()}, changed)
    return packed


def check_python(tag: str) -> None:
    """Raise BuildError unless this is the kit's Python version."""
    if tag != PYTHON_TAG:
        raise BuildError(
            f"the GPU kit is for CPython 3.12, and this is {tag}: name another, as in "
            "PYTHON=python3.12 ./build.sh gpu-kit"
        )


def check_size(packed: bytes, parts: Mapping[str, int], changed: Files) -> None:
    """Raise BuildError if the kit exceeds its size limit."""
    if len(packed) <= LIMIT_BYTES:
        return
    sizes = ", ".join(f"{name} {nbytes / 1e6:.1f} MB" for name, nbytes in parts.items())
    largest = sorted(changed, key=lambda name: -len(changed[name][0]))[:5]
    named = ", ".join(f"{name} {len(changed[name][0]) / 1e6:.1f} MB" for name in largest)
    raise BuildError(
        f"the GPU kit has {len(packed) / 1e6:.1f} MB and may have {LIMIT_BYTES / 1e6:.0f}: "
        f"{sizes}; the largest of ours.tar.xz, before compression: {named}. Leave more out, in "
        "NOT_OF_RAY and LOADED_OF_NIXL of ci/build/gpu_kit.py"
    )


def difference(wheel: Path, base_wheel: Path) -> tuple[Files, set[str]]:
    """Return the files of our wheel that differ from stock Ray's.

    Returns:
        These files, and the names of stock Ray's files that differ or are missing in ours.
    """
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(base_wheel) as other:
        stock = {each.filename: (each.CRC, each.file_size) for each in other.infolist()}
        here = {each.filename: (each.CRC, each.file_size) for each in one.infolist()}
    ours = members(wheel, lambda name: here[name] != stock.get(name))
    return ours, {name for name in stock if is_kept(name) and here.get(name) != stock[name]}


def is_kept(name: str) -> bool:
    """Tell whether a file of a Ray wheel goes into the kit."""
    return not name.startswith(NOT_OF_RAY) and ".data/" not in name and not name.endswith("/")


def members(wheel: Path, is_wanted: Callable[[str], bool]) -> Files:
    """Return the files of a Ray wheel that belong to the kit."""
    return read_wheel(wheel, lambda name: is_kept(name) and is_wanted(name))


def read_wheel(wheel: Path, is_wanted: Callable[[str], bool]) -> Files:
    with zipfile.ZipFile(wheel) as archive:
        return {
            each.filename: (
                archive.read(each),
                0o755 if each.external_attr >> 16 & 0o100 else 0o644,
            )
            for each in archive.infolist()
            if is_wanted(each.filename)
        }


def pack_stock(base_wheel: Path, left_out: set[str], work: Path) -> Path:
    """Return the archive of the parts that seldom change."""
    packed = work / f"gpu-kit-{base.python_tag()}.tar.xz"
    stamp = packed.with_suffix(".done")
    key = digest(base_wheel.name, Path(__file__), *REQUIRED, *sorted(left_out))
    if is_done(stamp, key):
        return packed
    needs = wheels_of_needs(work)
    say("packing the stock part of the GPU kit (once)")
    files = prefixed("site", members(base_wheel, lambda name: name not in left_out))
    for name, wheel in needs.items():
        content = read_wheel(wheel, lambda path: not path.endswith("/"))
        is_nixl = name.startswith("nixl")
        files |= prefixed("site" if is_nixl else f"needs/{name}", slim(content))
    packed.write_bytes(archive(files, "w:xz"))
    mark_done(stamp, key)
    return packed


def wheels_of_needs(work: Path) -> dict[str, Path]:
    """Return the wheels of gpu-kit.txt for the running Python, by distribution name."""
    folder = work / f"gpu-kit-needs-{base.python_tag()}"
    stamp = folder / "downloaded.txt"
    key = digest(*REQUIRED)
    if not is_done(stamp, key):
        say("downloading the other packages of the GPU kit")
        shutil.rmtree(folder, ignore_errors=True)
        wanted, *pins = REQUIRED
        constraints = [part for pin in pins for part in ("--constraint", pin)]
        run(
            [*base.PIP_DOWNLOAD, "--dest", folder, "--requirement", wanted, *constraints],
            advice="it needs a package index",
        )
        mark_done(stamp, key)
    return {wheel.name.split("-")[0]: wheel for wheel in sorted(folder.glob("*.whl"))}


def imports_of(wheels: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the import name of each package that a machine may already have."""
    found = {}
    for name, wheel in wheels.items():
        if name.startswith("nixl"):
            continue
        with zipfile.ZipFile(wheel) as archive:
            found[name] = top_modules(archive.namelist())
    return found


def top_modules(names: Iterable[str]) -> list[str]:
    """Return the top-level packages and modules of a wheel."""
    packages = {PurePosixPath(name).parent for name in names if name.endswith("/__init__.py")}
    modules = {PurePosixPath(name).with_suffix("") for name in names if name.endswith(".py")}
    alone = {module for module in modules if module.parent == PurePosixPath()}
    tops = alone | {each for each in packages if not packages & set(each.parents)}
    return sorted(".".join(each.parts) for each in tops)


def slim(files: Files) -> Files:
    """Return the files of a package; for nixl's libraries, only those that are loaded."""
    libraries = {name for name in files if ".so" in PurePosixPath(name).name}
    roots = [name for name in libraries if any(map(PurePosixPath(name).match, LOADED_OF_NIXL))]
    if not any("nixl" in name for name in roots):
        return files
    kept = linked({name: files[name][0] for name in libraries}, roots)
    unused = (".la", ".h", ".cmake", ".pc")
    return {
        name: file
        for name, file in files.items()
        if name in kept or not (name in libraries or name.endswith(unused) or _is_beside_nixl(name))
    }


def _is_beside_nixl(name: str) -> bool:
    """Tell whether a file is a program, a header, or nixl's library for mixtures of experts."""
    first = name.partition("/")[0]
    return first.endswith((".data", ".scripts")) or first.startswith("nixl_ep_")


def linked(libraries: Mapping[str, bytes], roots: Iterable[str]) -> set[str]:
    """Return the roots and all libraries that they are linked to, directly or indirectly."""
    by_name: dict[str, list[str]] = {}
    for path in libraries:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)
    found: set[str] = set()
    left = list(roots)
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            needed = needed_by(libraries[path])
            left += [each for name in needed for each in by_name.get(name, ())]
    return found


def needed_by(library: bytes) -> list[str]:
    """Return the names of the libraries that a library is linked to."""
    from elftools.elf.elffile import ELFFile  # auditwheel's

    section = ELFFile(io.BytesIO(library)).get_section_by_name(".dynamic")
    return [str(tag.needed) for tag in section.iter_tags("DT_NEEDED")] if section else []


def checkout(root: Path) -> Files:
    """Return the part of this checkout that runs on the machine."""
    files = sorted(file for pattern in CHECKOUT for file in root.glob(pattern) if file.is_file())
    return {
        file.relative_to(root).as_posix(): (file.read_bytes(), file.stat().st_mode & 0o755 | 0o644)
        for file in files
        if "__pycache__" not in file.parts
    }


def commit(root: Path) -> str:
    """Return the commit of the sources, or "" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def prefixed(folder: str, files: Files) -> Files:
    return {f"{folder}/{name}": file for name, file in files.items()}


def archive(files: Files, mode: str) -> bytes:
    """Return a reproducible tar file: fixed order, one timestamp, no owner."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for name, (content, permissions) in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(content), permissions, EPOCH_2020
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
