"""The patch series applies exactly or not at all, and its linter says what is wrong with it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ci import patches as tool
from ci.build import overlay as composer
from ci.build import series
from ci.build.steps import BuildError

ONE = "python/ray/one.py"


def lint(tree: Path, patches: Path) -> str:
    return tool.lint(tree, patches)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_the_committed_series_is_sound(stock: Path) -> None:
    assert "patches" in lint(stock, series.PATCHES)


def test_a_sound_patch_passes_and_applies(tree: Path, patches: Path) -> None:
    assert lint(tree, patches) == "1 patches, 1 files, 1 changed lines"
    after = series.apply_series(series.read_series(patches), tree)[ONE]
    assert after.splitlines()[18:21] == ["line_19 = 19", "hello = 0", "line_20 = 20"]


def test_an_empty_series_is_sound(tree: Path, patches: Path) -> None:
    (patches / "series").write_text("")
    (patches / "hello.patch").unlink()
    assert lint(tree, patches) == "0 patches, 0 files, 0 changed lines"


@pytest.mark.skipif(not shutil.which("patch"), reason="GNU patch is not installed")
def test_gnu_patch_agrees(tree: Path, patches: Path) -> None:
    ours = series.apply_series(series.read_series(patches), tree)[ONE]
    strict = ["patch", "-p1", "-F0", "--forward", "--input", patches / "hello.patch"]
    subprocess.run(strict, cwd=tree, check=True, capture_output=True)
    assert (tree / ONE).read_text() == ours


def test_a_line_inserted_above_makes_it_stale(tree: Path, patches: Path) -> None:
    edit(tree / ONE, "line_1 = 1\n", "line_0 = 0\nline_1 = 1\n")
    with pytest.raises(BuildError, match=r"stale patch: patches/hello\.patch .*python/ray/one\.py"):
        lint(tree, patches)


def test_context_that_only_nearly_fits_is_no_fit(tree: Path, patches: Path) -> None:
    edit(tree / ONE, "line_20 = 20\n", "line_20 = 20  # changed\n")
    with pytest.raises(BuildError, match=r"stale patch: patches/hello\.patch .*python/ray/one\.py"):
        series.apply_series(series.read_series(patches), tree)


def test_a_file_that_is_gone_makes_it_stale(tree: Path, patches: Path) -> None:
    (tree / ONE).unlink()
    with pytest.raises(BuildError, match=r"stale patch: patches/hello\.patch .*python/ray/one\.py"):
        series.apply_series(series.read_series(patches), tree)


def test_a_second_application_is_refused(tree: Path, patches: Path) -> None:
    after = series.apply_series(series.read_series(patches), tree)
    (tree / ONE).write_text(after[ONE])
    with pytest.raises(BuildError, match="stale patch"):
        series.apply_series(series.read_series(patches), tree)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Forwarded: no\n", "", "missing: Forwarded"),
        ("Reason: build", "Reason: because", "Reason begins with"),
        ("2026-11-23", "yesterday", "Last-Update"),
        ("tests/build/conftest.py", "tests/none.py", "tests/none.py"),
        ("+hello = 0", "+hello = (", "no longer compiles"),
        ("@@ -19,2 +19,3 @@", "@@ -19,2 +21,3 @@", "moves to line 21"),
        ("@@ -19,2 +19,3 @@", "@@ -19,3 +19,4 @@", "cut short"),
        ("+++ b/python/ray/one.py", "+++ b/python/ray/other.py", "of one stock file"),
        ("--- a/python/ray/one.py", "--- /dev/null", "cannot create or remove files"),
        ("+hello = 0\n line_20 = 20\n", "-line_20 = 20\n+hello = 0\n+line_20 = 20\n", "export"),
    ],
)
def test_the_linter_names_the_fault(
    tree: Path, patches: Path, old: str, new: str, complaint: str
) -> None:
    edit(patches / "hello.patch", old, new)
    with pytest.raises(BuildError, match=complaint) as raised:
        lint(tree, patches)
    assert "hello.patch" in str(raised.value)


def test_series_and_files_must_agree(tree: Path, patches: Path) -> None:
    (patches / "stray.patch").write_text("")
    with pytest.raises(BuildError, match=r"stray\.patch"):
        lint(tree, patches)
    (patches / "stray.patch").unlink()
    (patches / "series").write_text("hello.patch\nlost.patch\n")
    with pytest.raises(BuildError, match=r"lost\.patch"):
        lint(tree, patches)


def test_a_patch_must_keep_off_what_the_overlay_replaces(
    tree: Path, patches: Path, overlay: Path
) -> None:
    edit(patches / "hello.patch", "python/ray/one.py", "python/ray/two.py")
    with pytest.raises(BuildError, match=r"hello\.patch changes python/ray/two\.py"):
        composer.compose(tree, patches, overlay)


def test_export_takes_the_least_context_that_is_unique() -> None:
    before = "".join(f"a\nb\nc{n // 2}\n" for n in range(6))
    lines = before.splitlines(keepends=True)
    after = "".join([*lines[:8], "new\n", *lines[8:]])
    diff = series.export({ONE: before}, {ONE: after})
    (hunk,) = series.parse("x.patch", diff).hunks[ONE]
    assert series.only_place(hunk, lines) == series.stated_place(hunk, lines) >= 0
    assert series.apply(series.parse("x.patch", diff), {ONE: before})[ONE] == after


@pytest.fixture
def workshop(tmp_path: Path, patches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The patch tool at work on the small series; gives the folder where it lays files out."""
    monkeypatch.setattr(tool, "PATCHES", patches)
    monkeypatch.setattr(tool, "OPEN", tmp_path / "open")
    return tmp_path / "open"


def test_export_writes_the_same_bytes(tree: Path, patches: Path, workshop: Path) -> None:
    before = (patches / "hello.patch").read_bytes()
    tool.export_all(tree)
    assert (patches / "hello.patch").read_bytes() == before
    tool.open_patch("hello.patch", tree)
    tool.export_all(tree)
    assert (patches / "hello.patch").read_bytes() == before


def test_a_later_patch_moves_with_an_edit_of_an_earlier_one(
    tree: Path, patches: Path, workshop: Path
) -> None:
    tool.new_patch("bye.patch", [ONE], tree)
    edit(workshop / "bye.patch" / ONE, "line_30 = 30\n", "line_30 = 30\nbye = 0\n")
    header = (patches / "bye.patch").read_text()
    assert "Reason: one of temporary" in header
    (patches / "bye.patch").write_text((patches / "hello.patch").read_text().split("---")[0])
    tool.export_all(tree)
    assert not workshop.exists()
    assert "@@ -31,2 +31,3 @@" in (patches / "bye.patch").read_text()

    tool.open_patch("hello.patch", tree)
    edit(workshop / "hello.patch" / ONE, "hello = 0\n", "hello = 0\nworld = 0\n")
    tool.export_all(tree)
    assert "@@ -32,2 +32,3 @@" in (patches / "bye.patch").read_text()
    assert lint(tree, patches) == "2 patches, 1 files, 3 changed lines"
