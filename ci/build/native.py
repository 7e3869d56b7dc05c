"""Compile the native agent, the Python extensions and the native tests.

Objects in build/native are reused while their inputs are the same. Equal inputs give equal bytes:
the output has no time, absolute path or debug information.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ci.build.steps import BUILD, ROOT, capture, is_done, mark_done, sha256_of

SOURCE = ROOT / "ray" / "src"
CACHE = BUILD / "native"
JOBS = 2

SODIUM_FILES = (
    "crypto_auth/hmacsha256/auth_hmacsha256.c",
    "crypto_hash/sha256/cp/hash_sha256_cp.c",
    "crypto_verify/sodium/verify.c",
    "sodium/utils.c",
)
SODIUM_FLAGS = (
    "-DSODIUM_STATIC",
    "-DCONFIGURED=1",
    "-DNATIVE_LITTLE_ENDIAN=1",
    "-DHAVE_WEAK_SYMBOLS=1",
    "-DHAVE_EXPLICIT_BZERO=1",
    "-D_DEFAULT_SOURCE",  # declares explicit_bzero
)
#: Files of aws-checksums and aws-c-common that CRC-64 needs on every machine.
CRC_FILES = (
    "aws-checksums/source/crc64.c",
    "aws-checksums/source/crc64_sw.c",
    "aws-checksums/source/crc_util.c",
)
#: Additional files for each architecture, with their options. At run time, the library checks
#: whether the CPU has these instructions.
CRC_FILES_OF = {
    "x86_64": {
        "aws-c-common/source/arch/intel/cpuid.c": (),
        "aws-c-common/source/arch/intel/asm/cpuid.c": (),
        "aws-checksums/source/intel/intrin/crc64nvme_clmul.c": ("-mpclmul", "-msse4.2"),
        "aws-checksums/source/intel/intrin/crc64nvme_avx512.c": (
            *("-mavx512f", "-mavx512vl", "-mvpclmulqdq"),
            *("-mpclmul", "-msse4.2"),
        ),
    },
    "aarch64": {
        "aws-c-common/source/arch/arm/auxv/cpuid.c": (),
        "aws-checksums/source/arm/crc64_arm.c": ("-march=armv8-a+crc+crypto",),
    },
}
#: Facts about compiler and machine that the library's own build would detect.
CRC_CONFIG = {
    "x86_64": (
        *("AWS_ARCH_INTEL", "AWS_ARCH_INTEL_X64", "AWS_HAVE_CLMUL"),
        *("AWS_HAVE_AVX2_INTRINSICS", "AWS_HAVE_AVX512_INTRINSICS"),
    ),
    "aarch64": ("AWS_ARCH_ARM64", "AWS_HAVE_ARMv8_1"),
}

SANITIZERS = {
    "address": "-fsanitize=address,undefined",
    "thread": "-fsanitize=thread",
}
# Fields that an initializer does not name have their intended defaults.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers")


@dataclass(frozen=True)
class Library:
    """Sources from the source package of a Python binding.

    Package indexes have no packages for these C libraries.
    """

    package: str
    archive: str
    sha256: str
    root: str  # the folder in the archive that holds the parts
    parts: tuple[str, ...]  # the files and folders to unpack
    licence: str

    def fetch(self) -> Path:
        """Download and verify the parts once; return their folder."""
        folder = CACHE / self.package.partition("==")[0].lower()
        root = folder / self.root
        if all((root / part).exists() for part in self.parts):
            return root
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / self.archive
        if not archive.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            _run([*pip, "--no-binary=:all:", "--dest", str(folder), self.package])
        found = sha256_of(archive.read_bytes())
        if found != self.sha256:
            archive.unlink()
            raise SystemExit(f"{self.archive}: sha256 is {found}, not {self.sha256}")
        wanted = tuple(f"{self.root}/{part}" for part in self.parts)
        with tempfile.TemporaryDirectory(dir=folder) as unpacked, tarfile.open(archive) as package:
            package.extractall(
                unpacked, [m for m in package.getmembers() if m.name.startswith(wanted)]
            )
            shutil.rmtree(root, ignore_errors=True)
            root.parent.mkdir(parents=True, exist_ok=True)
            (Path(unpacked) / self.root).rename(root)
        return root


SODIUM = Library(
    package="PyNaCl==1.5.0",
    archive="PyNaCl-1.5.0.tar.gz",
    sha256="8ac7448f09ab85811607bdd21ec2464495ac8b7c66d146bf545b0f08fb9220ba",
    root="PyNaCl-1.5.0/src/libsodium",
    parts=("src/libsodium", "LICENSE"),
    licence="LICENSE",
)
AWS_CRT = Library(
    package="awscrt==0.38.1",
    archive="awscrt-0.38.1.tar.gz",
    sha256="0dcebfaa70cf079133cd2352119e3d05e9b8ca1d1621736cfb54c03f3d5fef0f",
    root="awscrt-0.38.1/crt",
    parts=("aws-checksums", "aws-c-common"),
    licence="aws-checksums/LICENSE",
)


def licences() -> dict[str, bytes]:
    """Return the licenses of the libraries that are linked into the agent, by name."""
    libraries = {"libsodium": SODIUM, "aws-checksums": AWS_CRT}
    return {
        name: (library.fetch() / library.licence).read_bytes()
        for name, library in libraries.items()
    }


@dataclass(frozen=True)
class Flavour:
    """One set of compiler options; objects of two flavors never mix."""

    name: str
    common: tuple[str, ...]
    link: tuple[str, ...] = field(default=())
    compilers: tuple[str, str] = ("gcc", "g++")

    @property
    def folder(self) -> Path:
        return CACHE / self.name


def flavour(sanitize: str | None) -> Flavour:
    if sanitize is None:
        return Flavour("plain", ("-O2", "-g0"), ("-static-libstdc++", "-static-libgcc", "-s"))
    option = SANITIZERS[sanitize]
    # GCC 12 reports false overflows in sanitized code.
    checks = (
        *("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"),
        "-Wno-stringop-overflow",
    )
    return Flavour(sanitize, (option, *checks), (option,))


def compile_extensions(out_dir: Path, sanitize: str | None = None) -> list[Path]:
    """Build the extensions for the running Python; return their paths in out_dir."""
    style = flavour(sanitize)
    agent = _compile_extension(style, "_agent", _core_units(), out_dir)
    _check_no_undefined_sodium(agent)
    strided = _Unit(SOURCE / "ray" / "rdt" / "strided.cc")
    return [agent, _compile_extension(style, "_tensors", [strided], out_dir)]


def _compile_extension(style: Flavour, name: str, others: list[_Unit], out_dir: Path) -> Path:
    generated = _cythonize(style, name)
    include = sysconfig.get_paths()["include"]
    # Cython's output is exempt from our warnings. Assertions in Python's headers
    # would contain their path.
    quiet = (f"-I{include}", f"-ffile-prefix-map={include}=python", "-DNDEBUG")
    extension = _Unit(generated, *quiet, warnings=())
    objects = _compile(style, [*others, extension])
    out_dir.mkdir(parents=True, exist_ok=True)
    target = out_dir / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _link(style, objects, target, "-shared")
    return target


def build_native_tests(sanitize: str | None = None) -> Path:
    """Build tests/native into one program; return its path."""
    style = flavour(sanitize)
    files = sorted((ROOT / "tests" / "native").glob("*.cc"))
    tests = [_Unit(path, *_crc_headers()) for path in files]
    objects = _compile(style, [*_core_units(), *tests])
    target = style.folder / "rdt_native_tests"
    _link(style, objects, target)
    return target


def build_fuzzers(clang: str) -> list[Path]:
    """Build each target of tests/fuzz into its own program, with that clang; see fuzz.py."""
    checks = "address,undefined"
    style = Flavour(
        "fuzz",
        (f"-fsanitize=fuzzer-no-link,{checks}", "-fno-sanitize-recover=all", "-O1", "-g", "-w"),
        (f"-fsanitize=fuzzer,{checks}",),
        (clang, clang.replace("clang", "clang++")),
    )
    ours = [unit for unit in _core_units() if unit.path.suffix == ".cc"]
    # Coverage counters would keep unused libsodium functions that call missing functions.
    theirs = [unit for unit in _core_units() if unit.path.suffix == ".c"]
    core = _compile(style, ours) + _compile(flavour(None), theirs)
    programs = []
    for path in sorted((ROOT / "tests" / "fuzz").glob("*.cc")):
        programs.append(style.folder / path.stem)
        _link(style, [*core, *_compile(style, [_Unit(path)])], programs[-1])
    return programs


class _Unit:
    """One file to compile, with its own options."""

    def __init__(self, path: Path, *flags: str, warnings: tuple[str, ...] = WARNINGS):
        self.path = path
        self.flags = (*warnings, *flags)

    def language(self, style: Flavour) -> tuple[str, ...]:
        c, cxx = style.compilers
        return (c, "-std=c11") if self.path.suffix == ".c" else (cxx, "-std=c++20")


def _core_units() -> list[_Unit]:
    sodium = SODIUM.fetch() / "src" / "libsodium"
    include = sodium / "include"
    theirs = [
        _Unit(sodium / name, *SODIUM_FLAGS, f"-I{include / 'sodium'}", warnings=("-w",))
        for name in SODIUM_FILES
    ]
    flags = (f"-I{include}", "-DSODIUM_STATIC", *_crc_headers())
    ours = sorted((SOURCE / "ray" / "rdt").rglob("*.cc"))
    return [*(_Unit(path, *flags) for path in ours), *theirs, *_crc_units()]


def _crc_units() -> list[_Unit]:
    library, headers = AWS_CRT.fetch(), _crc_headers()
    files = {**dict.fromkeys(CRC_FILES, ()), **CRC_FILES_OF.get(platform.machine(), {})}
    return [
        _Unit(library / name, *options, *headers, warnings=("-w",))
        for name, options in files.items()
    ]


def _crc_headers() -> tuple[str, ...]:
    """Return the include options; system headers are exempt from our warnings."""
    library, config = AWS_CRT.fetch(), CACHE / "config"
    names = [
        *CRC_CONFIG.get(platform.machine(), ()),
        *("AWS_USE_CPU_EXTENSIONS", "AWS_HAVE_GCC_INLINE_ASM"),
        "AWS_HAVE_GCC_OVERFLOW_MATH_EXTENSIONS",
    ]
    text = "".join(f"#define {name}\n" for name in names)
    header = config / "aws" / "common" / "config.h"
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return (
        *(f"-isystem{library / name / 'include'}" for name in AWS_CRT.parts),
        f"-isystem{config}",
    )


def _compile(style: Flavour, units: list[_Unit]) -> list[Path]:
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda unit: _compile_one(style, unit), units))


def _compile_one(style: Flavour, unit: _Unit) -> Path:
    name = str(unit.path.relative_to(ROOT)).replace("/", "-")
    tag = sha256_of(" ".join(unit.flags).encode())[:8]
    target = style.folder / "objects" / f"{name}-{tag}.o"
    command = [
        *unit.language(style),
        *style.common,
        *unit.flags,
        "-fPIC",
        "-pthread",
        "-fvisibility=hidden",
        "-ffunction-sections",
        "-fdata-sections",
        f"-ffile-prefix-map={ROOT}=.",
        f"-I{SOURCE}",
        "-c",
        str(unit.path),
        "-MMD",
        "-MF",
        f"{target}.d",
    ]
    if not _is_fresh(target, command):
        target.parent.mkdir(parents=True, exist_ok=True)
        _run_for(target, command)
        _remember_inputs(target, command)
    return target


def _is_fresh(target: Path, command: list[str]) -> bool:
    record = Path(f"{target}.json")
    if not target.exists() or not record.exists():
        return False
    known = json.loads(record.read_text())
    return bool(known == {"command": command, "inputs": _hashes(known["inputs"])})


def _remember_inputs(target: Path, command: list[str]) -> None:
    rule = Path(f"{target}.d").read_text().replace("\\\n", " ")
    inputs = shlex.split(rule.split(":", 1)[1])
    record = {"command": command, "inputs": _hashes(inputs)}
    Path(f"{target}.json").write_text(json.dumps(record))


def _hashes(paths: Iterable[str]) -> dict[str, str]:
    return {
        path: sha256_of(Path(path).read_bytes()) if Path(path).exists() else "" for path in paths
    }


def _cythonize(style: Flavour, name: str) -> Path:
    """Translate a .pyx from the package root: the C++ names its source by a relative path."""
    package = ROOT / "ray" / "python"
    target = style.folder / f"{name}-{sysconfig.get_config_var('SOABI')}.cpp"
    target.parent.mkdir(parents=True, exist_ok=True)
    source = f"ray/experimental/rdt/{name}.pyx"
    command = [sys.executable, "-m", "cython", "--cplus", "-3", "-I", "."]
    command += ["--module-name", f"ray.experimental.rdt.{name}", "-o", str(target), source]
    files = sorted((package / source).parent.glob(f"{name}*"))
    inputs = [str(file) for file in files if file.suffix in (".pyx", ".pxd", ".pxi")]
    key = json.dumps([*command, *_hashes(inputs).values()])
    record = Path(f"{target}.stamp")
    if not target.exists() or not is_done(record, key):
        _run(command, cwd=package)
        mark_done(record, key)
    return target


def _link(style: Flavour, objects: list[Path], target: Path, *options: str) -> None:
    # The compiler runs in the objects' folder, so that none of their
    # absolute paths reaches the output.
    names = sorted(os.path.relpath(path, style.folder) for path in objects)
    command = [
        style.compilers[1],
        *options,
        *style.link,
        "-pthread",
        "-Wl,--gc-sections",
        "-Wl,--build-id=none",
    ]
    _run_for(target, [*command, *names], cwd=style.folder)


def _check_no_undefined_sodium(target: Path) -> None:
    listing = capture(["nm", "-D", "--undefined-only", target], advice="nm is needed (binutils)")
    missing = [
        line.split()[-1] for line in listing.splitlines() if "sodium" in line or "crypto_" in line
    ]
    if missing:
        raise SystemExit(f"{target.name} has undefined symbols: {', '.join(missing)}")


def _run_for(target: Path, command: list[str], cwd: Path | None = None) -> None:
    """Run a command that writes `target` atomically: two builds may run at once."""
    written = target.with_name(f"{target.name}.{os.getpid()}")
    _run([*command, "-o", str(written)], cwd=cwd)
    written.replace(target)


def _run(command: list[str], cwd: Path | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, check=False)
    if result.returncode != 0:
        raise SystemExit(f"failed: {shlex.join(command)}")
