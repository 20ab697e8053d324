// d_g by (7). <S, X> is a sum over pairs of a token j that writes and a later token l that reads. A pair adds to d_g_t if it crosses
// the decay of token t: j < t <= l. For token i of a group these are
//   pairs inside the group, j < i <= l                         reads by tokens l >= i of the S before the group
//   writes of tokens j < i that the X after the group reads    pairs across the whole group, from S before to X after
// Pairs j = l are left out: they cross no decay, and at strong decays they would make most of the rounding error. The sum of the pairs
// across a group is <S, X> after the group less the group's writes, from the last group to the first, so no token's d_g depends on an
// earlier token's d_o. Where the group's decay is below rounding, this difference has no correct digit and counts as 0. Its rounding
// error does not fade as the products do, so once a block the sum across a group is computed afresh from S and X.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_DECAY_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_DECAY_HPP

#include <hybridattn/attention/gdn/cpu_groups.hpp>

#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// The sums of one block of one head.
template <class T> struct DecayPaths {
  PerGroup<T> through[group_tokens];   // the pairs across the decay of token i, except those across the whole group
  PerGroup<T> reads, writes;           // reads by the group of the S before it; writes of the group that the X after it reads
  PerGroup<T> decay;                   // of the whole group
  Index fresh;                         // the group whose pairs across it are computed afresh
  T* gradient;                         // X after that group is carry * gradient [K, V], in panels
  T carry;
  double passes;                       // decay <S before that group, X after it>
};

// The group to compute afresh, from the last group to the first: where the decay since the last such group is below 2^-10, or else
// the first group. `since` is carried from block to block.
template <class T> Index fresh_group(PerGroup<T> const& decay, Index groups, T& since) {
  Index fresh = groups - 1;
  while (fresh > 0 && (since *= decay[fresh]) >= T(0x1p-10)) --fresh;
  since = 1;
  for (Index g = 0; g < fresh; ++g) since *= decay[g];
  return fresh;
}

// The pairs inside groups. `keys` are k_l . k_j and scale q_l . k_j with the decay between, `values` are dot_share times w_l . e_j
// and d_o_l . e_j.
template <class T>
void paths_inside(PerGroup<T> const (&beta)[group_tokens], PerGroup<T> const (&keys)[pairs], PerGroup<T> const (&values)[pairs],
                  DecayPaths<T>& paths) {
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> through[group_tokens] = {};
    for (int l = 1; l < group_tokens; ++l)
      for (int j = 0; j < l; ++j) {
        Vec<T> const read = keys[upto(l, j)].get(g) * values[upto(l, j)].get(g);
        Vec<T> const erased = beta[l].get(g) * keys[below(l, j)].get(g) * values[below(l, j)].get(g);
        for (int i = j + 1; i <= l; ++i) through[i] += beta[j].get(g) / dot_share<T> * (read - erased);
      }
    for (int i = 0; i < group_tokens; ++i) paths.through[i].put(g, through[i]);
  });
}

// Reads and writes of all groups. `crossing` [groups, crossing_rows, panel] has, for each lane of the columns, the tokens' reads of the S
// before their group, then k . stored X e. `write` times the latter is the token's write.
inline constexpr int crossing_rows = 2 * group_tokens;
template <class T>
void paths_across(T const* crossing, Index groups, PerGroup<T> const (&write)[group_tokens], DecayPaths<T>& paths) {
  alignas(cpu::vector_bytes) GroupDots<T> dots = {};
  for (Index g = 0; g < groups; ++g) {
    Vec<T> sum[crossing_rows] = {};
    for (int i = 0; i < crossing_rows; ++i)
      for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA { sum[i] += load(crossing + (g * crossing_rows + i) * panel_width<T> + x); });
    cpu::sum_each<crossing_rows>(sum, dots[g]);
  }
  PerGroup<T> sums[pairs];
  to_lanes<T>(dots, sums);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> reads{}, writes{}, by_later[group_tokens];
    for (int i = group_tokens - 1; i >= 0; --i) by_later[i] = reads += sums[i].get(g);
    for (int i = 0; i < group_tokens; ++i) {
      paths.through[i].put(g, paths.through[i].get(g) + by_later[i] + writes);
      writes += write[i].get(g) * sums[group_tokens + i].get(g);
    }
    paths.reads.put(g, reads);
    paths.writes.put(g, writes);
  });
}

