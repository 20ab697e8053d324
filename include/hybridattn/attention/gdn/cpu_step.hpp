// Decoding: equations (1) to (4) for one token of each sequence, on states in place. The states are read
// twice and written once, a few columns at a time, so the second read comes from the first-level cache.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_STEP_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_STEP_HPP

#include <hybridattn/attention/gdn/cpu_groups.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// One token of one head.
template <class T> struct Token {
  T const *q, *k, *v;
  T decay, beta;
  T scale, scaled_qk;  // scaled_qk = scale q . k
  T *state, *o;
  Index K, row;        // row k of the state starts at state + k row
};

// `N` vectors of columns from `slot` on. Only where N is 1 may the vector have fewer columns than lanes.
template <int N, class T> HYBRIDATTN_INLINE void step_columns(Token<T> const& t, cpu::Slot<T> slot) {
  auto const column = [&](int n) HYBRIDATTN_INLINE_LAMBDA { return cpu::Slot<T>{slot.i + n * lanes<T>, slot.count}; };
  Vec<T> with_k[std::size_t{N}] = {}, with_q[std::size_t{N}] = {}, delta[std::size_t{N}];
  for (Index a = 0; a < t.K; ++a) {
    HYBRIDATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      Vec<T> const s = column(n).get(t.state + a * t.row);
      with_k[n] += t.k[a] * s;
      with_q[n] += t.q[a] * s;
    }
  }
  HYBRIDATTN_UNROLL
  for (int n = 0; n < N; ++n) {
    delta[n] = t.beta * (column(n).get(t.v) - t.decay * with_k[n]);                          // (2)
    column(n).put(t.o, t.scale * t.decay * with_q[n] + t.scaled_qk * delta[n]);              // (4)
  }
  for (Index a = 0; a < t.K; ++a) {
    HYBRIDATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      T* const row = t.state + a * t.row;
      column(n).put(row, t.decay * column(n).get(row) + t.k[a] * delta[n]);                  // (1), (3)
    }
  }
}
template <class T> void step_head(Token<T> const& t, Index V) {
  constexpr int wide = 4;
  Index v = 0;
  for (; v + wide * lanes<T> <= V; v += wide * lanes<T>) step_columns<wide>(t, cpu::Slot<T>{v, lanes<T>});
  cpu::for_each_vector<T>(v, V, [&](cpu::Slot<T> slot) { step_columns<1>(t, slot); });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif
