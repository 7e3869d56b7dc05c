"""The calls of nixl that the transport uses. No other module imports nixl.

Written for nixl 1.5. The agent is opened differently from nixl's own Python constructor, for two
reasons:

1. Its progress thread. The constructor fixes the thread's delay at 0, and with that it polls
   without a pause: one core is lost in every process that has ever used nixl. With a delay it
   sleeps until UCX has an event, and looks by itself once a delay (UCX loses an event at times).
2. Its locking. Without a listener the constructor turns nixl's own lock off, but nixl releases the
   GIL during a transfer, and RDT calls it from several threads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common.failures import TransferFailed, raise_if_interrupt
from ray.experimental.rdt.common.processes import pid_domain
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.nixl.plan import Batch

if TYPE_CHECKING:
    from ray.experimental.rdt.transports.nixl.plan import Rows

logger = logging.getLogger("ray.rdt")

_PROGRESS_DELAY_US = 10_000

#: Open engines. They are closed, never collected: in a forked child a collected one would wait for
#: a thread that only its parent has.
_open_engines: list[NixlEngine] = []


class NixlError(TransferFailed):
    """An operation of nixl failed; ``peer_lost`` where the connection to the peer broke."""


class NixlMissing(TransportUnavailable, ImportError):
    """The nixl library is not installed in this process's environment."""

    name = "nixl"


def check_installed() -> None:
    """Raise NixlMissing unless nixl can be imported. Does not import it."""
    if importlib.util.find_spec("nixl") is None:
        raise NixlMissing(
            "the nixl library is missing in this process: pip install nixl (or nixl-cu12 / "
            "nixl-cu13 for one CUDA version)"
        )


def open_engine(options: Mapping[str, str] = MappingProxyType({})) -> NixlEngine:
    """Make this process's nixl agent, with options as nixl's ``create_backend`` takes them.

    Raises:
        TransportUnavailable: nixl is missing, not a version that this is written for, or finds no
            backend that works here.
    """
    check_installed()
    try:  # nixl raises exceptions without a common base class
        api = _import_nixl()
        engine = NixlEngine(api, f"rdt-{uuid.uuid4().hex}", options)
    except Exception as error:
        raise_if_interrupt(error)
        raise TransportUnavailable(
            f"nixl cannot be started here ({type(error).__name__}: {error}); RDT is written for "
            "nixl 1.5"
        ) from error
    logger.info("RDT uses nixl with its %s backend in process %d", engine.backend, os.getpid())
    return engine


def choose_backend(plugins: Sequence[str], sysfs: Path = Path("/sys/class")) -> str:
    """Return the nixl backend to use: LIBFABRIC if there are AWS EFA devices, else UCX.

    In a container, EFA devices appear as InfiniBand devices. Their kernel driver identifies them.
    """
    drivers = (os.path.realpath(device / "device/driver") for device in sysfs.glob("infiniband/*"))
    has_efa = any(sysfs.glob("net/efa*")) or any(Path(d).name == "efa" for d in drivers)
    return "LIBFABRIC" if has_efa and "LIBFABRIC" in plugins else "UCX"


def find_reach(sysfs: Path = Path("/sys/class")) -> str:
    """Return an ID of the processes that can read each other, with RDMA if there is a device."""
    return pid_domain() + (" rdma" if has_rdma(sysfs) else "")


def has_rdma(sysfs: Path = Path("/sys/class")) -> bool:
    """Return whether this host has an RDMA device."""
    return any(sysfs.glob("infiniband/*"))


def is_direct(reach: str, other: str) -> bool:
    """Return whether two agents can read each other's memory without the other process."""
    return reach.partition(" ")[0] == other.partition(" ")[0] or has_rdma_both(reach, other)


def has_rdma_both(reach: str, other: str) -> bool:
    """Return whether the hosts of two agents have RDMA devices."""
    return reach.partition(" ")[2] == other.partition(" ")[2] == "rdma"


