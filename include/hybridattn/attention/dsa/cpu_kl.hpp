// The indexer's loss on the CPU. Scores and attention's weights are computed again where they are needed, a query at a time.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_KL_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_KL_HPP

#include <hybridattn/attention/dsa/cpu_attention.hpp>

#include <numbers>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// A query's distribution by the indexer, and its target: a number for each of its keys, in memory of the caller.
template <class T> class KlQuery {
 public:
  KlQuery(Config const& c, Inputs<In<T>> const& x, Sequence s, Index t, Keys keys) : c_(c), x_(x), s_(s), n_(s.start + t), keys_(keys) {}

  // products [HI, room]: iq_j . ik_s. scores: (1)
  HYBRIDATTN_INLINE void score(T* products, Index room, T* scores) const {
    attention::for_each_heads(c_.index_heads, [&](auto R, Index j) HYBRIDATTN_INLINE_LAMBDA {
      dot_rows<R, T>(c_.index_dim, heads_of(x_.index_q, n_, j), index_keys(), keys_, {products + j * room, room});
    });
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> sum{};
      for (Index j = 0; j < c_.index_heads; ++j) sum += weight(j) * cpu::max<T>(cpu::Vec<T>{}, cpu::load(products + j * room + i));
      cpu::store<T>(scores + i, sum);
    });
  }
  // target: p of (5). The products have the order of attend, whose lse would not fit others.
  HYBRIDATTN_INLINE void share(Wide<In<T>, 2> lse, HeadScratch<T> const& heads, T* target) const {
    Index const group = c_.num_heads / c_.num_kv_heads;
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(target + i, cpu::Vec<T>{}); });
    for (Index hk = 0; hk < c_.num_kv_heads; ++hk) {
      dot_heads<T>(c_.head_dim, heads_of(x_.q, n_, hk * group), group, head_of(x_.k, s_, hk), keys_, heads.panels, heads.p);
      for (Index g = 0; g < group; ++g) add_weights(heads.p[g], static_cast<T>(lse(n_, hk * group + g)), target);
    }
  }
  // index_lse of (5), and the query's part of (6).
  HYBRIDATTN_INLINE T log_sum(T const* scores) const {
    cpu::Vec<T> most = cpu::broadcast<T>(-std::numeric_limits<T>::infinity()), sum{};
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { most = cpu::max<T>(most, cpu::load(scores + i)); });
    T const largest = cpu::largest<T>(most);
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { sum += real(i, cpu::exp<T>(cpu::load(scores + i) - largest)); });
    return attention::OnlineSoftmax<T>{largest, cpu::sum<T>(sum)}.lse();
  }
  HYBRIDATTN_INLINE T divergence(T const* scores, T const* target, T index_lse) const {
    cpu::Vec<T> sum{};
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const p = cpu::load(target + i), log_p = std::numbers::ln2_v<T> * cpu::log2<T>(cpu::max<T>(p, smallest()));
      cpu::Vec<T> const log_r = cpu::load(scores + i) - index_lse;
      sum += real(i, p * (log_p - log_r) + (cpu::exp<T>(log_r) - p));
    });
    return cpu::sum<T>(sum);
  }

  // (7) for the query's index_q and index_w. d_z overwrites products.
  HYBRIDATTN_INLINE void slopes(T d_loss, T index_lse, T const* target, T* scores, T* products, Index room,
                                Inputs<Out<T>> const& d_x) const {
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const r = cpu::exp<T>(cpu::load(scores + i) - index_lse);
      cpu::store<T>(scores + i, d_loss * (r - cpu::load(target + i)));
    });
    T const scale = static_cast<T>(c_.index_scale);
    for (Index j = 0; j < c_.index_heads; ++j) {
      T* const product = products + j * room;
      cpu::Vec<T> sum{};
      for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const d_score = cpu::load(scores + i), z = cpu::load(product + i);
        sum += real(i, d_score * cpu::max<T>(cpu::Vec<T>{}, scale * z));
        cpu::store<T>(product + i, cpu::select<T>(z > T(0), weight(j) * d_score, cpu::Vec<T>{}));
      });
      if (!d_x.index_w.empty()) d_x.index_w(n_, j) = cpu::sum<T>(sum);
    }
    if (d_x.index_q.empty()) return;
    attention::for_each_heads(c_.index_heads, [&](auto R, Index j) HYBRIDATTN_INLINE_LAMBDA {
      weighted_rows<R, T>(c_.index_dim, Rows<T const>{products + j * room, room}, index_keys(), keys_, heads_of(d_x.index_q, n_, j));
    });
  }

 private:
  // target += the weights of a head / H. The lse is that of rounded scores, so the scores are rounded here too.
  HYBRIDATTN_INLINE void add_weights(T* products, T lse, T* target) const {
    T const scale = static_cast<T>(c_.scale), each = T(1) / static_cast<T>(c_.num_heads);
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(products + i, scale * cpu::load(products + i)); });
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const p = cpu::exp<T>(cpu::load(products + i) - lse);
      cpu::store<T>(target + i, cpu::load(target + i) + each * p);
    });
  }
  static cpu::Vec<T> smallest() { return cpu::broadcast<T>(std::numeric_limits<T>::min()); }
  T weight(Index j) const { return static_cast<T>(c_.index_scale) * x_.index_w(n_, j); }
  Rows<T const> index_keys() const { return {x_.index_k.row(s_.start), x_.index_k.stride[0]}; }
  HYBRIDATTN_INLINE cpu::Vec<T> real(Index i, cpu::Vec<T> x) const { return real_keys<T>(i, keys_.count, x); }
  template <class F> HYBRIDATTN_INLINE void for_each_vector(F f) const {
    for (Index i = 0; i < keys_.count; i += cpu::lanes<T>) f(i);
  }

  Config const& c_;
  Inputs<In<T>> const& x_;
  Sequence s_;
  Index n_;
  Keys keys_;
};

