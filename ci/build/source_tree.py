"""`build.sh apply`: apply patches and overlay to a user's Ray source tree, and remove them.

Replaced content is kept in `<tree>/.rdt/`, so that removal restores every byte. Everything is
computed and checked before the first write.
"""

import shutil
from pathlib import Path

from ci.build.overlay import compose
from ci.build.steps import BuildError, replace_file, say

KEPT = ".rdt"
STOCK, OURS = "stock", "ours"


def put_on(tree: Path) -> None:
    if not (tree / "python" / "ray").is_dir():
        raise BuildError(f"{tree} has no python/ray: name the root of a Ray source tree")
    kept = tree / KEPT
    if kept.exists():
        raise BuildError(
            f"{kept} exists: it was applied before; run './build.sh apply --reverse' first"
        )
    changes = compose(tree)
    replace_file(kept / ".gitignore", b"*\n")
    for path, change in sorted(changes.items()):
        file = tree / path
        if file.exists():
            replace_file(kept / STOCK / path, file.read_bytes(), _mode(file))
        if change.content is not None:
            replace_file(kept / OURS / path, change.content)
    for path, change in changes.items():
        file = tree / path
        if change.content is None:
            file.unlink()
        else:
            replace_file(file, change.content, _mode(file))
    say(f"{len(changes)} files of {tree} changed; {kept} has their original content")


def take_off(tree: Path) -> None:
    kept = tree / KEPT
    if not kept.is_dir():
        raise BuildError(f"{kept} does not exist: nothing was applied to this tree")
    stock, ours = _read_all(kept / STOCK), _read_all(kept / OURS)
    edited = [path for path in ours if _content(tree / path) != ours[path]]
    edited += [path for path in stock.keys() - ours.keys() if (tree / path).exists()]
    if edited:
        raise BuildError(
            "changed since they were applied, so nothing was taken off (save your edits, put the "
            f"files back as they are in {kept}): {', '.join(sorted(edited))}"
        )
    for path in ours.keys() - stock.keys():
        (tree / path).unlink()
        _remove_empty((tree / path).parent, tree)
    for path, content in stock.items():
        replace_file(tree / path, content, _mode(kept / STOCK / path))
    shutil.rmtree(kept)
    say(f"{tree} is restored")


def _read_all(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777 if path.exists() else 0o644


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
