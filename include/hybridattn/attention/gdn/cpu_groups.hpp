// Shared by the sweeps over the tokens of a head. Tokens are computed in groups of two or four: one pass over a state has the arithmetic
// of a group, but loads and stores the state once. Groups are counted from the start of the sequence, and the last group is
// padded with zeros, so a token's result does not depend on the number of later tokens. Sixteen groups are a block: the
// small terms of its groups are computed together, one group in each lane.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_GROUPS_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_GROUPS_HPP

#include <hybridattn/backend/cpu/simd.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/core/sequences.hpp>

#include <algorithm>
#include <limits>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

using cpu::lanes, cpu::load, cpu::store, cpu::Vec;

inline constexpr int group_tokens = cpu::tuning.delta.rows, block_groups = 16, block_tokens = group_tokens * block_groups;

// Columns of a state in one pass: so few vectors that the sums and factors of a group stay in registers.
inline constexpr int panel_vectors = cpu::tuning.delta.vectors;
template <class T> inline constexpr int panel_width = panel_vectors * lanes<T>;
// Panels that take turns: the short, serial work between two passes over one panel overlaps with the passes over the others. A panel
// has rows of its own: the products of one group with the state, and the updates of the state by one group.
inline constexpr Index panels_in_turn = 4, panel_rows = 3 * group_tokens;
// Rows of a state whose products with a group are summed across lanes together.
inline constexpr int error_rows = 4;
// K and V in whole panels and whole groups of rows.
template <class T> Index padded(Index dim) { return round_up(dim, std::max(panel_width<T>, error_rows)); }

// A row of a panel, in registers.
template <class T> struct PanelRow {
  Vec<T> vector[std::size_t{panel_vectors}] = {};

  PanelRow() = default;
  HYBRIDATTN_INLINE explicit PanelRow(T const* from) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) vector[v] = cpu::in_register<T>(load(from + v * lanes<T>));
  }
  HYBRIDATTN_INLINE void store(T* to) const {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) cpu::store<T>(to + v * lanes<T>, vector[v]);
  }
  // *this += factor x
  HYBRIDATTN_INLINE void add(T factor, PanelRow const& x) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) vector[v] += factor * x.vector[v];
  }
  HYBRIDATTN_INLINE void operator*=(T factor) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) vector[v] *= factor;
  }
};
// Calls f(column) for every vector of a panel.
template <class T, class F> HYBRIDATTN_INLINE void for_panel_vectors(F f) {
  HYBRIDATTN_UNROLL
  for (int v = 0; v < panel_vectors; ++v) f(v * lanes<T>);
}

// Consecutive tokens of one sequence, at most block_tokens.
struct TokenBlock {
  Index first;   // in the batch
  Index tokens;

  Index groups() const { return ceil_div(tokens, group_tokens); }
};
inline Index count_blocks(Sequence s) { return ceil_div(s.length, block_tokens); }
inline TokenBlock block_of(Sequence s, Index b) {
  return {s.start + b * block_tokens, std::min<Index>(block_tokens, s.length - b * block_tokens)};
}

// TokenRows of one head, one for each token.
template <class T> struct TokenRows {
  T* data;
  Index stride;

  TokenRows() = default;
  HYBRIDATTN_INLINE TokenRows(T* first, Index step) : data(first), stride(step) {}
  template <class U> requires std::is_same_v<U const, T>
  HYBRIDATTN_INLINE TokenRows(TokenRows<U> const& writable) : TokenRows(writable.data, writable.stride) {}
  HYBRIDATTN_INLINE T* operator[](Index token) const { return data + token * stride; }
  HYBRIDATTN_INLINE TokenRows group(Index g) const { return {data + g * group_tokens * stride, stride}; }
  HYBRIDATTN_INLINE TokenRows columns(Index first) const { return {data + first, stride}; }
};

