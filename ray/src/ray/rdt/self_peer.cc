#include "ray/rdt/self_peer.h"

#include "ray/rdt/lanes/copy_job.h"
#include "ray/rdt/read_memory.h"

namespace ray::rdt {

SelfPeer::SelfPeer(const Context &context, RegionTable *regions, Service *service)
    : context_(context), regions_(regions), service_(service) {
  LaneSet mine = context_.settings->lanes;
  lane_report_.Set(EvaluateLanes({.mine = mine,
                                  .theirs = mine,
                                  .is_same_agent = true,
                                  .no_tcp_reason = "the peer is this process"}));
}

// The inproc lane. The copy holds the pin until the report.
void SelfPeer::Submit(std::shared_ptr<Pull> pull) {
  Pin source;
  Status status = regions_->FindIntact(pull->key, &source);
  if (status.ok()) status = pull->CheckTotal(source->memory.total());
  if (!status.ok()) return pull->End(status);
  pull->set_lane(LaneKind::kInproc);
  uint64_t id = pull->id;
  pulls_[id] = pull;
  CopyRange copy = [source, to = &pull->destination](Range range) {
    return ReadOwnMemory(source->memory, *to, range);
  };
  StartCopyJob(context_.copies, std::move(pull), copy, [this, id](const Status &result) {
    context_.loop->Post([this, id, result] { OnCopied(id, result); });
  });
}

void SelfPeer::Submit(std::shared_ptr<Call> call, Bytes payload) {
  uint64_t id = call->id;
  FrameType kind = call->kind;
  calls_[id] = std::move(call);
  auto answer = [this, id](bool is_error, Bytes reply) {
    if (auto node = calls_.extract(id)) {
      node.mapped()->Answer(is_error, std::move(reply));
    }
  };
  if (kind == FrameType::kCall)
    return service_->ForwardCall(context_.self->agent, payload, answer);
  service_->FindChecksum(Unpack<ChecksumRequest>(payload)->key, answer);
}

void SelfPeer::SendNotices() {
  Notices notices = notice_queue_.TakeAll();
  regions_->SetOwner(notices.owned, context_.self->agent);
  for (const Key &key : notices.freed) regions_->Release(key);
}

void SelfPeer::Shutdown(const Status &why) {
  for (auto &[id, pull] : pulls_) pull->End(why);
  for (auto &[id, call] : calls_) call->End(why);
  pulls_.clear();
  calls_.clear();
}

void SelfPeer::OnCopied(uint64_t id, const Status &status) {
  auto node = pulls_.extract(id);
  if (!node) return;
  Pull &pull = *node.mapped();
  if (status.ok())
    context_.counters->CountPull(LaneKind::kInproc, pull.destination.total());
  pull.End(status);
}

}  // namespace ray::rdt
