"""The wheel: the same bytes twice, true metadata, and an install that works on its own."""

import importlib.util
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from ci.build import base, wheel
from ci.build.steps import ROOT, BuildError, need_disk

# Each may have to wait for a build, and a build for a busy machine.
pytestmark = pytest.mark.timeout(600)

# Run on their own, away from the checkout: what a user sees right after `pip install`.
AFTER_INSTALL = """
import importlib.metadata
import ray
print(ray.__version__, importlib.metadata.version("ray"), ray.__file__)
import ray.experimental.rdt._agent
"""
LOADED = """
import sys
import ray
print([name for name in sys.modules if name == "torch" or name.endswith("._agent")])
"""


def build_command(*arguments: str | Path) -> list[str | Path]:
    return [ROOT / "build.sh", *arguments]


def build(root: Path) -> Path:
    """The wheel in dist/, as build.sh leaves it."""
    done = subprocess.run([root / "build.sh"], check=True, capture_output=True, text=True)
    return root / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def built() -> Path:
    return build(ROOT)


def differing(one: Path, other: Path) -> list[str]:
    """The members of two wheels that are not the same in both."""
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        names = set(first.namelist()) & set(second.namelist())
        odd = set(first.namelist()) ^ set(second.namelist())
        return sorted(odd | {name for name in names if first.read(name) != second.read(name)})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_clones_build_the_same_bytes(tmp_path: Path) -> None:
    """Another folder, with its own unpacking, compiling and packing; only downloads are shared."""
    clone = tmp_path / "a longer name than the other"
    made = {"build", "dist", ".venv", ".git"}
    shutil.copytree(ROOT, clone, ignore=lambda at, _: made if Path(at) == ROOT else set())
    built = Path(shutil.copy2(build(ROOT), tmp_path))
    tools = f"tools-{base.python_tag()}"
    for cached in (tools, "base", "native/pynacl", "native/awscrt"):
        (clone / "build" / cached).parent.mkdir(parents=True, exist_ok=True)
        (clone / "build" / cached).symlink_to(ROOT / "build" / cached)
    again = build(clone)
    assert differing(again, built) == []
    assert again.read_bytes() == built.read_bytes()


def test_an_unchanged_tree_is_not_built_again(built: Path) -> None:
    before = built.stat().st_mtime_ns
    done = subprocess.run(build_command(), check=True, capture_output=True, text=True)
    assert built.stat().st_mtime_ns == before
    assert done.stderr == ""


def test_names_and_tags(built: Path) -> None:
    release = base.read_base().version
    version = f"{release}+rdt.{wheel.our_version()}"
    name, in_name, python, abi, platform = built.stem.split("-")
    assert (name, in_name, python, abi) == ("ray", version, base.python_tag(), base.python_tag())
    with zipfile.ZipFile(built) as archive:
        info = f"ray-{version}.dist-info"
        names = archive.namelist()
        assert f"Version: {version}\n" in archive.read(f"{info}/METADATA").decode()
        assert f"Tag: {python}-{abi}-{platform}\n" in archive.read(f"{info}/WHEEL").decode()
        assert not [n for n in names if n.startswith("ray-") and not n.startswith(info)]
        assert b"Apache License" in archive.read(f"{info}/licenses/aws-checksums.txt")
        assert b"ISC License" in archive.read(f"{info}/licenses/libsodium.txt")
        ours = [n for n in names if n.startswith("ray/experimental/rdt/")]
        assert {n.rpartition(".")[2] for n in ours} == {"py", "pyi", "so"}
        assert {member.date_time for member in archive.infolist()} == {wheel.timestamp()}


def test_record_is_true(built: Path, tmp_path: Path) -> None:
    wheel.check_record(built)
    with zipfile.ZipFile(built) as archive:
        record = archive.read(wheel.record_of(archive.namelist()))
    spoilt = tmp_path / built.name
    with zipfile.ZipFile(spoilt, "w") as archive:
        archive.writestr("ray/__init__.py", "")
        archive.writestr("ray-1.dist-info/RECORD", record)
    with pytest.raises(BuildError, match="RECORD"):
        wheel.check_record(spoilt)


@pytest.mark.slow
def test_auditwheel_agrees_with_the_tag(built: Path) -> None:
    tools = ROOT / "build" / f"tools-{base.python_tag()}" / "bin" / "python"
    shown = subprocess.run(
        [tools, "-m", "auditwheel", "show", built], check=True, capture_output=True, text=True
    )
    assert f'"{built.stem.split("-")[-1]}"' in shown.stdout


@pytest.mark.slow
def test_it_installs_and_imports_on_its_own(built: Path, tmp_path: Path) -> None:
    """An empty venv outside the checkout, with nothing but the wheel and what it asks for."""
    folder = tmp_path / "empty"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-qq", built], check=True, cwd=tmp_path)
    subprocess.run([python, "-m", "pip", "check"], check=True, cwd=tmp_path)
    done = subprocess.run(
        [python, "-I", "-c", AFTER_INSTALL],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    version, installed, file = done.stdout.split()
    assert (version, installed) == (base.read_base().version, built.stem.split("-")[1])
    assert Path(file).is_relative_to(folder)


def test_tests_run_against_the_installed_wheel(built: Path) -> None:
    """What the other tests import is the wheel's, byte for byte."""
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    site = Path(found.origin).parents[1]
    assert site.is_relative_to(sys.prefix)
    with zipfile.ZipFile(built) as archive:
        for name in archive.namelist():
            if name.startswith("ray/experimental/"):
                assert (site / name).read_bytes() == archive.read(name), name


def test_importing_ray_loads_neither_torch_nor_the_agent(tmp_path: Path) -> None:
    """In this venv, which has torch: it could be loaded, and is not."""
    assert importlib.util.find_spec("torch") is not None
    loaded = subprocess.check_output([sys.executable, "-I", "-c", LOADED], cwd=tmp_path, text=True)
    assert loaded.strip() == "[]"


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match="no gcc found: install one"):
        wheel.need_compiler()


def test_a_python_without_headers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(BuildError, match="no Python headers in /nowhere: install them"):
        wheel.need_compiler()


def test_a_full_disk_is_told() -> None:
    with pytest.raises(BuildError, match=r"unpacking needs 1000000000\.0 GB of disk"):
        need_disk(10**18, "unpacking")


def test_a_wrong_base_stops_the_build(base_wheel: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / base_wheel.name
    spoilt.write_bytes(base_wheel.read_bytes()[:-1])
    with pytest.raises(BuildError, match=f"wrong base: .*{base_wheel.name}"):
        base.fetch(base.read_base(), cache=tmp_path)


def test_a_machine_without_a_base_is_told(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no wheel for cp39 on riscv64"):
        base.read_base().wheel_name("cp39", "riscv64")


def test_an_unknown_command_shows_the_usage() -> None:
    done = subprocess.run(build_command("bake"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no command 'bake'" in done.stderr
    assert "Usage: ./build.sh" in done.stderr


def test_another_python_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\necho cp39\n")
    fake.chmod(0o755)
    done = subprocess.run(
        build_command(), capture_output=True, text=True, check=False, env={"PYTHON": str(fake)}
    )
    assert done.returncode == 1
    assert "only for CPython 3.10 to 3.14" in done.stderr
