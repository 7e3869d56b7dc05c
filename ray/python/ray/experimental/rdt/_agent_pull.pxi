# Objects that an agent returns: pulls, calls and blocks of memory.

@cython.final
@cython.no_gc  # the collector must not clear `keep` before the pull has ended
cdef class Pull:
    """One fetch in flight, created by Agent.pull. Deallocation cancels it.

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
        """Wait for the pull to complete.

        Raises:
            TimeoutError: It did not complete within timeout_s. The pull continues.
            AgentError: The pull failed.
        """
        _check_process(self._agent._pid)
        _wait(self._ticket.pull.get(), timeout_s, "the pull did not complete within the timeout")
        cdef Status status = deref(self._ticket.pull).status()
        if not status.ok():
            _raise_status(status, self.lane)

    def cancel(self):
        """Cancel the pull. Once this returns, the destination is no longer written to."""
        _check_process(self._agent._pid)
        with nogil:
            self._agent._native.Cancel(self._ticket)

    def fileno(self):
        """Return a descriptor that becomes readable when the pull ends."""
        _check_process(self._agent._pid)
        return deref(self._ticket.pull).EventFd()

    @property
    def done(self):
        _check_process(self._agent._pid)
        return deref(self._ticket.pull).is_settled()

    @property
    def checksum(self):
        """The checksum of the received bytes, if Agent.pull was told to compute it."""
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
    """One request in flight, created by Agent.call. Deallocation cancels it."""
    cdef CallTicket _ticket
    cdef Agent _agent

    def __dealloc__(self):
        if self._agent is not None and self._agent._pid == getpid():
            with nogil:
                self._agent._native.CancelCall(self._ticket)

    def wait(self, timeout_s=None):
        """Wait for the reply and return its payload. It can be taken once.

        Raises:
            TimeoutError: There was no reply within timeout_s. The call continues.
            AgentError: The call failed; "refused" with the payload as text if
                the other side replied with an error.
        """
        _check_process(self._agent._pid)
        _wait(self._ticket.call.get(), timeout_s, "there was no reply within the timeout")
        cdef Status status = deref(self._ticket.call).status()
        if not status.ok():
            _raise_status(status)
        return _copy_out(deref(self._ticket.call).TakeReply())

    def cancel(self):
        _check_process(self._agent._pid)
        with nogil:
            self._agent._native.CancelCall(self._ticket)

    def fileno(self):
        """Return a descriptor that becomes readable when the call ends."""
        _check_process(self._agent._pid)
        return deref(self._ticket.call).EventFd()

    @property
    def done(self):
        _check_process(self._agent._pid)
        return deref(self._ticket.call).is_settled()


@cython.final
cdef class Block:
    """Writable memory from the receive pool. Deallocation returns it to the pool."""
    cdef shared_ptr[Pool] _pool
    cdef void *_memory
    cdef int _pid
    cdef readonly size_t nbytes

    def __dealloc__(self):
        # In a forked child the pool's lock may be held by a thread that does not exist.
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
