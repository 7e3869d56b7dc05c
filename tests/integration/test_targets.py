"""set_target_for_ref and set_target_device_for_ref: where ray.get puts an object's tensors."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ray
from ray.experimental import set_target_device_for_ref, set_target_for_ref
from tests.integration.conftest import needs_nixl
from tests.integration.peers import LARGE, SMALL, Peer

SIZES = pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "large"])


@pytest.fixture(params=["auto", "gloo", pytest.param("nixl", marks=needs_nixl()), "files", "shm"])
def any_transport(request: pytest.FixtureRequest, users_transports: None) -> str:
    """Every transport that runs without a GPU, and two of users'."""
    return str(request.param)


def two_tensors(_: Peer, count: int) -> list[torch.Tensor]:
    return [torch.arange(count, dtype=torch.float32), torch.full((2, count), 5, dtype=torch.int16)]


def targets_for(count: int) -> list[torch.Tensor]:
    return [torch.zeros(count), torch.zeros((2, count), dtype=torch.int16)]


def assert_filled(tensors: list[torch.Tensor], count: int) -> None:
    for tensor, expected in zip(tensors, two_tensors(None, count), strict=True):  # type: ignore[arg-type]
        assert torch.equal(tensor, expected)


@SIZES
def test_targets_receive_the_tensors(producer: Any, transport: str, count: int) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(two_tensors, count)
    targets = targets_for(count)
    addresses = [target.data_ptr() for target in targets]
    set_target_for_ref(ref, targets)
    got = ray.get(ref)
    assert [one is two for one, two in zip(got, targets, strict=True)] == [True, True]
    assert [target.data_ptr() for target in targets] == addresses
    assert_filled(targets, count)


@SIZES
@pytest.mark.parametrize(
    "lay_out",
    [
        lambda count: torch.zeros(count, 2)[:, 0],
        lambda count: torch.zeros(2 * count)[::2],
        lambda count: torch.zeros(count + 3)[3:],
        lambda count: torch.zeros(count).flip(0).flip(0),
    ],
    ids=["column", "stepped", "offset", "flipped"],
)
def test_targets_need_not_be_contiguous(
    producer: Any, count: int, lay_out: Callable[[int], torch.Tensor]
) -> None:
    ref = producer.make.remote(two_tensors, count)
    target = lay_out(count)
    whole = torch.zeros(count, 2, dtype=torch.int16).t()
    set_target_for_ref(ref, [target, whole])
    assert ray.get(ref)[0] is target
    assert_filled([target, whole], count)


def test_memory_around_a_target_stays_untouched(producer: Any, transport: str) -> None:
    memory = torch.full((LARGE + 20,), -1.0)
    ref = producer.make.options(tensor_transport=transport).remote(two_tensors, LARGE)
    set_target_for_ref(ref, [memory[7 : LARGE + 7], torch.zeros((2, LARGE), dtype=torch.int16)])
    ray.get(ref)
    assert memory[:7].eq(-1).all()
    assert memory[LARGE + 7 :].eq(-1).all()
    assert torch.equal(memory[7 : LARGE + 7], torch.arange(LARGE, dtype=torch.float32))


