// The reverse sweep of backward: X, the gradient of the state, from the last group of tokens to the first.
// With X the gradient of the state after a group and decays between tokens not written,
//   w_i = X_i^T k_i = X^T k_i + sum_{j >= i} scale (k_i . q_j) d_o_j - sum_{j > i} (k_i . k_j) d_v_j        d_v_i = beta_i w_i
// As in forward, one pass over X adds a group and computes the products of the next group: three multiply-adds a token for each element
// loaded and stored. The sweep writes d_v, d_beta, X e_i and the dots of each group.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_REVERSE_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_REVERSE_HPP

#include <hybridattn/attention/gdn/cpu_decay.hpp>
#include <hybridattn/attention/gdn/cpu_groups.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// The rows of a block. d_v has w until the block's reverse sweep is finished.
template <class T> struct BackwardRows {
  Index groups, K, V;
  TokenRows<T const> q, k, error, d_o;
  TokenRows<T> d_v;
};
// Factors for the reverse sweep over the groups of a block; X = carry * stored.
template <class T> struct ReverseTerms {
  PerGroup<T> beta[group_tokens];
  PerGroup<T> forget[group_tokens];      // from the stored X after the group to token i
  PerGroup<T> keep_query[group_tokens];  // scale * keep, keep: from token i to the stored X before the group
  PerGroup<T> keep_key[group_tokens];    // -beta keep
  PerGroup<T> pair[pairs];               // [below(i, j)] k_i . k_j and [upto(i, j)] scale q_i . k_j, with the decay between
  Carry<T> carry;
};
// The results of the reverse sweep for the forward sweep, besides X e, and those of both sweeps for d_g.
template <class T> struct Handover {
  PerGroup<T> gradient[group_tokens];  // from stored X e_i to X delta_i
  PerGroup<T> pair[pairs];             // [below(i, j)] d_v_i . delta_j and [upto(i, j)] scale d_o_i . delta_j, with the decay between
  DecayPaths<T> paths;
};
template <class T> struct ReversePanel {
  T* state;     // [K, panel] X
  T* products;  // [group_tokens, panel] stored^T k of the group to be solved
  T* updates;   // [2 group_tokens, panel] keep_query d_o, then keep_key w of the group to be added
};

// Returns the carry before the block.
template <class T>
T reverse_terms(Gates<T> const& gates, T scale, BackwardRows<T> const& rows, T carry, ReverseTerms<T>& terms) {
  for (Index g = block_groups; g-- > 0;) carry = terms.carry.pass(carry, g, gates.after[0][g]);
  key_pairs(gates, rows.q, rows.k, rows.K, rows.groups, scale, terms.pair);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const keep = gates.until[i].get(g) * terms.carry.inverse.get(g), beta = gates.beta[i].get(g);
      terms.beta[i].put(g, beta);
      terms.forget[i].put(g, terms.carry.before.get(g) * gates.after[i + 1].get(g));
      terms.keep_query[i].put(g, scale * keep);
      terms.keep_key[i].put(g, -beta * keep);
    }
  });
  return carry;
}

// The products of a block's last group.
template <class T> void multiply(ReversePanel<T> panel, Index K, TokenRows<T const> k) {
  PanelRow<T> products[std::size_t{group_tokens}];
  for (Index r = 0; r < K; ++r) {
    PanelRow<T> const s{panel.state + r * panel_width<T>};
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) products[i].add(k[i][r], s);
  }
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
}

// w of one group, from its last token to its first.
template <class T>
HYBRIDATTN_INLINE void solve(ReverseTerms<T> const& terms, Index g, TokenRows<T const> d_o, TokenRows<T> w, ReversePanel<T> panel) {
  for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> d_v[group_tokens], up[group_tokens];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      up[i] = load(d_o[i] + x);
      store(panel.updates + i * panel_width<T> + x, terms.keep_query[i][g] * up[i]);
    }
    HYBRIDATTN_UNROLL
    for (int i = group_tokens - 1; i >= 0; --i) {
      Vec<T> y = terms.forget[i][g] * load(panel.products + i * panel_width<T> + x);
      HYBRIDATTN_UNROLL
      for (int j = i; j < group_tokens; ++j) y += terms.pair[upto(j, i)][g] * up[j];
      HYBRIDATTN_UNROLL
      for (int j = i + 1; j < group_tokens; ++j) y -= terms.pair[below(j, i)][g] * d_v[j];
      store(w[i] + x, y);
      d_v[i] = terms.beta[i][g] * y;
      store(panel.updates + (group_tokens + i) * panel_width<T> + x, terms.keep_key[i][g] * y);
    }
  });
}

// X before one group by (6), and the products of the group before it when `multiplies`. The updates of a row are two chains, of queries
// and of keys, where the row is one vector: a serial chain of eight would limit the speed of the pass.
template <bool folds, bool multiplies, class T>
HYBRIDATTN_INLINE void pass(ReversePanel<T> panel, Index K, [[maybe_unused]] T fold, TokenRows<T const> q, TokenRows<T const> k,
                            [[maybe_unused]] TokenRows<T const> next_k) {
  constexpr bool has_two_chains = panel_vectors == 1;
  PanelRow<T> update[std::size_t{2 * group_tokens}], products[std::size_t{group_tokens}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < 2 * group_tokens; ++i) update[i] = PanelRow<T>{panel.updates + i * panel_width<T>};
  for (Index r = 0; r < K; ++r) {
    T* const row = panel.state + r * panel_width<T>;
    PanelRow<T> s{row}, by_keys;
    if constexpr (folds) s *= fold;
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      s.add(q[i][r], update[i]);
      (has_two_chains ? by_keys : s).add(k[i][r], update[group_tokens + i]);
    }
    if constexpr (has_two_chains) s.add(T(1), by_keys);
    s.store(row);
    if constexpr (multiplies) {
      HYBRIDATTN_UNROLL
      for (int i = 0; i < group_tokens; ++i) products[i].add(next_k[i][r], s);
    }
  }
  if constexpr (multiplies) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
  }
}
template <class T>
HYBRIDATTN_INLINE void add_group(ReversePanel<T> panel, BackwardRows<T> const& rows, Index g, T fold) {
  TokenRows<T const> const q = rows.q.group(g), k = rows.k.group(g), next_k = g == 0 ? k : rows.k.group(g - 1);
  if (g == 0) pass<true, false>(panel, rows.K, fold, q, k, next_k);
  else if (fold == 1) pass<false, true>(panel, rows.K, fold, q, k, next_k);
  else pass<true, true>(panel, rows.K, fold, q, k, next_k);
}

