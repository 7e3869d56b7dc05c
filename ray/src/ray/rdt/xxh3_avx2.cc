// Only the library and the one call are compiled for AVX2: what the standard's
// headers define may be linked into the rest of the agent.
#include <cstring>

#include "ray/rdt/xxh3.h"

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC target("avx2")
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ray::rdt {

uint64_t Xxh3Avx2(const void *data, size_t nbytes, uint64_t seed) {
  return XXH3_64bits_withSeed(data, nbytes, seed);
}

}  // namespace ray::rdt
