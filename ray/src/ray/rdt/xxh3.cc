#include "ray/rdt/xxh3.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ray::rdt {

uint64_t Xxh3(const void *data, size_t nbytes, uint64_t seed) {
#ifdef __x86_64__
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) return Xxh3Avx2(data, nbytes, seed);
#endif
  return XXH3_64bits_withSeed(data, nbytes, seed);
}

}  // namespace ray::rdt
