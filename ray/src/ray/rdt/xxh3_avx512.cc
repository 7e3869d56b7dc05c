// Compiled for AVX-512 on machines of that kind (ci/build/native.py), so it includes
// nothing that the rest of the agent could be given instead of its own.
#include "ray/rdt/xxh3.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ray::rdt {

uint64_t Xxh3Avx512(const void *data, size_t nbytes, uint64_t seed) {
  return XXH3_64bits_withSeed(data, nbytes, seed);
}

}  // namespace ray::rdt