// Calls f(sequence number, first, last, thread) for `queries` queries of a sequence at a time, those with the most keys first.
template <class F> void for_each_queries(Cpu& cpu, Sequences const& s, Index queries, F f) {
  Index const count = s.count(), pieces = ceil_div(s.longest(), queries);
  parallel_for(cpu, count * pieces, [&](Index task, int thread) {
    Index const i = task % count, first = (pieces - 1 - task / count) * queries;
    Index const last = std::min(first + queries, s[static_cast<std::size_t>(i)].length);
    if (first < last) f(i, first, last, thread);
  });
}

// (5) and each query's part of (6), [N].
template <class T>
void query_losses(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Wide<In<T>, 2> lse,
                  Wide<Out<T>, 1> index_lse, T* losses) {
  Index const room = key_room<T>(sets.most()), HI = c.index_heads, group = c.num_heads / c.num_kv_heads;
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, (HI + 2) * room + HeadScratch<T>::size(c.head_dim, group, sets.most())}};
  auto const memory = out(scratch);
  for_each_queries(cpu, s, 8, [&](Index i, Index first, Index last, int thread) {
    T *const products = memory.row(thread), *scores = products + HI * room, *target = scores + room;
    HeadScratch<T> const heads{group, sets.most(), target + room};
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    for (Index t = first; t < last; ++t) {
      KlQuery<T> const query{c, x, sequence, t, sets.of(sequence, t)};
      query.score(products, room, scores);
      query.share(lse, heads, target);
      T const total = query.log_sum(scores);
      index_lse(sequence.start + t) = total;
      losses[sequence.start + t] = query.divergence(scores, target, total);
    }
  });
}
// (6), the sum of the queries' parts in order, unless loss is an empty view. Writes index_lse.
template <class T>
void index_loss(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Saved<Out<T>> saved,
                State<Out<T>, 1> loss) {
  cpu::Scratch<T> const losses{cpu, s.tokens()};
  query_losses<T>(cpu, sets, c, s, x, saved.lse, saved.index_lse, losses.data());
  if (!loss.empty())
    loss(0) = cpu::sum_vectors<T>(s.tokens(), [&](cpu::Slot<T> n) HYBRIDATTN_INLINE_LAMBDA { return n.get(losses.data()); });
}

