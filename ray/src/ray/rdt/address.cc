#include "ray/rdt/address.h"

#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <fstream>

namespace ray::rdt {
namespace {

uint64_t InodeOf(const char *path) {
  struct stat status{};
  return stat(path, &status) == 0 ? status.st_ino : 0;
}

// A UUID in text, once per boot.
std::array<uint8_t, 16> ReadBootId() {
  std::array<uint8_t, 16> id{};
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  std::getline(file, text);
  std::erase(text, '-');
  if (text.size() != 2 * id.size()) return id;
  for (size_t i = 0; i < id.size(); ++i) {
    std::from_chars(&text[2 * i], &text[2 * i] + 2, id[i], 16);
  }
  return id;
}

}  // namespace

bool Address::SharesHostWith(const Address &other) const {
  bool is_known = boot != decltype(boot){} && net_namespace != 0;
  return is_known && boot == other.boot && net_namespace == other.net_namespace;
}

std::string Address::Describe() const {
  return "pid " + std::to_string(pid) + " on " + ip + ", agent " +
         Hex(ByteView(agent).first(4));
}

Address DescribeThisProcess(const AgentId &agent) {
  Address self;
  self.agent = agent;
  self.boot = ReadBootId();
  self.net_namespace = InodeOf("/proc/self/ns/net");
  self.pid_namespace = InodeOf("/proc/self/ns/pid");
  self.pid = static_cast<uint32_t>(getpid());
  self.uid = geteuid();
  return self;
}

std::optional<Address> ParseAddress(ByteView bytes) {
  Address other;
  Decoder start(bytes);
  start.Take(other.magic);
  start.Take(other.version);
  if (!start.is_ok() || other.magic != kMagic) return std::nullopt;
  if (other.version != kProtocolVersion) return other;
  return Unpack<Address>(bytes);
}

std::string Hex(ByteView bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace ray::rdt
