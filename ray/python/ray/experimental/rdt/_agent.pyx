# cython: language_level=3, embedsignature=True
# distutils: language = c++
"""Python interface of the native agent: converts values, releases the GIL, maps errors.

Every wait runs without the GIL, in slices of at most 250 ms. Between two slices it checks
for signals and for the cancellation of its task: Ray cancels with
``_thread.interrupt_main``, which sets a flag but does not wake a system call.

A forked child has none of the agent's threads. There every method raises ``AgentError``
with code "stopped", and deallocation frees nothing.
"""
import time

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cython.operator cimport dereference as deref
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy
from libcpp.utility cimport move
from posix.unistd cimport getpid

from ray.experimental.rdt.common.cancellation import raise_if_cancelled
from ray.experimental.rdt.common.failures import TransferFailed

include "_agent_convert.pxi"
include "_agent_pull.pxi"


cdef _event(const Event &event):
    if event.kind == EventKind.kReleased:
        return ("released", event.tokens)
    if event.kind == EventKind.kLog:
        return ("log", event.level.decode(), event.text.decode(errors="replace"))
    if event.kind == EventKind.kCall:
        return ("call", event.call, _id(event.agent), _copy_out(event.payload))
    if event.kind == EventKind.kLost:
        return ("lost", _id(event.agent))
    return ("stopped",)


cdef bytes _id(Key agent):
    return PyBytes_FromStringAndSize(<const char *>agent.data(), 16)


