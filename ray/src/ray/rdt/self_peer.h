// This process as its own peer.
#pragma once

#include <map>

#include "ray/rdt/context.h"
#include "ray/rdt/peer.h"
#include "ray/rdt/region.h"
#include "ray/rdt/service.h"

namespace ray::rdt {

// Runs on: the agent's loop.
class SelfPeer : public Peer {
 public:
  SelfPeer(const Context &context, RegionTable *regions, Service *service);

  void Submit(std::shared_ptr<Pull> pull) override;
  void Submit(std::shared_ptr<Call> call, Bytes payload) override;
  void ForgetPull(uint64_t id) override { pulls_.erase(id); }
  void ForgetCall(uint64_t id) override { calls_.erase(id); }
  void SendNotices() override;
  void Tick() override {}
  bool is_idle() const override { return false; }  // kept for the life of the agent
  void Shutdown(const Status &why) override;

 private:
  void OnCopied(uint64_t id, const Status &status);

  const Context context_;
  RegionTable *const regions_;
  Service *const service_;
  std::map<uint64_t, std::shared_ptr<Pull>> pulls_;
  std::map<uint64_t, std::shared_ptr<Call>> calls_;
};

}  // namespace ray::rdt
