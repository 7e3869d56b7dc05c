#include "ray/rdt/shared_copy.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "ray/rdt/limits.h"
#include "ray/rdt/pool.h"
#include "ray/rdt/read_memory.h"

namespace ray::rdt {
namespace {

uint64_t RoundUp(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

// A span that is mapped begins at a page, and a large one at a huge page. Small ones
// follow each other without gaps: they are read.
uint64_t AlignmentOf(uint64_t nbytes) {
  if (nbytes >= limits::kMinCollapsedSpan) return Pool::kHugePage;
  return nbytes >= limits::kMinMappedBlock ? limits::kPage : 1;
}

}  // namespace

// Shared by the copy threads that fill one copy. The last one to end reports.
class SharedCopy::FillJob {
 public:
  FillJob(std::shared_ptr<SharedCopy> copy, Pin pin, Loop *loop, int steps)
      : copy_(std::move(copy)),
        source_(copy_->sources_),
        target_(copy_->targets_),
        pin_(std::move(pin)),
        loop_(loop),
        steps_(steps) {}

  // Copies one chunk. True if there may be more.
  bool Step() {
    uint64_t total = target_.total(), offset = next_.fetch_add(limits::kMaxChunk);
    if (offset < total && !has_failed_) {
      Range chunk{offset, std::min(limits::kMaxChunk, total - offset)};
      Status status = ReadOwnMemory(source_, target_, chunk);
      if (status.ok()) return true;
      std::lock_guard<std::mutex> lock(mutex_);
      if (!has_failed_.exchange(true)) failure_ = status;
    }
    if (--steps_ == 0) {
      loop_->Post([copy = copy_, status = failure_] { copy->OnFilled(status); });
    }
    return false;
  }

 private:
  const std::shared_ptr<SharedCopy> copy_;
  const SpanList source_;
  const SpanList target_;
  const Pin pin_;
  Loop *const loop_;
  std::atomic<uint64_t> next_{0};
  std::atomic<int> steps_;
  std::atomic<bool> has_failed_{false};
  std::mutex mutex_;
  Status failure_;  // guarded by mutex_
};

std::shared_ptr<SharedCopy> SharedCopy::Create(const Pin &pin, FilePool *pool) {
  std::shared_ptr<SharedCopy> made(new SharedCopy(pool));
  const std::vector<Span> &spans = pin->memory.spans();
  std::vector<size_t> copied;
  for (size_t i = 0; i < spans.size(); ++i) {
    made->layout_.push_back({0, spans[i].nbytes});
    made->file_of_.push_back(0);
    if (pin->places.empty() || !made->Place(i, pin->places[i])) {
      made->sources_.push_back(spans[i]);
      copied.push_back(i);
    }
  }
  return copied.empty() || made->PlaceCopies(copied) ? made : nullptr;
}

SharedCopy::~SharedCopy() {
  if (copy_) pool_->Return(std::move(copy_), is_reusable_);
}

// False if the span is in no file, or in one too many.
bool SharedCopy::Place(size_t span, const FilePlace &place) {
  if (!place.file) return false;
  auto found = std::find(files_.begin(), files_.end(), place.file);
  if (found == files_.end()) {
    // One more may be needed for the copy.
    if (files_.size() + 1 >= limits::kMaxFilesOfObject) return false;
    found = files_.insert(files_.end(), place.file);
    if (place.lease) leases_.push_back(place.lease);
  }
  layout_[span].address = place.position;
  file_of_[span] = static_cast<uint8_t>(found - files_.begin());
  return true;
}

// Gives the other spans places in a new file. False if there is no memory for it.
bool SharedCopy::PlaceCopies(const std::vector<size_t> &spans) {
  uint64_t position = 0;
  for (size_t span : spans) {
    uint64_t nbytes = layout_[span].nbytes;
    position = RoundUp(position, AlignmentOf(nbytes));
    layout_[span].address = position;
    file_of_[span] = static_cast<uint8_t>(files_.size());
    position += nbytes;
  }
  copy_ = pool_->Take(RoundUp(position, limits::kPage));
  if (!copy_) return false;
  files_.push_back(copy_->file());
  for (size_t span : spans) {
    targets_.push_back({copy_->address() + layout_[span].address, layout_[span].nbytes});
  }
  return true;
}

void SharedCopy::Abandon() {
  is_reusable_ = false;
  for (auto &lease : leases_) lease->Abandon();
}

void SharedCopy::Fill(Loop *loop, CopyPool *copies, Pin pin) {
  if (!copy_) return OnFilled({});
  int steps = copies->threads();
  auto job = std::make_shared<FillJob>(shared_from_this(), std::move(pin), loop, steps);
  copies->Add([job] { return job->Step(); }, steps);
}

void SharedCopy::WhenReady(OnReady ready) {
  if (is_settled_) return ready(status_);
  waiting_.push_back(std::move(ready));
}

void SharedCopy::OnFilled(const Status &status) {
  is_settled_ = true;
  status_ = status;
  for (OnReady &ready : std::exchange(waiting_, {})) ready(status);
}

}  // namespace ray::rdt
