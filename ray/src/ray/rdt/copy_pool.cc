#include "ray/rdt/copy_pool.h"

#include <string>

namespace ray::rdt {

CopyPool::CopyPool(int threads) : is_busy_(static_cast<size_t>(threads), false) {
  for (int i = 0; i < threads; ++i) {
    loops_.push_back(std::make_unique<Loop>("rdt-copy-" + std::to_string(i)));
  }
}

void CopyPool::Start() {
  for (auto &loop : loops_) loop->Start();
}

void CopyPool::Stop() {
  for (auto &loop : loops_) loop->Stop();
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.clear();
}

void CopyPool::Add(Step step, int parallel) {
  auto shared = std::make_shared<Step>(std::move(step));
  std::vector<size_t> idle;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int i = 0; i < parallel; ++i) queue_.push_back(shared);
    for (size_t i = 0; i < is_busy_.size() && idle.size() < queue_.size(); ++i) {
      if (is_busy_[i]) continue;
      is_busy_[i] = true;
      idle.push_back(i);
    }
  }
  for (size_t thread : idle) Wake(thread);
}

void CopyPool::Turn(size_t thread) {
  std::shared_ptr<Step> step;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_busy_[thread] = !queue_.empty();
    if (queue_.empty()) return;
    step = std::move(queue_.front());
    queue_.pop_front();
  }
  if ((*step)()) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(step));
  }
  Wake(thread);
}

void CopyPool::Wake(size_t thread) {
  loops_[thread]->Post([this, thread] { Turn(thread); });
}

}  // namespace ray::rdt
