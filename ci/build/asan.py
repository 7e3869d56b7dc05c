"""Tests with a real Ray whose agents are built with sanitizers: ci/asan.sh [PYTEST ARGS].

The extensions are compiled with address and undefined-behavior checks into build/asan, beside hard
links to the rest of the installed package. Every process of the tests, including Ray's own, starts
with the sanitizer's runtime. Each process writes its reports to a file, so that reports of
unobserved workers count too. A first worker reads past the end of a block, to check the reporting.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ci.build.native import compile_extensions
from ci.build.steps import BUILD, ROOT, BuildError, capture, run, say

WORK = BUILD / "asan"
SITE = WORK / "site"
REPORTS = WORK / "reports"
TESTS = [
    f"tests/integration/test_{name}.py" for name in ("conformance", "lanes", "lifetime", "calls")
]
#: Sanitized code is slower.
TIMEOUT_S = 600

ASAN_OPTIONS = {
    # Python does not free its memory at exit.
    "detect_leaks": 0,
    # The runtime is preloaded; Ray's programs are linked with their own allocators.
    "verify_asan_link_order": 0,
    "alloc_dealloc_mismatch": 0,
    "new_delete_type_mismatch": 0,
    # As without sanitizers: an allocation that is too large returns null.
    "allocator_may_return_null": 1,
    "quarantine_size_mb": 32,
    "malloc_context_size": 10,
    "log_exe_name": 1,
}

READS_PAST_THE_END = """
import ctypes
import ray

@ray.remote(max_retries=0)
def read():
    from array import array
    from ray.experimental.rdt import _agent
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    return _agent.checksum(array("Q", [malloc(4096)]), array("Q", [4097]))

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
try:
    ray.get(read.remote())
except ray.exceptions.WorkerCrashedError:
    pass
"""


def run_tests(python: Path, arguments: list[str]) -> None:
    """Run pytest with sanitizers; raise BuildError if a test fails or one reports an error.

    Args:
        python: Of the venv with our wheel.
        arguments: For pytest; without any, a few files of the integration tests.
    """
    _lay_site(python)
    environment = _environment()
    _forget_reports()
    say("checking that the sanitizer reports a read past the end of a block in a worker")
    run([python, "-c", READS_PAST_THE_END], env=environment, advice="Ray did not start")
    if not any("AddressSanitizer" in file.read_text() for file in _reports()):
        raise BuildError(f"the sanitizer reports no error in Ray's workers: see {REPORTS}")
    _forget_reports()
    options = [f"--timeout={TIMEOUT_S}", *(arguments or TESTS)]
    pytest = [str(python), "-m", "pytest", *options]
    status = subprocess.run(
        pytest, cwd=ROOT, env={**os.environ, **environment}, check=False
    ).returncode
    found = _reports()
    if found:
        text = found[0].read_text(errors="replace")[:6000]
        raise BuildError(f"{len(found)} reports in {REPORTS}, the first of them:\n{text}")
    if status:
        raise BuildError("tests failed, without a sanitizer report")
    say("no sanitizer report")


def _lay_site(python: Path) -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    where: list[str | Path] = [python, "-c", "import ray; print(ray.__path__[0])"]
    installed = Path(capture(where, advice="Ray is not installed").strip())
    rdt = Path("experimental", "rdt")

    def ours(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".so") and Path(folder) == installed / rdt]

    shutil.copytree(installed, SITE / "ray", copy_function=os.link, ignore=ours)
    compile_extensions(SITE / "ray" / rdt, "address")


def _environment() -> dict[str, str]:
    """Return the environment of a sanitized process; Ray passes it to its workers."""
    libraries = [_library("libasan.so"), _library("libstdc++.so")]
    options = [f"{name}={value}" for name, value in ASAN_OPTIONS.items()]
    path = [str(SITE), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "LD_PRELOAD": " ".join(libraries),
        "RAY_LD_PRELOAD_ON_WORKERS": "1",
        "RAY_raylet_start_wait_time_s": "300",
        "ASAN_OPTIONS": ":".join([*options, f"log_path={REPORTS / 'report'}"]),
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={REPORTS / 'report'}",
    }


def _library(name: str) -> str:
    found = capture(["gcc", f"-print-file-name={name}"], advice="gcc is needed").strip()
    if not Path(found).is_file():
        raise BuildError(f"gcc has no {name}: install this gcc's sanitizers")
    return str(Path(found).resolve())


def _forget_reports() -> None:
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)


def _reports() -> list[Path]:
    return sorted(REPORTS.iterdir())
