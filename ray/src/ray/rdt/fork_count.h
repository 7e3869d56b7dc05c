// The number of forks of this process.
#pragma once

#include <cstdint>

namespace ray::rdt {

// A child may still use memory that was mapped when the count was lower.
// Runs on: any thread.
uint64_t ForkCount();

}  // namespace ray::rdt
