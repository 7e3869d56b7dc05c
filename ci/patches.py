"""Edit the patch series: `python -m ci.patches lint | new NAME FILE... | edit NAME | export`.

`new` and `edit` write the files of one patch, with it applied, to build/patches/NAME/ for
editing. `export` rewrites every patch of the series from these files and closes them.
Run it as `build/tools-cp3XX/bin/python -m ci.patches`; see doc/patching.md.
"""

import argparse
import re
import shutil
import sys
from datetime import date
from pathlib import Path

from ci.build import base
from ci.build.series import (
    PATCHES,
    Patch,
    add_stock,
    apply,
    apply_series,
    export,
    only_place,
    parse,
    read_series,
)
from ci.build.steps import BUILD, ROOT, BuildError, replace_file

OPEN = BUILD / "patches"
FIELDS = ("Description", "Reason", "Forwarded", "Remove-When", "Test", "Last-Update")
REASONS = ("temporary", "build", "divergent")
HEADER = """\
Description: the effect, and why it must be a patch
Reason: {reasons}
Forwarded: no
Remove-When: the condition that makes it unnecessary
Test: tests/FILE.py::NAME (fails without it)
Last-Update: {today}

"""


def stock_tree() -> Path:
    release = base.read_base()
    wheel = base.fetch(release)
    return base.unpack(wheel, release.wheels[wheel.name])


def check_files(patches: Path) -> None:
    listed = (patches / "series").read_text().split()
    there = {file.name for file in patches.glob("*.patch")}
    if len(set(listed)) != len(listed) or set(listed) != there:
        odd = there.symmetric_difference(listed) or "a name occurs twice"
        raise BuildError(f"patches/series and the files in patches/ differ: {odd}")


def check_header(patch: Patch, root: Path) -> None:
    fields = patch.fields
    empty = [field for field in FIELDS if not fields.get(field, "").strip()]
    if empty or list(fields) != list(FIELDS):
        raise BuildError(
            f"patches/{patch.name}: the header must have these fields, not empty, in this order:  "
            f"{', '.join(FIELDS)}; missing: {', '.join(empty) or 'none'}"
        )
    if fields["Reason"].split()[0].rstrip(",;:") not in REASONS:
        raise BuildError(f"patches/{patch.name}: Reason begins with one of {', '.join(REASONS)}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d\s*", fields["Last-Update"]):
        raise BuildError(f"patches/{patch.name}: Last-Update is no date like {date.today()}")
    test = fields["Test"].split()[0].partition("::")[0]
    if not (root / test).is_file():
        raise BuildError(f"patches/{patch.name}: Test names {test}, which does not exist")


def check_diff(patch: Patch, texts: dict[str, str], patches: Path) -> dict[str, str]:
    """Check that the diff applies, reverses, compiles and re-exports; return the result."""
    after = apply(patch, texts)
    before = {path: texts[path] for path in patch.hunks}
    if apply(patch.reversed(), after) != before:
        raise BuildError(f"patches/{patch.name} does not reverse")
    for path, text in after.items():
        if path.endswith(".py"):
            try:
                compile(text, path, "exec", dont_inherit=True)
            except SyntaxError as error:
                broken = f"patches/{patch.name}: {path} no longer compiles: {error}"
                raise BuildError(broken) from None
    if (patches / patch.name).read_text() != patch.header + export(before, after):
        raise BuildError(f"patches/{patch.name} differs from the output of 'ci.patches export'")
    return after


def lint(tree: Path, patches: Path = PATCHES, root: Path = ROOT) -> str:
    """Check the series against the stock tree; return its size as text."""
    check_files(patches)
    series = read_series(patches)
    for patch in series:
        check_header(patch, root)
    texts: dict[str, str] = {}
    for patch in series:
        add_stock(texts, tree, patch.name, patch.hunks)
        texts.update(check_diff(patch, texts, patches))
    total = sum(patch.changed_lines for patch in series)
    return f"{len(series)} patches, {len(texts)} files, {total} changed lines"


def open_patch(name: str, tree: Path) -> None:
    """Write the files of a patch as they are after it."""
    series = read_series(PATCHES)
    names = [patch.name for patch in series]
    if name not in names:
        raise BuildError(f"patches/series has no {name}")
    upto = names.index(name)
    texts = apply_series(series[: upto + 1], tree)
    for path in series[upto].hunks:
        replace_file(OPEN / name / path, texts[path].encode())
    print(f"edit the files in {OPEN / name}, then run: python -m ci.patches export")


def new_patch(name: str, paths: list[str], tree: Path) -> None:
    series = read_series(PATCHES)
    texts = apply_series(series, tree)
    add_stock(texts, tree, name, paths)
    for path in paths:
        replace_file(OPEN / name / path, texts[path].encode())
    reasons = ", ".join(REASONS)
    (PATCHES / name).write_text(HEADER.format(reasons=f"one of {reasons}", today=date.today()))
    with open(PATCHES / "series", "a") as lines:
        lines.write(name + "\n")
    print(f"edit the files in {OPEN / name} and the header of patches/{name}, then run: export")


def export_all(tree: Path) -> None:
    """Rewrite every patch; one that is not open keeps its change at its new line."""
    texts: dict[str, str] = {}
    written: dict[Path, str] = {}
    for patch in read_series(PATCHES):
        opened = OPEN / patch.name
        edited = {
            file.relative_to(opened).as_posix(): file.read_text()
            for file in opened.rglob("*")
            if file.is_file()
        }
        add_stock(texts, tree, patch.name, edited or patch.hunks)
        after = edited or apply(patch, texts, only_place)
        written[PATCHES / patch.name] = patch.header + export(texts, after)
        texts.update(after)
    for file, text in written.items():
        parse(file.name, text)
        file.write_text(text)
    shutil.rmtree(OPEN, ignore_errors=True)
    print(f"wrote {len(written)} patches")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.patches")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lint", help="check the series")
    commands.add_parser("export", help="rewrite every patch from the edited files")
    edit = commands.add_parser("edit", help="write a patch's files for editing")
    new = commands.add_parser("new", help="add a patch to the end of the series")
    for command in (edit, new):
        command.add_argument("name", help="the patch's file name, as in patches/")
    new.add_argument("paths", nargs="+", help="stock files, as python/ray/...")
    chosen = parser.parse_args()
    try:
        tree = stock_tree()
        if chosen.command == "lint":
            print(lint(tree))
        elif chosen.command == "edit":
            open_patch(chosen.name, tree)
        elif chosen.command == "new":
            new_patch(chosen.name, chosen.paths, tree)
        else:
            export_all(tree)
    except BuildError as error:
        print(f"ci.patches: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
