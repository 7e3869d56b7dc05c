#include "ray/rdt/xxh3.h"

namespace ray::rdt {
namespace {

using Hash = uint64_t (*)(const void *data, size_t nbytes, uint64_t seed);

// The widest that the CPU has and the system lets it use.
Hash Widest() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return Xxh3Avx512;
  if (__builtin_cpu_supports("avx2")) return Xxh3Avx2;
#endif
  return Xxh3Portable;
}

}  // namespace

uint64_t Xxh3(const void *data, size_t nbytes, uint64_t seed) {
  static const Hash hash = Widest();
  return hash(data, nbytes, seed);
}

}  // namespace ray::rdt
