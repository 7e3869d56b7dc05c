# Errors, conversions between Python and C++ values, and interruptible waits.

#: Seconds of a wait between two checks for signals and cancellation.
cdef double _SLICE_S = 0.25

LANES = tuple(kLaneNames[i].decode() for i in range(kLaneCount))


class AgentError(TransferFailed):
    """An error of the agent.

    Attributes:
        code: "not_found", "unreachable", "auth", "version", "size_mismatch",
            "cancelled", "peer_lost", "refused", "io", "stopped", "broken" or "changed".
        lane: The lane of the failed pull, None if none was selected yet.
    """

    def __init__(self, code, text, lane=None):
        super().__init__(text, code)
        self.args = (code, text, lane)
        self.lane = lane

    def __str__(self):
        return self.args[1]


cdef _raise_status(Status status, lane=None):
    raise AgentError(CodeName(status.code).decode(), status.text.decode(errors="replace"), lane)


cdef _check_process(int pid):
    if pid != getpid():
        raise AgentError("stopped", "a forked process cannot use the RDT agent of its parent")


cdef Key _key(bytes key) except *:
    cdef Key result
    if len(key) != 16:
        raise ValueError(f"a key must have 16 bytes, not {len(key)}")
    memcpy(result.data(), <const char *>key, 16)
    return result


cdef vector[Key] _keys(keys) except *:
    cdef vector[Key] result
    for key in keys:
        result.push_back(_key(key))
    return result


cdef ByteView _view(const uint8_t[::1] data):
    if data.shape[0] == 0:
        return ByteView()
    return ByteView(&data[0], data.shape[0])


cdef Bytes _copy_in(const uint8_t[::1] data):
    cdef Bytes result
    if data.shape[0] > 0:
        result.assign(&data[0], &data[0] + data.shape[0])
    return result


cdef bytes _copy_out(const Bytes &data):
    return PyBytes_FromStringAndSize(<const char *>data.data(), data.size())


cdef vector[Span] _spans(const uint64_t[::1] addrs, const uint64_t[::1] lens) except *:
    cdef vector[Span] spans
    cdef Py_ssize_t i
    if addrs.shape[0] != lens.shape[0]:
        raise ValueError("addrs and lens differ in length")
    spans.resize(addrs.shape[0])
    for i in range(addrs.shape[0]):
        spans[i].address = addrs[i]
        spans[i].nbytes = lens[i]
    return spans


cdef vector[Guard] _guards(const uint64_t[::1] words) except *:
    cdef vector[Guard] guards
    cdef size_t i
    if words.shape[0] % 2:
        raise ValueError("guards must be pairs of an address and a value")
    guards.resize(words.shape[0] // 2)
    for i in range(guards.size()):
        guards[i].address = words[2 * i]
        guards[i].value = words[2 * i + 1]
    return guards


cdef double _deadline(timeout_s):
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s


cdef double _slice_before(double deadline):
    """Return the seconds to wait now, 0 once the deadline has passed."""
    return max(0.0, min(_SLICE_S, deadline - time.monotonic()))


cdef _wait(Completion *request, timeout_s, str timeout_text):
    """Wait until the request has settled. Raise TimeoutError after timeout_s."""
    cdef double deadline = _deadline(timeout_s)
    cdef double left = _SLICE_S
    cdef bool is_settled = False
    while True:
        left = _slice_before(deadline)
        with nogil:
            is_settled = request.Wait(left)
        if is_settled:
            return
        PyErr_CheckSignals()
        raise_if_cancelled()
        if left == 0:
            raise TimeoutError(timeout_text)
