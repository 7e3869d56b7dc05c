// The copy threads find the checksum of an object that is served here.
#pragma once

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Ends with pin->checksum.Set. Runs on: any thread.
void StartChecksum(CopyPool *copies, Pin pin);

}  // namespace ray::rdt