def test_targets_of_views_of_one_memory_are_filled_one_by_one(producer: Any) -> None:
    def make(_: Peer) -> list[torch.Tensor]:
        base = torch.arange(LARGE, dtype=torch.float32)
        return [base, base[10:20], base.view(2, -1).t()]

    ref = producer.make.remote(make)
    targets = [torch.zeros(LARGE), torch.zeros(10), torch.zeros(LARGE // 2, 2)]
    set_target_for_ref(ref, targets)
    ray.get(ref)
    for target, expected in zip(targets, make(None)):  # type: ignore[arg-type]
        assert torch.equal(target, expected)


@SIZES
@pytest.mark.parametrize("kept", [0, 0.5], ids=["freed", "shrunk"])
@pytest.mark.parametrize("lay_out", [lambda t: t, lambda t: t[::2]], ids=["dense", "stepped"])
def test_targets_whose_storage_was_freed_are_refused(
    producer: Any, consumer: Any, count: int, kept: float, lay_out: Callable[[Any], Any]
) -> None:
    def get_into(_: Peer, refs: list[Any]) -> None:
        whole = torch.zeros(2 * count)
        target = lay_out(whole)
        whole.untyped_storage().resize_(int(8 * count * kept))
        set_target_for_ref(refs[0], [target])
        ray.get(refs[0])

    ref = producer.make.remote(lambda _: lay_out(torch.zeros(2 * count)))
    with pytest.raises(ValueError, match=r"target 0 .* bytes of a storage that has \d+"):
        ray.get(consumer.run.remote(get_into, [ref]), timeout=60)


def test_targets_in_other_values_than_lists(producer: Any) -> None:
    ref = producer.make.remote(lambda _: {"b": torch.ones(LARGE), "a": (torch.zeros(3), "x")})
    targets = [torch.zeros(LARGE), torch.ones(3)]
    set_target_for_ref(ref, targets)
    got = ray.get(ref)
    assert got["b"] is targets[0]
    assert got["a"] == (targets[1], "x")
    assert targets[0].eq(1).all()
    assert targets[1].eq(0).all()


def test_targets_of_an_object_that_was_made_here() -> None:
    tensor = torch.arange(LARGE, dtype=torch.float32)
    ref = ray.put(tensor, _tensor_transport="auto")
    target = torch.zeros(LARGE)
    set_target_for_ref(ref, [target])
    assert ray.get(ref) is target
    assert torch.equal(target, tensor)


def test_parameters_that_require_grad_are_targets(producer: Any) -> None:
    ref = producer.make.remote(lambda _: [torch.ones(LARGE)])
    target = torch.nn.Parameter(torch.zeros(LARGE))
    set_target_for_ref(ref, [target])
    ray.get(ref)
    assert target.detach().eq(1).all()
    assert target.requires_grad


@SIZES
@pytest.mark.parametrize("is_contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("wrap", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "param"])
def test_targets_that_inference_mode_made(
    producer: Any, any_transport: str, count: int, is_contiguous: bool, wrap: Any
) -> None:
    with torch.inference_mode():
        target = wrap(torch.zeros(count) if is_contiguous else torch.zeros(count, 2)[:, 0])
    ref = producer.make.options(tensor_transport=any_transport).remote(two_tensors, count)
    targets = [target, targets_for(count)[1]]
    set_target_for_ref(ref, targets)
    assert ray.get(ref)[0] is target
    assert_filled(targets, count)


@SIZES
def test_a_get_in_inference_mode(producer: Any, any_transport: str, count: int) -> None:
    ref = producer.make.options(tensor_transport=any_transport).remote(two_tensors, count)
    targets = targets_for(count)
    with torch.inference_mode():
        assert_filled(ray.get(ref), count)
        set_target_for_ref(ref, targets)
        assert ray.get(ref)[0] is targets[0]
    assert_filled(targets, count)
    targets[0].add_(1)


@SIZES
def test_autograd_sees_that_a_target_has_changed(
    producer: Any, any_transport: str, count: int
) -> None:
    target = torch.nn.Parameter(torch.ones(count))
    product = (target * target).sum()
    ref = producer.make.options(tensor_transport=any_transport).remote(
        lambda _, count: torch.nn.Parameter(torch.full((count,), 3.0)), count
    )
    set_target_for_ref(ref, [target])
    assert ray.get(ref) is target
    assert target.eq(3).all()
    assert target.requires_grad
    assert target.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    (target * target).sum().backward()
    assert target.grad.eq(6).all()


@SIZES
def test_targets_of_rows_and_of_views_of_a_bucket(
    producer: Any, any_transport: str, count: int
) -> None:
    def make(_: Peer, count: int) -> list[torch.Tensor]:
        bucket = torch.arange(4 * count, dtype=torch.float32)
        return [*bucket[: 2 * count].view(2, count), bucket[2 * count :], bucket.view(2, -1)[0]]

    ref = producer.make.options(tensor_transport=any_transport).remote(make, count)
    wanted = make(None, count)  # type: ignore[arg-type]
    targets = [torch.nn.Parameter(torch.zeros_like(view)) for view in wanted]
    set_target_for_ref(ref, targets)
    got = ray.get(ref)
    assert [one is two for one, two in zip(got, targets, strict=True)] == [True] * 4
    assert all(torch.equal(one, two) for one, two in zip(got, wanted))


WRONG = [
    ("shape", lambda n: [torch.zeros(n + 1), targets_for(n)[1]], r"target 0 .*shape.*\({1}.*\({0}"),
    ("shape", lambda n: [torch.zeros(1, n), targets_for(n)[1]], r"target 0 .*shape.*\(1, {0}"),
    ("dtype", lambda n: [targets_for(n)[0], torch.zeros(2, n)], r"target 1 .*float32.*int16"),
    ("count", lambda n: targets_for(n)[:1], r"1 target.* 2"),
    ("count", lambda n: [*targets_for(n), torch.zeros(1)], r"3 target.* 2"),
    ("count", lambda n: [], r"0 target.* 2"),
]


@SIZES
@pytest.mark.parametrize(
    ("make", "message"),
    [row[1:] for row in WRONG],
    ids=[f"{row[0]}{i}" for i, row in enumerate(WRONG)],
)
def test_wrong_targets_are_refused_and_the_reference_stays_usable(
    producer: Any, count: int, make: Callable[[int], list[torch.Tensor]], message: str
) -> None:
    ref = producer.make.remote(two_tensors, count)
    wrong = make(count)
    set_target_for_ref(ref, wrong)
    with pytest.raises(ValueError, match=message.format(count, count + 1)):
        ray.get(ref)
    assert all(not target.any() for target in wrong)
    assert_filled(ray.get(ref), count)
    right = targets_for(count)
    set_target_for_ref(ref, right)
    assert ray.get(ref)[0] is right[0]
    assert_filled(right, count)


def test_a_wrong_target_does_not_spoil_its_batch(producer: Any) -> None:
    good, bad = (producer.make.remote(two_tensors, LARGE) for _ in range(2))
    set_target_for_ref(bad, [torch.zeros(1)])
    with pytest.raises(ValueError, match="target"):
        ray.get([good, bad])
    for tensors in ray.get([good, bad]):
        assert_filled(tensors, LARGE)


@pytest.mark.parametrize("wrong", [[None], ["x"], [torch.zeros(SMALL).numpy()]], ids=repr)
def test_targets_that_are_no_tensors_are_refused(producer: Any, wrong: list[Any]) -> None:
    ref = producer.make.remote(lambda _: [torch.ones(SMALL)])
    with pytest.raises(ValueError, match="target 0"):
        set_target_for_ref(ref, wrong)
    assert ray.get(ref)[0].eq(1).all()


def test_a_later_target_replaces_an_earlier_one(producer: Any) -> None:
    ref = producer.make.remote(two_tensors, LARGE)
    first, second = targets_for(LARGE), targets_for(LARGE)
    set_target_for_ref(ref, first)
    set_target_for_ref(ref, second)
    assert ray.get(ref)[0] is second[0]
    assert not first[0].any()
    set_target_device_for_ref(ref, "cpu")
    assert ray.get(ref)[0] is not second[0]


def test_targets_stay_with_the_process_that_set_them(producer: Any, consumer: Any) -> None:
    ref = producer.make.remote(two_tensors, LARGE)
    targets = targets_for(LARGE)
    set_target_for_ref(ref, targets)
    assert ray.get(consumer.run.remote(lambda _, got: float(got[0].sum()), ref)) > 0
    in_list = ray.get(consumer.run.remote(lambda _, refs: float(ray.get(refs[0])[0].sum()), [ref]))
    assert in_list > 0
    assert not targets[0].any()


def test_borrower_sets_targets(producer: Any, consumer: Any, transport: str) -> None:
    def get_into(_: Peer, refs: list[Any]) -> bool:
        targets = targets_for(LARGE)
        set_target_for_ref(refs[0], targets)
        got = ray.get(refs[0])
        assert_filled(targets, LARGE)
        return got[0] is targets[0]

    ref = producer.make.options(tensor_transport=transport).remote(two_tensors, LARGE)
    assert ray.get(consumer.run.remote(get_into, [ref]))


def test_targets_can_be_set_before_the_object_exists(spawn: Any) -> None:
    def when_open(peer: Peer) -> list[torch.Tensor]:
        assert peer.gate.wait(60)
        return two_tensors(peer, LARGE)

    maker = spawn(max_concurrency=2)
    ref = maker.make.remote(when_open)
    targets = targets_for(LARGE)
    set_target_for_ref(ref, targets)
    ray.get(maker.open.remote())
    assert ray.get(ref)[0] is targets[0]
    assert_filled(targets, LARGE)


def test_targets_serve_every_get_while_they_live(producer: Any) -> None:
    ref = producer.make.remote(two_tensors, LARGE)
    targets = targets_for(LARGE)
    set_target_for_ref(ref, targets)
    for _ in range(2):
        targets[0].zero_()
        assert ray.get(ref)[0] is targets[0]
        assert_filled(targets, LARGE)


def test_a_borrowers_targets_are_not_kept_for_ever(producer: Any, consumer: Any) -> None:
    def get_and_drop(peer: Peer, refs: list[Any]) -> None:
        targets = targets_for(LARGE)
        set_target_for_ref(refs[0], targets)
        assert ray.get(refs[0])[0] is targets[0]
        peer.kept["target"] = weakref.ref(targets[0])

    def is_gone(peer: Peer) -> bool:
        gc.collect()
        return peer.kept["target"]() is None

    ref = producer.make.remote(two_tensors, LARGE)
    ray.get(consumer.run.remote(get_and_drop, [ref]))
    assert ray.get(consumer.run.remote(is_gone))


@pytest.mark.parametrize("value", [7, b"raw", "text", {"a": [1]}], ids=repr)
def test_targets_for_an_object_without_tensors(producer: Any, value: Any) -> None:
    for ref in (ray.put(value), producer.make.remote(lambda _, v: v, value)):
        set_target_for_ref(ref, [torch.zeros(3)])
        with pytest.raises(ValueError, match="not an RDT object"):
            ray.get(ref)
        assert ray.get([ref]) == [value]


def test_targets_for_a_plain_object_of_tensors() -> None:
    ref = ray.put(torch.ones(LARGE))
    set_target_for_ref(ref, [torch.zeros(LARGE)])
    with pytest.raises(ValueError, match="not an RDT object"):
        ray.get(ref)


def test_a_failed_tasks_error_comes_before_its_targets(producer: Any) -> None:
    ref = producer.make.remote(lambda _: 1 / 0)
    set_target_for_ref(ref, [torch.zeros(3)])
    with pytest.raises(ZeroDivisionError):
        ray.get(ref)


def test_device_cpu(producer: Any, transport: str) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(two_tensors, LARGE)
    set_target_device_for_ref(ref, "cpu")
    assert_filled(ray.get(ref), LARGE)


def test_what_is_no_device_is_refused_at_once(producer: Any) -> None:
    ref = producer.make.remote(two_tensors, LARGE)
    with pytest.raises(ValueError, match="no_such_device"):
        set_target_device_for_ref(ref, "no_such_device")
    assert_filled(ray.get(ref), LARGE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has that device")
def test_a_device_that_is_not_there_is_the_objects_error(producer: Any) -> None:
    ref = producer.make.remote(two_tensors, LARGE)
    set_target_device_for_ref(ref, "cuda:0")
    with pytest.raises(ray.exceptions.RayError, match=r"(?i)cuda"):
        ray.get(ref)
    set_target_device_for_ref(ref, "cpu")
    assert_filled(ray.get(ref), LARGE)


@SIZES
@pytest.mark.parametrize("view", [torch.conj, torch._neg_view], ids=["conj", "neg"])
def test_targets_that_are_lazy_views(producer: Any, count: int, view: Callable[..., Any]) -> None:
    """Their memory holds other numbers than they show."""

    def make(_: Peer, count: int) -> torch.Tensor:
        return torch.arange(count).to(torch.complex64) * (1 + 2j)

    ref = producer.make.remote(make, count)
    target = view(torch.zeros(count, dtype=torch.complex64))
    assert target.is_conj() or target.is_neg()
    set_target_for_ref(ref, [target])
    assert ray.get(ref) is target
    assert torch.equal(target, make(None, count))  # type: ignore[arg-type]


def test_awaited_objects_whose_targets_do_not_fit(producer: Any) -> None:
    """The error comes to who awaits; a value beside it comes as well."""
    small, plain = producer.make.remote(two_tensors, SMALL), ray.put([torch.ones(2)])

    async def take(ref: Any) -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), 30)

    for ref, expected in ((small, "target"), (plain, "is not an RDT object")):
        set_target_for_ref(ref, [torch.ones(2)])
        with pytest.raises(ValueError, match=expected):
            asyncio.run(take(ref))
    assert_filled(ray.get(small), SMALL)
