// The error value of the agent. Copied between threads and, as code and text, sent to
// peers.
#pragma once

#include <cstdint>
#include <string>

namespace ray::rdt {

// Numbers are part of the wire protocol: never reuse one.
enum class Code : uint8_t {
  kOk = 0,
  kNotFound = 1,      // the producer has no such region (freed or never registered)
  kUnreachable = 2,   // no connection could be made
  kAuth = 3,          // the other side does not know the secret
  kVersion = 4,       // the other side speaks another protocol version
  kSizeMismatch = 5,  // destination and region differ in size
  kCancelled = 6,     // the caller cancelled
  kPeerLost = 7,      // the connection or the process behind it ended
  kRefused = 8,       // refused by the other side or by a setting
  kIo = 9,            // a system call failed
  kStopped = 10,      // this agent was stopped
  kBroken = 11,       // the connection ended; the call may have been served
  kChanged = 12,      // the object's memory was freed, resized or moved
};

struct Status {
  Code code = Code::kOk;
  std::string text;

  bool ok() const { return code == Code::kOk; }
};

// The name that Python sees in AgentError.code.
const char *CodeName(Code code);

// A code that a peer sent. Unknown numbers become kRefused.
Code CodeFromWire(uint8_t number);

// "text: <what errno means>".
std::string WithErrno(const std::string &text, int error);

}  // namespace ray::rdt
