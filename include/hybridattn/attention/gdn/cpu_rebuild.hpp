// The forward sweep of backward. It computes S again from the errors e that forward saved, for
//   d_q_i = scale (S d_o_i + sum_{j <= i} (d_o_i . delta_j) k_j)
//   d_k_i = X delta_i + sum_{j >= i} scale (delta_i . d_o_j) q_j - sum_{j > i} (delta_i . d_v_j) k_j
//         - S d_v_i - sum_{j < i} (d_v_i . delta_j) k_j
// with S the state before a group, X the gradient of the state after it, and decays between tokens not written.
// There is no triangle to solve. S is stored as S^T [V, K], so that S d_o and S d_v sum over rows and not over lanes.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_REBUILD_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_REBUILD_HPP

#include <hybridattn/attention/gdn/cpu_reverse.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// Factors for the forward sweep; S = carry * stored.
template <class T> struct RebuildTerms {
  PerGroup<T> forget[group_tokens];  // from the stored S before the group to token i
  PerGroup<T> read[group_tokens];    // scale forget
  PerGroup<T> keep[group_tokens];    // beta times the decay from token i to the stored S after the group
  Carry<T> carry;
};
// Returns the carry after the block.
template <class T> T rebuild_terms(Gates<T> const& gates, T scale, T carry, RebuildTerms<T>& terms) {
  for (Index g = 0; g < block_groups; ++g) carry = terms.carry.pass(carry, g, gates.after[0][g]);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const forget = terms.carry.before.get(g) * gates.until[i].get(g);
      terms.forget[i].put(g, forget);
      terms.read[i].put(g, scale * forget);
      terms.keep[i].put(g, gates.beta[i].get(g) * gates.after[i + 1].get(g) * terms.carry.inverse.get(g));
    }
  });
  return carry;
}

// products = S d_o and S d_v of one group [2 group_tokens, panel], then (3). `state` is S^T [V, panel], k its columns of the keys.
template <bool folds, class T>
HYBRIDATTN_INLINE void rebuild(T* state, Index V, RebuildTerms<T> const& terms, Index g, TokenRows<T const> k, TokenRows<T const> d_o,
                               TokenRows<T const> d_v, TokenRows<T const> error, T* products) {
  PanelRow<T> key[std::size_t{group_tokens}], by_d_o[std::size_t{group_tokens}], by_d_v[std::size_t{group_tokens}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) {
    key[i] = PanelRow<T>{k[i]};
    key[i] *= terms.keep[i][g];
  }
  for (Index r = 0; r < V; ++r) {
    T* const row = state + r * panel_width<T>;
    PanelRow<T> s{row};
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      by_d_o[i].add(d_o[i][r], s);
      by_d_v[i].add(d_v[i][r], s);
    }
    if constexpr (folds) s *= terms.carry.fold[g];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) s.add(error[i][r], key[i]);
    s.store(row);
  }
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) {
    by_d_o[i].store(products + i * panel_width<T>);
    by_d_v[i].store(products + (group_tokens + i) * panel_width<T>);
  }
}

// d_q and d_k of one group and one panel of columns. d_k has stored X e on entry. `crossing` [crossing_rows, panel] is each token's read of S,
// then k . stored X e: the first panel overwrites, the other panels add.
template <class T>
HYBRIDATTN_INLINE void combine(RebuildTerms<T> const& terms, Handover<T> const& handover, Index g, TokenRows<T const> q,
                               TokenRows<T const> k, T const* products, TokenRows<T> d_q, TokenRows<T> d_k, bool first, T* crossing) {
  for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> key[group_tokens], query[group_tokens];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      key[i] = load(k[i] + x);
      query[i] = load(q[i] + x);
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const state_error = load(d_k[i] + x), erased = terms.forget[i][g] * load(products + (group_tokens + i) * panel_width<T> + x);
      Vec<T> y = terms.read[i][g] * load(products + i * panel_width<T> + x), z = handover.gradient[i][g] * state_error - erased;
      T *const reads = crossing + i * panel_width<T> + x, *const writes = reads + group_tokens * panel_width<T>;
      Vec<T> const read = query[i] * y - key[i] * erased, written = key[i] * state_error;
      store(reads, first ? read : load(reads) + read);
      store(writes, first ? written : load(writes) + written);
      HYBRIDATTN_UNROLL
      for (int j = 0; j <= i; ++j) y += handover.pair[upto(i, j)][g] * key[j];
      HYBRIDATTN_UNROLL
      for (int j = i; j < group_tokens; ++j) z += handover.pair[upto(j, i)][g] * query[j];
      HYBRIDATTN_UNROLL
      for (int j = 0; j < group_tokens; ++j)
        if (j != i) z -= handover.pair[j > i ? below(j, i) : below(i, j)][g] * key[j];
      store(d_q[i] + x, y);
      store(d_k[i] + x, z);
    }
  });
}

