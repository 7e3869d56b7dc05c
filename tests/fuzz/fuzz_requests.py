"""Requests of peers: whatever the bytes, the session answers, with an error at worst.

A whole session without Ray, with the handlers of a producer and of hints, and one object whose key
is in no input.
"""

import logging
import os
import sys

import atheris

import ray

assert ray  # imported first, so that it is not instrumented as well

with atheris.instrument_imports(
    include=[
        "ray.experimental.rdt.rpc.protocol",
        "ray.experimental.rdt.rpc.session",
        "ray.experimental.rdt.producer.transport_server",
        "ray.experimental.rdt.consumer.prefetcher",
        "ray.experimental.rdt.producer.streams",
    ]
):
    from ray.experimental.rdt.consumer.prefetcher import Prefetcher
    from ray.experimental.rdt.owner.streams import TakenStreams
    from ray.experimental.rdt.producer.streams import ProducedStreams
    from ray.experimental.rdt.producer.tensor_store import TensorStore
    from ray.experimental.rdt.producer.transport_server import Server
    from ray.experimental.rdt.rpc import protocol
    from ray.experimental.rdt.rpc.session import Session
    from ray.experimental.rdt.transports.registry import Transports
    from ray.experimental.rdt.transports.selection import AutoTransportPolicy

PEER = bytes(16)
KEY = bytes(16)


class Replies:
    """A wrapper of the agent that checks that each request has one answer."""

    def __init__(self, agent):
        self._agent = agent
        self.answers = []

    def __getattr__(self, name):
        return getattr(self._agent, name)

    def reply(self, call_id, payload, is_error=False):
        self.answers.append(protocol.decode_answer(payload))


def make_session():
    logging.disable(logging.CRITICAL)
    session = Session(b"secret", "127.0.0.1")
    session.agent = Replies(session.agent)
    transports, produced = Transports(session), ProducedStreams(session)
    Server(session, TensorStore(), transports, produced)
    Prefetcher(session, AutoTransportPolicy(session))
    TakenStreams(session)
    return session


def seeds():
    pull = {"key": KEY, "transport": "staged", "device": "cpu", "route": {}, "timeout_s": 1}
    bodies = {
        protocol.SEND: pull | {"transport": "gloo"},
        protocol.EXPOSE: pull,
        protocol.DONE: {"key": KEY},
        protocol.HINT: {"key": KEY, "address": b"AAAA", "regions": [1, 2]},
        protocol.STREAM_OPEN: {"stream": "s", "address": b"0"},
        protocol.STREAM_CLOSE: {"stream": "s"},
    }
    return [protocol.encode_request(op, body) for op, body in bodies.items()]


#: Of each field of a request, what is right; the others are wrong in some way.
FIELDS = {
    "key": KEY,
    "transport": "staged",
    "device": "cpu",
    "route": {},
    "timeout_s": 1,
    "address": b"AAAA",
    "regions": [1, 2],
    "stream": "s",
}
OPS = [
    protocol.SEND,
    protocol.EXPOSE,
    protocol.DONE,
    protocol.HINT,
    protocol.STREAM_OPEN,
    protocol.STREAM_CLOSE,
]


def make_value(data, right):
    text = data.ConsumeUnicode(data.ConsumeIntInRange(0, 40))
    number = data.ConsumeInt(8)
    wrong = [text, number, data.ConsumeFloat(), None, [], [number, text], {text: number}, [right]]
    return data.PickValueInList([right, right, right, *wrong])


def make_request(data):
    """A request whose fields are right, wrong or missing."""
    body = {
        name: make_value(data, right)
        for name, right in FIELDS.items()
        if data.ConsumeIntInRange(0, 9)
    }
    return protocol.encode_request(data.PickValueInList(OPS), body)


def main():
    folder = os.environ.get("RDT_FUZZ_SEEDS")
    if folder is not None:
        for number, seed in enumerate(seeds()):
            with open(os.path.join(folder, f"seed{number}"), "wb") as file:
                file.write(seed)
        return
    session = make_session()

    def check(data):
        session.agent.answers.clear()
        is_made = not data.startswith(b"rdt.")
        payload = make_request(atheris.FuzzedDataProvider(data)) if is_made else data
        session._answer(1, PEER, payload)
        (answer,) = session.agent.answers
        assert ("body" in answer) != ("error" in answer)

    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
