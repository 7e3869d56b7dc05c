"""Several drivers of one cluster: they share objects, and detached actors outlive them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from tests.integration.peers import LARGE, ones, total_of_refs
from tests.support import run_program, wait_until

#: What the second driver begins with: the cluster's address, a namespace, and its working folder.
CONNECT = """
import os, sys
import ray
address, namespace, folder = sys.argv[1:]
environment = {"working_dir": folder, "env_vars": {"MINE": "yes"}}
ray.init(address=address, namespace=namespace, runtime_env=environment, log_to_driver=False)
from tests.integration.peers import Peer, ones, total, total_of_refs
"""

SECOND = (
    CONNECT
    + """
def make_mine(peer):
    import mine
    assert os.environ["MINE"] == "yes"
    return mine.make()

peer = ray.get_actor("shared peer")
(ref,) = ray.get(peer.run.remote(lambda peer: peer.kept["refs"]))
print("borrowed", total(None, ray.get(ref)))
print("made there", total(None, ray.get(peer.make.remote(ones))))
print("put", ray.get(peer.run.remote(total, ray.put(ones(None), _tensor_transport="gloo"))))
own = Peer.remote()
print("own", ray.get(peer.run.remote(total, own.make.remote(make_mine))))
print("own takes", ray.get(own.run.remote(total, ref)))
task = ray.remote(tensor_transport="auto")(make_mine)
print("task", ray.get(peer.run.remote(total, task.remote(None))))
"""
)

FIRST = (
    CONNECT
    + """
def call(peer, other):
    refs = [other.make.remote(ones), ray.put(ones(peer), _tensor_transport="auto")]
    ray.wait(refs, num_returns=2)
    peer.kept["refs"] = refs

one, two = (Peer.options(lifetime="detached", name=name).remote() for name in ("one", "two"))
ray.get(one.run.remote(call, two))
ref = two.make.remote(ones)
print("taken", ray.get(one.run.remote(total, ref)))
"""
)


def run_second(source: str, folder: Path) -> list[str]:
    """Runs a driver of the same cluster and namespace; returns the lines that it printed."""
    work, program = folder / "work", folder / "second.py"
    work.mkdir()
    (work / "mine.py").write_text(f"import torch\nmake = lambda: torch.ones({LARGE})\n")
    program.write_text(source)
    context = ray.get_runtime_context()
    return run_program(
        [program, context.gcs_address, context.namespace, str(work)], folder
    ).splitlines()


def stored(actor: Any) -> int:
    return int(ray.get(actor.stats.remote())["stored_objects"])


def test_second_driver_with_an_environment_of_its_own(
    spawn: Any, producer: Any, tmp_path: Path
) -> None:
    shared = spawn(name="shared peer")
    refs = [producer.make.remote(ones)]
    ray.get(shared.run.remote(lambda peer, refs: peer.kept.update(refs=refs), refs))
    printed = run_second(SECOND, tmp_path)
    for what in ("borrowed", "made there", "put", "own", "own takes", "task"):
        assert f"{what} {float(LARGE)}" in printed, printed
    wait_until(lambda: stored(shared) == 0, "what was made for the second driver is freed")
    assert ray.get(shared.run.remote(total_of_refs, refs)) == LARGE


def test_detached_actors_after_their_driver(producer: Any, tmp_path: Path) -> None:
    printed = run_second(FIRST, tmp_path)
    assert f"taken {float(LARGE)}" in printed, printed
    one, two = ray.get_actor("one"), ray.get_actor("two")
    wait_until(lambda: stored(two) == 1, "the driver's own object is freed")
    refs = ray.get(one.run.remote(lambda peer: peer.kept["refs"]))
    assert total_of_refs(None, refs) == 2 * LARGE
    assert ray.get(producer.run.remote(total_of_refs, refs)) == 2 * LARGE
    assert ray.get(one.run.remote(lambda _, tensor: len(tensor), two.make.remote(ones))) == LARGE
    del refs
    ray.get(one.run.remote(lambda peer: peer.kept.clear()))
    for actor in (one, two):
        wait_until(lambda actor=actor: stored(actor) == 0, "all is freed")
        ray.kill(actor)
