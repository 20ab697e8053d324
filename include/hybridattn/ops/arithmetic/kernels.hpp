// Arithmetic as kernels. A thread has an element.
#ifndef HYBRIDATTN_OPS_ARITHMETIC_KERNELS_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_KERNELS_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>

#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> struct SetElement {
  T value;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) = value; }
};

template <class T> struct AddElement {
  View<T const, 1> x;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) += x(i); }
};

template <class T> struct AddWeightedElement {
  double weight;
  View<T const, 1> x;
  View<double, 1> sum;
  HYBRIDATTN_HD void operator()(Index i) const { sum(i) += weight * static_cast<double>(x(i)); }
};

// found becomes 1 where an element is NaN or infinite.
template <class T> struct FindBadElement {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 1> x;
    View<std::int32_t, 1> found;   // [1]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const i = simt::block_x() * threads + simt::thread_id();
    auto const infinity = simt::infinity<wide_t<T>>();
    bool const bad = i < p.x.extent(0) && !(-infinity < p.x(i) && p.x(i) < infinity);
    if (simt::any(bad) && simt::lane() == 0) simt::atomic_max(&p.found(0), std::int32_t{1});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
