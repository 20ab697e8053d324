// The indexer on the CPU: scores a tile at a time, then each query's choice. There are T x T scores in all, but a thread stores
// only the rows of a few queries.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_INDEXER_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_INDEXER_HPP

#include <hybridattn/attention/dsa/types.hpp>
#include <hybridattn/backend/cpu/tile.hpp>
#include <hybridattn/ops/top_k/top_k.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

inline constexpr int panel_vectors = 4;
template <class T> inline constexpr Index panel_keys = panel_vectors * cpu::lanes<T>;
inline constexpr Index panel_queries = 8;   // queries that take turns on a panel while it is in the first-level cache

// Panel p of the index keys of a sequence: [DI, panel_keys] of consecutive keys, zero after the last key.
template <class T> void pack_panel(Index DI, View<T const, 2> keys, Sequence sequence, Index p, T* panel) {
  constexpr Index n = cpu::lanes<T>;
  for (Index j = 0; j < panel_keys<T>; j += n)
    for (Index d = 0; d < DI; d += n) {
      Index const first = p * panel_keys<T> + j;
      T* const to = panel + d * panel_keys<T> + j;
      if (first + n <= sequence.length && d + n <= DI) {
        cpu::transpose<T>(keys.row(sequence.start + first) + d, keys.stride[0], to, panel_keys<T>);
        continue;
      }
      alignas(cpu::vector_bytes) T square[std::size_t{n * n}] = {};
      for (Index i = first, row = 0; row < n && i < sequence.length; ++i, ++row)
        std::copy_n(keys.row(sequence.start + i) + d, std::min(n, DI - d), square + row * n);
      cpu::transpose<T>(square, n, to, panel_keys<T>);
    }
}

// The index keys of a batch in panels.
template <class T> class KeyPanels {
 public:
  KeyPanels(Cpu& cpu, Sequences const& s, Index DI)
      : depth_(DI), memory_{cpu, {s.tokens() / panel_keys<T> + s.count(), round_up(DI, cpu::lanes<T>) * panel_keys<T>}},
        panels_(out(memory_)) {}

  // Panel p of sequence i. A sequence of length T has room for ceil(T / panel_keys) or more panels before those of the next sequence.
  T* panel(Sequences const& s, Index i, Index p) const { return panels_.row(s[static_cast<std::size_t>(i)].start / panel_keys<T> + i + p); }

  void pack(View<T const, 2> keys, Sequence sequence, Index p, T* panel) const { pack_panel<T>(depth_, keys, sequence, p, panel); }

 private:
  Index depth_;
  Tensor<T, 2, Cpu> memory_;
  View<T, 2> panels_;
};

// scores [panel_keys] (+)= the share of MR heads in (1): the rows of a tile are the heads of one query.
template <int MR, class T>
HYBRIDATTN_INLINE void score_heads(Index DI, cpu::Scalars<T> q, T const* weights, T const* panel, bool first_heads, T* scores) {
  constexpr int NV = std::min(panel_vectors, cpu::tuning.index_sums / MR);
  for (Index column = 0; column < panel_keys<T>; column += NV * cpu::lanes<T>) {
    cpu::Vec<T> sum[std::size_t{NV}];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) sum[v] = first_heads ? cpu::Vec<T>{} : cpu::load(scores + column + v * cpu::lanes<T>);
    cpu::tile<MR, NV, T>(
        DI, q, {panel + column, panel_keys<T>}, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return cpu::Vec<T>{}; },
        [&](int r, int v, cpu::Vec<T> x) HYBRIDATTN_INLINE_LAMBDA { sum[v] += weights[r] * cpu::max<T>(cpu::Vec<T>{}, x); });
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) cpu::store<T>(scores + column + v * cpu::lanes<T>, sum[v]);
  }
}
// (1) for one query and the keys of a panel. The weights are multiplied by index_scale: it is positive, so relu does not change it.
template <class T> HYBRIDATTN_INLINE void score_panel(Config const& c, cpu::Scalars<T> q, T const* weights, T const* panel, T* scores) {
  Index const HI = c.index_heads, DI = c.index_dim;
  Index j = 0;
  auto const from = [&] { return cpu::Scalars<T>{q.data + j * q.row, q.row, 1}; };
  for (; j + 8 <= HI; j += 8) score_heads<8>(DI, from(), weights + j, panel, j == 0, scores);
  for (; j + 4 <= HI; j += 4) score_heads<4>(DI, from(), weights + j, panel, j == 0, scores);
  for (; j < HI; ++j) score_heads<1>(DI, from(), weights + j, panel, j == 0, scores);
}

