// Reads memory that may be gone by then: the read fails, the process does not.
#pragma once

#include <sys/types.h>

#include "ray/rdt/spans.h"
#include "ray/rdt/status.h"

namespace ray::rdt {

// Runs on: any thread. `from` is memory of the process `pid`, `to` of this one.
// kRefused when the system forbids such reads, kPeerLost without the process, kIo
// when some of the memory is not there.
Status ReadMemory(pid_t pid, const SpanList &from, const SpanList &to, Range range);

// As ReadMemory of this process itself, also where the system forbids that.
Status ReadOwnMemory(const SpanList &from, const SpanList &to, Range range);
// The same, into plain memory.
Status ReadOwnMemory(const SpanList &from, Range range, void *to);

}  // namespace ray::rdt