// Kernels need whole groups of rows and whole panels of columns. Such rows are used in place, other rows through a copy, padded
// with zeros.
template <class T> bool is_whole(View<T, 3> x, TokenBlock block, TokenRows<std::remove_const_t<T>> copy) {
  return block.tokens % group_tokens == 0 && x.extent(2) == copy.stride;
}
template <class T> TokenRows<T const> rows_to_read(View<T const, 3> x, TokenBlock block, Index head, TokenRows<T> copy) {
  if (is_whole(x, block, copy)) return {x.row(block.first, head), x.stride[0]};
  for (Index n = 0; n < block.groups() * group_tokens; ++n) {
    Index const columns = n < block.tokens ? x.extent(2) : 0;
    if (columns > 0) std::copy_n(x.row(block.first + n, head), columns, copy[n]);
    std::fill_n(copy[n] + columns, copy.stride - columns, T(0));
  }
  return {copy.data, copy.stride};
}
template <class T> TokenRows<T> rows_to_write(View<T, 3> y, TokenBlock block, Index head, TokenRows<T> copy) {
  if (y.empty() || !is_whole(y, block, copy)) return copy;
  return {y.row(block.first, head), y.stride[0]};
}
// Copies the results from the copy, if there is one, to y.
template <class T> void write_back(View<T, 3> y, TokenBlock block, Index head, TokenRows<T> copy) {
  if (y.empty() || is_whole(y, block, copy)) return;
  for (Index n = 0; n < block.tokens; ++n) std::copy_n(copy[n], y.extent(2), y.row(block.first + n, head));
}

// Numbers of the groups of a block, one in each lane.
template <class T> struct alignas(cpu::vector_bytes) PerGroup {
  T group[block_groups];

  HYBRIDATTN_INLINE T operator[](Index g) const { return group[g]; }
  HYBRIDATTN_INLINE Vec<T> get(int g) const { return load(group + g); }
  HYBRIDATTN_INLINE void put(int g, Vec<T> x) { store(group + g, x); }
};
// Calls f(g) for every vector of groups g .. g + lanes - 1.
template <class T, class F> HYBRIDATTN_INLINE void for_groups(F f) {
  for (int g = 0; g < block_groups; g += lanes<T>) f(g);
}

// Pairs of tokens i, j of a group: below(i, j) for j < i, then upto(i, j) for j <= i.
inline constexpr int pairs = group_tokens * group_tokens;
constexpr int below(int i, int j) { return i * (i - 1) / 2 + j; }
constexpr int upto(int i, int j) { return group_tokens * (group_tokens - 1) / 2 + i * (i + 1) / 2 + j; }

// The gates of a block. Padding does not change the state: decay 1, beta 0.
template <class T> struct Gates {
  PerGroup<T> beta[group_tokens];
  PerGroup<T> after[group_tokens + 1];  // [i] exp(g_i + ... + the last g); 1 after the last token
  PerGroup<T> until[group_tokens];      // [i] exp(g_0 + ... + g_i)
  PerGroup<T> between[pairs];           // [below(i, j)], [upto(i, j)] exp(g_{j+1} + ... + g_i)
};

// log 2 = high + low. The product of high with a whole number below 2^11 has no rounding.
template <class T> struct LogTwo;
template <> struct LogTwo<float> {
  static constexpr float high = 0x1.62ep-1f, low = 0x1.0bfbe8p-15f;
};
template <> struct LogTwo<double> {
  static constexpr double high = 0x1.62e42fefap-1, low = 0x1.cf79abc9e3b3ap-40;
};

// exp(g), or 0 below the smallest normal number. The rounding of g log2(e) alone would give an error |g| times that of the result.
template <class T> HYBRIDATTN_INLINE Vec<T> decay_of(Vec<T> g) {
  using E = cpu::detail::Exp2<T>;
  Vec<T> const exponent = g * cpu::log2_e<T>, whole = (exponent + E::magic) - E::magic;
  Vec<T> const rest = (g - whole * LogTwo<T>::high) - whole * LogTwo<T>::low;
  Vec<T> const decay = cpu::exp2<T>(whole) * cpu::exp2<T>(rest * cpu::log2_e<T>);
  Vec<T> const in_range = cpu::select<T>(exponent < E::least, Vec<T>{}, decay);
  Vec<T> const any = cpu::select<T>(exponent > -E::least, cpu::broadcast(std::numeric_limits<T>::infinity()), in_range);
  return cpu::select<T>(g == g, any, g);
}

