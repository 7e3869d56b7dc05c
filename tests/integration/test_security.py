"""The cluster's secret and the objects' keys are in no log, no command line and no environment.

With TLS on, nothing of RDT's goes in the clear.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

import ray
from ray.experimental.rdt import explain
from ray.experimental.rdt.common import descriptor
from tests.integration.peers import LARGE, ones, pulls, total
from tests.support import START, run_driver


def shapes(secret: bytes) -> list[bytes]:
    """How bytes are most often written."""
    return [secret, secret.hex().encode(), base64.b64encode(secret), repr(secret)[2:-1].encode()]


def test_no_secret_is_written_anywhere(tmp_path: Path) -> None:
    """A session whose loggers say everything, with an error for good measure."""
    run_driver(
        START
        + """
from tests.integration.test_security import look_everywhere

os.environ["RAY_BACKEND_LOG_LEVEL"] = "debug"
start()
look_everywhere()
""",
        tmp_path,
    )


def look_everywhere() -> None:
    """Runs on: the driver of a session of its own."""
    import logging

    from ray.experimental import internal_kv
    from ray.experimental.rdt.rpc import session as rdt_session
    from tests.integration.peers import Peer

    def talk(peer: Any) -> None:
        logging.basicConfig(level=logging.DEBUG)
        logging.getLogger("ray.rdt").setLevel(logging.DEBUG)

    logging.getLogger("ray.rdt").setLevel(logging.DEBUG)
    logging.getLogger("ray.rdt").addHandler(logging.FileHandler("driver.log"))
    maker, taker = Peer.remote(), Peer.remote()
    ray.get([maker.run.remote(talk), taker.run.remote(talk)])
    ref = maker.make.remote(ones)
    assert ray.get(taker.run.remote(total, ref)) == LARGE
    worker = ray._private.worker.global_worker
    ((_, metadata, _),) = worker.core_worker.get_objects([ref], -1)
    key = descriptor.decode(metadata).key
    lost = Peer.remote()
    gone = lost.make.remote(ones)
    ray.wait([gone])
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(lost.run.remote(lambda _: os._exit(1)))
    try:
        ray.get(gone)
    except ray.exceptions.RayError as error:
        Path("error.log").write_text(f"{error!r} {error}")
    secret = internal_kv._internal_kv_get(b"secret", namespace=rdt_session.KV_NAMESPACE)
    assert len(secret) == 32
    logs = Path(worker.node.get_session_dir_path(), "logs")
    files = [file for file in logs.rglob("*") if file.is_file()]
    files += [Path("driver.log"), Path("error.log")]
    pids = [os.getpid(), *ray.get([maker.pid.remote(), taker.pid.remote()])]
    files += [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
    wanted = shapes(secret) + shapes(key)
    said = 0
    for file in files:
        content = file.read_bytes()
        said += b"RDT with" in content
        assert not any(shape in content for shape in wanted), file
    assert said, "no log has a line of RDT's: nothing was looked at"
    for file in Path("/dev/shm").glob("*rdt*"):
        with contextlib.suppress(FileNotFoundError):  # another test's, which has ended
            assert not stat.S_IMODE(file.stat().st_mode) & 0o077, file


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """What turns Ray's TLS on, with a certificate for this machine."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    names = f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{ray.util.get_node_ip_address()}"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    make += ["-subj", "/CN=ray", "-addext", names, "-keyout", key, "-out", certificate]
    subprocess.run(make, check=True, capture_output=True)
    return {
        "RAY_USE_TLS": "1",
        "RAY_RDT_STRICT_TRANSPORT": "0",
        "RAY_TLS_SERVER_CERT": certificate,
        "RAY_TLS_SERVER_KEY": key,
        "RAY_TLS_CA_CERT": certificate,
    }


def test_a_cluster_with_tls(tmp_path: Path, tls: dict[str, str]) -> None:
    run_driver(
        START
        + """
from tests.integration.test_security import stay_on_the_host

start()
stay_on_the_host()
""",
        tmp_path,
        environment=tls,
    )


def stay_on_the_host() -> None:
    """Runs on: the driver of a session with TLS."""
    from tests.integration.peers import Peer

    maker, taker = Peer.remote(), Peer.remote()
    for transport in ("auto", "gloo", "nixl"):
        ref = maker.make.options(tensor_transport=transport).remote(ones)
        assert ray.get(taker.run.remote(total, ref)) == LARGE
        told = explain((maker, taker), transport=transport)
        reasons = {way.name: way.reason for way in told.ways["cpu"]}
        assert told.used() == "cma"
        assert "TLS" in reasons["tcp"]
        assert transport == "auto" or "TLS" in reasons[transport]
    assert pulls(taker) == {"map": 0, "cma": 3, "shm": 0, "tcp": 0}