// [K / error_rows][token][error_rows] to one row for each token.
template <class T> HYBRIDATTN_INLINE void by_token(T const* state_error, Index K, TokenRows<T> to) {
  for (Index r = 0; r < K; r += error_rows)
    for (int i = 0; i < group_tokens; ++i) std::copy_n(state_error + r * group_tokens + i * error_rows, error_rows, to[i] + r);
}

// One block of one head: d_q and d_k of this value head alone. `state` is S^T, `products` [2 group_tokens, panel], `crossing`
// [groups, crossing_rows, panel].
template <class T>
void rebuild_block(RebuildTerms<T> const& terms, Handover<T>& handover, BackwardRows<T> const& rows, T* state, T const* state_error,
                   T* products, TokenRows<T> d_q, TokenRows<T> d_k, T* crossing) {
  DecayPaths<T>& paths = handover.paths;
  double product = 0;
  for (Index g = 0; g < rows.groups; ++g) by_token(state_error + g * group_tokens * rows.K, rows.K, d_k.group(g));
  for (Index column = 0; column < rows.K; column += panel_width<T>)
    for (Index g = 0; g < rows.groups; ++g) {
      TokenRows<T const> const q = rows.q.group(g).columns(column), k = rows.k.group(g).columns(column), d_v = rows.d_v.group(g);
      T* const panel = state + column * rows.V;
      if (g == paths.fresh) product += panel_product(panel, paths.gradient, rows.K, rows.V, column);
      if (terms.carry.fold[g] == 1) rebuild<false>(panel, rows.V, terms, g, k, rows.d_o.group(g), d_v, rows.error.group(g), products);
      else rebuild<true>(panel, rows.V, terms, g, k, rows.d_o.group(g), d_v, rows.error.group(g), products);
      combine(terms, handover, g, q, k, products, d_q.group(g).columns(column), d_k.group(g).columns(column), column == 0,
              crossing + g * crossing_rows * panel_width<T>);
    }
  auto const factor = [](T x) { return static_cast<double>(x); };
  paths.passes = product * factor(paths.carry) * factor(terms.carry.before[paths.fresh]) * factor(paths.decay[paths.fresh]);
}

// Writes d_q and d_k of a query/key head: its first value head overwrites, the other value heads add.
template <class T>
void finish_rebuild(TokenRows<T const> own_q, TokenRows<T const> own_k, TokenBlock block, Index hk, bool first, View<T, 3> d_q,
                    View<T, 3> d_k) {
  for (Index n = 0; n < block.tokens; ++n) {
    T *const to_q = d_q.row(block.first + n, hk), *const to_k = d_k.row(block.first + n, hk);
    cpu::for_each_vector<T>(0, d_q.extent(2), [&](cpu::Slot<T> d) HYBRIDATTN_INLINE_LAMBDA {
      d.put(to_q, first ? d.get(own_q[n]) : d.get(to_q) + d.get(own_q[n]));
      d.put(to_k, first ? d.get(own_k[n]) : d.get(to_k) + d.get(own_k[n]));
    });
  }
}

// The state as S^T in panels of K: element (k, v) is at (k / panel) panel V + v panel + k % panel.
template <class T> Index transposed_place(Index k, Index v, Index V) {
  return k / panel_width<T> * panel_width<T> * V + v * panel_width<T> + k % panel_width<T>;
}
template <class T> void read_transposed(View<T const, 4> states, Index i, Index h, Index K, Index V, T* state) {
  std::fill_n(state, K * V, T(0));
  if (states.empty()) return;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); ++v) state[transposed_place<T>(k, v, V)] = states(i, h, k, v) / Carry<T>::start;
}
template <class T> double dot_transposed(View<T const, 4> states, Index i, Index h, Index V, T const* state, T carry) {
  double sum = 0;
  if (states.empty()) return sum;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); ++v)
      sum += static_cast<double>(states(i, h, k, v)) * static_cast<double>(carry * state[transposed_place<T>(k, v, V)]);
  return sum;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif
