// A pool of freed memory blocks, for later requests.
#ifndef HYBRIDATTN_BACKEND_POOL_HPP
#define HYBRIDATTN_BACKEND_POOL_HPP

#include <hybridattn/core/memory.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <list>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Blocks come in eight sizes for each doubling (below 512 bytes in steps of 64), so at most an eighth of a large one is unused.
struct BlockSize {
  static constexpr std::size_t largest = std::size_t{1} << 62, classes = 8 * 54;

  std::size_t bytes, number;

  explicit constexpr BlockSize(std::size_t wanted) {
    std::size_t const least = std::max<std::size_t>(wanted, 1);
    std::size_t const octave = std::max<std::size_t>(std::bit_width(least - 1), 9) - 1;   // 2^octave < least <= 2^(octave + 1), or 8
    std::size_t const step = octave == 8 ? 64 : (std::size_t{1} << octave) / 8, steps = (least + step - 1) / step;
    bytes = steps * step;
    number = steps - 1 + 8 * (std::max<std::size_t>(octave, 9) - 9);
  }
};

// A block of several tensors. The last tensor that ends frees it.
struct SharedBlock {
  void* data = nullptr;
  std::size_t bytes = 0;
  Index tensors = 0;
};

// A freed block waits for the next request of its size, so a training step after the first one allocates no memory.
//
// The pool returns waiting blocks to the system before an allocation fails, and in trim(). When it holds more than 1.5 times the
// largest recent in_use(), it also returns waiting blocks without recent use.
//
// "Recent" means the last hundred takes that no waiting block could serve, in four periods of 25. Equal steps have no such takes
// after the first one, so none of their blocks counts as unused, for any number of takes in a step. Where waiting blocks serve all
// takes, a period ends when it has three times as many takes as there were up to the last allocation, at least 25 and at most a
// million: no block of a step waits longer.
class Pool {
 public:
  // Returns a block. allocate(bytes) makes one, or returns nullptr where memory is short; release(block, bytes) returns it to the system.
  // Where memory is short after all waiting blocks were released too, throws Error with the bytes asked for, in use, held and allowed.
  template <class Allocate, class Release> void* take(std::size_t bytes, Allocate allocate, Release release, std::size_t limit) {
    check(bytes <= BlockSize::largest, "out of memory: ", bytes, " bytes are more than a block can have");
    BlockSize const size{bytes};
    Blocks& blocks = blocks_[size.number];
    if (++takes_ - takes_before_ >= std::clamp<std::size_t>(3 * last_allocation_, period_takes, 1'000'000)) next_period(release);
    void* block = nullptr;
    if (blocks.waiting.empty()) {
      block = allocate_block(bytes, size, allocate, release, limit);
    } else {
      block = blocks.waiting.back().block;
      blocks.waiting.pop_back();
    }
    in_use_ += bytes;
    used_ += size.bytes;
    peak_ = std::max(peak_, in_use_);
    peaks_[period_ % peaks_.size()] = std::max(peaks_[period_ % peaks_.size()], used_);
    return block;
  }
  void give(void* block, std::size_t bytes) noexcept {
    BlockSize const size{bytes};
    in_use_ -= bytes;
    used_ -= size.bytes;
    blocks_[size.number].waiting.push_back({block, period_});   // there is room for every block of this size
  }
  // Takes a record for a block that tensors share; end_sharing frees it. Records are used again, like blocks.
  SharedBlock* begin_sharing() {
    if (free_records_.empty()) {
      reserve(free_records_, static_cast<Index>(records_.size()) + 1, "a list of blocks");   // so that end_sharing never allocates
      free_records_.push_back(&records_.emplace_back());
    }
    SharedBlock* const record = free_records_.back();
    free_records_.pop_back();
    return record;
  }
  void end_sharing(SharedBlock* record) noexcept { free_records_.push_back(record); }
  // Returns all waiting blocks to the system.
  template <class Release> void trim(Release release) { release_until(0, period_ + 1, release); }
  std::size_t in_use() const { return in_use_; }   // bytes asked for, before rounding up to a block's size
  std::size_t peak() const { return peak_; }       // the largest in_use()
  std::size_t held() const { return held_; }       // bytes of all blocks, in use and waiting
  std::size_t allocations() const { return allocations_; }
  // Sets peak() to in_use().
  void reset_peak() { peak_ = in_use_; }

 private:
  struct Waiting {
    void* block;
    std::size_t period;   // in which it was freed
  };
  struct Blocks {
    std::vector<Waiting> waiting;   // in the order in which they were freed
    std::size_t bytes = 0, count = 0;   // bytes of one block; number of blocks, in use or waiting
  };
  static constexpr std::size_t period_takes = 25, periods = 4;

  template <class Allocate, class Release>
  void* allocate_block(std::size_t bytes, BlockSize size, Allocate allocate, Release release, std::size_t limit) {
    last_allocation_ = takes_;
    if (allocations_ - allocations_before_ >= period_takes) next_period(release);
    else release_unused(size.bytes, release);
    Blocks& blocks = blocks_[size.number];
    if (blocks.waiting.capacity() == blocks.count)   // so that give never allocates
      reserve(blocks.waiting, static_cast<Index>(2 * blocks.count + 1), "a list of blocks");
    void* block = allocate(size.bytes);
    if (block == nullptr) {
      trim(release);
      block = allocate(size.bytes);
    }
    check(block != nullptr, "out of memory: ", bytes, " bytes did not fit beside ", in_use_, " bytes in use, ", held_,
          " held; the limit is ", limit);
    blocks.bytes = size.bytes;
    ++blocks.count;
    ++allocations_;
    held_ += size.bytes;
    return block;
  }
  template <class Release> void next_period(Release release) {
    takes_before_ = takes_;
    allocations_before_ = allocations_;
    peaks_[++period_ % peaks_.size()] = used_;
    release_unused(0, release);
  }
  // Releases waiting blocks without recent use, to make room for `more` bytes.
  template <class Release> void release_unused(std::size_t more, Release release) {
    std::size_t const most = std::max(*std::ranges::max_element(peaks_), used_ + more);
    if (held_ + more > most + most / 2) release_until(most + most / 2 - more, period_ - periods, release);
  }
  // Releases blocks that were freed before a period, the largest blocks first, until no more than `enough` bytes are held.
  template <class Release> void release_until(std::size_t enough, std::size_t period, Release release) {
    for (auto blocks = blocks_.rbegin(); blocks != blocks_.rend() && held_ > enough; ++blocks) {
      auto const first = blocks->waiting.begin();
      auto last = first;
      for (; last != blocks->waiting.end() && last->period < period && held_ > enough; ++last) {
        release(last->block, blocks->bytes);
        held_ -= blocks->bytes;
        --blocks->count;
      }
      blocks->waiting.erase(first, last);
    }
  }

  std::array<Blocks, BlockSize::classes> blocks_;
  std::list<SharedBlock> records_;
  std::vector<SharedBlock*> free_records_;
  std::array<std::size_t, periods + 1> peaks_ = {};   // the most bytes in use in this period and in each of the last ones
  std::size_t period_ = periods, takes_before_ = 0, allocations_before_ = 0;
  std::size_t in_use_ = 0, peak_ = 0, used_ = 0, held_ = 0, allocations_ = 0, takes_ = 0, last_allocation_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
