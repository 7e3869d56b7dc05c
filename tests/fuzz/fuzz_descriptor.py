"""descriptor.decode: any bytes give a descriptor or a DescriptorError, and encode undoes it."""

import base64
import os
import sys

import atheris

import ray

assert ray  # imported first, so that it is not instrumented as well

with atheris.instrument_imports(include=["ray.experimental.rdt.common.descriptor"]):
    from ray.experimental.rdt.common import descriptor

SEED = descriptor.Descriptor(bytes(16), 1 << 20, bytes(16), "auto", b"address", False)


def seeds() -> list[bytes]:
    packed = base64.b64decode(descriptor.encode(SEED)[len(descriptor.PREFIX) :])
    return [b"\0" + descriptor.encode(SEED), b"\1" + packed, b"\0" + descriptor.PREFIX + b"!,9"]


def check(data: bytes) -> None:
    try:
        found = descriptor.unpack(data[1:]) if data[:1] == b"\1" else descriptor.decode(data[1:])
    except descriptor.DescriptorError:
        return
    assert descriptor.decode(descriptor.encode(found)) == found


def main() -> None:
    folder = os.environ.get("RDT_FUZZ_SEEDS")
    if folder is not None:
        for number, seed in enumerate(seeds()):
            with open(os.path.join(folder, f"seed{number}"), "wb") as file:
                file.write(seed)
        return
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
