"""Compute the changes that patches and overlay make to a tree with Ray's source layout.

The tree is the unpacked base wheel (`<tree>/python/ray/...`) or a Ray checkout: the rules
are the same for both. `compose` only reads; its callers write.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ci.build.series import PATCHES, apply_series, read_series
from ci.build.steps import ROOT, BuildError, sha256_of

OVERLAY = ROOT / "ray"
LEFT_OUT = {"__pycache__", "REPLACED"}
SOURCES = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".cc", ".h"}


@dataclass(frozen=True)
class Replaced:
    """A line of ray/REPLACED: a stock file that the overlay replaces or removes."""

    sha256: str
    path: str
    action: str


@dataclass(frozen=True)
class Change:
    """The change of one file of the tree: its new content, or None if it is removed."""

    content: bytes | None
    reason: str


def read_replaced(overlay: Path = OVERLAY) -> list[Replaced]:
    rows = []
    for line in (overlay / "REPLACED").read_text().splitlines():
        if line and not line.startswith("#"):
            row = Replaced(*line.split())
            if row.action not in ("replaced", "removed"):
                raise BuildError(f"ray/REPLACED: {row.path} is neither 'replaced' nor 'removed'")
            rows.append(row)
    return rows


def overlay_files(overlay: Path = OVERLAY) -> Iterator[str]:
    for file in sorted(overlay.rglob("*")):
        path = file.relative_to(overlay)
        if not file.is_file() or LEFT_OUT & set(path.parts) or file.name.startswith("."):
            continue
        if file.suffix not in SOURCES:
            raise BuildError(f"ray/{path}: the overlay holds only {', '.join(sorted(SOURCES))}")
        yield path.as_posix()


def check_replaced(tree: Path, rows: list[Replaced], ours: set[str]) -> None:
    """Raise BuildError if a stock file that we replace or remove has changed."""
    for row in rows:
        stock = tree / row.path
        if not stock.is_file():
            raise BuildError(f"changed base: {row.path} of ray/REPLACED is not in {tree}")
        found = sha256_of(stock.read_bytes())
        if found != row.sha256:
            raise BuildError(
                f"changed base: {row.path} in {tree} has sha256 {found}, ray/REPLACED says "
                f"{row.sha256}: read the change, carry it over, then update the line"
            )
        if (row.path in ours) != (row.action == "replaced"):
            there = "has" if row.path in ours else "lacks"
            raise BuildError(f"ray/REPLACED says {row.path} is {row.action}, but ray/ {there} it")


def compose(tree: Path, patches: Path = PATCHES, overlay: Path = OVERLAY) -> dict[str, Change]:
    """Return all files that patches and overlay change, by their path in Ray's sources."""
    ours = set(overlay_files(overlay))
    rows = read_replaced(overlay)
    check_replaced(tree, rows, ours)
    listed = {row.path for row in rows}
    for path in sorted(ours - listed):
        if (tree / path).exists():
            raise BuildError(f"ray/{path} would replace a stock file: list it in ray/REPLACED")

    series = read_series(patches)
    for patch in series:
        for path in patch.hunks:
            if path in ours | listed:
                raise BuildError(f"patches/{patch.name} changes {path}, which the overlay replaces")

    changes = {row.path: Change(None, "removed") for row in rows}
    for path in sorted(ours):
        reason = "replaced" if path in listed else "new"
        changes[path] = Change((overlay / path).read_bytes(), reason)
    for path, text in apply_series(series, tree).items():
        names = " ".join(patch.name for patch in series if path in patch.hunks)
        changes[path] = Change(text.encode(), f"patched by {names}")
    return changes
