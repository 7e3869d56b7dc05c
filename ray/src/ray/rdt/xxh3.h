// XXH3-64 of the xxhash library, over the widest vectors of this CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ray::rdt {

// Runs on: any thread.
uint64_t Xxh3(const void *data, size_t nbytes, uint64_t seed);
// The same, for every CPU; for those that have AVX2; for those that have AVX-512F.
uint64_t Xxh3Portable(const void *data, size_t nbytes, uint64_t seed);
uint64_t Xxh3Avx2(const void *data, size_t nbytes, uint64_t seed);
uint64_t Xxh3Avx512(const void *data, size_t nbytes, uint64_t seed);

}  // namespace ray::rdt
