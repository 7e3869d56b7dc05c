"""Measure the machine's limits for comparison with the lanes: one GPU, two processes.

Rates count each byte once: a copy of 1 GB in a second is 1 GB/s, whatever their source.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from ci.gpu import result
from ci.gpu.programs import pair

LARGE, SMALL = 256 << 20, 4 << 10
_ROUNDS = 10
_IPC_ROUNDS = 20
_PEER_LIMIT_S = 30.0
_HANDLE_NBYTES = 64


def main(told: result.Result) -> str:
    """Measure each figure; rates are in GB/s, times in microseconds."""
    pair.need_gpus()
    checks: dict[str, Callable[[], Any]] = {
        "device_copy": device_copy,
        "pinned": pinned_copies,
        "pageable": pageable_copies,
        "small": small_copies,
        "registered": registered_memory,
        "ipc": ipc,
    }
    found = told.figures
    try:
        pair.run_all(told, checks)
    finally:
        told.note(table="\n".join(f"{name}: {value}" for name, value in found.items()))
    return (
        f"device {found['device_copy']:.0f}, pinned d2h {found['pinned']['d2h']:.1f} and h2d "
        f"{found['pinned']['h2d']:.1f} GB/s, IPC open {found['ipc']['open_us']:.0f} us"
    )


def device_copy(nbytes: int = 1 << 30) -> float:
    """Measure a copy within the device."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    return rate(lambda: target.copy_(source), nbytes)


