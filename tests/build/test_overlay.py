"""Overlay and patches on a tree: what they change, what stops them, and back again."""

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from ci.build import overlay as composer
from ci.build import source_tree
from ci.build.steps import ROOT, BuildError


def content(tree: Path) -> dict[str, bytes | None]:
    """Every file and folder of a tree, so that two states of it can be compared."""
    return {
        path.relative_to(tree).as_posix(): path.read_bytes() if path.is_file() else None
        for path in tree.rglob("*")
    }


def test_what_is_new_replaced_and_patched(tree: Path, patches: Path, overlay: Path) -> None:
    changes = composer.compose(tree, patches, overlay)
    assert {path: change.reason for path, change in changes.items()} == {
        "python/ray/one.py": "patched by hello.patch",
        "python/ray/two.py": "replaced",
        "python/ray/three.py": "new",
    }


def test_a_changed_replaced_file_stops_it(tree: Path, patches: Path, overlay: Path) -> None:
    (tree / "python/ray/two.py").write_text("two = 3\n")
    with pytest.raises(BuildError, match=r"changed base: python/ray/two\.py"):
        composer.compose(tree, patches, overlay)


def test_a_replaced_file_that_is_gone_stops_it(tree: Path, patches: Path, overlay: Path) -> None:
    (tree / "python/ray/two.py").unlink()
    with pytest.raises(BuildError, match=r"changed base: python/ray/two\.py"):
        composer.compose(tree, patches, overlay)


def test_an_unlisted_replacement_stops_it(tree: Path, patches: Path, overlay: Path) -> None:
    (tree / "python/ray/three.py").write_text("")
    with pytest.raises(BuildError, match=r"python/ray/three\.py would replace a stock file"):
        composer.compose(tree, patches, overlay)


def test_a_line_of_replaced_that_is_not_done_stops_it(
    tree: Path, patches: Path, overlay: Path
) -> None:
    (overlay / "python/ray/two.py").unlink()
    with pytest.raises(BuildError, match=r"python/ray/two\.py is replaced, but ray/ lacks it"):
        composer.compose(tree, patches, overlay)


def test_every_stock_rdt_file_is_replaced_or_removed(stock: Path) -> None:
    listed = {row.path for row in composer.read_replaced()}
    rdt = {f.relative_to(stock).as_posix() for f in stock.glob("python/ray/experimental/rdt/*.py")}
    assert rdt <= listed


def test_apply_and_reverse_leave_every_byte(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "ray-checkout"
    shutil.copytree(stock, tree)
    before = content(tree)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    subprocess.run([ROOT / "build.sh", "apply", "ray-checkout"], check=True)
    for path, change in composer.compose(stock).items():
        if change.content is None:
            assert not (tree / path).exists()
        else:
            assert (tree / path).read_bytes() == change.content
    subprocess.run([ROOT / "build.sh", "apply", "--reverse", "ray-checkout"], check=True)
    assert content(tree) == before


@pytest.fixture
def applied(
    tree: Path, patches: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes | None]:
    """Puts the small series and overlay onto the tiny tree; gives what it held before."""
    before = content(tree)
    compose = partial(composer.compose, patches=patches, overlay=overlay)
    monkeypatch.setattr(source_tree, "compose", compose)
    source_tree.put_on(tree)
    return before


def test_reverse_refuses_to_lose_an_edit(tree: Path, applied: dict[str, bytes | None]) -> None:
    three = tree / "python/ray/three.py"
    three.write_text("three = 4\n")
    with pytest.raises(BuildError, match=r"python/ray/three\.py"):
        source_tree.take_off(tree)
    three.write_text("three = 3\n")
    source_tree.take_off(tree)
    assert content(tree) == applied


def test_applying_twice_is_refused(tree: Path, applied: dict[str, bytes | None]) -> None:
    with pytest.raises(BuildError, match="applied before"):
        source_tree.put_on(tree)
    source_tree.take_off(tree)
    assert content(tree) == applied


def test_a_folder_that_is_no_ray_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no python/ray"):
        source_tree.put_on(tmp_path)
    with pytest.raises(BuildError, match="nothing was applied"):
        source_tree.take_off(tmp_path)
