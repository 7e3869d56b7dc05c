#include "ray/rdt/lanes/inproc.h"

namespace ray::rdt {
namespace {

Status CopyPlain(const SpanList &from, const SpanList &to, Range range) {
  std::vector<iovec> pieces;
  while (range.nbytes > 0) {
    to.Slice(range, &pieces);
    for (const iovec &piece : pieces) {
      from.CopyOut({range.offset, piece.iov_len}, piece.iov_base);
      range = {range.offset + piece.iov_len, range.nbytes - piece.iov_len};
    }
  }
  return {};
}

}  // namespace

void StartInprocCopy(CopyPool *copies,
                     std::shared_ptr<Pull> pull,
                     Pin source,
                     Report report) {
  const SpanList *to = &pull->destination;
  CopyRange copy = [source = std::move(source), to](Range range) {
    return CopyPlain(source->memory, *to, range);
  };
  StartCopyJob(copies, std::move(pull), std::move(copy), std::move(report));
}

}  // namespace ray::rdt
