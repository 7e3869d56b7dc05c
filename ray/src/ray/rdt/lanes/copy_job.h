// Lanes that need nothing but this process's own system calls: the copy threads
// share out the chunks of a pull.
#pragma once

#include <functional>
#include <memory>

#include "ray/rdt/copy_pool.h"
#include "ray/rdt/lanes/lane.h"

namespace ray::rdt {

// Copies one range into the pull's destination.
using CopyRange = std::function<Status(Range range)>;

// Starts copying all of `pull`; see Report. Runs on: any thread.
void StartCopyJob(CopyPool *copies,
                  std::shared_ptr<Pull> pull,
                  CopyRange copy,
                  Report report);

}  // namespace ray::rdt