template <class T> void multiply_decays(PerGroup<T> const (&decay)[group_tokens], Gates<T>& gates) {
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> until = cpu::broadcast<T>(1), after = until;
    gates.after[group_tokens].put(g, after);
    for (int i = 0; i < group_tokens; ++i) {
      gates.until[i].put(g, until *= decay[i].get(g));
      gates.after[group_tokens - 1 - i].put(g, after *= decay[group_tokens - 1 - i].get(g));
      Vec<T> between = cpu::broadcast<T>(1);
      for (int j = i; j >= 0; --j) {
        gates.between[upto(i, j)].put(g, between);
        if (j < i) gates.between[below(i, j)].put(g, between);
        between *= decay[j].get(g);
      }
    }
  });
}
template <class T> void read_gates(View<T const, 2> g, View<T const, 2> beta, TokenBlock block, Index h, Gates<T>& gates) {
  PerGroup<T> decay[group_tokens];
  for (Index n = 0; n < block_tokens; ++n) {
    bool const is_token = n < block.tokens;
    decay[n % group_tokens].group[n / group_tokens] = is_token ? g(block.first + n, h) : T(0);
    gates.beta[n % group_tokens].group[n / group_tokens] = is_token ? beta(block.first + n, h) : T(0);
  }
  for (auto& of_token : decay)
    for_groups<T>([&](int first) HYBRIDATTN_INLINE_LAMBDA { of_token.put(first, decay_of<T>(of_token.get(first))); });
  multiply_decays(decay, gates);
}

// A state is kept as carry * stored, so a decay costs a product of two numbers and no pass over memory. The carry stays well above 1,
// so the stored matrix, and its products before they are scaled, overflow only where the state does. When the carry leaves its range,
// it is multiplied into the stored matrix and starts again.
template <class T> struct Carry {
  static constexpr T start = T(0x1p24), least = T(0x1p4), most = T(0x1p44);

  PerGroup<T> before;   // the carry before the group
  PerGroup<T> inverse;  // 1 / the carry after the group
  PerGroup<T> fold;     // factor of the stored state before the group is added, 1 for most groups

  // Returns the carry after group g, from the carry before it and the decay of the whole group. Called in the order of the sweep.
  HYBRIDATTN_INLINE T pass(T carry, Index g, T decay) {
    before.group[g] = carry;
    carry *= decay;
    bool const in_range = carry >= least && carry <= most;   // false for a NaN, which then reaches all of the state
    fold.group[g] = in_range ? T(1) : carry / start;
    carry = in_range ? carry : start;
    inverse.group[g] = 1 / carry;
    return carry;
  }
};

