// The one error value of the agent. Copyable; travels between threads and, as
// code and text, over the wire.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace ray::rdt {

// Numbers are part of the wire protocol: never reuse one.
enum class Code : uint8_t {
  kOk = 0,
  kNotFound = 1,      // the producer has no such region (freed, or never there)
  kUnreachable = 2,   // no connection could be made
  kAuth = 3,          // the other side does not know the secret
  kVersion = 4,       // the other side speaks another protocol version
  kSizeMismatch = 5,  // destination and region differ in length
  kCancelled = 6,     // the caller gave up
  kPeerLost = 7,      // the connection or the process behind it ended
  kRefused = 8,       // the other side, or a setting of ours, said no
  kIo = 9,            // the operating system failed a copy
  kStopped = 10,      // this agent was stopped
  kBroken = 11,   // the connection ended, its process did not; what was asked may be done
  kChanged = 12,  // the object's memory is not what was registered any more
};

struct Status {
  Code code = Code::kOk;
  std::string text;

  bool ok() const { return code == Code::kOk; }
};

// The name that Python sees in AgentError.code.
const char *CodeName(Code code);

// A code that came over the wire; unknown numbers become kRefused.
Code CodeFromWire(uint8_t number);

// "text: <what errno means>".
std::string WithErrno(const std::string &text, int error);

}  // namespace ray::rdt
