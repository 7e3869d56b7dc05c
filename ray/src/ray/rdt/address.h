// The address of an agent. To Python it is opaque bytes.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>

#include "ray/rdt/wire.h"

namespace ray::rdt {

struct Address {
  uint32_t magic = kMagic;
  uint16_t version = kProtocolVersion;
  AgentId agent{};
  std::array<uint8_t, 16> boot{};  // the running kernel; zero if unknown
  uint64_t net_namespace = 0;
  uint64_t pid_namespace = 0;
  uint32_t pid = 0;  // in its own pid namespace
  uint32_t uid = 0;
  std::string ip;
  uint16_t port = 0;  // 0: does not listen on TCP
  auto Fields() {
    return std::tie(
        magic, version, agent, boot, net_namespace, pid_namespace, pid, uid, ip, port);
  }

  // True if `other`'s abstract Unix socket is reachable from here.
  bool SharesHostWith(const Address &other) const;
  // "pid 12 on 10.0.0.1, agent 0a1b2c3d"
  std::string Describe() const;
};

// The address of this process, without ip and port.
Address DescribeThisProcess(const AgentId &agent);

// Empty if the bytes are not an address. For another version only `version` is set.
std::optional<Address> ParseAddress(ByteView bytes);

std::string Hex(ByteView bytes);

}  // namespace ray::rdt
