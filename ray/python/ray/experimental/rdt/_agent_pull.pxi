# What an agent gives out: pulls, calls and blocks of memory.

@cython.final
@cython.no_gc  # what `keep` holds must not be taken apart before the pull has ended
cdef class Pull:
    """One fetch under way, made by Agent.pull. Deallocation cancels it.

    Attributes:
        keep: Any object that must outlive the writes to the destination.
        nbytes: Size of the destination.
    """
    cdef PullTicket _ticket
    cdef Agent _agent
    cdef public object keep
    cdef readonly uint64_t nbytes

    def __dealloc__(self):
        if self._agent is not None and self._agent._pid == getpid():
            with nogil:
                self._agent._native.Cancel(self._ticket)

    def wait(self, timeout_s=None):
        """Blocks until the bytes are there.

        Raises:
            TimeoutError: Not within timeout_s; the pull goes on.
            AgentError: The pull failed.
        """
        cdef double deadline = _deadline(timeout_s)
        cdef double left = _SLICE_S
        cdef bool is_settled = False
        _check_process(self._agent._pid)
        while True:
            left = _slice_before(deadline)
            with nogil:
                is_settled = deref(self._ticket.pull).Wait(left)
            if is_settled:
                break
            _look_around()
            if left == 0:
                raise TimeoutError("the pull did not end in time")
        cdef Status status = deref(self._ticket.pull).status()
        if not status.ok():
            _raise_status(status, self.lane)

    def cancel(self):
        """Gives up. When it returns, nobody writes to the destination any more."""
        _check_process(self._agent._pid)
        with nogil:
            self._agent._native.Cancel(self._ticket)

    def fileno(self):
        """A descriptor that is readable once the pull has ended."""
        _check_process(self._agent._pid)
        return deref(self._ticket.pull).EventFd()

    @property
    def done(self):
        _check_process(self._agent._pid)
        return deref(self._ticket.pull).is_settled()

    @property
    def checksum(self):
        """Of what has landed, if Agent.pull was told to find it; whole once done."""
        _check_process(self._agent._pid)
        return deref(self._ticket.pull).checksum()

    @property
    def lane(self):
        _check_process(self._agent._pid)
        cdef int lane = deref(self._ticket.pull).lane()
        return LANES[lane] if lane >= 0 else None


@cython.final
@cython.no_gc_clear
cdef class Call:
    """One request under way, made by Agent.call. Deallocation cancels it."""
    cdef CallTicket _ticket
    cdef Agent _agent

    def __dealloc__(self):
        if self._agent is not None and self._agent._pid == getpid():
            with nogil:
                self._agent._native.CancelCall(self._ticket)

    def wait(self, timeout_s=None):
        """The reply's payload, which can be taken once.

        Raises:
            TimeoutError: None came within timeout_s; the call goes on.
            AgentError: The call failed; "refused" with the payload as text if
                the other side replied with an error.
        """
        cdef double deadline = _deadline(timeout_s)
        cdef double left = _SLICE_S
        cdef bool is_settled = False
        _check_process(self._agent._pid)
        while True:
            left = _slice_before(deadline)
            with nogil:
                is_settled = deref(self._ticket.call).Wait(left)
            if is_settled:
                break
            _look_around()
            if left == 0:
                raise TimeoutError("no reply came in time")
        cdef Status status = deref(self._ticket.call).status()
        if not status.ok():
            _raise_status(status)
        return _copy_out(deref(self._ticket.call).TakeReply())

    def cancel(self):
        _check_process(self._agent._pid)
        with nogil:
            self._agent._native.CancelCall(self._ticket)

    def fileno(self):
        """A descriptor that is readable once the call has ended."""
        _check_process(self._agent._pid)
        return deref(self._ticket.call).EventFd()

    @property
    def done(self):
        _check_process(self._agent._pid)
        return deref(self._ticket.call).is_settled()


@cython.final
cdef class Block:
    """Writable memory from the receive pool; goes back when deallocated."""
    cdef shared_ptr[Pool] _pool
    cdef void *_memory
    cdef int _pid
    cdef readonly size_t nbytes

    def __dealloc__(self):
        # In a forked child the pool's lock may be held by a thread that is not there.
        if self._memory != NULL and self._pid == getpid():
            with nogil:
                deref(self._pool).Free(self._memory, self.nbytes)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self._memory, self.nbytes, 0, flags)

    def __len__(self):
        return self.nbytes

    @property
    def address(self):
        return <uint64_t>self._memory
