"""Commands of build.sh, which runs this module in the build's venv from the checkout's root."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ci.build import asan, checks, fuzz, gpu_kit, source_tree, venvs
from ci.build.base import python_tag
from ci.build.steps import BUILD, ROOT, BuildError, one_at_a_time, run, say
from ci.build.wheel import DIST, build_wheel, check_wheel

USAGE = """\
Usage: ./build.sh [COMMAND]

  (none)                build the wheel in dist/
  venv                  install the wheel, torch and all packages of tests and examples into .venv/
  demo [ARGS]           send weights from a trainer to inference actors; print a table and a plot
  test [PYTEST ARGS]    run pytest on the installed wheel; without ARGS, first run the native tests,
                        plain and sanitized, and a short fuzzing
  fuzz [SECONDS]        fuzz the agent's input, for SECONDS a target
  asan [PYTEST ARGS]    run integration tests with the agent under address checks
  check                 run linters, type checks, and the rules for patches, overlay and layers
  format                format Python and C++ as check requires
  gpu-kit               create an archive that runs ci/gpu/run.sh on a GPU machine without a network
  gpu [STEP...]         run the GPU steps and measure beside stock Ray: doc/gpu.md
  bench [ARGS]          measure the wheel against stock Ray, each in its own venv
  apply TREE            apply patches and overlay to a Ray source tree
  apply --reverse TREE  remove them again
  clean                 remove build/, dist/ and .venv/
  help                  print this text

Each command uses the Python that runs it. PYTHON=python3.12 ./build.sh selects another.
A step is skipped if it already ran for the same input.
"""

#: Two test files at a time, in order: tests mostly wait for processes.
TWO_AT_ONCE = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def wheel(_: list[str], __: Path) -> None:
    with one_at_a_time():
        built = build_wheel()
        check_wheel(built)
    print(built.relative_to(ROOT))


def installed() -> Path:
    """Return the python of .venv with the current wheel installed."""
    with one_at_a_time():
        return venvs.test_venv(build_wheel())


def venv(_: list[str], __: Path) -> None:
    print(installed().relative_to(ROOT))


def demo(arguments: list[str], _: Path) -> None:
    program = ROOT / "examples" / "demo" / "run.py"
    run([installed(), program, *arguments], advice="see the demo's error above")


def test(arguments: list[str], _: Path) -> None:
    """Run pytest last, so that its summary is the last line."""
    python = installed()
    if not arguments:
        checks.native_tests()
        fuzz.fuzz_all(python, fuzz.SHORT_S)
        arguments = TWO_AT_ONCE
    done = subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, check=False)
    raise SystemExit(done.returncode)


def fuzz_for(arguments: list[str], _: Path) -> None:
    parser = argparse.ArgumentParser(prog="./build.sh fuzz")
    parser.add_argument("seconds", type=int, nargs="?", default=60, help="for each target")
    python = installed()
    fuzz.install_atheris(python)
    fuzz.fuzz_all(python, parser.parse_args(arguments).seconds)


def sanitized(arguments: list[str], _: Path) -> None:
    asan.run_tests(installed(), arguments)


def check(_: list[str], __: Path) -> None:
    checks.check_all(installed())


def lay_out(_: list[str], __: Path) -> None:
    checks.format_all()


def bench(arguments: list[str], _: Path) -> None:
    ours = installed()
    with one_at_a_time():
        stock = venvs.stock_venv()
    program = ROOT / "bench" / "run.py"
    run(
        [ours, program, "--stock-python", stock, *arguments],
        advice="see the benchmark's error above",
    )


def make_gpu_kit(_: list[str], __: Path) -> None:
    gpu_kit.check_python(python_tag())
    with one_at_a_time():
        print(gpu_kit.build_kit(build_wheel()).relative_to(ROOT))


def gpu(arguments: list[str], _: Path) -> None:
    """Exit with the status of ci.gpu; its report names each failed step and the reason."""
    ours = installed()
    with one_at_a_time():
        stock = venvs.stock_venv()
    command = [str(ours), "-m", "ci.gpu", "--stock-python", str(stock), *arguments]
    raise SystemExit(subprocess.run(command, cwd=ROOT, check=False).returncode)


def apply(arguments: list[str], here: Path) -> None:
    parser = argparse.ArgumentParser(prog="./build.sh apply")
    parser.add_argument("--reverse", action="store_true", help="remove them again")
    parser.add_argument("tree", type=Path, help="a Ray source tree: the folder that holds python/")
    chosen = parser.parse_args(arguments)
    act = source_tree.take_off if chosen.reverse else source_tree.put_on
    act(here / chosen.tree)


def clean(_: list[str], __: Path) -> None:
    for folder in (BUILD, DIST, venvs.VENV):
        shutil.rmtree(folder, ignore_errors=True)


def show_help(_: list[str], __: Path) -> None:
    print(USAGE, end="")


COMMANDS: dict[str, Callable[[list[str], Path], None]] = {
    "wheel": wheel,
    "venv": venv,
    "demo": demo,
    "test": test,
    "fuzz": fuzz_for,
    "asan": sanitized,
    "check": check,
    "format": lay_out,
    "gpu-kit": make_gpu_kit,
    "gpu": gpu,
    "bench": bench,
    "apply": apply,
    "clean": clean,
    "help": show_help,
    "--help": show_help,
    "-h": show_help,
}


def main(arguments: list[str]) -> int:
    here = Path(arguments[1])
    name, *rest = arguments[2:] or ["wheel"]
    if name not in COMMANDS:
        say(f"no command '{name}'")
        print(USAGE, end="", file=sys.stderr)
        return 2
    try:
        COMMANDS[name](rest, here)
    except BuildError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
