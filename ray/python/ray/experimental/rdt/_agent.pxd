# Declarations of the native agent (ray/src/ray/rdt/agent.h). Nothing else.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t
from libcpp cimport bool
from libcpp.map cimport map as cpp_map
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "ray/rdt/agent.h" namespace "ray::rdt" nogil:
    ctypedef vector[uint8_t] Bytes

    cdef cppclass ByteView:
        ByteView()
        ByteView(const uint8_t *data, size_t nbytes)

    cdef cppclass Key:
        uint8_t *data()

    cdef enum class Code(uint8_t):
        kOk

    const char *CodeName(Code code)

    cdef cppclass Status:
        Code code
        string text
        bool ok()

    cdef cppclass Span:
        uint64_t address
        uint64_t nbytes

    cdef cppclass Guard:
        uint64_t address
        uint64_t value

    cdef cppclass Settings:
        string bind_ip
        unsigned int lanes
        int copy_threads
        int tcp_streams
        uint64_t pool_bytes
        double connect_timeout_s
        double peer_timeout_s
        bool clear_tcp

    const size_t kLaneCount
    const char *kLaneNames[5]

    cdef cppclass LaneReasons:
        string &operator[](size_t lane)

    cdef cppclass SpanList:
        SpanList()
        SpanList(const vector[Span] &spans) except +
        uint64_t total()

    cdef cppclass Range:
        uint64_t offset
        uint64_t nbytes

    uint64_t Checksum(const SpanList &memory, Range range) except +

    cdef cppclass Completion:
        bool is_settled()
        Status status()
        int EventFd() except +
        bool Wait(double timeout_s) except +

    cdef cppclass NativePull "ray::rdt::Pull"(Completion):
        int lane()
        uint64_t checksum()

    cdef cppclass NativeCall "ray::rdt::Call"(Completion):
        Bytes TakeReply()

    cdef cppclass PullTicket:
        shared_ptr[NativePull] pull

    cdef cppclass CallTicket:
        shared_ptr[NativeCall] call

    cdef cppclass Pool:
        void *Allocate(size_t nbytes) except +
        void *AllocateInFile(size_t nbytes) except +
        void Free(void *memory, size_t nbytes)
        void Trim(double idle_s)

    cdef enum class EventKind "ray::rdt::Event::Kind":
        kReleased "ray::rdt::Event::Kind::kReleased"
        kLog "ray::rdt::Event::Kind::kLog"
        kCall "ray::rdt::Event::Kind::kCall"
        kLost "ray::rdt::Event::Kind::kLost"
        kStopped "ray::rdt::Event::Kind::kStopped"

    cdef cppclass Event:
        EventKind kind
        vector[int64_t] tokens
        string level
        string text
        uint64_t call
        Key agent
        Bytes payload

    cdef enum class Notice "ray::rdt::Notice":
        kOwn "ray::rdt::Notice::kOwn"
        kFree "ray::rdt::Notice::kFree"

    cdef cppclass RegionTable:
        bool Register(
            const Key &key,
            const vector[Span] &spans,
            int64_t token,
            vector[Guard] guards,
            const Pool *frozen_in,
        ) except +
        bool Release(const Key &key)
        size_t CountOwned(const Key &owner)
        size_t ReleaseOwned(const Key &owner)
        vector[Key] Unowned(const vector[Key] &keys)
        size_t ReleaseUnowned(const vector[Key] &keys)

    cdef cppclass NativeAgent "ray::rdt::Agent":
        NativeAgent(string secret, const Settings &settings) except +
        const Bytes &address()
        const Key &id()
        RegionTable &regions()
        void Notify(ByteView address, Notice notice, const Key &key) except +
        PullTicket StartPull(
            ByteView address, const Key &key, const vector[Span] &to, bool with_checksum) except +
        void Cancel(const PullTicket &ticket)
        void RecordPull(const vector[Span] &spans) except +
        CallTicket StartCall(ByteView address, Bytes payload, bool is_idempotent) except +
        CallTicket StartChecksum(ByteView address, const Key &key) except +
        void CancelCall "Cancel"(const CallTicket &ticket)
        void Reply(uint64_t call, Bytes payload, bool is_error)
        vector[Event] NextEvents(double timeout_s)
        const shared_ptr[Pool] &pool()
        LaneReasons Explain(ByteView address) except +
        cpp_map[string, int64_t] Stats()
        void Stop()


cdef extern from "ray/rdt/read_memory.h" namespace "ray::rdt" nogil:
    Status ReadOwnMemory(const SpanList &memory, Range range, void *to) except +