// (7) in blocks of queries. Threads share out a block's queries, which store d_z, and then the keys, which sum d_z over the
// queries in order.
template <class T> class KlBackward {
 public:
  KlBackward(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> const& x, Saved<In<T>> const& saved,
             T d_loss, Inputs<Out<T>> const& d_x)
      : cpu_(cpu), sets_(sets), c_(c), s_(s), x_(x), saved_(saved), d_loss_(d_loss), d_x_(d_x), room_(key_room<T>(sets.most())),
        scratch_(2 * room_ + HeadScratch<T>::size(c.head_dim, group(), sets.most())), rows_(cpu, cpu.threads() * scratch_),
        d_z_(cpu, block * c.index_heads * start(s.count(), s.tokens())) {}

  void run() {
    for (Index first = 0; first < s_.longest(); first += block) {
      queries(first);
      if (!d_x_.index_k.empty()) keys(first);
    }
  }

 private:
  static constexpr Index block = 32, task_queries = 4, task_keys = 64;

  Index group() const { return c_.num_heads / c_.num_kv_heads; }
  // d_z of a block: rows [HI, room] of each query of sequence i, after those of earlier sequences.
  Index room(Sequence s) const { return std::min(room_, key_room<T>(s.length)); }
  static Index start(Index i, Index tokens_before) { return tokens_before + i * cpu::lanes<T>; }
  T* d_z(Index i, Sequence s, Index query) const { return d_z_.data() + c_.index_heads * (block * start(i, s.start) + query * room(s)); }

  void queries(Index first) {
    parallel_for(cpu_, s_.count() * (block / task_queries), [&](Index task, int thread) {
      Index const i = task % s_.count(), begin = first + task / s_.count() * task_queries;
      Sequence const sequence = s_[static_cast<std::size_t>(i)];
      T *const scores = rows_.data() + thread * scratch_, *target = scores + room_;
      HeadScratch<T> const heads{group(), sets_.most(), target + room_};
      for (Index t = begin; t < std::min(begin + task_queries, sequence.length); ++t) {
        T* const products = d_z(i, sequence, t - first);
        KlQuery<T> const query{c_, x_, sequence, t, sets_.of(sequence, t)};
        query.score(products, room(sequence), scores);
        query.share(saved_.lse, heads, target);
        query.slopes(d_loss_, static_cast<T>(saved_.index_lse(sequence.start + t)), target, scores, products, room(sequence), d_x_);
      }
    });
  }

  // Adds a block's part of d_ik. The first block overwrites.
  void keys(Index first) {
    parallel_for(cpu_, s_.count() * ceil_div(s_.longest(), task_keys), [&](Index task, int) {
      Index const i = task % s_.count(), begin = task / s_.count() * task_keys;
      Sequence const sequence = s_[static_cast<std::size_t>(i)];
      Index const end = std::min(begin + task_keys, sequence.length);
      if (first == 0)
        for (Index key = begin; key < end; ++key) std::fill_n(d_x_.index_k.row(sequence.start + key), c_.index_dim, T(0));
      for (Index t = std::max(first, begin); t < std::min(first + block, sequence.length); ++t) {
        Keys const all = sets_.of(sequence, t);
        std::int32_t const* const from = std::lower_bound(all.indices, all.indices + all.count, begin);
        std::int32_t const* const to = std::lower_bound(from, all.indices + all.count, end);
        Rows<T const> const weights{d_z(i, sequence, t - first) + (from - all.indices), room(sequence)};
        attention::add_to_rows<T>(c_.index_dim, weights, heads_of(x_.index_q, sequence.start + t, 0), c_.index_heads, Keys{from, to - from},
                                  Rows<T>{d_x_.index_k.row(sequence.start), d_x_.index_k.stride[0]});
      }
    });
  }

  Cpu& cpu_;
  KeySets const& sets_;
  Config const& c_;
  Sequences const& s_;
  Inputs<In<T>> x_;
  Saved<In<T>> saved_;
  T d_loss_;
  Inputs<Out<T>> d_x_;
  Index room_, scratch_;   // of scratch for a thread
  cpu::Scratch<T> rows_, d_z_;
};
template <class T>
void index_loss_backward(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Saved<In<T>> saved, T d_loss,
                         Inputs<Out<T>> d_x) {
  KlBackward<T>{cpu, sets, c, s, x, saved, d_loss, d_x}.run();
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
