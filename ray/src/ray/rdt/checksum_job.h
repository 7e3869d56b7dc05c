// Computes the checksum of an object of this process on the copy threads.
#pragma once

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Calls pin->checksum.Set when it is done. Runs on: any thread.
void StartChecksum(CopyPool *copies, Pin pin);

}  // namespace ray::rdt
