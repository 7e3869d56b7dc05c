"""The patch series: read patches/, apply it without fuzz or offset, write diffs.

A patch is a header of `Field: text` lines and a unified diff against Ray's source paths
(python/ray/...). This module works on texts in memory and writes no files.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ci.build.steps import ROOT, BuildError

PATCHES = ROOT / "patches"
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
MOST_CONTEXT = 12

Lines = list[str]


@dataclass(frozen=True)
class Hunk:
    """One changed place: lines with their mark (' ', '-' or '+') and line ends."""

    old_start: int
    new_start: int
    lines: tuple[str, ...]

    @property
    def old(self) -> Lines:
        return [line[1:] for line in self.lines if line[0] in " -"]

    @property
    def new(self) -> Lines:
        return [line[1:] for line in self.lines if line[0] in " +"]

    def reversed(self) -> "Hunk":
        swap = {" ": " ", "-": "+", "+": "-"}
        marked = tuple(swap[line[0]] + line[1:] for line in self.lines)
        return Hunk(self.new_start, self.old_start, marked)


@dataclass(frozen=True)
class Patch:
    """One file of patches/: its header text, and the hunks of each changed file."""

    name: str
    header: str
    hunks: dict[str, tuple[Hunk, ...]]

    @property
    def fields(self) -> dict[str, str]:
        return dict(re.findall(r"^([A-Z][A-Za-z-]*): *((?:.|\n )*)", self.header, re.MULTILINE))

    @property
    def changed_lines(self) -> int:
        hunks = [hunk for of_file in self.hunks.values() for hunk in of_file]
        return sum(line[0] != " " for hunk in hunks for line in hunk.lines)

    def reversed(self) -> "Patch":
        swapped = {
            path: tuple(hunk.reversed() for hunk in hunks) for path, hunks in self.hunks.items()
        }
        return Patch(self.name, self.header, swapped)


def parse(name: str, text: str) -> Patch:
    cut = re.search(r"^--- ", text, re.MULTILINE)
    header = text[: cut.start()] if cut else text
    lines = text[len(header) :].splitlines(keepends=True)
    hunks: dict[str, tuple[Hunk, ...]] = {}
    at = 0
    while at < len(lines):
        path = _path_of(name, lines[at : at + 2])
        at += 2
        found: list[Hunk] = []
        while at < len(lines) and lines[at].startswith("@@"):
            hunk, at = _parse_hunk(name, lines, at)
            found.append(hunk)
        if not found or path in hunks:
            raise BuildError(f"patches/{name}: {path} has no hunks, or occurs twice")
        hunks[path] = tuple(found)
    return Patch(name, header, hunks)


def _path_of(name: str, two_lines: Lines) -> str:
    if len(two_lines) == 2:
        old, new = (line.rstrip("\n") for line in two_lines)
        if old[:6] == "--- a/" and new[:6] == "+++ b/" and old[6:] == new[6:]:
            return old[6:]
    raise BuildError(
        f"patches/{name}: expected '--- a/PATH' and '+++ b/PATH' of one stock file, got "
        f"{''.join(two_lines)!r}; a patch cannot create or remove files: use the overlay"
    )


def _parse_hunk(name: str, lines: Lines, at: int) -> tuple[Hunk, int]:
    match = HUNK.match(lines[at])
    if not match:
        raise BuildError(f"patches/{name}: not a hunk header: {lines[at]!r}")
    old_start, old_count, new_start, new_count = (int(group or 1) for group in match.groups())
    if match[2] == "0" or match[4] == "0":
        raise BuildError(f"patches/{name}: {lines[at]!r} has no context lines")
    body: Lines = []
    at += 1
    while at < len(lines) and lines[at][0] in " +-":
        hunk = Hunk(old_start, new_start, tuple(body))
        if len(hunk.old) == old_count and len(hunk.new) == new_count:
            break
        body.append(lines[at])
        at += 1
    hunk = Hunk(old_start, new_start, tuple(body))
    if len(hunk.old) != old_count or len(hunk.new) != new_count:
        raise BuildError(f"patches/{name}: the hunk at line {old_start} is cut short or too long")
    return hunk, at


Place = Callable[[Hunk, Lines], int]


def stated_place(hunk: Hunk, lines: Lines) -> int:
    """Return the index of the hunk's stated line if its old lines are there, otherwise -1."""
    start = hunk.old_start - 1
    return start if lines[start : start + len(hunk.old)] == hunk.old else -1


