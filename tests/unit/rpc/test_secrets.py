"""Secrets stay out of texts, and nothing that an agent's connection brought is unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

import ray.experimental.rdt
from ray.experimental.rdt.common.descriptor import Descriptor, Location
from ray.experimental.rdt.owner.object_directory import Free
from ray.experimental.rdt.producer.tensor_store import TensorStore
from ray.experimental.rdt.serialization.layout import lay_out

KEY = bytes.fromhex("d00dfeedc0ffee00d00dfeedc0ffee00")

#: Where something is unpickled, and how it came there.
UNPICKLING = {
    "serialization/envelope.py": "in the Ray value: the skeleton and the table of its tensors",
    "consumer/user_transfer.py": "in the Ray value: the description of a user-defined transport",
    "transports/user/registered.py": "from Ray's GCS: transports of users, and their notes",
}


def test_keys_are_in_no_repr():
    stored = TensorStore().add(KEY, "id", lay_out([torch.ones(2)]), "auto")
    shown = [
        Descriptor(KEY, 1, bytes(16), "auto", b"address", False),
        Location(b"address", KEY, 1),
        Free(Location(b"address", KEY, 1)),
        stored,
    ]
    for one in shown:
        assert repr(KEY)[2:-1] not in repr(one)
        assert KEY.hex() not in repr(one)


def test_only_what_came_through_ray_is_unpickled():
    package = Path(ray.experimental.rdt.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and is_unpickling(node.func):
                found.add(file.relative_to(package).as_posix())
    assert found == set(UNPICKLING)


def is_unpickling(function: ast.expr) -> bool:
    text = ast.unparse(function)
    module, _, name = text.rpartition(".")
    if name in ("loads", "load"):
        return module != "json"
    return name in ("Unpickler", "eval", "exec", "find_class")
