// Reads memory that may have been freed: then the read fails and the process continues.
#pragma once

#include <sys/types.h>

#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

// Runs on: any thread. `from` is memory of the process `pid`, `to` of this one.
// kRefused if the system forbids such reads, kPeerLost if the process has exited, kIo if
// some of the memory is not mapped.
Status ReadMemory(pid_t pid, const SpanList &from, const SpanList &to, Range range);

// Like ReadMemory for this process, also if the system forbids ReadMemory.
Status ReadOwnMemory(const SpanList &from, const SpanList &to, Range range);
// The same, into one buffer.
Status ReadOwnMemory(const SpanList &from, Range range, void *to);

}  // namespace ray::rdt
