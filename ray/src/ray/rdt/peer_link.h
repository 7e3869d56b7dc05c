// The control connection to one peer.
#pragma once

#include <memory>
#include <string>

#include "ray/rdt/channel.h"
#include "ray/rdt/connector.h"
#include "ray/rdt/context.h"

namespace ray::rdt {

// state          event                                action               next state
// -------------  -----------------------------------  -------------------  -------------
// kDisconnected  Connect                              start a connector    kConnecting
// kDisconnected  Connect, but TCP is not possible     OnUnreachable        kDisconnected
// kConnecting    handshake finished                   OnConnected          kConnected
// kConnecting    no connection, or handshake failed   OnUnreachable        kDisconnected
// kConnected     connection closed, malformed frame   OnLost(kBroken)      kDisconnected
// kConnected     silent for peer_timeout_s            OnLost(kSilent)      kDisconnected
// kConnected     the peer's process exited            OnLost(kExited)      kDisconnected
// any            Close                                none                 kDisconnected
//
// The link does not reconnect by itself: its handler calls Connect when it has work.
//
// Runs on: the agent's loop.
class PeerLink : private Channel::Handler {
 public:
  enum class State { kDisconnected, kConnecting, kConnected };
  enum class Loss { kBroken, kSilent, kExited };

  class Handler {
   public:
    virtual ~Handler() = default;
    virtual void OnConnected() = 0;
    // No connection could be made.
    virtual void OnUnreachable(const Status &why) = 0;
    virtual void OnLost(const Status &why, Loss loss) = 0;
    // False if the frame is malformed or not one that a producer sends.
    virtual bool OnPeerFrame(const FrameHeader &header,
                             ByteView payload,
                             Fds *attached) = 0;
    // True while the peer owes an answer.
    virtual bool is_waiting() const = 0;
  };

  PeerLink(const Context &context, const Address &address, Handler *handler)
      : context_(context), address_(address), handler_(handler) {}
  ~PeerLink() override { Close(); }

  State state() const { return state_; }
  bool is_connected() const { return state_ == State::kConnected; }
  // Does nothing unless disconnected.
  void Connect();
  void Close();
  // Call before a request is added: an idle peer's silence does not count.
  void StartSilenceClock();

  // The next four require a connection.
  void Send(Bytes frame) { channel_->Send(std::move(frame)); }
  void Lose(const std::string &why, Loss loss);
  // Sends a PING to a silent peer that owes an answer, and later gives it up.
  void CheckSilence();

  // True if the connection and the process behind it are those of the handshake. Bytes
  // read from that pid before the call then came from the pinned region.
  bool IsSameProcess() const;

  const Address &address() const { return address_; }
  const std::shared_ptr<Channel> &channel() const { return channel_; }
  const PeerInfo &info() const { return info_; }
  // In our pid namespace; 0 over TCP, or if it cannot be seen from here.
  pid_t pid() const { return pid_; }
  bool is_unix() const { return context_.self->SharesHostWith(address_); }
  // Empty if TCP to the peer is possible.
  std::string NoTcpReason() const;
  // The status with the peer's address added to its text.
  Status WithAddress(const Status &why) const;

 private:
  void OnResult(const Status &status,
                std::shared_ptr<Channel> channel,
                const PeerInfo &info);
  void IdentifyProcess();
  bool HasExited() const;
  void OnFrame(const FrameHeader &header, ByteView payload, Fds *attached) override;
  void OnClosed(const Status &why) override { Lose(why.text, Loss::kBroken); }

  const Context context_;
  const Address address_;
  Handler *const handler_;
  State state_ = State::kDisconnected;
  std::unique_ptr<Connector> connector_;  // in kConnecting
  // Of the present connection.
  std::shared_ptr<Channel> channel_;
  PeerInfo info_;
  pid_t pid_ = 0;
  Fd pidfd_;
  Loop::Id pidfd_watch_ = 0;
  Clock::time_point last_heard_;
};

}  // namespace ray::rdt
