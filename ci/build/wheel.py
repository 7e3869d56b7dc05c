"""Build our wheel: the base's files with patches, overlay and agent.

The same input gives the same bytes: members in one order, one timestamp, two file modes.
Stock members are compressed once, so that a change in our Python is packed in a second.
"""

import base64
import hashlib
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

from ci.build import base, overlay
from ci.build.native import compile_extensions, licences
from ci.build.steps import BUILD, ROOT, BuildError, capture, digest, is_done, mark_done, say

DIST = ROOT / "dist"
SHIPPED = "python/"
NOT_SHIPPED = (".pyx", ".pxd", ".pxi")
EPOCH_2020 = 1577836800
ZIP_BEGINS = 315532800  # 1980 is the earliest time in a zip file
CHANGES_FILE = "RDT-CHANGES.txt"
PLATFORM_LINE = re.compile(r'platform\s+tag:\s+"(\w+)"')

Members = dict[str, bytes | None]


def our_version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if not found:
        raise BuildError("pyproject.toml: no line 'version = \"...\"' in [project]")
    return found[1]


def build_wheel(work: Path = BUILD, dist: Path = DIST) -> Path:
    """Return the wheel for the running Python; build the missing parts."""
    stock_release = base.read_base()
    base_wheel = base.fetch(stock_release)
    stock = base.unpack(base_wheel, stock_release.wheels[base_wheel.name], work)
    changes = overlay.compose(stock)
    need_compiler()
    extensions = compile_extensions(work / "extensions")

    members: Members = {
        path.removeprefix(SHIPPED): change.content
        for path, change in changes.items()
        if path.startswith(SHIPPED) and not path.endswith(NOT_SHIPPED)
    }
    for extension in extensions:
        members[f"ray/experimental/rdt/{extension.name}"] = extension.read_bytes()
    stock_info = f"ray-{stock_release.version}.dist-info/"
    with zipfile.ZipFile(base_wheel) as archive:
        info = {
            name.removeprefix(stock_info): archive.read(name)
            for name in archive.namelist()
            if name.startswith(stock_info)
        }
    version = f"{stock_release.version}+rdt.{our_version()}"
    tag = f"{base.python_tag()}-{base.python_tag()}-{platform_tag(base_wheel, extensions, work)}"
    info[CHANGES_FILE] = describe_changes(changes).encode()
    info |= {f"licenses/{name}.txt": text for name, text in licences().items()}
    return pack(version, tag, base_wheel, members, info, work, dist)


def need_compiler() -> None:
    for program in ("gcc", "g++"):
        if not shutil.which(program):
            raise BuildError(f"no {program} found: install one (on Debian: apt-get install g++)")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        raise BuildError(
            f"no Python headers in {header.parent}: install them (on Debian: apt-get install "
            "python3-dev)"
        )


def describe_changes(changes: dict[str, overlay.Change]) -> str:
    """Return the wheel's list of files that differ from stock Ray's."""
    lines = [f"{path.removeprefix(SHIPPED)}  {c.reason}" for path, c in sorted(changes.items())]
    return "Files of this wheel that differ from the stock Ray release:\n" + "\n".join(lines) + "\n"


def platform_tag(base_wheel: Path, extensions: list[Path], work: Path) -> str:
    """Return the oldest platform on which all compiled files run, according to auditwheel."""
    stamp = work / f"platform-{base.python_tag()}.txt"
    key = digest(base_wheel.name, *extensions)
    if stamp.is_file():
        known, _, tag = stamp.read_text().partition(" ")
        if known == key:
            return tag
    say("determining the platform tag with auditwheel")
    probe = work / f"ray-0-{base.python_tag()}-{base.python_tag()}-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(base_wheel) as stock, zipfile.ZipFile(probe, "w") as archive:
        for name in stock.namelist():
            content = stock.read(name)
            if content.startswith(b"\x7fELF"):
                archive.writestr(name, content)
        for extension in extensions:
            archive.writestr(f"ray/experimental/rdt/{extension.name}", extension.read_bytes())
        rows = "".join(f"{name},,\n" for name in archive.namelist())
        archive.writestr("ray-0.dist-info/WHEEL", wheel_file("-".join(probe.stem.split("-")[2:])))
        archive.writestr("ray-0.dist-info/RECORD", rows)
    report = capture(
        [sys.executable, "-m", "auditwheel", "show", probe],
        advice="auditwheel could not read the compiled files",
    )
    probe.unlink()
    found = PLATFORM_LINE.search(report)
    if not found:
        raise BuildError(f"auditwheel named no platform tag:\n{report}")
    mark_done(stamp, f"{key} {found[1]}")
    return found[1]


def metadata(stock: bytes, version: str) -> bytes:
    """Return the base's METADATA with our version and an explicit content type."""
    head, blank, body = stock.decode().partition("\n\n")
    head, count = re.subn(r"(?m)^Version: .+$", f"Version: {version}", head)
    if count != 1:
        raise BuildError("the base's METADATA does not have exactly one line for its version")
    if "\nDescription-Content-Type:" not in head:
        head += "\nDescription-Content-Type: text/x-rst"
    return (head + blank + body).encode()


