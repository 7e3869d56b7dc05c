// What the fuzz targets share: reading a script from the fuzzer's bytes, and the
// seeds that a run begins with.
//
// A target defines Seeds() and LLVMFuzzerTestOneInput. With RDT_FUZZ_SEEDS=DIR it
// only writes its seeds there: nothing binary lies in the repository.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "ray/rdt/wire.h"

namespace fuzz {

using namespace ray::rdt;

// The fuzzer's bytes; what is asked for beyond their end is zero or empty.
class Script {
 public:
  explicit Script(ByteView bytes) : left_(bytes) {}

  bool at_end() const { return left_.empty(); }
  uint8_t Number() {
    ByteView one = Take(1);
    return one.empty() ? 0 : one[0];
  }
  // As many bytes as the next number says.
  ByteView Some() { return Take(Number()); }
  ByteView Rest() { return Take(left_.size()); }

 private:
  ByteView Take(size_t nbytes) {
    ByteView taken = left_.first(std::min(nbytes, left_.size()));
    left_ = left_.subspan(taken.size());
    return taken;
  }

  ByteView left_;
};

// Ends the program, for the fuzzer to report the input.
inline void Require(bool is_so, const char *what) {
  if (is_so) return;
  std::fprintf(stderr, "fuzz: not so: %s\n", what);
  std::abort();
}

std::vector<Bytes> Seeds();

}  // namespace fuzz

// Each target is one file, so this is defined once in a program.
extern "C" int LLVMFuzzerInitialize(int * /*argc*/, char *** /*argv*/) {
  const char *folder = std::getenv("RDT_FUZZ_SEEDS");
  if (folder == nullptr) return 0;
  int number = 0;
  for (const fuzz::Bytes &seed : fuzz::Seeds()) {
    std::ofstream file(std::string(folder) + "/seed" + std::to_string(number++));
    file.write(reinterpret_cast<const char *>(seed.data()),
               static_cast<std::streamsize>(seed.size()));
  }
  std::exit(0);
}
