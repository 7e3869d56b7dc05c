"""What every transport must do, whoever wrote it. A new one joins by a name in ``TRANSPORTS``.

The cases themselves are ``ray.experimental.rdt.transports.conformance``, which users have too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ray
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.transports import conformance
from ray.experimental.rdt.transports.conformance import CASES, Case, Stage
from tests.integration import user_transports
from tests.integration.peers import LARGE, Peer, total
from tests.support import needs_nixl

pytestmark = pytest.mark.usefixtures("users_transports")

#: Ours that run without a GPU; a user's in five lines; users' and fakes of RDT's own kind, all of
#: whose steps come late.
TRANSPORTS = ["auto", "gloo", pytest.param("nixl", marks=needs_nixl()), "files"]
LATE = ["shm", "pipe", "fake_reads", "fake_sends"]
STEPS = ("receive", "send", "expose", "read")


@pytest.fixture(params=[*TRANSPORTS, *LATE])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stage(name: str, producer: Any, consumer: Any, third: Any, spawn: Any) -> Any:
    steps = dict.fromkeys(STEPS, "late") if name in LATE else {}

    def spawn_late() -> Any:
        actor = spawn(Peer)
        actor.run.remote(play, steps)
        return actor

    ray.get([each.run.remote(play, steps) for each in (producer, consumer, third)])
    yield Stage(name, producer, consumer, third, spawn_late)
    ray.get([each.run.remote(play, {}) for each in (producer, consumer, third)])


def play(_: Any, steps: dict[str, str]) -> None:
    user_transports.SCRIPT.clear()
    user_transports.SCRIPT.update(steps)


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_conformance(stage: Stage, case: Case) -> None:
    case(stage)


def test_a_put_of_the_drivers(consumer: Any, name: str) -> None:
    ref = ray.put(torch.ones(LARGE), _tensor_transport=name)
    assert ray.get(consumer.run.remote(total, ref)) == LARGE


class Blanks(user_transports.FilesTransport):
    """Of a user's who has still to find out what is wrong with it."""

    def recv_multiple_tensors(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [torch.zeros_like(each) for each in super().recv_multiple_tensors(*args, **kwargs)]


def test_a_transport_that_does_not_conform_is_told(
    local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    register_tensor_transport("blanks", ["cpu"], Blanks, torch.Tensor)
    with pytest.raises(AssertionError, match=r"'blanks' fails in round_trip$"):
        conformance.check("blanks", [conformance.zero_tensors, conformance.round_trip])
    assert "blanks: zero_tensors: passed" in capsys.readouterr().out
