#include "ray/rdt/lanes/map.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>
#include <vector>

#include "ray/rdt/fork_count.h"
#include "ray/rdt/limits.h"
#include "ray/rdt/mailbox.h"
#include "ray/rdt/memory_file.h"

namespace ray::rdt {
namespace {

// Kept by the blocks that map the files of one pull. The last one tells the producer.
class Lease : public FileLease {
 public:
  Lease(const Context &context, const std::shared_ptr<Channel> &channel, uint64_t pull)
      : mailbox_(context.mailbox), channel_(channel), pull_(pull) {}
  ~Lease() override {
    // A child process that was forked meanwhile still has the files mapped.
    bool is_reusable = !is_abandoned_ && ForkCount() == forks_;
    FrameType end = is_reusable ? FrameType::kDone : FrameType::kAbort;
    mailbox_->Post([weak = std::move(channel_), end, pull = pull_] {
      if (auto channel = weak.lock()) channel->Send(EncodeFrame(end, pull));
    });
  }
  Lease(const Lease &) = delete;
  Lease &operator=(const Lease &) = delete;

  void Abandon() override { is_abandoned_ = true; }

 private:
  std::atomic<bool> is_abandoned_{false};
  const std::shared_ptr<Mailbox> mailbox_;
  std::weak_ptr<Channel> channel_;
  const uint64_t pull_;
  const uint64_t forks_ = ForkCount();
};

// The object in its files.
class ObjectFiles {
 public:
  ObjectFiles(MemoryFiles files, const Grant &grant)
      : files_(std::move(files)), file_of_(grant.files), layout_(grant.spans) {
    starts_.reserve(layout_.size());
    uint64_t offset = 0;
    for (const Span &span : layout_) {
      starts_.push_back(offset);
      offset += span.nbytes;
    }
  }

  // True if each span is within its file.
  bool IsValid() const {
    if (file_of_.size() != layout_.size()) return false;
    for (size_t i = 0; i < layout_.size(); ++i) {
      if (file_of_[i] >= files_.size() || !files_[file_of_[i]]) return false;
      uint64_t nbytes = files_[file_of_[i]]->nbytes();
      const Span &span = layout_[i];
      if (span.nbytes > nbytes || span.address > nbytes - span.nbytes) return false;
    }
    return true;
  }

  // The place of a range of the object, if a block can map it. Else without a file.
  FilePlace PlaceOf(Range range) const {
    size_t at = Find(range.offset);
    const Span &span = layout_[at];
    bool is_whole = starts_[at] == range.offset && span.nbytes == range.nbytes &&
                    span.address % limits::kPage == 0;
    if (!is_whole) return {};
    return {.file = files_[file_of_[at]], .position = span.address, .is_private = true};
  }

  // Reads a range of the object into the destination.
  Status Read(const SpanList &destination, Range range) const {
    for (size_t at = Find(range.offset); range.nbytes > 0; ++at) {
      uint64_t skip = range.offset - starts_[at];
      Range part{range.offset, std::min(layout_[at].nbytes - skip, range.nbytes)};
      const MemoryFile &file = *files_[file_of_[at]];
      Status status = file.Read(layout_[at].address + skip, destination, part);
      if (!status.ok()) return status;
      range = {range.offset + part.nbytes, range.nbytes - part.nbytes};
    }
    return {};
  }

 private:
  size_t Find(uint64_t offset) const {
    auto after = std::upper_bound(starts_.begin(), starts_.end(), offset);
    return static_cast<size_t>(after - starts_.begin()) - 1;
  }

  const MemoryFiles files_;
  const Bytes file_of_;
  const std::vector<Span> layout_;
  std::vector<uint64_t> starts_;  // the offset in the object of each span
};

Status Map(const Span &block, const FilePlace &place) {
  void *at = reinterpret_cast<void *>(block.address);
  void *mapped =
      place.file->Map(at, block.nbytes, MAP_PRIVATE | MAP_FIXED, place.position);
  if (mapped != MAP_FAILED) return {};
  return {Code::kRefused, WithErrno("shared memory cannot be mapped", errno)};
}

// Maps what can be mapped in place of a block, and reads the rest.
Status PutAll(const ObjectFiles &files,
              const SpanList &destination,
              Pool *pool,
              const std::shared_ptr<FileLease> &lease) {
  uint64_t offset = 0;
  for (const Span &span : destination.spans()) {
    Range range{offset, span.nbytes};
    offset += span.nbytes;
    FilePlace place;
    if (pool->IsMappedBlock(span)) place = files.PlaceOf(range);
    Status status = place.file ? Map(span, place) : files.Read(destination, range);
    if (!status.ok()) return status;
    if (!place.file) continue;
    place.lease = lease;
    pool->Attach(span.address, std::move(place));
  }
  return {};
}

}  // namespace

bool MapLane::Suits(const Pull &pull) const {
  uint64_t mapped = 0;
  for (const Span &span : pull.destination.spans()) {
    if (context_.pool->IsMappedBlock(span)) mapped += span.nbytes;
  }
  return mapped > pull.destination.total() / 2;
}

void MapLane::Start(std::shared_ptr<Pull> pull,
                    const Grant &grant,
                    MemoryFiles files,
                    Report report) {
  auto lease = std::make_shared<Lease>(context_, channel_, pull->id);
  auto object = std::make_shared<const ObjectFiles>(std::move(files), grant);
  if (!object->IsValid()) {
    return report({Code::kRefused, "the producer's files do not match the object"});
  }
  uint64_t total = pull->destination.total();
  auto job = std::make_shared<LaneJob>(std::move(pull), std::move(report), total);
  auto step = [job, object, lease, pool = context_.pool] {
    bool is_put = false, is_whole = false;
    auto put_once = [&](Range) {
      if (std::exchange(is_put, true)) return Status{};
      return PutAll(*object, job->pull->destination, pool, lease);
    };
    Status status;
    for (Range range; status.ok() && job->TakeRange(&range);) {
      status = job->pull->Receive(job->attempt, range, put_once, &is_whole);
    }
    if (is_whole || !status.ok()) job->ReportOnce(status);
    return false;
  };
  context_.copies->Add(std::move(step), 1);
}

}  // namespace ray::rdt