// <S, X> over one panel of S^T [V, panel], where X [K, V] is stored in panels of columns and `column` is the first of the rows. Squares
// are summed in T, their sum in double: it may be far larger than d_g.
template <class T> double panel_product(T const* state, T const* gradient, Index K, Index V, Index column) {
  double sums[std::size_t{lanes<T>}] = {};
  for (Index v = 0; v < V; v += panel_width<T>)
    for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
      for_panel_vectors<T>([&](int y) HYBRIDATTN_INLINE_LAMBDA {
        alignas(cpu::vector_bytes) T turned[std::size_t{lanes<T> * lanes<T>}];
        cpu::transpose(gradient + v * K + (column + y) * panel_width<T> + x, panel_width<T>, turned, lanes<T>);
        Vec<T> square{};
        HYBRIDATTN_UNROLL
        for (Index r = 0; r < lanes<T>; ++r) square += load(turned + r * lanes<T>) * load(state + (v + x + r) * panel_width<T> + y);
        HYBRIDATTN_UNROLL
        for (int lane = 0; lane < lanes<T>; ++lane) sums[lane] += static_cast<double>(square[lane]);
      });
    });
  return std::accumulate(std::begin(sums), std::end(sums), 0.0);
}

// d_g of one head of one sequence.
template <class T> class DecayGradients {
 public:
  // `paths(b)` are the sums of block b. before() is <S_0, X_0>, a function because few cases need it; after is <S_T, X_T>.
  template <class Paths, class Before>
  static void write(Sequence sequence, Index h, Paths paths, Before before, double after, View<T, 2> d_g) {
    for (Index b = count_blocks(sequence); b-- > 0;) {
      TokenBlock const block = block_of(sequence, b);
      DecayPaths<T> const& own = paths(b);
      for (Index g = block.groups(); g-- > 0;) {
        double passes = g == own.fresh ? own.passes : passing(own, g, after - number(own.writes[g]));
        if (!std::isfinite(passes)) passes = from_the_front(paths, before, b, g);
        for (Index i = 0; i < group_tokens && g * group_tokens + i < block.tokens; ++i)
          d_g(block.first + g * group_tokens + i, h) = static_cast<T>(number(own.through[i][g]) + passes);
        after = passes + number(own.reads[g]);
      }
    }
  }

 private:
  static double number(T x) { return static_cast<double>(x); }
  static double passing(DecayPaths<T> const& paths, Index g, double difference) {
    return paths.decay[g] <= std::numeric_limits<T>::epsilon() / 2 ? 0 : difference;
  }
  // The pairs across group g of block b, from <S, X> before each group less its reads. So a NaN or infinite value of a token does not
  // reach the d_g of earlier tokens.
  template <class Paths, class Before> static double from_the_front(Paths paths, Before before, Index last_block, Index last) {
    Index b = last_block, g = last;
    auto const is_fresh = [&] { return g == paths(b).fresh; };
    while (!is_fresh() && (b > 0 || g > 0)) g > 0 ? --g : (g = block_groups - 1, --b);
    double passes = is_fresh() ? paths(b).passes : passing(paths(b), g, before() - number(paths(b).reads[g]));
    while (b < last_block || g < last) {
      double const after = passes + number(paths(b).writes[g]);
      if (++g == block_groups) g = 0, ++b;
      passes = passing(paths(b), g, after - number(paths(b).reads[g]));
    }
    return passes;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif
