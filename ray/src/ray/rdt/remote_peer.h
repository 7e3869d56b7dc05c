// Another process as producer: one control connection, and the lanes over it.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "ray/rdt/lanes/lane.h"
#include "ray/rdt/peer.h"

namespace ray::rdt {

// Runs on: the agent's loop. The connection is made at the first use. When it
// breaks and the process behind it has not ended, it is made anew: pulls go on
// with what has not landed (up to kMaxTries times with no byte in between), notices that
// the peer may not have seen are sent again, and so are calls that may be repeated.
// Others fail once it is known whether the peer lives: kBroken if it does.
class RemotePeer : public Peer, private Channel::Handler {
 public:
  RemotePeer(const Context &context, const Address &address);
  ~RemotePeer() override;

  void Submit(std::shared_ptr<Pull> pull) override;
  void Submit(std::shared_ptr<Call> call, Bytes payload) override;
  void ForgetPull(uint64_t id) override;
  void ForgetCall(uint64_t id) override;
  void SendNotices() override;
  void Tick() override;
  bool is_idle() const override;
  void Shutdown(const Status &why) override;

  static constexpr int kMaxTries = 5;

 private:
  struct PendingPull {
    std::shared_ptr<Pull> pull;
    LaneKind lane = LaneKind::kTcp;
    LaneSet tried = 0;  // lanes that could not carry it
    bool is_sent = false;
    bool is_granted = false;
    int tries = 1;                 // since bytes landed last
    uint64_t received_before = 0;  // when the last try began
  };
  struct PendingCall {
    std::shared_ptr<Call> call;
    Bytes payload;  // until sent, or answered if it may be repeated
    bool is_sent = false;
    int tries = 1;
  };

  // Connection.
  void Connect();
  void OnConnected(const Status &status,
                   std::shared_ptr<Channel> channel,
                   const PeerInfo &info);
  void IdentifyProcess();
  void SettleLanes();
  void LogLanes(const LaneReasons &reasons);
  std::unique_ptr<Lane> MakeLane(LaneKind kind);
  bool IsMemoryValid() const;
  void OnClosed(const Status &why) override;
  void Lose(const Status &why);
  void Disconnect();
  void GiveUp(const Status &why);
  bool TryAgain(PendingPull *asked);
  static bool TryAgain(PendingCall *called);
  void FailBroken();
  void FailAll(const Status &why);
  bool OverUnix() const;
  std::string NoTcpReason() const;
  Status Named(const Status &why) const;

  // Requests.
  void SendAll();
  void FlushNotices();
  void FollowNotices(Notices notices);
  void DropNotices();
  void SendKeys(FrameType type, std::vector<Key> keys);
  void SendPull(uint64_t id, PendingPull *asked);
  void SendCall(uint64_t id, PendingCall *called);
  Lane *BestLane(LaneSet but_not, LaneKind *kind);
  void DisableLane(LaneKind lane, const std::string &why);
  void OnFrame(const FrameHeader &header, ByteView payload, Fd *attached) override;
  bool Handle(const FrameHeader &header, ByteView payload);
  bool OnGrant(uint64_t id, std::optional<Grant> grant);
  bool TakeAttached(uint64_t id, const Grant &grant);
  bool OnRefuse(uint64_t id, const std::optional<Refuse> &refuse);
  bool OnReply(uint64_t id, ByteView payload);
  void OnMoved(uint64_t id, uint64_t attempt, const Status &status);
  void StartLane(uint64_t id, const Grant &grant);
  void TryNextLane(uint64_t id);
  void AskAgain(uint64_t id);
  void FinishPull(uint64_t id, const Status &status);
  bool is_waiting() const;
  void StartSilenceClock();

  const Context context_;
  const Address address_;
  std::unique_ptr<Connector> connector_;
  std::shared_ptr<Channel> channel_;  // when connected
  PeerInfo info_;                     // of that connection
  pid_t pid_ = 0;                     // in our pid namespace; over Unix only
  Fd pidfd_;
  Loop::Id pidfd_watch_ = 0;
  std::array<std::unique_ptr<Lane>, kLaneCount> lanes_;  // those that are usable
  bool were_lanes_logged_ = false;
  std::map<uint64_t, PendingPull> pulls_;
  std::map<uint64_t, PendingCall> calls_;
  // Notices that the peer has not answered for, by the PING that followed them.
  std::map<uint64_t, Notices> unanswered_;
  uint64_t last_ping_ = 0;
  Clock::time_point notices_sent_at_;
  // Since when the peer cannot be reached, and when it is tried again.
  std::optional<Clock::time_point> cut_since_;
  Clock::time_point try_at_;
  Clock::time_point last_heard_;
  // Lets a report find out that the peer is gone.
  const std::shared_ptr<RemotePeer *> alive_ = std::make_shared<RemotePeer *>(this);
};

}  // namespace ray::rdt
