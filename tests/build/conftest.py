"""The stock tree, made once, and small stand-ins for patches/ and ray/ that tests may spoil."""

from pathlib import Path

import pytest

from ci.build import base
from ci.build.steps import sha256_of

HEADER = """\
Description: says hello
Reason: build
Forwarded: no
Remove-When: never
Test: tests/build/conftest.py
Last-Update: 2026-11-23

"""


@pytest.fixture(scope="session")
def base_wheel() -> Path:
    return base.fetch(base.read_base())


@pytest.fixture(scope="session")
def stock(base_wheel: Path) -> Path:
    """The pristine tree; only read it."""
    return base.unpack(base_wheel, base.read_base().wheels[base_wheel.name])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tiny Ray source tree of two files."""
    package = tmp_path / "tree" / "python" / "ray"
    package.mkdir(parents=True)
    lines = [f"line_{n} = {n}\n" for n in range(1, 41)]
    (package / "one.py").write_text("".join(lines))
    (package / "two.py").write_text("two = 2\n")
    return tmp_path / "tree"


@pytest.fixture
def overlay(tmp_path: Path, tree: Path) -> Path:
    """An overlay that replaces two.py of the tiny tree and adds three.py."""
    folder = tmp_path / "overlay"
    (folder / "python" / "ray").mkdir(parents=True)
    (folder / "python" / "ray" / "two.py").write_text("two = 22\n")
    (folder / "python" / "ray" / "three.py").write_text("three = 3\n")
    stock_two = sha256_of((tree / "python" / "ray" / "two.py").read_bytes())
    (folder / "REPLACED").write_text(f"{stock_two} python/ray/two.py replaced\n")
    return folder


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """A series of one patch, to line 20 of one.py."""
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "series").write_text("hello.patch\n")
    (folder / "hello.patch").write_text(
        HEADER + "--- a/python/ray/one.py\n"
        "+++ b/python/ray/one.py\n"
        "@@ -19,2 +19,3 @@\n"
        " line_19 = 19\n"
        "+hello = 0\n"
        " line_20 = 20\n"
    )
    return folder