// products[below(i, j)] = dot_share a_i . c_j, products[upto(i, j)] = dot_share b_i . c_j for the tokens of each group. There are
// no products with later tokens. dot_share keeps a dot in range that would overflow before it is scaled.
template <class T> inline constexpr T dot_share = T(0x1p-8);
template <class T> HYBRIDATTN_INLINE void group_dots(TokenRows<T const> a, TokenRows<T const> b, TokenRows<T const> c, Index width,
                                                     T* dots) {
  Vec<T> sum[pairs] = {};
  for (Index d = 0; d < width; d += lanes<T>) {
    Vec<T> x[group_tokens];
    HYBRIDATTN_UNROLL
    for (int j = 0; j < group_tokens; ++j) x[j] = dot_share<T> * load(c[j] + d);
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const y = load(a[i] + d), z = load(b[i] + d);
      HYBRIDATTN_UNROLL
      for (int j = 0; j < i; ++j) sum[below(i, j)] += y * x[j];
      HYBRIDATTN_UNROLL
      for (int j = 0; j <= i; ++j) sum[upto(i, j)] += z * x[j];
    }
  }
  cpu::sum_each<pairs>(sum, dots);
}
// `pairs` numbers of each group, one group in each lane.
template <class T> using GroupDots = T[block_groups][pairs];
template <class T> void to_lanes(GroupDots<T> const& dots, PerGroup<T> (&products)[pairs]) {
  if constexpr (pairs % lanes<T> == 0) {
    for (int p = 0; p < pairs; p += lanes<T>)
      for (int g = 0; g < block_groups; g += lanes<T>) cpu::transpose(&dots[g][p], pairs, products[p].group + g, block_groups);
  } else {
    for (int p = 0; p < pairs; ++p)
      for (int g = 0; g < block_groups; ++g) products[p].group[g] = dots[g][p];
  }
}
template <class T>
void pair_dots(TokenRows<T const> a, TokenRows<T const> b, TokenRows<T const> c, Index width, Index groups,
               PerGroup<T> (&products)[pairs]) {
  alignas(cpu::vector_bytes) GroupDots<T> dots = {};
  for (Index g = 0; g < groups; ++g) group_dots(a.group(g), b.group(g), c.group(g), width, dots[g]);
  to_lanes<T>(dots, products);
}

// k_i . k_j and scale q_i . k_j, times the decay from token j to token i.
template <class T>
void key_pairs(Gates<T> const& gates, TokenRows<T const> q, TokenRows<T const> k, Index K, Index groups, T scale,
               PerGroup<T> (&pair)[pairs]) {
  pair_dots(k, q, k, K, groups, pair);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int p = 0; p < pairs; ++p)
      pair[p].put(g, (p < upto(0, 0) ? T(1) : scale) / dot_share<T> * gates.between[p].get(g) * pair[p].get(g));
  });
}

// dots[i] = a_i . b_i
template <class T> HYBRIDATTN_INLINE void token_dots(TokenRows<T const> a, TokenRows<T const> b, Index width, T* dots) {
  Vec<T> sum[group_tokens] = {};
  for (Index d = 0; d < width; d += lanes<T>) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) sum[i] += load(a[i] + d) * load(b[i] + d);
  }
  cpu::sum_each<group_tokens>(sum, dots);
}

// A state [K, V] of one head as panels of columns: element (k, v) is at (v / panel) panel K + k panel + v % panel. Its value is
// Carry::start * stored.
template <class T> void read_state(View<T const, 4> states, Index i, Index h, Index rows, Index columns, T* state) {
  std::fill_n(state, rows * columns, T(0));
  if (states.empty()) return;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); v += panel_width<T>)
      std::transform(states.row(i, h, k) + v, states.row(i, h, k) + std::min<Index>(v + panel_width<T>, states.extent(3)),
                     state + v * rows + k * panel_width<T>, [](T x) { return x / Carry<T>::start; });
}
template <class T> void write_state(T const* state, T carry, Index i, Index h, Index rows, View<T, 4> states) {
  if (states.empty()) return;
  for (Index k = 0; k < states.extent(2); ++k) {
    T* const row = states.row(i, h, k);
    for (Index v = 0; v < states.extent(3); ++v)
      row[v] = carry * state[v / panel_width<T> * panel_width<T> * rows + k * panel_width<T> + v % panel_width<T>];
  }
}

// <states, carry * state>, summed in double.
template <class T> double dot_state(View<T const, 4> states, Index i, Index h, Index rows, T const* state, T carry) {
  double sum = 0;
  if (states.empty()) return sum;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); ++v)
      sum += static_cast<double>(states(i, h, k, v)) *
             static_cast<double>(carry * state[v / panel_width<T> * panel_width<T> * rows + k * panel_width<T> + v % panel_width<T>]);
  return sum;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif
