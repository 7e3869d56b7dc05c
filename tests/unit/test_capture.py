"""Without processes: what is captured and restored equals what plain pickling gives."""

from __future__ import annotations

import ctypes
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray import cloudpickle
from ray.experimental.rdt import capture
from tests.unit import values

relaxed = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


class Context:
    """What capture needs of Ray's serialization context."""

    def set_in_band_serialization(self) -> None: ...

    def set_out_of_band_serialization(self) -> None: ...

    def get_and_clear_contained_object_refs(self) -> set[Any]:
        return set()


def send(value: Any, is_packed: bool = False) -> Any:
    """Through capture and restore, the bytes copied to other memory on the way."""
    skeleton, captured = capture.take(Context(), value)
    table = pickle.loads(pickle.dumps(captured.table))
    if is_packed:
        joined, places, at = bytearray(captured.gather()), [], 0
        for nbytes in table.regions:
            places.append((joined, at))
            at += nbytes
    else:
        places = [(bytearray(ctypes.string_at(*region)), 0) for region in captured.regions]
    envelope = capture.Envelope(None, skeleton.inband, table, None, skeleton.buffers)
    (result,) = envelope.restore(capture.build_tensors(table, places))
    return result


def send_plain(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


@relaxed
@given(values.values, st.booleans())
def test_equals_plain_pickling(value: Any, is_packed: bool):
    values.assert_same(send(value, is_packed), send_plain(value))


@pytest.mark.parametrize("dtype", values.FLOAT8)
def test_float8_is_carried(dtype: torch.dtype):
    tensor = values.filled((3, 5), dtype)
    values.assert_same(send(tensor), tensor)


@relaxed
@given(values.shared())
def test_views_still_share_memory(views: list[torch.Tensor]):
    got = send(views)
    for one, other in zip(got, views):
        for two, another in zip(got, views):
            assert overlaps(one, two) == overlaps(other, another)
            assert (one is two) == (other is another)


def overlaps(one: torch.Tensor, other: torch.Tensor) -> bool:
    return extent(one)[0] < extent(other)[1] and extent(other)[0] < extent(one)[1]


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def test_writing_to_one_view_shows_in_the_other():
    base = torch.zeros(8)
    whole, part = send([base, base[2:4]])
    part.fill_(7)
    assert whole.tolist() == [0, 0, 7, 7, 0, 0, 0, 0]


def test_tied_weights_stay_tied():
    layer, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    head.weight = layer.weight
    got_layer, got_head = send([layer, head])
    assert got_head.weight is got_layer.weight


def test_view_sends_its_span_and_not_its_storage():
    _, captured = capture.take(Context(), torch.zeros(1 << 20)[100:110])
    assert captured.table.nbytes <= 10 * 4 + 16


def test_shared_bytes_are_sent_once():
    base = torch.zeros(1000)
    _, captured = capture.take(Context(), [base, base[10:20], base.view(10, 100), base])
    assert captured.table.nbytes == base.nbytes


def test_tensor_kept_alone_does_not_pickle_its_neighbours():
    small = send([torch.zeros(10), torch.zeros(100_000)], is_packed=True)[0]
    assert len(pickle.dumps(small)) < 2000


def test_same_process_gives_the_very_tensors():
    tensor, parameter = torch.zeros(3), torch.nn.Parameter(torch.ones(2))
    skeleton, captured = capture.take(Context(), {"t": tensor, "p": [parameter, tensor]})
    envelope = capture.Envelope(None, skeleton.inband, captured.table, None, skeleton.buffers)
    (result,) = envelope.restore(captured.tensors)
    assert result["t"] is tensor
    assert result["p"][0] is parameter
    assert result["p"][1] is tensor


def test_attributes_of_a_tensor_survive():
    tensor = torch.zeros(3)
    tensor.mark = "x"
    assert send(tensor).mark == "x"


def test_skeleton_alone_says_what_it_is():
    skeleton, _ = capture.take(Context(), torch.zeros(3))
    with pytest.raises(pickle.UnpicklingError, match="RDT"):
        pickle.loads(skeleton.inband)


def test_unpicklable_value_raises_as_plain_pickling_does():
    with pytest.raises(TypeError):
        capture.take(Context(), [torch.zeros(2), (i for i in range(3))])
