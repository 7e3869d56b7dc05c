#include "ray/rdt/lanes/inproc.h"

#include "ray/rdt/read_memory.h"

namespace ray::rdt {

void StartInprocCopy(CopyPool *copies,
                     std::shared_ptr<Pull> pull,
                     Pin source,
                     Report report) {
  const SpanList *to = &pull->destination;
  CopyRange copy = [source = std::move(source), to](Range range) {
    return ReadOwnMemory(source->memory, *to, range);
  };
  StartCopyJob(copies, std::move(pull), std::move(copy), std::move(report));
}

}  // namespace ray::rdt
