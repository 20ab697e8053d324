// In which order the emulator runs the threads of a block.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_SCHEDULE_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_SCHEDULE_HPP

#include <hybridattn/core/sizes.hpp>

#include <bit>
#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

// Schedule `number`, from 1 on. Orders of warps and lanes are forward, backward and random. In the odd ones of 1 .. 6 a warp runs until
// it must wait, in the even ones the warps take turns. A block's random numbers depend on the schedule and the block alone.
class Schedule {
 public:
  explicit Schedule(int number) : order_(static_cast<Order>((number - 1) % 3)), takes_turns_(number % 2 == 0), number_(number) {}

  void start_block(Index block) {
    random_ = static_cast<std::uint64_t>(block + 1) * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(number_);
  }
  // The warp that runs next, of those in the set, after `last`.
  int next_warp(std::uint32_t ready, int last) {
    std::uint32_t const others = ready & ~(1u << last);
    if (!takes_turns_ && others != ready) return last;
    return pick(takes_turns_ && others != 0 ? others : ready);
  }
  int next_lane(std::uint32_t ready) { return pick(ready); }

 private:
  enum class Order { forward, backward, random };

  int pick(std::uint32_t set) {
    if (order_ == Order::forward) return std::countr_zero(set);
    if (order_ == Order::backward) return 31 - std::countl_zero(set);
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    for (auto skip = random_ % static_cast<std::uint64_t>(std::popcount(set)); skip > 0; --skip) set &= set - 1;
    return std::countr_zero(set);
  }

  Order order_;
  bool takes_turns_;
  int number_;
  std::uint64_t random_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif
