"""Detection of nixl by the tests, and the packages that they install for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, why_no_nixl

ALONE = (ROOT / "ci" / "requirements" / "alone.txt").read_text()


@pytest.fixture
def front_without_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package nixl as it is where the build for torch's CUDA version is missing."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "nixl"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "nixl").mkdir()
    (tmp_path / "nixl" / "__init__.py").write_text("raise ImportError('no nixl for CUDA 13')\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_front_that_has_no_backend_is_no_nixl(front_without_backend: None) -> None:
    found = why_no_nixl.__wrapped__()
    assert found == "nixl cannot be imported: no nixl for CUDA 13"


def test_nixl_is_installed_for_each_cuda_that_torch_is_built_for() -> None:
    versions = dict(re.findall(r"^(nixl[-\w]*)==(\S+)$", ALONE, re.MULTILINE))
    assert set(versions) == {"nixl", "nixl-cu12", "nixl-cu13"}
    assert len(set(versions.values())) == 1
