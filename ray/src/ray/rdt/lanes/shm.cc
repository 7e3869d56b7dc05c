#include "ray/rdt/lanes/shm.h"

#include <cerrno>

namespace ray::rdt {
namespace {

// Runs small work on this thread, other work on a copy thread.
void RunCopy(CopyPool *copies, uint64_t nbytes, std::function<void()> work) {
  if (nbytes <= limits::kMaxInlineCopy) return work();
  copies->Add(
      [work = std::move(work)] {
        work();
        return false;
      },
      1);
}

Bytes FilledFrame(uint64_t pull, uint64_t position, bool is_ok) {
  return EncodeFrame(
      FrameType::kFilled, pull, Filled{.position = position, .is_ok = is_ok});
}

}  // namespace

void ShmLane::Start(std::shared_ptr<Pull> pull,
                    const Grant & /*grant*/,
                    MemoryFiles /*files*/,
                    Report report) {
  if (!ring_ && refusal_.ok() && !OpenRing()) {
    refusal_ = {Code::kRefused, WithErrno("shared memory cannot be created", errno)};
  }
  if (!refusal_.ok()) return report(refusal_);
  jobs_.push_back(
      std::make_shared<LaneJob>(std::move(pull), std::move(report), limits::kSlotBytes));
  Pump();
}

bool ShmLane::OpenRing() {
  uint64_t nbytes = limits::kSlots * limits::kSlotBytes;
  ring_ = RingMemory::Create(nbytes);
  Fd fd = ring_ ? ring_->file().Duplicate() : Fd();
  if (!fd) {
    ring_.reset();
    return false;
  }
  channel_->Send(EncodeFrame(FrameType::kRing, 0, Ring{.nbytes = nbytes}), std::move(fd));
  return true;
}

// Requests a range for each free slot, taking the pulls in turn.
void ShmLane::Pump() {
  for (size_t i = 0; i < limits::kSlots && !jobs_.empty(); ++i) {
    Slot &slot = slots_[i];
    if (slot.job) continue;
    while (!jobs_.empty() && !jobs_.front()->TakeRange(&slot.range)) jobs_.pop_front();
    if (jobs_.empty()) return;
    slot.job = std::move(jobs_.front());
    jobs_.pop_front();
    jobs_.push_back(slot.job);
    Fill fill{.offset = slot.range.offset,
              .nbytes = slot.range.nbytes,
              .position = i * limits::kSlotBytes};
    channel_->Send(EncodeFrame(FrameType::kFill, slot.job->pull->id, fill));
  }
}

void ShmLane::OnFrame(const FrameHeader &header, ByteView payload) {
  auto filled = Unpack<Filled>(payload);
  size_t index = filled ? filled->position / limits::kSlotBytes : limits::kSlots;
  if (index >= limits::kSlots || !slots_[index].job || slots_[index].is_filled) return;
  Slot &slot = slots_[index];
  if (slot.job->pull->id != header.request) return;
  if (filled->is_ok) {
    slot.is_filled = true;
    return CopySlot(index);
  }
  std::exchange(slot.job, nullptr)
      ->ReportOnce(
          {Code::kIo, "the producer no longer has the object, or cannot read it"});
  Pump();
}

void ShmLane::CopySlot(size_t index) {
  std::shared_ptr<LaneJob> job = slots_[index].job;
  Range range = slots_[index].range;
  auto work =
      [loop = loop_, weak = std::weak_ptr(alive_), ring = ring_, job, range, index] {
        bool is_whole = false;
        auto copy = [&](Range part) {
          uint64_t at = index * limits::kSlotBytes + (part.offset - range.offset);
          job->pull->destination.CopyIn(part, ring->at(at));
          return Status{};
        };
        job->pull->Receive(job->attempt, range, copy, &is_whole);
        loop->Post([weak, index, is_whole] {
          if (auto lane = weak.lock()) (*lane)->OnSlotCopied(index, is_whole);
        });
      };
  RunCopy(copies_, range.nbytes, std::move(work));
}

void ShmLane::OnSlotCopied(size_t index, bool is_whole) {
  Slot slot = std::exchange(slots_[index], {});
  if (is_whole) slot.job->ReportOnce({});
  Pump();
}

bool ShmSource::OnRing(const std::optional<Ring> &ring, Fd fd) {
  if (!ring || ring_ || !fd || ring->nbytes > limits::kMaxRing) return false;
  ring_ = MemoryFile::Open(std::move(fd), ring->nbytes);
  return ring_ != nullptr;
}

bool ShmSource::OnFill(uint64_t pull, const std::optional<Fill> &frame, Pin pin) {
  if (!frame) return false;
  const Fill &fill = *frame;
  if (!ring_ || fill.nbytes > ring_->nbytes() ||
      fill.position > ring_->nbytes() - fill.nbytes) {
    return false;
  }
  if (!pin) {
    channel_->Send(FilledFrame(pull, fill.position, false));
    return true;
  }
  uint64_t total = pin->memory.total();
  if (fill.nbytes > total || fill.offset > total - fill.nbytes) return false;
  auto work =
      [loop = loop_, channel = channel_, ring = ring_, pull, fill, pin = std::move(pin)] {
        Status status =
            ring->Write(fill.position, pin->memory, {fill.offset, fill.nbytes});
        loop->Post([channel, pull, fill, is_ok = status.ok()] {
          channel->Send(FilledFrame(pull, fill.position, is_ok));
        });
      };
  RunCopy(copies_, fill.nbytes, std::move(work));
  return true;
}

}  // namespace ray::rdt
