// Gates as kernels. A thread has an element.
#ifndef HYBRIDATTN_OPS_GATE_KERNELS_HPP
#define HYBRIDATTN_OPS_GATE_KERNELS_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/ops/gate/gate.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> struct SwigluForward {
  View<T const, 1> gate, up;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) = up.empty() ? silu(gate(i)) : silu(gate(i)) * up(i); }
};

template <class T> struct SwigluBackward {
  View<T const, 1> gate, up, d_y;
  View<T, 1> d_gate, d_up;
  HYBRIDATTN_HD void operator()(Index i) const {
    T const x = gate(i), dy = d_y(i), wide = up.empty() ? T(1) : up(i);
    d_gate(i) = dy * wide * silu_slope(x);
    if (!up.empty()) d_up(i) = dy * silu(x);
  }
};

template <class T> struct SigmoidGateForward {
  View<T const, 1> x, z;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) = x(i) * sigmoid(z(i)); }
};

template <class T> struct SigmoidGateBackward {
  View<T const, 1> x, z, d_y;
  View<T, 1> d_x, d_z;
  HYBRIDATTN_HD void operator()(Index i) const {
    T const open = sigmoid(z(i)), dy = d_y(i), value = x(i);
    d_x(i) = dy * open;
    d_z(i) = dy * value * open * (T(1) - open);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
