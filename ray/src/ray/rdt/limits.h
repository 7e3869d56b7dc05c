// Every limit of the agent that is not a setting: its value, its unit and its reason.
//
// A plain number is in the unit that the name or the comment states. The checksum's block
// (checksum.h) is missing here: it is part of the protocol.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace ray::rdt::limits {

inline constexpr uint64_t kKiB = 1 << 10;
inline constexpr uint64_t kMiB = 1 << 20;

// ---- frames ----

// Payload bytes of a frame. Bounds the memory that one peer can make this process take.
inline constexpr uint64_t kMaxFrame = 64 * kMiB;
// The same before the peer is authenticated. Handshake messages are smaller.
inline constexpr uint64_t kMaxFrameBeforeAuth = 512;
// Descriptors that were received and not taken yet: a frame carries one at most.
inline constexpr size_t kMaxAttachedFds = 16;
// Bytes of a call or reply. A reply's first byte tells whether it is an error.
inline constexpr uint64_t kMaxCallPayload = kMaxFrame - 1;

// ---- connections ----

// Unauthenticated connections at one listener, after which the oldest is dropped. An
// honest client authenticates in milliseconds and retries if it is dropped. Each listener
// has its own limit, so a flood over TCP does not affect the processes of this host.
inline constexpr size_t kMaxUnauthenticated = 64;
// Seconds for a client to authenticate. A network round trip takes far less.
inline constexpr double kHandshakeTimeoutS = 5.0;
// Seconds without accepting after descriptors or memory ran out: a waiting connection
// keeps the listener ready, so an immediate retry would use a whole CPU.
inline constexpr double kAcceptPauseS = 0.1;
// Entries of a listener's backlog. The kernel lowers it to its own limit.
inline constexpr int kListenBacklog = 4096;
// Seconds until the next attempt to connect, doubled after each failed handshake: the
// system does not tell when descriptors or a place in a backlog become free.
inline constexpr double kConnectRetryS = 0.01;
// Handshakes of one attempt to connect. With the doubled delays they take over a second:
// by then a flood at the peer's listener has timed out or passed.
inline constexpr int kMaxHandshakes = 8;
// TCP keepalive probes that go unanswered before the connection is closed. The interval
// follows from the setting peer_timeout_s.
inline constexpr int kKeepaliveProbes = 3;
// Descriptors from this number on stay open in forked children (fd.cc).
inline constexpr int kMaxTrackedFd = 1 << 16;

// ---- retries ----

// Times that a pull or call is sent. A pull starts again at 2 when bytes have arrived.
inline constexpr int kMaxTries = 5;
// Data connections of the tcp lane that break in a row with no bytes in between.
inline constexpr int kMaxStreamBreaks = 3;

// ---- notices ----

// Time between two sends. Of a burst the first notice is sent at once and the rest
// together: each frame wakes threads at both sides.
inline constexpr std::chrono::milliseconds kNoticeInterval{5};
// Time between two attempts to reach a peer for which only notices are queued.
inline constexpr std::chrono::seconds kNoticeRetryInterval{5};
// Time after which the notices for an unreachable peer are dropped. It may only be cut
// off, and would keep objects that are no longer needed.
inline constexpr std::chrono::seconds kNoticesKept{600};

// ---- threads ----

// Seconds between two checks for silent peers and idle memory.
inline constexpr double kTickS = 1.0;
// Bytes that one turn moves over a data connection, so that connections on one thread
// share it evenly.
inline constexpr uint64_t kStreamBytesPerTurn = 1 * kMiB;
// Reads of a control connection in one turn, so that a busy peer does not delay others.
inline constexpr int kReadsPerTurn = 8;
// Bytes that a control connection reads at once, unless a larger frame is under way.
inline constexpr size_t kReadBytes = 64 * kKiB;
// Bytes of an empty input buffer that is kept for the next frame.
inline constexpr size_t kMaxKeptInput = 1 * kMiB;
// Bytes that a data connection discards at once, for a pull that has ended.
inline constexpr size_t kDiscardBytes = 64 * kKiB;
// Bytes of requests that a data connection reads at once: about 25 of them.
inline constexpr size_t kRequestBytes = 1 * kKiB;

// ---- pulls ----

// Bytes of a chunk. A larger one delays other work on the copy thread, a smaller one
// costs more system calls.
inline constexpr uint64_t kMaxChunk = 4 * kMiB;
inline constexpr uint64_t kMinChunk = 256 * kKiB;
// Bytes that the calling thread copies itself: to wake a copy thread takes longer.
inline constexpr uint64_t kMaxInlineCopy = 64 * kKiB;
// Bytes of an object that a consumer wants within the grant: on every lane that takes
// less time than starting the lane.
inline constexpr uint64_t kMaxAttached = 64 * kKiB;
// The largest value of that limit that a producer accepts from a consumer.
inline constexpr uint64_t kMaxAttachedAccepted = 1 * kMiB;

// ---- shm lane ----

// Bytes of a slot, and slots of a ring: both sides can copy while frames travel.
inline constexpr uint64_t kSlotBytes = 1 * kMiB;
inline constexpr size_t kSlots = 8;
// Bytes of a ring that a producer accepts. Bounds what a consumer can make it write.
inline constexpr uint64_t kMaxRing = 64 * kMiB;

// ---- map lane ----

// Bytes of a page. Files are mapped and aligned in pages.
inline constexpr uint64_t kPage = 4 * kKiB;
// Sizes of objects for which consumers are counted. Beyond it all counts are dropped.
inline constexpr size_t kMaxFanOuts = 256;
// Objects with one consumer, after many with several, until objects are no longer shared.
inline constexpr int kMaxFanOutScore = 256;
// Files in use, and files kept for the next objects. Each is a descriptor of the
// producer.
inline constexpr size_t kMaxFiles = 256;
// Files of one object. The memory in further files is copied.
inline constexpr size_t kMaxFilesOfObject = 16;
// Pages that are checked for writes by one system call.
inline constexpr size_t kPagesAtOnce = 4096;

// ---- tcp lane ----

// Chunks that a stream requests ahead: one arrives while the next request travels.
inline constexpr size_t kReadsAhead = 2;
// Requests that a producer queues for one stream; more are a protocol error.
inline constexpr size_t kMaxQueuedReads = 64;

// ---- receive pool ----

// Bytes from which a block has its own mapping, aligned for huge pages.
inline constexpr size_t kMinMappedBlock = 1 * kMiB;
// Size classes in each doubling: a mapped block is at most 1/32 larger than requested.
inline constexpr size_t kClassesPerDoubling = 32;
// Seconds after which an unused block is returned to the system.
inline constexpr double kPoolIdleS = 10.0;

// ---- huge pages ----

// Pulls of a span before it is collapsed into huge pages, and again after each doubling:
// pages in use at that moment are left out.
inline constexpr unsigned kPullsBeforeCollapse = 3;
// Bytes of the smallest span that is collapsed. Smaller ones gain less than it costs.
inline constexpr uint64_t kMinCollapsedSpan = 16 * kMiB;
// Bytes collapsed in one turn of a copy thread: a few milliseconds.
inline constexpr uint64_t kCollapseBytesPerTurn = 8 * kMiB;
// Spans that are counted. Beyond it all counts are dropped: the memory is short-lived.
inline constexpr size_t kMaxCountedSpans = 1024;

// ---- log ----

// Lines of one kind in a second, so that a misbehaving peer cannot fill the log.
inline constexpr int kLogLinesPerSecond = 5;

}  // namespace ray::rdt::limits
