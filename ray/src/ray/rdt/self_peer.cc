#include "ray/rdt/self_peer.h"

#include "ray/rdt/lanes/inproc.h"

namespace ray::rdt {

SelfPeer::SelfPeer(const Context &context, RegionTable *regions, Service *service)
    : context_(context), regions_(regions), service_(service) {
  LaneSet mine = context_.settings->lanes;
  lane_report_.Set(EvaluateLanes({.mine = mine,
                                  .theirs = mine,
                                  .is_same_agent = true,
                                  .no_tcp_reason = "the peer is this process"}));
}

void SelfPeer::Submit(std::shared_ptr<Pull> pull) {
  Pin source = regions_->Find(pull->key);
  if (!source)
    return pull->Fail(
        {Code::kNotFound, "this process has no such object (it was freed)"});
  if (Status intact = source->Check(); !intact.ok()) return pull->Fail(intact);
  if (Status fit = pull->CheckTotal(source->memory.total()); !fit.ok())
    return pull->Fail(fit);
  pull->set_lane(LaneKind::kInproc);
  pulls_[pull->id] = pull;
  StartInprocCopy(context_.copies,
                  pull,
                  std::move(source),
                  [this, id = pull->id](const Status &status) {
                    context_.loop->Post([this, id, status] { OnCopied(id, status); });
                  });
}

void SelfPeer::Submit(std::shared_ptr<Call> call, Bytes payload) {
  uint64_t id = call->id;
  FrameType kind = call->kind;
  calls_[id] = std::move(call);
  auto answer = [this, id](bool is_error, Bytes answer) {
    OnAnswer(id, is_error, std::move(answer));
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
  for (auto &[id, pull] : pulls_) pull->Fail(why);
  for (auto &[id, call] : calls_) call->Fail(why);
  pulls_.clear();
  calls_.clear();
}

void SelfPeer::OnCopied(uint64_t id, const Status &status) {
  auto node = pulls_.extract(id);
  if (!node) return;
  if (!status.ok()) return node.mapped()->Fail(status);
  context_.counters->CountPull(LaneKind::kInproc, node.mapped()->destination.total());
  node.mapped()->Complete();
}

void SelfPeer::OnAnswer(uint64_t id, bool is_error, Bytes payload) {
  auto node = calls_.extract(id);
  if (node) node.mapped()->Answer(is_error, std::move(payload));
}

}  // namespace ray::rdt
