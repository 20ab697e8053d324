// A run-time number as a compile-time one, for the few values that have a fast kernel.
#ifndef HYBRIDATTN_CORE_WITH_CONSTANT_HPP
#define HYBRIDATTN_CORE_WITH_CONSTANT_HPP

#include <hybridattn/core/view.hpp>

#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI {

// fast(std::integral_constant<Index, n>{}) when n is one of the values, generic() otherwise.
template <Index... values, class Fast, class Generic> void with_constant(Index n, Fast&& fast, Generic&& generic) {
  bool const found = ((n == values && (fast(std::integral_constant<Index, values>{}), true)) || ...);
  if (!found) generic();
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