def only_place(hunk: Hunk, lines: Lines) -> int:
    """Return the index of the only place with the hunk's old lines; -1 if none or several."""
    old = hunk.old
    starts = [i for i in range(len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
    return starts[0] if len(starts) == 1 else -1


def apply_hunks(patch: str, path: str, hunks: tuple[Hunk, ...], text: str, place: Place) -> str:
    lines = text.splitlines(keepends=True)
    result: Lines = []
    taken = 0
    for hunk in hunks:
        start = place(hunk, lines)
        if start < taken:
            raise BuildError(
                f"stale patch: patches/{patch} does not fit {path} exactly at its line "
                f"{hunk.old_start}: {hunk.old[0]!r} and the following lines are not there"
            )
        result += lines[taken:start]
        if place is stated_place and len(result) != hunk.new_start - 1:
            raise BuildError(
                f"patches/{patch}: the hunk for {path} at line {hunk.old_start} states that it "
                f"moves to line {hunk.new_start}, but it moves to {len(result) + 1}"
            )
        result += hunk.new
        taken = start + len(hunk.old)
    return "".join(result + lines[taken:])


def apply(patch: Patch, texts: dict[str, str], place: Place = stated_place) -> dict[str, str]:
    """Return the texts of the changed files after the patch; `texts` has them before it."""
    changed = {
        path: apply_hunks(patch.name, path, hunks, texts[path], place)
        for path, hunks in patch.hunks.items()
    }
    for path, text in changed.items():
        if text == texts[path]:
            raise BuildError(f"patches/{patch.name} does not change {path}")
    return changed


def read_series(patches: Path = PATCHES) -> list[Patch]:
    names = (patches / "series").read_text().split()
    missing = [name for name in names if not (patches / name).is_file()]
    if missing:
        raise BuildError(f"patches/series lists missing files: {', '.join(missing)}")
    return [parse(name, (patches / name).read_text()) for name in names]


def add_stock(texts: dict[str, str], tree: Path, patch: str, paths: Iterable[str]) -> None:
    """Add the stock text of each file of a patch that `texts` lacks."""
    for path in paths:
        if path not in texts:
            try:
                texts[path] = (tree / path).read_bytes().decode()
            except FileNotFoundError:
                missing = f"stale patch: patches/{patch} changes {path}, which is not in {tree}"
                raise BuildError(missing) from None


def apply_series(series: list[Patch], tree: Path) -> dict[str, str]:
    """Return all files that the series changes, as they are after the last patch."""
    texts: dict[str, str] = {}
    for patch in series:
        add_stock(texts, tree, patch.name, patch.hunks)
        texts.update(apply(patch, texts))
    return texts


def export(before: dict[str, str], after: dict[str, str]) -> str:
    """Return the diff between two sets of texts, in the format of the series."""
    return "".join(_diff(path, before[path], after[path]) for path in sorted(after))


def _diff(path: str, before: str, after: str) -> str:
    """Return a diff with the least context that makes each hunk's place unique."""
    lines = before.splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder, "old"), Path(folder, "new")
        old.write_bytes(before.encode())
        new.write_bytes(after.encode())
        for context in range(1, MOST_CONTEXT + 1):
            labels = ["--label", f"a/{path}", "--label", f"b/{path}"]
            command = ["diff", f"-U{context}", *labels, str(old), str(new)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return ""
            if done.returncode > 1:
                raise BuildError(f"diff failed on {path}: {done.stderr}")
            hunks = parse("(export)", done.stdout).hunks[path]
            if all(only_place(hunk, lines) >= 0 for hunk in hunks):
                return done.stdout
    raise BuildError(f"{path}: a change's place is not unique within {MOST_CONTEXT} lines")