def pinned_copies() -> dict[str, float]:
    """Measure each direction, and both at once, which counts the bytes of both."""
    device = [torch.zeros(LARGE, dtype=torch.uint8, device="cuda") for _ in range(2)]
    host = [torch.zeros(LARGE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def there() -> None:
        host[0].copy_(device[0], non_blocking=True)

    def back() -> None:
        device[1].copy_(host[1], non_blocking=True)

    def both() -> None:
        current = torch.cuda.current_stream()
        for stream, copy in zip(streams, (there, back)):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                copy()
        for stream in streams:
            current.wait_stream(stream)

    return {"d2h": rate(there, LARGE), "h2d": rate(back, LARGE), "both": rate(both, 2 * LARGE)}


def pageable_copies() -> dict[str, float]:
    """Measure with host memory that is not pinned."""
    device = torch.zeros(LARGE, dtype=torch.uint8, device="cuda")
    host = torch.zeros(LARGE, dtype=torch.uint8)
    return {
        "d2h": rate(lambda: host.copy_(device), LARGE, 3),
        "h2d": rate(lambda: device.copy_(host), LARGE, 3),
    }


def small_copies() -> dict[str, float]:
    """Measure 4 KiB from the call until this spinning thread sees its completion."""
    device = [torch.zeros(SMALL, dtype=torch.uint8, device="cuda") for _ in range(2)]
    host = torch.zeros(SMALL, dtype=torch.uint8, pin_memory=True)
    return {
        "d2h_us": spin(lambda: host.copy_(device[0], non_blocking=True)),
        "h2d_us": spin(lambda: device[0].copy_(host, non_blocking=True)),
        "d2d_us": spin(lambda: device[1].copy_(device[0])),
        "empty_us": spin(lambda: None),
    }


def registered_memory() -> dict[str, float]:
    """Measure with shared memory that is registered with CUDA."""
    memory = mmap.mmap(-1, LARGE)
    shared = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    device = torch.zeros(LARGE, dtype=torch.uint8, device="cuda")
    runtime = torch.cuda.cudart()
    started = time.perf_counter()
    _check("cudaHostRegister", runtime.cudaHostRegister(shared.data_ptr(), LARGE, 0))
    seconds = time.perf_counter() - started
    try:
        d2h = rate(lambda: shared.copy_(device, non_blocking=True), LARGE)
        h2d = rate(lambda: device.copy_(shared, non_blocking=True), LARGE)
    finally:
        torch.cuda.synchronize()
        _check("cudaHostUnregister", runtime.cudaHostUnregister(shared.data_ptr()))
    return {"register_ms": 1e3 * seconds, "d2h": d2h, "h2d": h2d}


def ipc() -> dict[str, float]:
    """Measure another process that opens, copies and closes this process's memory."""
    from cuda.bindings import driver

    torch.zeros(1, device="cuda")  # creates the context
    (pointer,) = ask(driver.cuMemAlloc, LARGE)
    try:
        ask(driver.cuMemsetD8, pointer, 9, LARGE)
        ask(driver.cuCtxSynchronize)
        get_us = median_us(partial(ask, driver.cuIpcGetMemHandle, pointer), _IPC_ROUNDS)
        (handle,) = ask(driver.cuIpcGetMemHandle, pointer)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        other = context.Process(target=open_and_close, args=(there, handle_bytes(handle)))
        other.start()
        there.close()
        try:
            if not here.poll(_PEER_LIMIT_S):
                raise TimeoutError(f"the other process did not answer within {_PEER_LIMIT_S:g} s")
            found = here.recv()
        finally:
            other.join(5)
            other.kill()
    finally:
        ask(driver.cuMemFree, pointer)
    if isinstance(found, str):
        raise RuntimeError(found)
    return {"get_us": get_us, **found}


def open_and_close(answers: Connection, handle: bytes) -> None:
    """Run the other process of ``ipc``; answer with figures or an error."""
    try:
        answers.send(_open_and_close(handle))
    except Exception as error:
        answers.send(result.describe(error))


def _open_and_close(handle: bytes) -> dict[str, float]:
    from cuda.bindings import driver

    target = torch.zeros(LARGE, dtype=torch.uint8, device="cuda")
    opened = driver.CUipcMemHandle()
    ctypes.memmove(opened.getPtr(), handle, _HANDLE_NBYTES)
    flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
    times: dict[str, list[float]] = {"open_us": [], "copy_us": [], "close_us": []}
    for _ in range(_IPC_ROUNDS):
        started = time.perf_counter()
        (pointer,) = ask(driver.cuIpcOpenMemHandle, opened, flags)
        times["open_us"].append(time.perf_counter() - started)
        started = time.perf_counter()
        ask(driver.cuMemcpyDtoD, target.data_ptr(), pointer, LARGE)
        ask(driver.cuCtxSynchronize)
        times["copy_us"].append(time.perf_counter() - started)
        started = time.perf_counter()
        ask(driver.cuIpcCloseMemHandle, pointer)
        times["close_us"].append(time.perf_counter() - started)
    if pair.wrong_bytes(target, 9):
        raise AssertionError("the read bytes are wrong")
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def handle_bytes(handle: Any) -> bytes:
    """Return a handle for another process; some versions of cuda-bindings lack its attribute."""
    return ctypes.string_at(handle.getPtr(), _HANDLE_NBYTES)


def ask(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Call CUDA's driver; return its results without the status."""
    status, *given = function(*arguments)
    _check(function.__name__, status)
    return tuple(given)


def _check(name: str, status: Any) -> None:
    if int(status) != 0:
        raise RuntimeError(f"{name} failed: {status}")


def rate(copy: Callable[[], Any], nbytes: int, rounds: int = _ROUNDS) -> float:
    """Return GB/s of a copy by the device's clock; median of some rounds."""
    copy()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        copy()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return nbytes / statistics.median(times) / 1e9


def spin(copy: Callable[[], Any]) -> float:
    """Return microseconds until a spinning thread sees the completion of a copy."""
    done = torch.cuda.Event()

    def once() -> None:
        copy()
        done.record()
        while not done.query():
            pass

    return median_us(once, 200)


def median_us(action: Callable[[], Any], rounds: int) -> float:
    """Return microseconds of an action."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


if __name__ == "__main__":
    result.run(main)