class NixlEngine:
    """The process's nixl agent. Thread-safe.

    Attributes:
        name: The globally unique name of the agent.
        agent: The agent object of nixl.
        backend: The nixl backend that moves the bytes.
        reach: The place of this process, for ``is_direct``.
    """

    def __init__(self, api: Any, name: str, options: Mapping[str, str]):
        self.name = name
        self.reach = find_reach()
        self._pid = os.getpid()
        with _quiet():
            self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
            self.agent.agent = api.nixlBind.nixlAgent(name, _core_config(api.nixlBind))
            self.backend = choose_backend(self.agent.get_plugin_list())
            self.agent.create_backend(self.backend, dict(options))
        _open_engines.append(self)

    def register(self, kind: str, rows: Rows) -> Any:
        """Register memory; return a handle for ``deregister``. Raises NixlError."""
        with _mapped("cannot register memory"):
            return self.agent.register_memory(rows, kind, [self.backend])

    def deregister(self, handle: Any) -> None:
        """End a registration. Never raises."""
        with _logged("could not deregister memory"):
            self.agent.deregister_memory(handle, [self.backend])

    def describe(self, kind: str, rows: Rows) -> bytes:
        """Describe memory, registered as exactly these rows, for ``attach`` of another agent."""
        with _mapped("cannot describe memory"):
            registered = self.agent.get_reg_descs(rows, kind)
            return bytes(self.agent.get_partial_agent_metadata(registered, True, [self.backend]))

    def attach(self, metadata: bytes) -> None:
        """Load the description of another agent. Raises NixlError."""
        with _mapped("cannot use the peer's memory"):
            self.agent.add_remote_agent(metadata)

    def detach(self, name: str) -> None:
        """Forget another agent and disconnect from it. Never raises."""
        with _logged("could not forget a peer"):
            self.agent.remove_remote_agent(name)

    def post(self, batch: Batch, name: str) -> NixlRead:
        """Start a read from the attached agent ``name``. Raises NixlError."""
        with _mapped("cannot read"):
            handle = self.agent.initialize_xfer(
                "READ",
                self.agent.get_xfer_descs(batch.local, batch.local_kind),
                self.agent.get_xfer_descs(batch.remote, batch.remote_kind),
                name,
            )
        return NixlRead(self.agent, handle)

    def close(self) -> None:
        """End the agent with all its registrations and connections. Idempotent.

        An agent of a parent process is left alone.
        """
        if self in _open_engines and self._pid == os.getpid():
            _open_engines.remove(self)
            del self.agent


class NixlRead:
    """One nixl transfer request in flight. Starts when made."""

    def __init__(self, agent: Any, handle: Any):
        self._agent = agent
        self._handle = handle
        try:
            with _mapped("the read failed"):
                self._state = agent.transfer(handle)
        except NixlError:
            self.release()
            raise

    def is_done(self) -> bool:
        """Make progress; return whether all bytes are in place. Raises NixlError on failure."""
        if self._state == "PROC":
            with _mapped("the read failed"):
                self._state = self._agent.check_xfer_state(self._handle)
        if self._state not in ("PROC", "DONE"):
            raise NixlError("nixl: the read failed; nixl's own log says more")
        return bool(self._state == "DONE")

    def release(self) -> None:
        """End the read in any state. Never raises; idempotent."""
        with _logged("could not end a read"):
            self._handle.release()


def _import_nixl() -> Any:
    """Import nixl's Python API without its changes to the process's logging."""
    raise_exceptions = logging.raiseExceptions
    try:
        return importlib.import_module("nixl._api")
    finally:
        logging.raiseExceptions = raise_exceptions


def _core_config(bind: Any) -> Any:
    config = bind.nixlAgentConfig()
    config.useProgThread = True
    config.pthrDelay = _PROGRESS_DELAY_US
    config.syncMode = bind.NIXL_THREAD_SYNC_STRICT
    config.useListenThread = False
    config.captureTelemetry = False
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress nixl's start message on stdout; RDT logs its own."""
    nixl_logger = logging.getLogger("nixl")
    level = nixl_logger.level
    nixl_logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        nixl_logger.setLevel(level)


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """Turn exceptions of nixl, which have no common base class, into NixlError."""
    try:
        yield
    except Exception as error:
        raise_if_interrupt(error)
        kind = type(error).__name__
        code = "peer_lost" if kind == "nixlRemoteDisconnectError" else ""
        raise NixlError(f"nixl: {what}: {error}", code) from error


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log exceptions of nixl in calls whose failure changes nothing for RDT."""
    try:
        yield
    except Exception as error:
        logger.debug("nixl: %s: %s", what, error)
