"""Checks of `./build.sh check`, in order: every failure is shown, and none stops the rest."""

import sys
from collections.abc import Callable
from pathlib import Path

from ci import patches
from ci.build import overlay, venvs
from ci.build.native import build_native_tests
from ci.build.steps import ROOT, BuildError, run, say
from ci.checks import layers, sizes

PYTHON_DIRS = ["bench", "ci", "examples", "ray/python", "tests"]
TYPED = ["ray/python/ray/experimental/rdt", "ray/python/ray/experimental/collective", "ci"]
NATIVE_DIRS = [ROOT / "ray" / "src", ROOT / "tests" / "native", ROOT / "tests" / "fuzz"]
PROSE = ["*.md", "build.sh", "doc", "patches", *PYTHON_DIRS]
CPPCHECK = [
    "--language=c++",
    "--std=c++20",
    "--enable=warning,performance,portability",
    "--inline-suppr",
    "--suppress=missingIncludeSystem",
    # Plain structs are filled by their creator: compilers report a missing field.
    "--suppress=uninitMemberVarNoCtor",
    "--error-exitcode=1",
    "--quiet",
]
SCRIPTS = ["build.sh", ".ci/run", "ci/**/*.sh", "tests/**/*.sh"]
SANITIZERS = [None, "address", "thread"]

Check = tuple[str, Callable[[], None]]


def existing(names: list[str]) -> list[str]:
    return [found.relative_to(ROOT).as_posix() for name in names for found in ROOT.glob(name)]


def native_sources() -> list[Path]:
    files = [file for folder in NATIVE_DIRS for file in folder.rglob("*")]
    return sorted(file for file in files if file.suffix in (".cc", ".h"))


def check_all(venv_python: Path) -> None:
    """Run every check; `venv_python` has the packages that provide our types."""
    programs = venvs.lint_venv().parent

    def tool(name: str, *arguments: str | Path) -> Callable[[], None]:
        advice = f"see the messages of {name} above"
        return lambda: run([programs / name, *arguments], advice=advice)

    sources = native_sources()
    cpp = [file for file in sources if file.suffix == ".cc"]
    include = ROOT / "ray" / "src"
    checks: list[Check] = [
        ("ruff", tool("ruff", "check", "--quiet", *existing(PYTHON_DIRS))),
        ("ruff format", tool("ruff", "format", "--check", *existing(PYTHON_DIRS))),
        ("mypy", tool("mypy", "--python-executable", venv_python, *existing(TYPED))),
        ("shellcheck", tool("shellcheck", *existing(SCRIPTS))),
        ("codespell", tool("codespell", *existing(PROSE))),
        ("patches", lambda: print(patches.lint(patches.stock_tree()))),
        ("overlay", lint_overlay),
        ("layers", lambda: lint(layers.check())),
        ("sizes", lambda: lint(sizes.check())),
        ("clang-format", tool("clang-format", "--dry-run", "--Werror", *sources)),
        ("cppcheck", tool("cppcheck", *CPPCHECK, f"-I{include}", *cpp)),
    ]
    failed = []
    for name, act in checks:
        say(f"checking: {name}")
        try:
            act()
        except BuildError as error:
            print(error, file=sys.stderr)
            failed.append(name)
    if failed:
        raise BuildError(f"these checks failed: {', '.join(failed)}")
    say(f"all {len(checks)} checks passed")


def format_all() -> None:
    programs = venvs.lint_venv().parent
    advice = "see the formatter's messages above"
    folders = existing(PYTHON_DIRS)
    run([programs / "ruff", "check", "--quiet", "--fix-only", *folders], advice=advice)
    run([programs / "ruff", "format", *folders], advice=advice)
    run([programs / "clang-format", "-i", *native_sources()], advice=advice)


def lint_overlay() -> None:
    changes = overlay.compose(patches.stock_tree())
    print(f"{len(changes)} stock and new files change")


def lint(problems: list[str]) -> None:
    """Raise BuildError if a rule is violated."""
    if problems:
        raise BuildError("\n".join(problems))


def native_tests() -> None:
    """Run the C++ tests: plain, with address and undefined-behavior checks, with thread checks."""
    for sanitizer in SANITIZERS:
        program = build_native_tests(sanitizer)
        say(f"native tests, {sanitizer or 'no'} sanitizer")
        run([program], advice="a native test failed or a sanitizer reported an error: see above")
