// Cross-memory attach: the consumer reads the producer's memory with
// process_vm_readv(2), in one copy and without the producer's help.
//
// After the report the caller must check that the pid still is the producer's
// (PeerLink::IsSameProcess).
#pragma once

#include <sys/types.h>

#include <string>

#include "ray/rdt/auth.h"
#include "ray/rdt/lanes/copy_job.h"

namespace ray::rdt {

// Empty if `pid`'s memory can be read and has the probe that the peer sent in its
// WELCOME; otherwise the reason.
std::string ProbeCma(pid_t pid, const PeerInfo &peer);

class CmaLane : public Lane {
 public:
  CmaLane(CopyPool *copies, pid_t pid) : copies_(copies), pid_(pid) {}

  PullMode mode() const override { return PullMode::kSpans; }
  void Start(std::shared_ptr<Pull> pull,
             const Grant &grant,
             MemoryFiles files,
             Report report) override;

 private:
  CopyPool *const copies_;
  const pid_t pid_;
};

}  // namespace ray::rdt
