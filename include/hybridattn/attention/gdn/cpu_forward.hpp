// Equations (1) to (4) for a group of tokens at a time. With S the state before a group, and decays between tokens not written,
//   e_i = v_i - S^T k_i - sum_{j < i} (k_i . k_j) delta_j        o_i = scale (S^T q_i + sum_{j <= i} (q_i . k_j) delta_j)
// So a group needs two products with S a token, the solution of a triangle, and an update of S a token. One pass over S adds a group
// and computes the products of the next group: three multiply-adds a token for each element loaded and stored.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_FORWARD_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_FORWARD_HPP

#include <hybridattn/attention/gdn/cpu_groups.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// Factors between the tokens of a group, and between tokens and the state; S = carry * stored.
template <class T> struct ForwardTerms {
  PerGroup<T> beta[group_tokens];
  PerGroup<T> forget[group_tokens];  // from the stored state to token i
  PerGroup<T> read[group_tokens];    // scale forget
  PerGroup<T> keep[group_tokens];    // from token i to the stored state after the group
  PerGroup<T> pair[pairs];           // [below(i, j)] k_i . k_j and [upto(i, j)] scale q_i . k_j, with the decay between
  Carry<T> carry;
};
// The input rows and result rows of a block. `error` has no data when no backward follows.
template <class T> struct ForwardRows {
  Index groups, K, V;
  TokenRows<T const> q, k, v;
  TokenRows<T> o, error;
};
// The panel of a state and of all rows that one pass computes.
template <class T> struct ForwardPanel {
  T* state;     // [K, panel]
  T* products;  // [2 group_tokens, panel] stored^T k and stored^T q of the group to be solved
  T* updates;   // [group_tokens, panel] keep delta of the group to be added
};

// Returns the carry after the block.
template <class T>
T forward_terms(Gates<T> const& gates, T scale, ForwardRows<T> const& rows, T carry, ForwardTerms<T>& terms) {
  for (Index g = 0; g < block_groups; ++g) carry = terms.carry.pass(carry, g, gates.after[0][g]);
  key_pairs(gates, rows.q, rows.k, rows.K, rows.groups, scale, terms.pair);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const forget = terms.carry.before.get(g) * gates.until[i].get(g);
      terms.beta[i].put(g, gates.beta[i].get(g));
      terms.forget[i].put(g, forget);
      terms.read[i].put(g, scale * forget);
      terms.keep[i].put(g, gates.after[i + 1].get(g) * terms.carry.inverse.get(g));
    }
  });
  return carry;
}

// The products of a block's first group.
template <class T> void multiply(ForwardPanel<T> panel, Index K, TokenRows<T const> k, TokenRows<T const> q) {
  PanelRow<T> products[std::size_t{2 * group_tokens}];
  for (Index r = 0; r < K; ++r) {
    PanelRow<T> const s{panel.state + r * panel_width<T>};
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      products[i].add(k[i][r], s);
      products[group_tokens + i].add(q[i][r], s);
    }
  }
  HYBRIDATTN_UNROLL
  for (int i = 0; i < 2 * group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
}

// (2) and (4) for one group.
template <class T>
HYBRIDATTN_INLINE void solve(ForwardTerms<T> const& terms, Index g, TokenRows<T const> v, TokenRows<T> error, TokenRows<T> o,
                             ForwardPanel<T> panel) {
  for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> delta[group_tokens];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> e = load(v[i] + x) - terms.forget[i][g] * load(panel.products + i * panel_width<T> + x);
      HYBRIDATTN_UNROLL
      for (int j = 0; j < i; ++j) e -= terms.pair[below(i, j)][g] * delta[j];
      if (error.data != nullptr) store(error[i] + x, e);
      delta[i] = terms.beta[i][g] * e;
      store(panel.updates + i * panel_width<T> + x, terms.keep[i][g] * delta[i]);
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> y = terms.read[i][g] * load(panel.products + (group_tokens + i) * panel_width<T> + x);
      HYBRIDATTN_UNROLL
      for (int j = 0; j <= i; ++j) y += terms.pair[upto(i, j)][g] * delta[j];
      store(o[i] + x, y);
    }
  });
}

// (3) for one group, and the products of the next when `multiplies`.
template <bool folds, bool multiplies, class T>
HYBRIDATTN_INLINE void pass(ForwardPanel<T> panel, Index K, [[maybe_unused]] T fold, TokenRows<T const> k,
                            [[maybe_unused]] TokenRows<T const> next_k, [[maybe_unused]] TokenRows<T const> next_q) {
  PanelRow<T> update[std::size_t{group_tokens}], products[std::size_t{2 * group_tokens}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) update[i] = PanelRow<T>{panel.updates + i * panel_width<T>};
  for (Index r = 0; r < K; ++r) {
    T* const row = panel.state + r * panel_width<T>;
    PanelRow<T> s{row};
    if constexpr (folds) s *= fold;
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) s.add(k[i][r], update[i]);
    s.store(row);
    if constexpr (multiplies) {
      HYBRIDATTN_UNROLL
      for (int i = 0; i < group_tokens; ++i) {
        products[i].add(next_k[i][r], s);
        products[group_tokens + i].add(next_q[i][r], s);
      }
    }
  }
  if constexpr (multiplies) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < 2 * group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
  }
}
template <class T>
HYBRIDATTN_INLINE void add_group(ForwardPanel<T> panel, ForwardRows<T> const& rows, Index g, T fold) {
  TokenRows<T const> const k = rows.k.group(g), next_k = rows.k.group(g + 1), next_q = rows.q.group(g + 1);
  if (g + 1 == rows.groups) pass<true, false>(panel, rows.K, fold, k, next_k, next_q);
  else if (fold == 1) pass<false, true>(panel, rows.K, fold, k, next_k, next_q);
  else pass<true, true>(panel, rows.K, fold, k, next_k, next_q);
}

// One block of one head: `panels_in_turn` panels at a time, through all its groups.
template <class T>
void forward_block(ForwardTerms<T> const& terms, ForwardRows<T> const& rows, T* state, T* panel_memory) {
  for (Index first = 0; first < rows.V; first += panels_in_turn * panel_width<T>) {
    ForwardPanel<T> turn[panels_in_turn];
    Index const count = std::min<Index>(panels_in_turn, (rows.V - first) / panel_width<T>);
    for (Index p = 0; p < count; ++p) {
      T* const own = panel_memory + p * panel_rows * panel_width<T>;
      turn[p] = {state + (first + p * panel_width<T>)*rows.K, own, own + 2 * group_tokens * panel_width<T>};
      multiply(turn[p], rows.K, rows.k, rows.q);
    }
    for (Index g = 0; g < rows.groups; ++g)
      for (Index p = 0; p < count; ++p) {
        Index const column = first + p * panel_width<T>;
        TokenRows<T> const error = rows.error.data == nullptr ? rows.error : rows.error.group(g).columns(column);
        solve(terms, g, rows.v.group(g).columns(column), error, rows.o.group(g).columns(column), turn[p]);
        add_group(turn[p], rows, g, terms.carry.fold[g]);
      }
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif
