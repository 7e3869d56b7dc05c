"""Coverage-guided fuzzing of all code that reads a peer's bytes: ci/fuzz.sh [SECONDS A TARGET].

Native targets (tests/fuzz/*.cc) are libFuzzer's and need clang; Python targets (tests/fuzz/*.py)
are atheris's, which goes into a folder of its own. Targets write their first seeds themselves; what
the fuzzers find interesting stays in build/fuzz for the next run. An input that breaks a target is
left in build/fuzz/findings, and is to become a test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ci.build.base import python_tag
from ci.build.native import build_fuzzers
from ci.build.steps import BUILD, ROOT, BuildError, run, say

WORK = BUILD / "fuzz"
FINDINGS = WORK / "findings"
ATHERIS = BUILD / f"atheris-{python_tag()}"
ATHERIS_PACKAGE = "atheris==3.0.0"
#: Older versions cannot compile the agent.
OLDEST_CLANG = 16
CLANGS = ["clang", *(f"clang-{version}" for version in range(22, OLDEST_CLANG - 1, -1))]
#: An input above this time, or a process above this memory, is a finding.
TIMEOUT_S, MEMORY_MB = 20, 2048
#: A target gets this much longer to exit.
GRACE_S = 60
#: As part of the test command.
SHORT_S = 2


@dataclass(frozen=True)
class Target:
    """A program that accepts libFuzzer's options."""

    name: str
    command: list[str | Path]
    environment: dict[str, str]

    def make_seeds(self) -> Path:
        folder = WORK / self.name / "seeds"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        environment = {**self.environment, "RDT_FUZZ_SEEDS": str(folder)}
        run(self.command, env=environment, advice=f"{self.name} could not write its seeds")
        return folder

    def fuzz(self, seconds: int) -> str:
        """Run for a time; return the numbers. Raise BuildError with each finding."""
        corpus = WORK / self.name / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        FINDINGS.mkdir(parents=True, exist_ok=True)
        options = [
            f"-max_total_time={seconds}",
            f"-timeout={TIMEOUT_S}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-artifact_prefix={FINDINGS}/{self.name}-",
            "-print_final_stats=1",
        ]
        folders = [str(corpus), str(self.make_seeds())]
        try:
            done = subprocess.run(
                [*map(str, self.command), *options, *folders],
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=seconds + GRACE_S,
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{self.name} did not end {GRACE_S} s after its time") from error
        if done.returncode:
            raise BuildError(
                f"fuzzing {self.name} failed; the input is in {FINDINGS}:\n{done.stderr[-6000:]}"
            )
        return _numbers(done.stderr)


def _numbers(log: str) -> str:
    runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)", log)
    last = re.findall(r"cov: (\d+).*?corp: (\d+)", log)
    if not runs or not last:
        return "nothing found"
    coverage, corpus = last[-1]
    return f"{int(runs[-1]):,} inputs, {coverage} edges, a corpus of {corpus}, nothing found"


def native_targets() -> list[Target]:
    clang = next((name for name in CLANGS if _version_of(name) >= OLDEST_CLANG), None)
    if clang is None:
        say(f"fuzzing: skipping the native targets: no clang {OLDEST_CLANG} or newer")
        return []
    return [Target(path.stem, [path], {}) for path in build_fuzzers(clang)]


def _version_of(clang: str) -> int:
    """Return the version of clang, or 0 if there is none."""
    if not shutil.which(clang):
        return 0
    said = subprocess.run([clang, "-dumpversion"], capture_output=True, text=True, check=False)
    return int(said.stdout.partition(".")[0] or 0)


def python_targets(python: Path) -> list[Target]:
    if not (ATHERIS / "atheris").is_dir():
        say("fuzzing: skipping the Python targets: ci/fuzz.sh has not installed atheris")
        return []
    environment = {"PYTHONPATH": os.pathsep.join([str(ATHERIS), str(ROOT)])}
    files = sorted((ROOT / "tests" / "fuzz").glob("fuzz_*.py"))
    return [Target(file.stem, [python, file], environment) for file in files]


def install_atheris(python: Path) -> None:
    if (ATHERIS / "atheris").is_dir():
        return
    say(f"installing {ATHERIS_PACKAGE} into {ATHERIS.relative_to(ROOT)}")
    pip = [str(python), "-m", "pip", "install", "-qq", "--no-deps", "--target", str(ATHERIS)]
    try:
        run([*pip, ATHERIS_PACKAGE], advice="it needs a package index")
    except BuildError as error:
        say(f"fuzzing: {error}")


def fuzz_all(python: Path, seconds: int) -> None:
    """Fuzz every target for the same time, in sequence.

    Args:
        python: Of the venv with our wheel.
        seconds: For each target.
    """
    found = []
    for target in [*native_targets(), *python_targets(python)]:
        try:
            say(f"fuzzing: {target.name}, {seconds} s: {target.fuzz(seconds)}")
        except BuildError as error:
            found.append(str(error))
    if found:
        raise BuildError("\n".join(found))
