// What the laws need to know of the library's policies: references, sizes and kinds of inputs. Plain noise would not show errors at the
// edges, so there are also inputs with gates that forget nothing or all, keys that repeat, a softmax near one-hot, and ties.
#ifndef HYBRIDATTN_TESTING_POLICIES_HPP
#define HYBRIDATTN_TESTING_POLICIES_HPP

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/attention/dsa/reference.hpp>
#include <hybridattn/attention/full/reference.hpp>
#include <hybridattn/attention/gdn/reference.hpp>
#include <hybridattn/testing/gates.hpp>
#include <hybridattn/testing/traits.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// q, k and v of a softmax.
inline std::vector<std::string> softmax_kinds() { return {"noise", "near one-hot", "one key for all", "early keys stand out"}; }
inline void draw_softmax(std::string_view kind, Random& random, HostGroup& x) {
  double const steepness = kind == "near one-hot" ? 3 : 1;
  set_normal(x.at("q"), random, steepness);
  set_normal(x.at("k"), random, steepness);
  set_normal(x.at("v"), random);
  HostTensor& k = x.at("k");
  if (kind == "one key for all") correlate(k, 1);
  if (kind == "early keys stand out")   // by more than e^40, so that the online softmax must scale its sums
    for (Index n = 0; n < k.row_count(); n += 5)
      for (Index e = 0; e < k.row_size(); ++e) k.row(n)[e] *= 30.0 / static_cast<double>(1 + n % 30);
}

// Draws the indexer's inputs. With whole numbers, scores are exact and many of them are equal.
inline void draw_index(std::string_view kind, Random& random, HostGroup& x) {
  for (char const* name : {"index_q", "index_k", "index_w"}) {
    HostTensor& tensor = x.at(name);
    if (kind == "ties") set_each(tensor, [&] { return static_cast<double>(random.below(5)) - 2; });
    else set_normal(tensor, random);
  }
  if (kind == "every score 0") set_each(x.at("index_w"), [] { return -0.0; });
  if (kind == "one index key") correlate(x.at("index_k"), 1);
}