def wheel_file(tag: str) -> bytes:
    lines = [
        "Wheel-Version: 1.0",
        f"Generator: ray-rdt build.sh ({our_version()})",
        "Root-Is-Purelib: false",
        f"Tag: {tag}",
    ]
    return ("\n".join(lines) + "\n").encode()


def record_row(name: str, content: bytes) -> str:
    hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={hashed},{len(content)}"


def timestamp() -> tuple[int, int, int, int, int, int]:
    stated = int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH_2020))
    return time.gmtime(max(stated, ZIP_BEGINS))[:6]


def write_member(archive: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    member = zipfile.ZipInfo(name, timestamp())
    member.compress_type = zipfile.ZIP_DEFLATED
    member.create_system = 3
    member.external_attr = (0o100000 | mode) << 16
    archive.writestr(member, content)


def pack_stock(base_wheel: Path, left_out: set[str], work: Path) -> Path:
    """Return a zip of the unchanged stock files; write their RECORD rows beside it."""
    packed = work / f"stock-{base.python_tag()}.zip"
    stamp = packed.with_suffix(".zip.done")
    with zipfile.ZipFile(base_wheel) as stock:
        left_out &= set(stock.namelist())
    key = digest(base_wheel.name, str(timestamp()), *sorted(left_out))
    if is_done(stamp, key):
        return packed
    say("packing the stock files (once)")
    rows = []
    with zipfile.ZipFile(base_wheel) as stock, zipfile.ZipFile(packed, "w") as archive:
        for member in sorted(stock.infolist(), key=lambda member: member.filename):
            name = member.filename
            if name in left_out or name.startswith("ray-"):
                continue
            content = stock.read(member)
            executable = member.external_attr >> 16 & 0o100
            write_member(archive, name, content, 0o755 if executable else 0o644)
            rows.append(record_row(name, content))
    packed.with_suffix(".rows").write_text("\n".join(rows) + "\n")
    mark_done(stamp, key)
    return packed


def pack(
    version: str,
    tag: str,
    base_wheel: Path,
    members: Members,
    info: dict[str, bytes],
    work: Path,
    dist: Path,
) -> Path:
    """Write the wheel if its content differs from the file in dist/."""
    stock = pack_stock(base_wheel, set(members), work)
    ours = {name: content for name, content in sorted(members.items()) if content is not None}
    info = {
        **info,
        "METADATA": metadata(info["METADATA"], version),
        "WHEEL": wheel_file(tag),
    }
    dist_info = f"ray-{version}.dist-info"
    for name, content in sorted(info.items()):
        if name != "RECORD":
            ours[f"{dist_info}/{name}"] = content
    record = f"{dist_info}/RECORD"
    rows = stock.with_suffix(".rows").read_text() + "".join(
        record_row(name, content) + "\n" for name, content in ours.items()
    )
    ours[record] = (rows + f"{record},,\n").encode()

    wheel = dist / f"ray-{version}-{tag}.whl"
    stamp = work / f"wheel-{base.python_tag()}.done"
    key = digest(str(wheel), str(timestamp()), ours[record])
    if wheel.exists() and is_done(stamp, key):
        return wheel
    dist.mkdir(parents=True, exist_ok=True)
    for older in dist.glob(f"ray-*-{base.python_tag()}-*.whl"):
        older.unlink()
    fresh = wheel.with_suffix(".new")
    shutil.copyfile(stock, fresh)
    with zipfile.ZipFile(fresh, "a") as archive:
        for name, content in ours.items():
            write_member(archive, name, content, 0o644)
    fresh.replace(wheel)
    mark_done(stamp, key)
    say(f"built {wheel.relative_to(ROOT) if wheel.is_relative_to(ROOT) else wheel}")
    return wheel


def record_of(names: list[str]) -> str:
    """Return the name of the wheel's RECORD; stock Ray contains packages with other RECORDs."""
    return next(name for name in names if re.fullmatch(r"ray-[^/]+\.dist-info/RECORD", name))


def check_wheel(wheel: Path) -> None:
    """Check once per wheel that RECORD matches, the metadata is valid, and all Python compiles."""
    stamp = BUILD / f"checked-{base.python_tag()}.done"
    key = digest(wheel)
    if is_done(stamp, key):
        return
    check_record(wheel)
    capture(
        [sys.executable, "-m", "twine", "check", "--strict", wheel],
        advice="the wheel's metadata is not valid for an index",
    )
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                compile(archive.read(name), f"{wheel.name}/{name}", "exec", dont_inherit=True)
    mark_done(stamp, key)


def check_record(wheel: Path) -> None:
    """Check that RECORD lists exactly the members, with their hashes and sizes."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = record_of(names)
        found = {record_row(name, archive.read(name)) for name in names if name != record}
        stated = archive.read(record).decode().splitlines()
    wrong = found ^ set(stated) - {f"{record},,"}
    if wrong or len(stated) != len(names) or len(set(names)) != len(names):
        raise BuildError(f"{wheel}: RECORD and files differ: {sorted(wrong)[:5]}")
