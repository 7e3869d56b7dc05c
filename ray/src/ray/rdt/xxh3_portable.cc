#include "ray/rdt/xxh3.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ray::rdt {

uint64_t Xxh3Portable(const void *data, size_t nbytes, uint64_t seed) {
  return XXH3_64bits_withSeed(data, nbytes, seed);
}

}  // namespace ray::rdt
