"""Transports as users write them, against nothing but Ray's public classes.

``CALLS`` and ``SCRIPT`` are each process's own: what was called there, and what is to go wrong.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch

import ray
from ray.experimental import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)

CALLS: Counter[str] = Counter()
SCRIPT: dict[str, str] = {}


def play(step: str) -> None:
    """Does what the script says about a step."""
    CALLS[step] += 1
    if SCRIPT.get(step) == "raise":
        raise OSError(f"scripted to fail in {step}")
    if SCRIPT.get(step) == "late":
        time.sleep(0.02)
    if SCRIPT.get(step) == "hang once":
        del SCRIPT[step]
        threading.Event().wait()
    if SCRIPT.get(step) == "hang":
        threading.Event().wait()
    if SCRIPT.get(step) == "die":
        os._exit(1)


@dataclass
class ShmMetadata(TensorTransportMetadata):
    name: str = ""
    nbytes: int = 0


class ShmTransport(TensorTransportManager):
    """One-sided: through a shared memory segment."""

    def __init__(self) -> None:
        self._held: dict[str, SharedMemory] = {}

    def tensor_transport_backend(self) -> str:
        return "shm"

    @staticmethod
    def is_one_sided() -> bool:
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        return SCRIPT.get("has") != "no"

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[Any]
    ) -> TensorTransportMetadata:
        play("extract")
        data = pickle.dumps(rdt_object)
        self._held[obj_id] = segment = SharedMemory(create=True, size=len(data))
        segment.buf[: len(data)] = data
        shapes = [(each.shape, each.dtype) for each in rdt_object]
        device = "cuda" if SCRIPT.get("extract") == "elsewhere" else "cpu"
        return ShmMetadata(shapes, device, segment.name, len(data))

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        play("receive")
        assert isinstance(tensor_transport_metadata, ShmMetadata)
        segment = SharedMemory(name=tensor_transport_metadata.name)
        received: list[Any] = pickle.loads(bytes(segment.buf[: tensor_transport_metadata.nbytes]))
        segment.close()
        if SCRIPT.get("receive") == "lose":
            received.pop()
        if SCRIPT.get("receive") == "mistake":
            received = [each[..., :1] for each in received]
        if SCRIPT.get("receive") == "spoil":
            received[0].view(-1)[0] += 1
        for target, tensor in zip(target_buffers or [], received):
            CALLS["into target"] += 1
            target.copy_(tensor)
        return target_buffers or received

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]
    ) -> None:
        segment = self._held.pop(obj_id)
        segment.close()
        segment.unlink()
        play("collect")


class FilesTransport(TensorTransportManager):
    """The one of doc/user_transports.md."""

    def tensor_transport_backend(self) -> str:
        return "files"

    @staticmethod
    def is_one_sided() -> bool:
        return True

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[Any]
    ) -> TensorTransportMetadata:
        torch.save(rdt_object, f"/dev/shm/{obj_id}")
        return TensorTransportMetadata([(each.shape, each.dtype) for each in rdt_object], "cpu")

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        received: list[Any] = torch.load(f"/dev/shm/{obj_id}")
        return received

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]
    ) -> None:
        os.unlink(f"/dev/shm/{obj_id}")


class AlphaTransport(ShmTransport):
    """Asks an actor by a call, as transports written for Ray's alpha do."""

    def __init__(self) -> None:
        play("init")
        super().__init__()

    def tensor_transport_backend(self) -> str:
        return "alpha"

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        play("has")

        def check(instance: Any) -> bool:
            return hasattr(instance, "kept")

        call = actor.__ray_call__.options(concurrency_group="_ray_system")
        return bool(ray.get(call.remote(check)))

    def get_communicator_metadata(
        self, src_actor: Any, dst_actor: Any, backend: str | None = None
    ) -> CommunicatorMetadata:
        play("communicator")
        return CommunicatorMetadata()


class OtherShmTransport(ShmTransport):
    """Another one, to be registered under a name that is taken."""


@dataclass
class PipeCommunicator(CommunicatorMetadata):
    path: str = ""


class PipeTransport(TensorTransportManager):
    """Two-sided: through a named pipe for each transfer, which only the communicator names."""

    def tensor_transport_backend(self) -> str:
        return "pipe"

    @staticmethod
    def is_one_sided() -> bool:
        return False

    @staticmethod
    def can_abort_transport() -> bool:
        return True

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[Any]
    ) -> TensorTransportMetadata:
        return TensorTransportMetadata([(each.shape, each.dtype) for each in rdt_object], "cpu")

    def get_communicator_metadata(
        self, src_actor: Any, dst_actor: Any, backend: str | None = None
    ) -> CommunicatorMetadata:
        CALLS[f"from {_name(src_actor)} to {_name(dst_actor)}"] += 1
        path = os.path.join(tempfile.mkdtemp(prefix="rdt-"), "pipe")
        os.mkfifo(path)
        return PipeCommunicator(path)

    def send_multiple_tensors(
        self,
        tensors: list[Any],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        play("send")
        with open(communicator_metadata.path, "wb") as pipe:  # type: ignore[attr-defined]
            pickle.dump(tensors, pipe)

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        path = communicator_metadata.path  # type: ignore[attr-defined]
        play("receive")
        try:
            with open(path, "rb") as pipe:
                received: list[Any] = pickle.load(pipe)
        finally:
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
        return received

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        CALLS["abort"] += 1
        # Whoever waits for the other end to be opened gets it, and its end at once.
        with suppress(FileNotFoundError):
            os.close(os.open(communicator_metadata.path, os.O_RDWR))  # type: ignore[attr-defined]


def _name(actor: Any) -> str:
    return "none" if actor is None else str(actor._actor_id.hex())
