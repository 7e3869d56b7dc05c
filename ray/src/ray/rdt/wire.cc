#include "ray/rdt/wire.h"

namespace ray::rdt {

Bytes EncodeFrame(FrameType type, uint64_t request, ByteView payload) {
  FrameHeader header{.type = type, .length = payload.size(), .request = request};
  Bytes out(sizeof(header) + payload.size());
  std::memcpy(out.data(), &header, sizeof(header));
  if (!payload.empty()) {
    std::memcpy(out.data() + sizeof(header), payload.data(), payload.size());
  }
  return out;
}

FrameHeader DecodeHeader(const uint8_t *bytes) {
  FrameHeader header;
  std::memcpy(&header, bytes, sizeof(header));
  return header;
}

std::string VersionMismatchText(uint16_t mine, uint16_t theirs) {
  return "RDT protocol versions differ: this side speaks version " +
         std::to_string(mine) + ", the other side version " + std::to_string(theirs);
}

}  // namespace ray::rdt
