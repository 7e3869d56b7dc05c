// The native endpoint of one process, and the interface of this folder to Python.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ray/rdt/acceptor.h"
#include "ray/rdt/context.h"
#include "ray/rdt/peer.h"
#include "ray/rdt/pool.h"
#include "ray/rdt/region.h"
#include "ray/rdt/service.h"

namespace ray::rdt {

// A pull or call and its peer, for cancelling it.
struct PullTicket {
  std::shared_ptr<Pull> pull;
  std::shared_ptr<Peer> peer;
};
struct CallTicket {
  std::shared_ptr<Call> call;
  std::shared_ptr<Peer> peer;
};

// Runs on: any thread; its own threads are "rdt-loop" and "rdt-copy-N". Only
// the constructor, Stop and NextEvents may block. The constructor throws
// std::exception; a malformed address throws std::invalid_argument.
class Agent {
 public:
  Agent(std::string secret, const Settings &settings);
  ~Agent();

  const Bytes &address() const { return address_bytes_; }
  const AgentId &id() const { return identity_.agent; }

  RegionTable &regions() { return regions_; }
  // Queues a notice about an object for the agent at an address.
  void Notify(ByteView address, Notice notice, const Key &key);

  PullTicket StartPull(ByteView address,
                       const Key &key,
                       const std::vector<Span> &destination,
                       bool with_checksum = false);
  // Once it returns, the destination is no longer written to.
  void Cancel(const PullTicket &ticket);
  // Counts a transfer of this memory that was made without the agent.
  void RecordPull(const std::vector<Span> &spans);

  CallTicket StartCall(ByteView address,
                       Bytes payload,
                       bool is_idempotent = false,
                       FrameType kind = FrameType::kCall);
  // Requests an object's checksum. The reply is a ChecksumReply.
  CallTicket StartChecksum(ByteView address, const Key &key);
  void Cancel(const CallTicket &ticket);
  void Reply(uint64_t call, Bytes payload, bool is_error);

  std::vector<Event> NextEvents(double timeout_s) { return events_.Next(timeout_s); }
  const std::shared_ptr<Pool> &pool() const { return pool_; }
  LaneReasons Explain(ByteView address);
  std::map<std::string, int64_t> Stats() const;

  // Fails all pulls and calls with kStopped, returns every token, joins the threads.
  void Stop();

 private:
  using UsePeer = std::function<void(const std::shared_ptr<Peer> &peer)>;

  void TickAll();
  Status WithPeer(const Address &address, const UsePeer &use);

  const Settings settings_;
  EventQueue events_;
  Log log_;
  Counters counters_;
  const MemoryLimit memory_limit_;
  const std::shared_ptr<Pool> pool_;  // blocks in use outlive the agent
  RegionTable regions_;
  const std::unique_ptr<Probe> probe_;
  const Identity identity_;
  Address self_;
  Bytes address_bytes_;
  Loop loop_;
  CopyPool copies_;
  HugePages huge_pages_;
  FilePool files_;
  const Context context_{&loop_,
                         &copies_,
                         &huge_pages_,
                         std::make_shared<Mailbox>(&loop_),
                         pool_.get(),
                         &files_,
                         &events_,
                         &log_,
                         &counters_,
                         &settings_,
                         &identity_,
                         &self_};
  Service service_;
  std::unique_ptr<Acceptor> acceptor_;
  mutable std::mutex mutex_;
  bool is_stopped_ = false;                         // guarded by mutex_
  std::map<AgentId, std::shared_ptr<Peer>> peers_;  // guarded by mutex_
  std::atomic<uint64_t> next_call_{1};
  std::mutex stop_mutex_;  // held during Stop, so that a second caller waits
};

}  // namespace ray::rdt
