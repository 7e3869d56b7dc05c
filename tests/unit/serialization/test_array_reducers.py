"""Arrays that go as tensors are, at the consumer, what plain pickling makes of them."""

from __future__ import annotations

import array
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ray.experimental.rdt.common import config
from ray.experimental.rdt.serialization import capture
from tests.unit.serialization.test_capture import Context, send, send_plain

LEAST = 64


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_RDT_ARRAY_BYTES", str(LEAST))
    config.settings.cache_clear()
    yield
    monkeypatch.undo()
    config.settings.cache_clear()


def carried(value: Any) -> int:
    """Return the number of tensors that a value is reduced to."""
    _, captured = capture.take(Context(), value)
    return len(captured.tensors)


def readonly() -> np.ndarray[Any, Any]:
    locked = np.arange(100)
    locked.flags.writeable = False
    return locked


CARRIED = {
    "C order": np.arange(120.0).reshape(10, 12),
    "Fortran order": np.asfortranarray(np.arange(120.0).reshape(10, 12)),
    "half": np.ones(100, np.float16),
    "complex": np.ones(100, np.complex128) * 1j,
    "bool": np.arange(100) % 3 == 0,
    "text": np.array(["one", "two"] * 50),
    "records": np.zeros(40, dtype=[("a", "i4"), ("b", "f8")]),
    "big endian": np.arange(100, dtype=">i4"),
    "part of a larger one": np.arange(1000)[300:500],
    "read-only": readonly(),
}
IN_THE_VALUE = {
    "small": np.arange(3),
    "empty": np.empty((0, 3)),
    "every other": np.arange(1000)[::2],
    "objects": np.array([{}, []] * 50, dtype=object),
    "dates": np.arange("2000-01", "2020-01", dtype="datetime64[M]"),
    "bytes": b"x" * 1000,
    "bytearray": bytearray(1000),
    "array.array": array.array("d", range(100)),
}


@pytest.mark.parametrize("name", [*CARRIED, *IN_THE_VALUE])
def test_arrays_equal_plain_pickling(name: str) -> None:
    value = CARRIED.get(name, IN_THE_VALUE.get(name))
    assert carried(value) == (name in CARRIED)
    got, plain = send(value), send_plain(value)
    assert type(got) is type(plain)
    assert np.array_equal(got, plain)
    if isinstance(plain, np.ndarray):
        assert (got.dtype, got.strides) == (plain.dtype, plain.strides)
        assert got.flags.writeable == plain.flags.writeable


def test_arrays_are_not_copied() -> None:
    value = np.zeros(1000)
    _, captured = capture.take(Context(), [value, readonly()])
    assert (value.ctypes.data, value.nbytes) in list(zip(*captured.host_spans()))


def test_memory_lives_as_long_as_its_tensor() -> None:
    _, captured = capture.take(Context(), [np.full(1000, 5.0)])
    assert captured.tensors[0].view(torch.float64).sum() == 5000


def test_one_array_twice_is_one_array() -> None:
    value = np.arange(100)
    one, two = send([value, value])
    assert one is two
    assert carried([value, value]) == 1


def test_arrays_beside_tensors_and_inside_other_objects() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"x": np.arange(1000.0), "y": np.arange(1000)})
    got = send({"t": torch.arange(5), "frame": frame, "masked": np.ma.arange(5)})
    assert got["t"].tolist() == list(range(5))
    assert got["frame"].equals(frame)
    assert carried(frame) >= 2


def test_arrow_buffers() -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = arrow.table({"x": np.arange(1000)})
    assert send(table).equals(table)
    assert carried(table) == 1


def test_arrays_that_speak_dlpack() -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    jnp = importlib.import_module("jax.numpy")
    value = {"x": jnp.arange(100.0), "half": jnp.ones((10, 10), jnp.bfloat16), "small": jnp.ones(2)}
    got = send(value)
    assert carried(value) == 2
    for name, each in value.items():
        assert isinstance(got[name], type(each))
        assert got[name].dtype == each.dtype
        assert (got[name] == each).all()


def test_nothing_changes_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_RDT_ARRAY_BYTES")
    config.settings.cache_clear()
    assert carried(list(CARRIED.values())) == 0