// The largest error of a score that a scalar with this eps computes in any order.
inline double score_rounding(dsa::Config const& c, Sequence sequence, dsa::Inputs<In<double>> const& x, Index t, double eps) {
  double largest = 0;
  for (Index s = 0; s <= t; ++s) {
    double size = 0;
    for (Index j = 0; j < c.index_heads; ++j)
      for (Index d = 0; d < c.index_dim; ++d)
        size += std::abs(x.index_w(sequence.start + t, j) * x.index_q(sequence.start + t, j, d) * x.index_k(sequence.start + s, d));
    largest = std::max(largest, size);
  }
  return static_cast<double>(c.index_dim + c.index_heads + 4) * eps * std::abs(c.index_scale) * largest;
}
inline bool all_whole(View<double const, 2> rows) {
  return std::all_of(rows.data, rows.data + rows.count(), [](double x) { return x == std::round(x) && std::abs(x) < 8; });
}
// Whole numbers times a power of two are not rounded, in any scalar and in any order.
inline bool scores_are_exact(dsa::Config const& c, dsa::Inputs<In<double>> const& x) {
  int exponent;
  return std::frexp(std::abs(c.index_scale), &exponent) == 0.5 && all_whole(as_rows(x.index_q)) && all_whole(x.index_k) &&
         all_whole(x.index_w);
}
// Says what is wrong with the keys of a query, or "". They must be keys with the k largest scores among the visible ones, as far as
// rounding can tell, in ascending order, each only once. Ties must be as dsa.hpp (2) says.
inline std::string wrong_keys(std::vector<double> const& scores, std::int32_t const* keys, Index k, double rounding) {
  Index const seen = std::ssize(scores), count = std::min(k, seen);
  std::vector<std::int32_t> best(static_cast<std::size_t>(k));
  dsa::reference::select(scores, k, best.data());
  if (std::equal(best.begin(), best.end(), keys)) return {};
  std::string const found =
      sentence("chooses ", listed(std::span(keys, static_cast<std::size_t>(k))), "; the largest scores have ", listed(best));
  if (rounding == 0) return found;
  std::vector<bool> chosen(scores.size());
  double least = std::numeric_limits<double>::infinity(), most_left_out = -least;
  for (Index i = 0; i < k; ++i) {
    if (i < count ? keys[i] < 0 || keys[i] >= seen || (i > 0 && keys[i] <= keys[i - 1]) : keys[i] != -1) return found;
    if (i >= count) continue;
    chosen[static_cast<std::size_t>(keys[i])] = true;
    least = std::min(least, scores[static_cast<std::size_t>(keys[i])]);
  }
  for (std::size_t s = 0; s < scores.size(); ++s)
    if (!chosen[s]) most_left_out = std::max(most_left_out, scores[s]);
  return least >= most_left_out - 2 * rounding ? std::string() : found;
}
inline std::string wrong_keys(SparseOptions o, dsa::Config const& c, Sequences const& s, dsa::Inputs<In<double>> const& x,
                              dsa::Saved<In<double>> const& saved, double eps) {
  if (c.stage == Stage::dense_warm_up) return {};   // nothing is chosen
  bool const exact = scores_are_exact(c, x);
  for (Sequence const sequence : s)
    for (Index t = 0; t < sequence.length; ++t) {
      std::int32_t const* const keys = saved.indices.row(sequence.start + t);
      Index const k = dsa::selection_size(o, sequence.length), room = saved.indices.extent(1);
      std::string why =
          wrong_keys(dsa::reference::index_scores(c, sequence, x, t), keys, k, exact ? 0 : score_rounding(c, sequence, x, t, eps));
      if (why.empty() && std::any_of(keys + k, keys + room, [](std::int32_t key) { return key != -1; }))
        why = "chooses " + listed(std::span(keys, static_cast<std::size_t>(room))) + " where -1 ends the row";
      if (!why.empty()) return sentence("token ", t, " of ", sequence.length, " ", why);
    }
  return {};
}

}  // namespace detail

template <FullOptions O> struct Reference<FullAttention<O>> {
  static constexpr double tolerance = 1e-11;
  template <class... Args> static void forward(Args const&... args) { full::reference::forward(O, args...); }
  template <class... Args> static void backward(Args const&... args) { full::reference::backward(O, args...); }
};
template <FullOptions O> struct Samples<FullAttention<O>> : PlainSamples<FullAttention<O>> {
  static constexpr bool overflows_like_loops = true;
  // Options are values to the kernels, so windows are judged with fewer head dimensions. Heads of 12 do not fill a vector.
  static std::vector<full::Config> sizes() {
    std::vector<full::Config> list{
        {.num_heads = 2, .num_kv_heads = 1, .head_dim = 12}, {.num_heads = 2, .head_dim = 32}, {.num_heads = 1, .head_dim = 128}};
    if (O.window == 0) {
      list.push_back({.num_heads = 4, .num_kv_heads = 2, .head_dim = 16});
      list.push_back({.num_heads = 2, .num_kv_heads = 1, .head_dim = 64});
    }
    return list;
  }
  static std::vector<std::string> kinds() { return detail::softmax_kinds(); }
  static void draw(std::string_view kind, Random& random, HostGroup& inputs) { detail::draw_softmax(kind, random, inputs); }
};