// Computes a thread's rows of scores, and chooses keys from them.
template <class T> class Chooser {
 public:
  using Row = cpu::RowTopK<T>;
  static Index row_size(Index longest) { return round_up(longest, panel_keys<T>); }
  static Index scratch(Config const& c, Index longest) { return panel_queries * (row_size(longest) + c.index_heads); }

  Chooser(Config const& c, Inputs<In<T>> x, Index longest, T* memory, typename Row::Key* keys)
      : c_(c), x_(x), row_(row_size(longest)), scores_(memory), weights_(scores_ + panel_queries * row_), keys_(keys) {}

  // Chooses keys for the queries first .. last - 1 of sequence i.
  void run(SparseOptions o, Sequences const& s, Index i, Index first, Index last, KeyPanels<T> const& panels,
           View<std::int32_t, 2> indices) {
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    Index const k = selection_size(o, sequence.length);
    for (Index t = first; t < last; t += panel_queries) {
      Index const end = std::min(last, t + panel_queries);
      if (k < end) score(s, i, t, end, panels);
      for (Index query = t; query < end; ++query)
        choose(std::min(k, query + 1), query, scores_ + (query - t) * row_, indices.row(sequence.start + query), indices.extent(1));
    }
  }

 private:
  void score(Sequences const& s, Index i, Index first, Index last, KeyPanels<T> const& panels) {
    Index const start = s[static_cast<std::size_t>(i)].start, HI = c_.index_heads;
    for (Index t = first; t < last; ++t)
      for (Index j = 0; j < HI; ++j) weights_[(t - first) * HI + j] = static_cast<T>(c_.index_scale) * x_.index_w(start + t, j);
    for (Index p = 0; p * panel_keys<T> < last; ++p) {
      T const* const panel = panels.panel(s, i, p);
      for (Index t = std::max(first, p * panel_keys<T>); t < last; ++t)
        score_panel<T>(c_, {x_.index_q.row(start + t, 0), x_.index_q.stride[1], 1}, weights_ + (t - first) * HI, panel,
                       scores_ + (t - first) * row_ + p * panel_keys<T>);
    }
  }
  // (2). A query that sees at most k keys chooses all of them.
  void choose(Index k, Index t, T const* scores, std::int32_t* indices, Index columns) {
    if (k == t + 1) std::iota(indices, indices + k, 0);
    else Row{scores, t + 1, keys_}.select(k, indices);
    std::fill(indices + k, indices + columns, -1);
  }

  Config const& c_;
  Inputs<In<T>> x_;
  Index row_;
  T *scores_, *weights_;          // [panel_queries, row_], [panel_queries, HI]
  typename Row::Key* keys_;
};

// Tasks are pieces of a sequence's queries, those with the most keys first.
template <class T>
void choose_keys(Cpu& cpu, SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t, 2> indices) {
  Index const count = s.count(), longest = s.longest(), threads = cpu.threads();
  KeyPanels<T> const panels{cpu, s, c.index_dim};
  Tensor<T, 2, Cpu> scores{cpu, {threads, Chooser<T>::scratch(c, longest)}};
  Tensor<typename Chooser<T>::Row::Key, 2, Cpu> keys{cpu, {threads, Chooser<T>::Row::scratch(longest)}};
  auto const score_memory = out(scores);
  auto const key_memory = out(keys);
  parallel_for(cpu, count * ceil_div(longest, panel_keys<T>), [&](Index task, int) {
    Index const i = task % count, p = task / count;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    if (p * panel_keys<T> < sequence.length && selection_size(o, sequence.length) < sequence.length)
      panels.pack(x.index_k, sequence, p, panels.panel(s, i, p));
  });
  Index const piece = round_up(ceil_div(longest * count, 8 * threads), panel_queries), pieces = ceil_div(longest, piece);
  parallel_for(cpu, count * pieces, [&](Index task, int thread) {
    Index const i = task % count, first = (pieces - 1 - task / count) * piece;
    Index const last = std::min(first + piece, s[static_cast<std::size_t>(i)].length);
    if (first >= last) return;
    Chooser<T>{c, x, longest, score_memory.row(thread), key_memory.row(thread)}.run(o, s, i, first, last, panels, indices);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
