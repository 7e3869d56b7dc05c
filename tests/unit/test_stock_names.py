"""Every public name of Ray's own RDT is here with its meaning, or the documents say why not."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import zipfile
from collections.abc import Iterator

import pytest
import torch

import ray
from ray.experimental.rdt import util
from ray.experimental.rdt.tensor_transport_manager import (
    TensorTransportManager,
    TensorTransportMetadata,
)
from tests.support import ROOT

PACKAGES = ("ray/experimental/rdt/", "ray/experimental/collective/")


def stock_modules() -> Iterator[tuple[str, ast.Module]]:
    """Ray's own modules of RDT, as the wheel has them that ours is made of."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = list((ROOT / "build" / "base").glob(f"ray-{ray.__version__}-{tag}-*.whl"))
    if not wheels:
        pytest.skip("stock Ray's wheel is not in build/base, where ./build.sh puts it")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for path in sorted(wheel.namelist()):
            is_meant = path.startswith(PACKAGES) or path == "ray/experimental/__init__.py"
            if is_meant and path.endswith(".py") and "conftest" not in path:
                module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                yield module, ast.parse(wheel.read(path))


def names_of(module: ast.Module) -> set[str]:
    """The public names that a module defines itself; what it lists in ``__all__``, if it does."""
    names = set()
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = {target.id for target in targets if isinstance(target, ast.Name)}
            if "__all__" in found:
                assert node.value is not None
                return set(ast.literal_eval(node.value))
            names |= found
    return {name for name in names if not name.startswith("_")} - {"logger"}


def is_here(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def listed_as_gone() -> set[str]:
    documents = (ROOT / "doc" / "compatibility.md").read_text()
    section = documents.partition("### Names that are gone")[2].partition("\n##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])}


def test_each_name_is_here_or_listed_as_gone() -> None:
    stock = [(module, name) for module, tree in stock_modules() for name in names_of(tree)]
    assert len(stock) > 50
    assert {name for module, name in stock if not is_here(module, name)} == listed_as_gone()


class Mover(TensorTransportManager):
    @staticmethod
    def is_one_sided() -> bool:
        return False


@pytest.fixture
def mover(monkeypatch: pytest.MonkeyPatch) -> str:
    from ray.experimental.rdt.transports.user import registered

    monkeypatch.setattr(registered, "_registered", {})
    assert util.has_custom_transports is False
    util.register_tensor_transport("mover", ["npu"], Mover, dict)
    return "MOVER"


def test_what_is_known_of_transports(mover: str) -> None:
    assert util.has_custom_transports is True
    assert [util.is_one_sided_transport(name) for name in ("NIXL", "CUDA_IPC", "GLOO", mover)] == [
        *(True, True, False, False)
    ]
    assert util.device_match_transport("cpu", "NIXL")
    assert not util.device_match_transport("cuda", "GLOO")
    assert util.device_match_transport("npu", mover)
    assert util.get_transport_data_type("NCCL") is torch.Tensor
    assert util.get_transport_data_type(mover) is dict
    assert set(util.transport_manager_info) == {*util.DEFAULT_TRANSPORTS, mover}
    assert util.transport_manager_info[mover] == (Mover, ["npu"], dict)


@pytest.mark.parametrize("name", ["get_transport_data_type", "is_one_sided_transport"])
def test_unknown_transports_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match="Unsupported tensor transport protocol: NONE"):
        getattr(util, name)("NONE")


def test_tensors_to_receive_into() -> None:
    metadata = TensorTransportMetadata([((2, 3), torch.float16), ((), torch.bool)], "cpu")
    tensors = util.create_empty_tensors_from_metadata(metadata)
    assert [(tensor.shape, tensor.dtype) for tensor in tensors] == metadata.tensor_meta
    (tensor, _) = util.create_empty_tensors_from_metadata(metadata, "meta")
    assert tensor.device.type == "meta"


def test_rdts_own_transports_by_name() -> None:
    assert util.get_tensor_transport_manager("GLOO").tensor_transport_backend() == "GLOO"
    nixl = util.get_tensor_transport_manager("NIXL")
    assert nixl is util.get_tensor_transport_manager("nixl")
    assert nixl.is_one_sided()
    with pytest.raises(ValueError, match="is RDT's own transport"):
        util.get_tensor_transport_manager("CUDA_IPC")


def test_transports_of_another_job_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.experimental.rdt.transports.user import registered

    entry = registered.RegisteredTransport("OTHER", ("cpu",), Mover, torch.Tensor)
    monkeypatch.setattr(registered, "_found", {("another job", "OTHER"): entry})
    assert "OTHER" not in registered.known_names()
    assert "OTHER" not in util.transport_manager_info
