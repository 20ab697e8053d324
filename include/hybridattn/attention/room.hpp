// Kernels for GPUs are compiled for a few sizes of a head. A smaller head leaves the rest of its room at zero.
#ifndef HYBRIDATTN_ATTENTION_ROOM_HPP
#define HYBRIDATTN_ATTENTION_ROOM_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/sizes.hpp>

#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI::attention {

// f(room) with the smallest room for `entries` that kernels are compiled for. Throws Error where none is large enough; the error names
// the policy and the size.
template <class F> void with_room(char const* policy, char const* size, Index entries, F f) {
  check(entries <= 256, policy, ": ", size, " ", entries, "; a GPU's kernels have room for 256");
  if (entries <= 32) f(std::integral_constant<int, 32>{});
  else if (entries <= 64) f(std::integral_constant<int, 64>{});
  else if (entries <= 128) f(std::integral_constant<int, 128>{});
  else f(std::integral_constant<int, 256>{});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
#endif
