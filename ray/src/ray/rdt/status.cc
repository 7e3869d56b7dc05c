#include "ray/rdt/status.h"

#include <system_error>

namespace ray::rdt {
namespace {

constexpr const char *kNames[] = {"ok",
                                  "not_found",
                                  "unreachable",
                                  "auth",
                                  "version",
                                  "size_mismatch",
                                  "cancelled",
                                  "peer_lost",
                                  "refused",
                                  "io",
                                  "stopped",
                                  "broken",
                                  "changed"};
constexpr uint8_t kCount = sizeof(kNames) / sizeof(kNames[0]);

}  // namespace

const char *CodeName(Code code) { return kNames[static_cast<uint8_t>(code)]; }

Code CodeFromWire(uint8_t number) {
  return number < kCount && number != 0 ? static_cast<Code>(number) : Code::kRefused;
}

std::string WithErrno(const std::string &text, int error) {
  return text + ": " + std::generic_category().message(error);
}

}  // namespace ray::rdt