template <GdnOptions O> struct Reference<GatedDeltaNet<O>> {
  static constexpr double tolerance = 1e-10;   // a recurrence
  template <class... Args> static void forward(Args const&... args) { gdn::reference::forward(args...); }
  template <class... Args> static void backward(Args const&... args) { gdn::reference::backward(args...); }
};
template <GdnOptions O> struct Samples<GatedDeltaNet<O>> : GatedSamples<GatedDeltaNet<O>> {
  using P = GatedDeltaNet<O>;
  static std::vector<gdn::Config> sizes() {
    return {{.num_heads = 1, .num_value_heads = 2, .key_dim = 12, .value_dim = 20},
            {.num_heads = 2, .num_value_heads = 4, .key_dim = 16, .value_dim = 8},
            {.num_heads = 2, .key_dim = 32},
            {.num_heads = 1, .num_value_heads = 2, .key_dim = 64},
            {.num_heads = 1, .key_dim = 128}};
  }
  static gdn::Inputs<Shapes> inputs(gdn::Config const& c, Sequences const& s) {
    auto shapes = P::inputs(c, s);
    shapes.initial_state = gdn::state_shape(c, s);
    return shapes;
  }
  static gdn::Outputs<Shapes> outputs(gdn::Config const& c, Sequences const& s) {
    auto shapes = P::outputs(c, s);
    shapes.final_state = gdn::state_shape(c, s);
    return shapes;
  }
};

template <SparseOptions O> struct Reference<SparseAttention<O>> {
  static constexpr double tolerance = 1e-11;
  template <class T>
  static void forward(dsa::Config const& c, Sequences const& s, dsa::Inputs<In<T>> x, dsa::Outputs<Out<T>> y, dsa::Saved<Out<T>> saved) {
    dsa::reference::attend<T>(c, s, x, saved.indices, y, saved.lse);
    fill(y.auxiliary_loss, wide_t<T>(0));
    if (c.stage != Stage::language_model)
      dsa::reference::index_loss<T>(c, s, x, saved.indices, saved.lse, saved.index_lse, y.auxiliary_loss);
  }
  template <class... Args> static void backward(Args const&... args) { dsa::reference::backward(O, args...); }
};
template <SparseOptions O> struct Samples<SparseAttention<O>> : PlainSamples<SparseAttention<O>> {
  using P = SparseAttention<O>;
  static std::vector<dsa::Config> sizes() {
    std::vector<dsa::Config> list{{.num_heads = 2, .num_kv_heads = 1, .head_dim = 12, .index_heads = 2, .index_dim = 4, .index_scale = 0.5},
                                  {.num_heads = 2, .head_dim = 32, .index_scale = 0.25},
                                  {.num_heads = 1, .head_dim = 128, .index_dim = 32}};
    if (O.top_k == SparseOptions{}.top_k) {   // the default; as for windows
      list.push_back({.num_heads = 4, .num_kv_heads = 2, .head_dim = 16, .index_heads = 3});
      list.push_back({.num_heads = 2, .num_kv_heads = 1, .head_dim = 64});
    }
    // The stages that train the indexer. The dense one does not depend on top_k.
    bool const is_default = O.top_k == SparseOptions{}.top_k;
    list.push_back(at(is_default ? list[1] : list[0], Stage::sparse));
    if (is_default) list.push_back(at(list[0], Stage::dense_warm_up));
    return list;
  }
  static dsa::Outputs<Shapes> outputs(dsa::Config const& c, Sequences const& s) {
    auto shapes = P::outputs(c, s);
    shapes.auxiliary_loss = {1};
    return shapes;
  }
  static dsa::Config at(dsa::Config c, Stage stage) {
    c.stage = stage;
    return c;
  }
  static constexpr bool saved_is_linear = O.top_k_percent == 0, overflows_like_loops = true;
  static std::vector<std::string> kinds() {
    return {"noise", "ties", "every score 0", "one index key", "near one-hot", "early keys stand out"};
  }
  static void draw(std::string_view kind, Random& random, HostGroup& inputs) {
    detail::draw_softmax(kind, random, inputs);
    detail::draw_index(kind, random, inputs);
  }
};

template <SparseOptions O> struct Choices<SparseAttention<O>> {
  static std::string wrong(dsa::Config const& c, Sequences const& s, dsa::Inputs<In<double>> x, dsa::Saved<In<double>> saved, double eps) {
    return detail::wrong_keys(O, c, s, x, saved, eps);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
