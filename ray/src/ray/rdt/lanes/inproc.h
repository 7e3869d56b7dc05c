// In-process lane: producer and consumer are the same process.
#pragma once

#include "ray/rdt/lanes/copy_job.h"
#include "ray/rdt/region.h"

namespace ray::rdt {

// Runs on: any thread. Holds the pin until the report.
void StartInprocCopy(CopyPool *copies,
                     std::shared_ptr<Pull> pull,
                     Pin source,
                     Report report);

}  // namespace ray::rdt
