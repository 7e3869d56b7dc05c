#include "ray/rdt/lanes/copy_job.h"

#include <atomic>
#include <mutex>

#include "ray/rdt/limits.h"

namespace ray::rdt {
namespace {

// Shared by the steps of one pull. The last step to end reports a failure, so that no
// thread still copies when another lane starts.
class CopyJob : private LaneJob {
 public:
  CopyJob(std::shared_ptr<Pull> pull,
          CopyRange copy,
          Report report,
          int steps,
          uint64_t chunk)
      : LaneJob(std::move(pull), std::move(report), chunk),
        copy_(std::move(copy)),
        steps_(steps) {}

  // Copies one chunk. True if there may be more.
  bool Step() {
    Range range;
    bool is_whole = false;
    if (has_failed_ || !TakeRange(&range)) return LastStep();
    Status status = pull->Receive(attempt, range, copy_, &is_whole);
    if (is_whole) ReportOnce({});
    if (status.ok()) return true;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!has_failed_.exchange(true)) failure_ = status;
    }
    return LastStep();
  }

 private:
  bool LastStep() {
    if (--steps_ > 0 || !has_failed_) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    ReportOnce(failure_);
    return false;
  }

  const CopyRange copy_;
  std::atomic<int> steps_;
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
