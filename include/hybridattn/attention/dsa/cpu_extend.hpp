// Decoding on the CPU: queries over the keys of a cache. Scores and attention use the sums of cpu_indexer.hpp and
// cpu_attention.hpp. So a query chooses the same keys and gives the same bits in a prompt and in a later step.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_EXTEND_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_EXTEND_HPP

#include <hybridattn/attention/dsa/cpu_attention.hpp>
#include <hybridattn/attention/dsa/cpu_indexer.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// Chooses keys for a few queries at a time: threads share out the panels of keys, then the queries.
template <class T> class CachedIndexer {
 public:
  CachedIndexer(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> const& x, View<T const, 3> index_keys,
                View<std::int32_t, 2> indices)
      : cpu_(cpu), c_(c), s_(s), x_(x), index_keys_(index_keys), indices_(indices), depth_(round_up(c.index_dim, cpu::lanes<T>)),
        scores_(cpu, {queries, round_up(index_keys.extent(1), panel_keys<T>)}),
        panels_(cpu, {Index{cpu.threads()}, depth_ * panel_keys<T> + c.index_heads}),
        keys_(cpu, {Index{cpu.threads()}, Row::scratch(index_keys.extent(1))}), score_rows_(out(scores_)), panel_rows_(out(panels_)),
        key_rows_(out(keys_)) {}

  // (2) for every token of the sequences with past tokens.
  void run() {
    Index const parts = ceil_div(score_rows_.extent(1), part_keys);
    for (Index first = 0; first < s_.tokens(); first += queries) {
      Index const count = std::min(queries, s_.tokens() - first);
      parallel_for(cpu_, count * parts, [&](Index task, int thread) { score(first + task / parts, task / parts, task % parts, thread); });
      parallel_for(cpu_, count, [&](Index query, int thread) { choose(first + query, query, thread); });
    }
  }

 private:
  using Row = cpu::RowTopK<T>;
  static constexpr Index queries = 8, part_keys = 8 * panel_keys<T>;

  Sequence sequence_of(Index n) const { return s_[static_cast<std::size_t>(s_.owners()(n))]; }
  Index seen_by(Index n) const { return s_.positions()(n) + 1; }
  Index chosen_by(Index n) const { return std::min(indices_.extent(1), seen_by(n)); }

  // (1) for some keys. A query that chooses all keys that it sees needs no scores.
  void score(Index n, Index query, Index part, int thread) {
    if (sequence_of(n).past == 0 || chosen_by(n) == seen_by(n)) return;
    Index const owner = s_.owners()(n), last = std::min((part + 1) * part_keys, seen_by(n));
    View<T const, 2> const keys{index_keys_.row(owner, 0), {seen_by(n), c_.index_dim}, {index_keys_.stride[1], 1}};
    T *const panel = panel_rows_.row(thread), *const weights = panel + depth_ * panel_keys<T>;
    for (Index j = 0; j < c_.index_heads; ++j) weights[j] = static_cast<T>(c_.index_scale) * x_.index_w(n, j);
    for (Index p = part * part_keys / panel_keys<T>; p * panel_keys<T> < last; ++p) {
      pack_panel<T>(c_.index_dim, keys, {0, seen_by(n)}, p, panel);
      score_panel<T>(c_, {x_.index_q.row(n, 0), x_.index_q.stride[1], 1}, weights, panel, score_rows_.row(query) + p * panel_keys<T>);
    }
  }
  void choose(Index n, Index query, int thread) {
    if (sequence_of(n).past == 0) return;
    std::int32_t* const indices = indices_.row(n);
    if (chosen_by(n) == seen_by(n)) std::iota(indices, indices + chosen_by(n), 0);
    else Row{score_rows_.row(query), seen_by(n), key_rows_.row(thread)}.select(chosen_by(n), indices);
  }

  Cpu& cpu_;
  Config const& c_;
  Sequences const& s_;
  Inputs<In<T>> x_;
  View<T const, 3> index_keys_;
  View<std::int32_t, 2> indices_;
  Index depth_;
  Tensor<T, 2, Cpu> scores_, panels_;   // [queries, capacity], [threads, a panel and weights]
  Tensor<typename Row::Key, 2, Cpu> keys_;
  View<T, 2> score_rows_, panel_rows_;
  View<typename Row::Key, 2> key_rows_;
};

// (3) for every token of the sequences with past tokens, over all keys if indices are empty. Tasks are groups of heads.
template <class T>
void attend_cached(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache, View<std::int32_t const, 2> indices,
                   View<T, 3> o) {
  Index const capacity = cache.keys.extent(1), HK = c.num_kv_heads, group = c.num_heads / HK;
  Index const most = indices.empty() ? capacity : std::min(capacity, indices.extent(1));
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, HeadScratch<T>::size(c.head_dim, group, most)}};
  Tensor<wide_t<T>, 2, Cpu> lse{cpu, {s.tokens(), c.num_heads}};
  cpu::Scratch<std::int32_t> const all{cpu, indices.empty() ? capacity : 0};
  if (indices.empty()) std::iota(all.data(), all.data() + capacity, 0);
  auto const memory = out(scratch);
  auto const lse_rows = out(lse);   // which nobody reads
  parallel_for(cpu, s.tokens() * HK, [&](Index task, int thread) {
    Index const n = task / HK, hk = task % HK, h = hk * group, i = s.owners()(n);
    if (s[static_cast<std::size_t>(i)].past == 0) return;
    Keys const keys{indices.empty() ? all.data() : indices.row(n), std::min<Index>(most, s.positions()(n) + 1)};
    Rows<T const> const k{cache.keys.row(i, 0, hk), cache.keys.stride[1]}, v{cache.values.row(i, 0, hk), cache.values.stride[1]};
    attend<T>(c.head_dim, static_cast<T>(c.scale), group, {heads_of(x.q, n, h), heads_of(o, n, h), lse_rows.row(n) + h}, k, v, keys,
              {group, most, memory.row(thread)});
  });
}

template <class T> void remember(Cpu& cpu, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache) {
  Index const HK = cache.keys.extent(2), D = cache.keys.extent(3);
  parallel_blocks(cpu, s.tokens(), 16, [&](Index first, Index last) {
    for (Index n = first; n < last; ++n) {
      Index const i = s.owners()(n), position = s.positions()(n);
      for (Index hk = 0; hk < HK; ++hk) {
        std::copy_n(x.k.row(n, hk), D, cache.keys.row(i, position, hk));
        std::copy_n(x.v.row(n, hk), D, cache.values.row(i, position, hk));
      }
      std::copy_n(x.index_k.row(n), x.index_k.extent(1), cache.index_keys.row(i, position));
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
