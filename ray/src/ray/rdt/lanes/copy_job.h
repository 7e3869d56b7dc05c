// Copies all chunks of a pull on the copy threads, for lanes that need only system calls
// of this process.
#pragma once

#include <memory>

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/lanes/lane.h"

namespace ray::rdt {

// Starts to copy all of `pull`; see Report. Runs on: any thread.
void StartCopyJob(CopyPool *copies,
                  std::shared_ptr<Pull> pull,
                  CopyRange copy,
                  Report report);

}  // namespace ray::rdt
