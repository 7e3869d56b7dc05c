"""Values to send: what generated tests draw from, and what it means that two are equal."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]
#: Plain pickling cannot carry these; RDT does.
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@dataclasses.dataclass
class Batch:
    """A user's dataclass."""

    tokens: Any
    note: str = "n"


class Tagged(torch.Tensor):
    """A user's subclass of tensor."""


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor with a different byte pattern wherever the dtype allows."""
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    if dtype is torch.bool:
        return (torch.arange(int(np.prod(shape, dtype=int))) % 3 == 0).reshape(shape)
    raw = torch.arange(count, dtype=torch.int64).remainder(127).to(torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(DTYPES)


@st.composite
def dense(draw: st.DrawFn) -> torch.Tensor:
    return filled(draw(shapes), draw(dtypes))


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """Transposed, sliced, stepped, expanded, offset."""
    base = filled((4, 6, 3), draw(dtypes))
    return draw(
        st.sampled_from(
            [
                base.transpose(0, 2),
                base[1:, ::2],
                base[2],
                base[..., 1],
                base[:1].expand(5, 6, 3),
                base.reshape(-1)[7:],
                base.permute(1, 2, 0)[:, :, 1:3],
                base[1:1],
                base.as_strided((2, 2), (1, 1)),
            ]
        )
    )


@st.composite
def special(draw: st.DrawFn) -> Any:
    base = filled((3, 4), torch.float32)
    leaf = filled((3,), torch.float64).requires_grad_()
    negative = torch.from_numpy(np.ascontiguousarray(np.arange(6.0)[::-1]))
    conjugated = filled((4,), torch.complex64).conj()
    return draw(
        st.sampled_from(
            [
                leaf,
                leaf * 2,
                torch.nn.Parameter(base.clone()),
                torch.nn.Parameter(base.clone(), requires_grad=False),
                conjugated,
                conjugated.imag,
                negative,
                torch.tensor(3.5),
                torch.eye(3).to_sparse(),
                torch.empty(2, 3, device="meta"),
                base.as_subclass(Tagged),
                torch.quantize_per_tensor(base, 0.1, 0, torch.qint8),
                torch.nn.Linear(3, 2),
            ]
        )
    )


@st.composite
def shared(draw: st.DrawFn) -> Any:
    """Several tensors over one storage, or one tensor several times."""
    base = filled((6, 4), draw(dtypes))
    views = [base, base[1:3], base[2:5, ::2], base.t(), base.reshape(-1)[3:11], base]
    return [draw(st.sampled_from(views)) for _ in range(draw(st.integers(2, 5)))]


@st.composite
def blocks(draw: st.DrawFn) -> list[torch.Tensor]:
    """Parts of a cache whose rows are of 1 KiB, as layers, blocks and heads of attention are cut.

    Some leave out most of the bytes that they span; some share bytes with others.
    """
    cache = filled((3, 8, 4, 128), draw(st.sampled_from([torch.int64, torch.complex64])))
    cuts = [
        lambda i: cache[:, i],
        lambda i: cache[:, i : i + 2],
        lambda i: cache[:, i].view(torch.int16),
        lambda i: cache[i % 3, ::3],
        lambda i: cache[::2, i : i + 1],
        lambda i: cache.transpose(0, 2)[i % 4],
        lambda i: cache[:, i, 1:2].expand(3, 5, 128),
        lambda i: cache[:, i, :, 64:],
        lambda i: cache[i % 3, i],
        lambda i: cache[:, i].permute(1, 0, 2),
    ]
    count = draw(st.integers(1, 5))
    return [draw(st.sampled_from(cuts))(draw(st.integers(0, 6))) for _ in range(count)]


plain = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.just(np.arange(5)),
    st.just(torch.float16),
    st.just((1, "a")),
)
tensors = st.one_of(dense(), strided(), special(), shared())


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Batch, inner),
    )


values = st.recursive(tensors | plain, containers, max_leaves=8)


def assert_same(got: Any, expected: Any) -> None:
    """Fails unless a user could not tell the two apart."""
    assert type(got) is type(expected)
    if isinstance(expected, torch.nn.Module):
        assert_same(dict(got.state_dict(keep_vars=True)), dict(expected.state_dict(keep_vars=True)))
    elif isinstance(expected, torch.Tensor):
        assert_same_tensor(got, expected)
    elif isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
    elif dataclasses.is_dataclass(expected):
        assert_same(vars(got), vars(expected))
    else:
        assert got == expected


def assert_same_tensor(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
    assert got.layout == expected.layout
    assert got.requires_grad == expected.requires_grad
    if expected.layout is not torch.strided:
        assert torch.equal(got.to_dense(), expected.to_dense())
        return
    assert got.stride() == expected.stride()
    assert got.is_conj() == expected.is_conj()
    assert got.is_neg() == expected.is_neg()
    if expected.device.type != "meta":
        assert bytes_of(got) == bytes_of(expected)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the tensor's elements as bytes, so that different NaNs differ."""
    tensor = tensor.detach().as_subclass(torch.Tensor)
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    resolved = tensor.resolve_conj().resolve_neg().contiguous()
    return resolved.view(-1).view(torch.uint8).numpy().tobytes()
