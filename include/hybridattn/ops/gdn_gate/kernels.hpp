// The gates of Gated DeltaNet as kernels.
#ifndef HYBRIDATTN_OPS_GDN_GATE_KERNELS_HPP
#define HYBRIDATTN_OPS_GDN_GATE_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/gdn_gate/gdn_gate.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// A thread has a head of a token.
template <class T> struct GdnGateForward {
  T range;
  View<T const, 2> a, b;
  View<T const, 1> a_log, dt_bias;
  View<T, 2> g, beta;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const n = i / a.extent(1), h = i % a.extent(1);
    g(n, h) = -std::exp(a_log(h)) * softplus(a(n, h) + dt_bias(h));
    beta(n, h) = range * sigmoid(b(n, h));
  }
};

// A block has sum_rows tokens and 32 heads, a thread one head of all these tokens.
template <class T> struct GdnGateBackward {
  static constexpr int threads = 32;
  struct Params {
    T range;
    View<T const, 2> a, b;
    View<T const, 1> a_log, dt_bias;
    View<T const, 2> d_g, d_beta;
    View<T, 2> d_a, d_b;
    View<T, 2> d_a_log, d_dt_bias;   // [blocks of tokens, HV]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const h = simt::block_y() * threads + simt::thread_id(), first = simt::block_x() * sum_rows;
    if (h >= p.a.extent(1)) return;
    T const rate = -std::exp(p.a_log(h)), bias = p.dt_bias(h);
    T d_rate = 0, d_bias = 0;
    for (Index n = first; n < simt::smaller(first + sum_rows, p.a.extent(0)); ++n) {
      T const shifted = p.a(n, h) + bias, open = sigmoid(p.b(n, h)), d_shifted = rate * sigmoid(shifted) * p.d_g(n, h);
      p.d_b(n, h) = p.range * open * (T(1) - open) * p.d_beta(n, h);
      d_rate += rate * softplus(shifted) * p.d_g(n, h);
      d_bias += d_shifted;
      p.d_a(n, h) = d_shifted;
    }
    p.d_a_log(simt::block_x(), h) = d_rate;
    p.d_dt_bias(simt::block_x(), h) = d_bias;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