// X e sums over the lanes. error_rows rows of X and the tokens of a group make a tile of sums, over the columns of all panels in turn
// before they are added up across lanes. Stored as [K / error_rows][token][error_rows]; the first panels of a group overwrite, the others add.
template <class T>
HYBRIDATTN_INLINE void times_error(ReversePanel<T> const* panels, Index count, Index K, TokenRows<T const> error, bool first, T* to) {
  constexpr int tile_size = error_rows * group_tokens;
  for (Index r = 0; r < K; r += error_rows) {
    Vec<T> sum[std::size_t{tile_size}] = {};
    for (Index p = 0; p < count; ++p)
      for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
        T const* const state = panels[p].state + r * panel_width<T> + x;
        Vec<T> s[std::size_t{error_rows}];
        HYBRIDATTN_UNROLL
        for (int row = 0; row < error_rows; ++row) s[row] = cpu::in_register<T>(load(state + row * panel_width<T>));
        HYBRIDATTN_UNROLL
        for (int i = 0; i < group_tokens; ++i) {
          Vec<T> const e = cpu::in_register<T>(load(error[i] + p * panel_width<T> + x));
          HYBRIDATTN_UNROLL
          for (int row = 0; row < error_rows; ++row) sum[i * error_rows + row] += s[row] * e;
        }
      });
    alignas(cpu::vector_bytes) T sums[std::size_t{tile_size}];
    cpu::sum_each<tile_size>(sum, sums);
    T* const tile = to + r * group_tokens;
    for (int p = 0; p < tile_size; p += lanes<T>) store(tile + p, first ? load(sums + p) : load(tile + p) + load(sums + p));
  }
}

// One block of one head, its groups from the last to the first. `state_error` is [groups][K / error_rows][group_tokens][error_rows].
template <class T>
void reverse_block(ReverseTerms<T> const& terms, BackwardRows<T> const& rows, T* state, T* panel_memory, T* state_error,
                   DecayPaths<T> const& paths) {
  for (Index first = 0; first < rows.V; first += panels_in_turn * panel_width<T>) {
    ReversePanel<T> turn[panels_in_turn];
    Index const count = std::min<Index>(panels_in_turn, (rows.V - first) / panel_width<T>);
    for (Index p = 0; p < count; ++p) {
      T* const own = panel_memory + p * panel_rows * panel_width<T>;
      turn[p] = {state + (first + p * panel_width<T>)*rows.K, own, own + group_tokens * panel_width<T>};
      multiply(turn[p], rows.K, rows.k.group(rows.groups - 1));
    }
    for (Index g = rows.groups; g-- > 0;) {
      times_error(turn, count, rows.K, rows.error.group(g).columns(first), first == 0, state_error + g * group_tokens * rows.K);
      for (Index p = 0; p < count; ++p) {
        Index const column = first + p * panel_width<T>;
        if (g == paths.fresh) std::copy_n(turn[p].state, rows.K * panel_width<T>, paths.gradient + column * rows.K);
        solve(terms, g, rows.d_o.group(g).columns(column), rows.d_v.group(g).columns(column), turn[p]);
        add_group(turn[p], rows, g, terms.carry.fold[g]);
      }
    }
  }
}

// With w complete: the dots of each group, d_beta by (5) and d_v.
template <class T>
void finish_reverse(Gates<T> const& gates, ReverseTerms<T> const& terms, T scale, BackwardRows<T> const& rows, TokenBlock block, Index h,
                    View<T, 2> d_beta, Handover<T>& handover) {
  TokenRows<T const> const w = rows.d_v;
  pair_dots(w, rows.d_o, rows.error, rows.V, rows.groups, handover.pair);
  paths_inside(terms.beta, terms.pair, handover.pair, handover.paths);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      handover.gradient[i].put(g, terms.forget[i].get(g) * terms.beta[i].get(g));
      for (int j = 0; j <= i; ++j) {
        Vec<T> const factor = gates.between[upto(i, j)].get(g) * terms.beta[j].get(g) / dot_share<T>;
        handover.pair[upto(i, j)].put(g, scale * factor * handover.pair[upto(i, j)].get(g));
        if (j < i) handover.pair[below(i, j)].put(g, factor * terms.beta[i].get(g) * handover.pair[below(i, j)].get(g));
      }
    }
  });
  for (Index g = 0; g < rows.groups; ++g) {
    T with_error[group_tokens];
    token_dots(w.group(g), rows.error.group(g), rows.V, with_error);
    for (Index i = 0; i < group_tokens && g * group_tokens + i < block.tokens; ++i)
      d_beta(block.first + g * group_tokens + i, h) = with_error[i];
    for (Index i = 0; i < group_tokens; ++i) {
      T* const row = rows.d_v.group(g)[i];
      for (Index d = 0; d < rows.V; d += lanes<T>) store(row + d, terms.beta[i][g] * load(row + d));
    }
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif
