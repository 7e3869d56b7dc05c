"""The GPU kit: what is in it, what is left out, and how it becomes a Ray on another machine."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ci.build import base, gpu_kit
from ci.build.steps import ROOT, BuildError
from ci.gpu import kit as unpacking
from tests.support import run_driver

TOOLS = ROOT / "build" / f"tools-{base.python_tag()}" / "bin" / "python"


def write_wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


STOCK = {
    "ray/__init__.py": "stock = True\n",
    "ray/same.py": "same = 1\n",
    "ray/gone.py": "gone = 1\n",
    "ray/rllib/big.py": "big = 1\n",
    "ray/core/raylet": "a program",
}
OURS = {**STOCK, "ray/__init__.py": "stock = False\n", "ray/new.py": "new = 1\n"}
del OURS["ray/gone.py"]


@pytest.fixture
def wheels(tmp_path: Path) -> tuple[Path, Path]:
    return write_wheel(tmp_path / "ours.whl", OURS), write_wheel(tmp_path / "stock.whl", STOCK)


def test_what_differs_from_stock_is_found(wheels: tuple[Path, Path]) -> None:
    ours, theirs = gpu_kit.difference(*wheels)
    assert {name: content for name, (content, _) in ours.items()} == {
        "ray/__init__.py": b"stock = False\n",
        "ray/new.py": b"new = 1\n",
    }
    assert theirs == {"ray/__init__.py", "ray/gone.py"}


def test_libraries_on_top_of_ray_stay_at_home(wheels: tuple[Path, Path]) -> None:
    kept = gpu_kit.members(wheels[1], lambda _: True)
    assert "ray/rllib/big.py" not in kept
    assert "ray/core/raylet" in kept


def test_a_package_is_imported_as_its_outermost_packages_and_modules() -> None:
    names = ["google/protobuf/__init__.py", "google/protobuf/internal/__init__.py", "LICENSE"]
    assert gpu_kit.top_modules(names) == ["google.protobuf"]
    assert gpu_kit.top_modules(["pytest_timeout.py"]) == ["pytest_timeout"]
    assert gpu_kit.top_modules(["attr/__init__.py", "attrs/__init__.py"]) == ["attr", "attrs"]


def test_the_same_files_make_the_same_archive() -> None:
    files = {"b": (b"2", 0o644), "a/c": (b"1", 0o755)}
    one = gpu_kit.archive(files, "w:xz")
    assert one == gpu_kit.archive(dict(reversed(files.items())), "w:xz")
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        assert [(each.name, each.mode) for each in tar] == [("a/c", 0o755), ("b", 0o644)]


def test_a_kit_that_is_too_large_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kit, "LIMIT_BYTES", 10)
    with pytest.raises(BuildError, match=r"may have 0: stock\.tar\.xz 5\.0 MB.*site/big 3\.0 MB"):
        gpu_kit.check_size(
            b"0" * 11, {"stock.tar.xz": 5_000_000}, {"site/big": (bytes(3_000_000), 0o644)}
        )


def test_another_python_is_told_which_to_name() -> None:
    gpu_kit.check_python("cp312")
    with pytest.raises(BuildError, match=r"PYTHON=python3\.12 \./build\.sh gpu-kit"):
        gpu_kit.check_python("cp311")


def test_what_a_library_is_linked_to_comes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """In these stand-ins the names of the libraries they need are all there is."""
    monkeypatch.setattr(gpu_kit, "needed_by", lambda library: library.decode().split())
    libraries = {
        "libs/a.so": b"b.so libc.so.6",
        "libs/b.so": b"a.so",
        "more/b.so": b"",
        "c.so": b"",
    }
    assert gpu_kit.linked(libraries, ["libs/a.so"]) == {"libs/a.so", "libs/b.so", "more/b.so"}


def test_of_nixl_only_what_it_loads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kit, "needed_by", lambda library: library.decode().split())
    libraries = {
        "nixl_cu13/_bindings.cpython-312.so": b"libnixl.so",
        "nixl_cu13.libs/libnixl.so": b"",
        "nixl_cu13.libs/nixl/libplugin_UCX.so": b"libucp.so.0",
        "nixl_cu13.libs/libucp.so.0": b"",
        "nixl_cu13.libs/ucx/libuct_cuda.so.0.0.0": b"",
    }
    left_out = {
        "nixl_cu13.libs/nixl/libplugin_GDS.so": b"",
        "nixl_cu13.libs/ucx/libuct_ib.so.0.0.0": b"",
        "nixl_cu13.libs/ucx/libuct_cuda.la": b"",
        "nixl_cu13.scripts/nixlbench": b"",
        "nixl_ep_cu13/nixl_ep.so": b"",
    }
    package = {name: (content, 0o644) for name, content in {**libraries, **left_out}.items()}
    package["nixl_cu13/_api.py"] = (b"", 0o644)
    assert set(gpu_kit.slim(package)) == {*libraries, "nixl_cu13/_api.py"}


def test_the_libraries_of_a_real_program_are_read() -> None:
    source = "import sys; from ci.build import gpu_kit as kit\n"
    source += "print(kit.needed_by(open(sys.argv[1], 'rb').read()))"
    agent = importlib.import_module("ray.experimental.rdt._agent").__file__
    done = subprocess.run(
        [TOOLS, "-c", source, agent], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "libc.so.6" in done.stdout


@pytest.fixture
def kit(wheels: tuple[Path, Path], tmp_path: Path) -> Path:
    """A kit of tiny wheels, with a package that is missing here and one that is not."""
    ours, differing = gpu_kit.difference(*wheels)
    stock = gpu_kit.prefixed("site", gpu_kit.members(wheels[1], lambda n: n not in differing))
    stock |= {"needs/absent/absent_one.py": (b"", 0o644), "needs/pytest/pytest/x.py": (b"", 0o644)}
    content = gpu_kit.compose(
        "ours.whl",
        ours,
        gpu_kit.members(wheels[1], lambda name: name in differing),
        gpu_kit.archive(stock, "w:xz"),
        {"absent": ["absent_one"], "pytest": ["pytest"]},
    )
    path = tmp_path / "dist" / "gpu-kit-cp.tar"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def test_an_unpacked_kit_has_our_ray_and_stock_ray(kit: Path, tmp_path: Path) -> None:
    folder = unpacking.unpack(kit, tmp_path / "scratch")
    site = folder / "site"
    assert sorted(each.name for each in site.iterdir()) == ["absent_one.py", "ray"]
    files = {name: (folder / name / "ray").glob("*.py") for name in ("site", "stock")}
    assert {name: sorted(each.stem for each in found) for name, found in files.items()} == {
        "site": ["__init__", "new", "same"],
        "stock": ["__init__", "gone", "same"],
    }
    environment = {"PYTHONPATH": str(site)}
    for python, is_stock in ((sys.executable, "False"), (folder / "stock-python", "True")):
        printed = subprocess.check_output(
            [python, "-c", "import ray; print(ray.stock)"], env=environment, text=True
        )
        assert printed.strip() == is_stock
    assert (folder / "checkout" / "ci" / "gpu" / "run.sh").stat().st_mode & 0o100
    assert (folder / "checkout" / "tests" / "gpu" / "test_cuda.py").is_file()


def test_a_kit_is_unpacked_once(kit: Path, tmp_path: Path) -> None:
    folder = unpacking.unpack(kit, tmp_path / "scratch")
    (folder / "here before").touch()
    assert unpacking.unpack(kit, tmp_path / "scratch") == folder
    assert [each.name for each in (tmp_path / "scratch").iterdir()] == [folder.name]
    assert (folder / "here before").exists()


def test_a_kit_is_found_in_its_folder(kit: Path) -> None:
    assert unpacking.find(kit.parent) == kit
    assert unpacking.find(kit) == kit
    kit.unlink()
    with pytest.raises(unpacking.KitError, match="kits there: none"):
        unpacking.find(kit.parent)


def test_a_kit_of_another_python_is_refused(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kit.base, "python_tag", lambda: "cp39")
    other = tmp_path / "gpu-kit-cp39.tar"
    other.write_bytes(gpu_kit.compose("ours.whl", {}, {}, gpu_kit.archive({}, "w:xz"), {}))
    with pytest.raises(unpacking.KitError, match=r"this kit is for cp39.*PYTHON=python3\.12"):
        unpacking.unpack(other, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_run_sh_tells_what_is_wrong_with_a_kit(tmp_path: Path) -> None:
    run = ROOT / "ci" / "gpu" / "run.sh"
    for arguments, told in ((["--kit"], "--kit needs"), (["--kit", tmp_path], "kits there: none")):
        done = subprocess.run(
            [run, *arguments],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert told in done.stderr


ACTOR = """
import ray, sys
assert "slim" in ray.__file__, ray.__file__
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)

@ray.remote(runtime_env={"env_vars": {"GIVEN": "1"}})
class Actor:
    @ray.method(tensor_transport="auto")
    def make(self):
        import os, torch
        return torch.full((1 << 18,), float(os.environ["GIVEN"]))

actor = Actor.remote()
print("sum", float(ray.get(actor.make.remote()).sum()))
"""


@pytest.mark.slow
def test_ray_starts_without_what_is_left_out(tmp_path: Path) -> None:
    """Its agents, an actor with an environment of its own, and a pull."""
    site = Path(importlib.import_module("ray").__file__ or "").parents[1]
    for file in (site / "ray").rglob("*"):
        name = file.relative_to(site).as_posix()
        if file.is_file() and gpu_kit.is_kept(name):
            link = tmp_path / "slim" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, link)
    folder = tmp_path / "run"
    folder.mkdir()
    printed = run_driver(ACTOR, folder, environment={"PYTHONPATH": str(tmp_path / "slim")})
    assert "sum 262144.0" in printed