@cython.final
cdef class Agent:
    """The native endpoint of this process.

    Runs on: any thread. Only stop, next_events and the waits block, all without the GIL.
    """
    cdef NativeAgent *_native
    cdef int _pid
    cdef readonly bytes address
    cdef readonly bytes agent_id

    def __init__(
        self,
        *,
        bytes secret,
        str bind_ip,
        lanes=frozenset(LANES),
        int copy_threads=2,
        int tcp_streams=4,
        uint64_t pool_bytes=1 << 30,
        double connect_timeout_s=10.0,
        double peer_timeout_s=30.0,
        bool clear_tcp=True,
    ):
        cdef Settings settings
        cdef string key = secret
        if self._native != NULL:
            raise RuntimeError("an Agent can be initialized only once")
        if not secret or copy_threads < 1 or tcp_streams < 1:
            raise ValueError("secret must not be empty, copy_threads and tcp_streams must be positive")
        settings.bind_ip = bind_ip.encode()
        settings.lanes = _lane_bits(lanes)
        settings.copy_threads = copy_threads
        settings.tcp_streams = tcp_streams
        settings.pool_bytes = pool_bytes
        settings.connect_timeout_s = connect_timeout_s
        settings.peer_timeout_s = peer_timeout_s
        settings.clear_tcp = clear_tcp
        self._native = new NativeAgent(key, settings)
        self._pid = getpid()
        self.address = _copy_out(self._native.address())
        self.agent_id = _id(self._native.id())

    def __dealloc__(self):
        if self._native != NULL and self._pid == getpid():
            with nogil:
                del self._native

    def register(
        self, bytes key, addrs, lens, int64_t token, guards=b"", bint is_frozen=False
    ):
        """Serve the memory at addrs under `key`.

        The caller owns the memory. It keeps the memory and the guards alive until
        next_events returns ("released", [.., token, ..]).

        Args:
            key: 16 bytes, not in use.
            addrs, lens: Buffers of uint64, equally long; may be empty.
            token: Returned by next_events when the memory is no longer read.
            guards: A buffer of uint64: addresses of aligned words, each followed by the
                expected value. If a word has another value, pulls fail with the code
                "changed".
            is_frozen: Whether the memory does not change any more. Parts of it that are in
                files then need no copy for consumers of this host.
        """
        _check_process(self._pid)
        cdef vector[Guard] words
        if len(guards):
            words = _guards(guards)
        cdef const Pool *frozen_in = self._native.pool().get() if is_frozen else NULL
        cdef Key native_key = _key(key)
        cdef vector[Span] spans = _spans(addrs, lens)
        cdef bool is_new
        with nogil:
            is_new = self._native.regions().Register(
                native_key, spans, token, words, frozen_in
            )
        if not is_new:
            raise ValueError("the key is already in use")

    def release(self, bytes key):
        """Stop serving `key`; pulls in flight continue. Return False if the key is unknown."""
        _check_process(self._pid)
        return self._native.regions().Release(_key(key))

    def free(self, address, bytes key):
        """Ask the agent at `address` to release `key`.

        Only queues the message, so it does not raise if the peer is unreachable.
        """
        self._notify(address, Notice.kFree, key)

    def own(self, address, bytes key):
        """Tell the agent at `address` that this process owns `key`. Only queues, as free does."""
        self._notify(address, Notice.kOwn, key)

    cdef _notify(self, address, Notice notice, bytes key):
        cdef ByteView where = _view(address)
        cdef Key native_key = _key(key)
        _check_process(self._pid)
        with nogil:
            self._native.Notify(where, notice, native_key)

    def owned(self, bytes agent_id):
        """Return the number of keys of this agent that another process's agent owns."""
        _check_process(self._pid)
        return self._native.regions().CountOwned(_key(agent_id))

    def release_owned(self, bytes agent_id):
        """Release all keys that another agent owns. Return their number."""
        _check_process(self._pid)
        return self._native.regions().ReleaseOwned(_key(agent_id))

    def unowned(self, keys):
        """Return those of the keys that are served here and have no owner."""
        _check_process(self._pid)
        return [_id(key) for key in self._native.regions().Unowned(_keys(keys))]

    def release_unowned(self, keys):
        """Release those of the keys that have no owner. Return their number."""
        _check_process(self._pid)
        return self._native.regions().ReleaseUnowned(_keys(keys))

    def pull(self, address, bytes key, addrs, lens, bint with_checksum=False):
        """Start to fetch `key` from the agent at `address`.

        Args:
            addrs, lens: The destination, as in register. Its pieces may differ from the
                producer's, but the total must be the same.
            with_checksum: Compute the checksum of the received bytes, for Pull.checksum.

        Returns:
            A Pull. The destination must stay alive until it is done.
        """
        cdef Pull pull = Pull.__new__(Pull)
        cdef uint64_t nbytes = 0
        _check_process(self._pid)
        cdef vector[Span] spans = _spans(addrs, lens)
        cdef ByteView where = _view(address)
        cdef Key native_key = _key(key)
        for span in spans:
            nbytes += span.nbytes
        pull.nbytes = nbytes
        with nogil:
            pull._ticket = self._native.StartPull(where, native_key, spans, with_checksum)
        pull._agent = self
        return pull

    def note_pulled(self, addrs, lens):
        """Count a transfer of this memory that another transport made.

        Memory that is transferred often moves to huge pages. Its contents and addresses
        stay the same.

        Args:
            addrs, lens: As in register; the memory may be freed at any time.
        """
        _check_process(self._pid)
        self._native.RecordPull(_spans(addrs, lens))

    def ask_checksum(self, address, bytes key):
        """Request the checksum of `key` from the agent at `address`: a Call.

        The reply has 8 bytes, little-endian. The producer computes the checksum at the
        first request and keeps it.
        """
        cdef Call call = Call.__new__(Call)
        _check_process(self._pid)
        cdef ByteView where = _view(address)
        cdef Key native_key = _key(key)
        with nogil:
            call._ticket = self._native.StartChecksum(where, native_key)
        call._agent = self
        return call

    def call(self, address, payload, bool is_idempotent=False):
        """Send `payload` to the Python side of the agent at `address`: a Call.

        If the connection breaks, an idempotent call is sent again, so it may be served
        twice. Another call then fails with "broken" if the process still runs.
        """
        cdef Call call = Call.__new__(Call)
        _check_process(self._pid)
        cdef ByteView where = _view(address)
        cdef Bytes copied = _copy_in(payload)
        with nogil:
            call._ticket = self._native.StartCall(where, copied, is_idempotent)
        call._agent = self
        return call

    def reply(self, uint64_t call_id, payload, bool is_error=False):
        """Answer a ("call", call_id, ..) event. Ignored if the caller is gone."""
        _check_process(self._pid)
        self._native.Reply(call_id, _copy_in(payload), is_error)

    def next_events(self, timeout_s=None):
        """Wait for events. Return an empty list if there was none within timeout_s.

        Returns:
            A list of ("released", [token, ..]), ("log", level, text),
            ("call", call_id, peer_agent_id, payload), ("lost", peer_agent_id)
            and, as the last event, ("stopped",).
        """
        cdef double deadline = _deadline(timeout_s)
        cdef double left = _SLICE_S
        cdef vector[Event] events
        _check_process(self._pid)
        while True:
            left = _slice_before(deadline)
            with nogil:
                events = self._native.NextEvents(left)
            if not events.empty() or left == 0:
                return [_event(event) for event in events]
            PyErr_CheckSignals()

    def allocate(self, size_t nbytes, bint is_shareable=False):
        """Return a Block of memory from the receive pool, aligned to 64 bytes at least.

        Args:
            nbytes: Bytes of the block.
            is_shareable: Whether a block of 1 MiB or more is in a file of its own, which
                consumers of this host can map (see register).
        """
        cdef Block block = Block.__new__(Block)
        _check_process(self._pid)
        block._pool = self._native.pool()
        block._pid = self._pid
        with nogil:
            if is_shareable:
                block._memory = deref(block._pool).AllocateInFile(nbytes)
            else:
                block._memory = deref(block._pool).Allocate(nbytes)
        block.nbytes = nbytes
        return block

    def explain(self, address):
        """Return for each lane "ok" or the reason why it cannot reach the agent at `address`."""
        _check_process(self._pid)
        cdef ByteView where = _view(address)
        cdef LaneReasons reasons
        with nogil:
            reasons = self._native.Explain(where)
        return {LANES[i]: reasons[i].decode() for i in range(kLaneCount)}

    def stats(self):
        """Return the agent's counters by name."""
        _check_process(self._pid)
        return {name.decode(): value for name, value in dict(self._native.Stats()).items()}

    def trim(self):
        """Return the receive pool's free memory to the system."""
        _check_process(self._pid)
        with nogil:
            deref(self._native.pool()).Trim(0)

    def stop(self):
        """Fail all waiters with "stopped" and join the threads. Idempotent."""
        _check_process(self._pid)
        with nogil:
            self._native.Stop()


def checksum(addrs, lens):
    """Return the checksum of memory of this process, taken as one run of bytes."""
    cdef SpanList memory = SpanList(_spans(addrs, lens))
    cdef uint64_t found = 0
    with nogil:
        found = Checksum(memory, _whole_range(memory))
    return found


def read_memory(addrs, lens, uint64_t to):
    """Copy memory of this process to an address, as one run of bytes.

    The memory may have been freed: then the read fails and the process continues.

    Raises:
        AgentError: "io": some of the memory is not mapped.
    """
    cdef SpanList memory = SpanList(_spans(addrs, lens))
    cdef Status status
    with nogil:
        status = ReadOwnMemory(memory, _whole_range(memory), <void *><uintptr_t>to)
    if not status.ok():
        _raise_status(status)


cdef Range _whole_range(const SpanList &memory) noexcept nogil:
    cdef Range whole
    whole.offset, whole.nbytes = 0, memory.total()
    return whole


cdef unsigned int _lane_bits(lanes) except *:
    cdef unsigned int bits = 0
    for name in lanes:
        if name not in LANES:
            raise ValueError(f"unknown lane {name!r}; the lanes are {', '.join(LANES)}")
        bits |= 1u << <unsigned int>LANES.index(name)
    return bits
