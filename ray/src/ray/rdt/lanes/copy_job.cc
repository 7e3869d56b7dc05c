#include "ray/rdt/lanes/copy_job.h"

#include <atomic>
#include <mutex>

#include "ray/rdt/limits.h"

namespace ray::rdt {
namespace {

// Shared by the steps of one pull. The last step to end reports a failure, so that no
// thread still copies when another lane starts.
class CopyJob {
 public:
  CopyJob(std::shared_ptr<Pull> pull,
          CopyRange copy,
          Report report,
          int steps,
          uint64_t chunk)
      : pull_(std::move(pull)),
        attempt_(pull_->attempt()),
        copy_(std::move(copy)),
        report_(std::move(report)),
        steps_(steps),
        chunk_(chunk) {}

  // Copies one chunk. True if there may be more.
  bool Step() {
    Range range;
    if (has_failed_ || !pull_->TakeRange(attempt_, chunk_, &range) ||
        !pull_->BeginWrite(attempt_)) {
      return LastStep();
    }
    uint64_t sum = 0;
    Status status = pull_->Fill(range, copy_, &sum);
    pull_->EndWrite();
    if (!status.ok()) {
      Remember(status);
      return LastStep();
    }
    if (pull_->CompleteRange(attempt_, range, sum)) report_({});
    return true;
  }

 private:
  void Remember(const Status &status) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!has_failed_.exchange(true)) failure_ = status;
  }

  bool LastStep() {
    if (--steps_ > 0 || !has_failed_) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    report_(failure_);
    return false;
  }

  const std::shared_ptr<Pull> pull_;
  const uint64_t attempt_;
  const CopyRange copy_;
  const Report report_;
  std::atomic<int> steps_;
  const uint64_t chunk_;
  std::atomic<bool> has_failed_{false};
  std::mutex mutex_;
  Status failure_;  // guarded by mutex_
};

}  // namespace

void StartCopyJob(CopyPool *copies,
                  std::shared_ptr<Pull> pull,
                  CopyRange copy,
                  Report report) {
  uint64_t total = pull->destination.total();
  if (total == 0) return report({});
  bool is_small = total <= limits::kMaxInlineCopy;
  int workers = is_small || total <= limits::kMinChunk ? 1 : copies->threads();
  uint64_t chunk = pull->ChunkFor(workers);
  auto job = std::make_shared<CopyJob>(
      std::move(pull), std::move(copy), std::move(report), workers, chunk);
  if (!is_small) return copies->Add([job] { return job->Step(); }, workers);
  while (job->Step()) {
  }
}

}  // namespace ray::rdt
