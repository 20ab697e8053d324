// Attention policies and their layers against golden values.
#ifndef HYBRIDATTN_TESTS_GOLDEN_POLICIES_HPP
#define HYBRIDATTN_TESTS_GOLDEN_POLICIES_HPP

#include "golden.hpp"

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/core/with_constant.hpp>
#include <hybridattn/nn/attention.hpp>
#include <hybridattn/ops/l2_norm/l2_norm.hpp>
#include <hybridattn/tensor/sequences_on.hpp>

namespace golden {

using ha::On;

// A bound of the scores, by the inequality of Cauchy and Schwarz.
template <class T, class B> double largest_score(Run<T, B>& run, double scale, Tensor<T, 3, B> const& q, Tensor<T, 3, B> const& k) {
  auto const longest = [&](Tensor<T, 3, B> const& x) {
    auto const elements = ha::download(run.backend(), x);
    Index const D = x.shape()[2], rows = x.shape().count() / D;
    double squares = 0;
    for (Index row = 0; row < rows; ++row)
      squares = std::max(squares, static_cast<double>(ha::dot(elements.data() + row * D, elements.data() + row * D, D)));
    return std::sqrt(squares);
  };
  return scale * longest(q) * longest(k);
}

// Calls f with the policy of this window. A test of golden values compiles the windows of its files.
template <class F> void with_window(Index window, F f) {
  ha::with_constant<0, 16, 64>(
      window, [&](auto known) { f(ha::FullAttention<ha::FullOptions{.window = static_cast<int>(known.value)}>{}); },
      [&] { FAIL("a window of " << window << " keys is not compiled here; 0, 16 and 64 keys are"); });
}

// The CPU's kernels take the options as run-time values, so that files may have any.
template <class T, class B> void full(Run<T, B>& run) {
  Case const& c = run.c();
  ha::FullOptions const options{.window = c.option_or("window", 0)};
  ha::full::Config const config{.num_heads = c.size("H"), .num_kv_heads = c.size("HK"), .head_dim = c.size("D"), .scale = c.real("scale")};
  ha::SequencesOn<B> const s{run.backend(), c.sequences()};
  auto const inputs = ha::Full::inputs(config, s);
  auto const outputs = ha::Full::outputs(config, s);
  ha::full::Inputs<Owned<T, B>> const x{.q = run.read("q", inputs.q), .k = run.read("k", inputs.k), .v = run.read("v", inputs.v)};
  ha::full::Outputs<Owned<T, B>> const d_y{.o = run.read("d_o", outputs.o)};
  auto y = run.unset(outputs);
  auto saved = run.unset(ha::Full::saved(config, s));
  auto d_x = run.unset(inputs);
  run.expect_scores(largest_score(run, config.scale, x.q, x.k));
  if constexpr (std::is_same_v<B, ha::Cpu>) {
    ha::full::forward(run.backend(), options, config, s, in(x), out(y), out(saved));
    ha::full::backward(run.backend(), options, config, s, in(x), in(y), in(saved), in(d_y), out(d_x));
  } else {
    with_window(options.window, [&]<class Policy>(Policy) {
      On<Policy, B>::forward(run.backend(), config, s, in(x), out(y), out(saved));
      On<Policy, B>::backward(run.backend(), config, s, in(x), in(y), in(saved), in(d_y), out(d_x));
    });
  }
  run.compare("o", y.o);
  run.compare("lse", saved.lse);
  run.compare("d_q", d_x.q);
  run.compare("d_k", d_x.k);
  run.compare("d_v", d_x.v);
}

// `unit` makes q or k of length one, as the layer does. `unit_backward` returns the gradient through it.
template <class T, class B> Tensor<T, 3, B> unit(Run<T, B>& run, Tensor<T, 3, B> const& raw) {
  auto result = run.unset(raw.shape());
  On<ha::L2Norm, B>::forward(run.backend(), head_rows(in(raw)), head_rows(out(result)));
  return result;
}
template <class T, class B> Tensor<T, 3, B> unit_backward(Run<T, B>& run, Tensor<T, 3, B> const& raw, Tensor<T, 3, B> const& d_unit) {
  auto d_raw = run.unset(raw.shape());
  On<ha::L2Norm, B>::backward(run.backend(), head_rows(in(raw)), head_rows(in(d_unit)), head_rows(out(d_raw)));
  return d_raw;
}

template <class T, class B> void gdn(Run<T, B>& run) {
  Case const& c = run.c();
  ha::gdn::Config const config{.num_heads = c.size("H"),
                               .num_value_heads = c.size("HV"),
                               .key_dim = c.size("K"),
                               .value_dim = c.size("V"),
                               .scale = c.real("scale")};
  bool const l2norm_inside = c.is("l2norm_inside");
  ha::SequencesOn<B> const s{run.backend(), c.sequences()};
  auto const states = ha::gdn::state_shape(config, s);
  auto inputs = ha::GDN::inputs(config, s);
  if (c.is("initial_state")) inputs.initial_state = states;
  auto outputs = ha::GDN::outputs(config, s);
  outputs.final_state = states;
  auto const raw_q = run.read("q", inputs.q), raw_k = run.read("k", inputs.k);
  ha::gdn::Inputs<Owned<T, B>> const x{.q = l2norm_inside ? unit(run, raw_q) : run.read("q", inputs.q),
                                       .k = l2norm_inside ? unit(run, raw_k) : run.read("k", inputs.k),
                                       .v = run.read("v", inputs.v),
                                       .g = run.read("g", inputs.g),
                                       .beta = run.read("beta", inputs.beta),
                                       .initial_state = run.read_if_there("initial_state", states)};
  ha::gdn::Outputs<Owned<T, B>> const d_y{.o = run.read("d_o", outputs.o), .final_state = run.read_if_there("d_final_state", states)};
  auto y = run.unset(outputs);
  auto saved = run.unset(ha::GDN::saved(config, s));
  auto d_x = run.unset(inputs);
  On<ha::GDN, B>::forward(run.backend(), config, s, in(x), out(y), out(saved));
  On<ha::GDN, B>::backward(run.backend(), config, s, in(x), in(y), in(saved), in(d_y), out(d_x));
  run.compare("o", y.o);
  run.compare("final_state", y.final_state);
  run.compare("d_q", l2norm_inside ? unit_backward(run, raw_q, d_x.q) : std::move(d_x.q));
  run.compare("d_k", l2norm_inside ? unit_backward(run, raw_k, d_x.k) : std::move(d_x.k));
  run.compare("d_v", d_x.v);
  run.compare("d_g", d_x.g);
  run.compare("d_beta", d_x.beta);
  if (c.is("initial_state")) run.compare("d_initial_state", d_x.initial_state);
}

// Which keys each query chose, counted from the start of its sequence; then -1.
template <class T, class B> void compare_selection(Run<T, B>& run, Tensor<std::int32_t, 2, B> const& indices) {
  auto const chosen = ha::download(run.backend(), indices);
  run.compare_integers(run.c().contains("indices_local") ? "indices_local" : "indices", {chosen.begin(), chosen.end()});
  auto const k = static_cast<std::size_t>(indices.shape()[1]);
  std::vector<std::int64_t> counts;
  for (std::size_t row = 0; row < chosen.size(); row += k)
    counts.push_back(std::count_if(chosen.data() + row, chosen.data() + row + k, [](auto key) { return key >= 0; }));
  run.compare_integers("counts", counts);
  run.c().pass_over("index_scores");   // the library never has them in memory
  run.c().pass_over("indices");        // in a packed row; indices_local has the same keys
}

template <class T, class B> ha::dsa::Config dsa_config(Run<T, B>& run) {
  Case const& c = run.c();
  return {.num_heads = c.size("H"),
          .num_kv_heads = c.size("HK"),
          .head_dim = c.size("D"),
          .scale = c.real("scale"),
          .index_heads = c.size("HI"),
          .index_dim = c.size("DI"),
          .index_scale = c.real("index_scale")};
}
// The shapes of Saved for a number of keys that is known at run time.
inline ha::dsa::Saved<ha::Shapes> dsa_saved(ha::SparseOptions options, ha::dsa::Config const& config, ha::Sequences const& s) {
  auto shapes = ha::DSA::saved(config, s);
  if (config.stage != ha::Stage::dense_warm_up) shapes.indices = {s.tokens(), ha::dsa::selection_size(options, s.longest())};
  return shapes;
}
template <class T, class B> bool is_zero(Run<T, B>& run, auto const& tensor) {
  return std::ranges::all_of(ha::download(run.backend(), tensor), [](T x) { return x == 0; });
}

// Both passes. As for full attention, only the CPU takes the number of keys as a run-time value.
template <class B, class T>
void dsa_passes(B& backend, ha::SparseOptions options, ha::dsa::Config const& config, ha::SequencesOn<B> const& s, ha::dsa::Inputs<In<T>> x,
                ha::dsa::Outputs<Owned<T, B>>& y, ha::dsa::Saved<Owned<T, B>>& saved, ha::dsa::Outputs<In<T>> d_y,
                ha::dsa::Inputs<Out<T>> d_x) {
  if constexpr (std::is_same_v<B, ha::Cpu>) {
    ha::dsa::forward(backend, options, config, s, x, out(y), out(saved));
    ha::dsa::backward(backend, options, config, s, x, in(y), in(saved), d_y, d_x);
  } else {
    ha::with_constant<1, 8, 16, 33>(
        options.top_k,
        [&](auto known) {
          using Policy = ha::SparseAttention<ha::SparseOptions{.top_k = static_cast<int>(known.value)}>;
          On<Policy, B>::forward(backend, config, s, x, out(y), out(saved));
          On<Policy, B>::backward(backend, config, s, x, in(y), in(saved), d_y, d_x);
        },
        [&] { FAIL("top_k = " << options.top_k << " is not compiled here; 1, 8, 16 and 33 are"); });
  }
}

template <class T, class B> void dsa(Run<T, B>& run) {
  Case const& c = run.c();
  ha::SparseOptions const options{.top_k = c.option("top_k").get<int>()};
  auto const config = dsa_config(run);
  ha::SequencesOn<B> const s{run.backend(), c.sequences()};
  auto const inputs = ha::DSA::inputs(config, s);
  auto const outputs = ha::DSA::outputs(config, s);
  ha::dsa::Inputs<Owned<T, B>> const x{.q = run.read("q", inputs.q),
                                       .k = run.read("k", inputs.k),
                                       .v = run.read("v", inputs.v),
                                       .index_q = run.read("index_q", inputs.index_q),
                                       .index_k = run.read("index_k", inputs.index_k),
                                       .index_w = run.read("index_w", inputs.index_w)};
  ha::dsa::Outputs<Owned<T, B>> const d_y{.o = run.read("d_o", outputs.o), .auxiliary_loss = {}};
  auto y = run.unset(outputs);
  auto saved = run.unset(dsa_saved(options, config, s));
  auto d_x = run.unset(inputs);
  run.expect_scores(largest_score(run, config.scale, x.q, x.k));
  dsa_passes(run.backend(), options, config, s, in(x), y, saved, in(d_y), out(d_x));
  compare_selection(run, saved.indices);
  run.compare("o", y.o);
  run.compare("lse", saved.lse);
  run.compare("d_q", d_x.q);
  run.compare("d_k", d_x.k);
  run.compare("d_v", d_x.v);
  CHECK((is_zero(run, d_x.index_q) && is_zero(run, d_x.index_k) && is_zero(run, d_x.index_w)));   // choosing has no gradient
}

// Each query's part of the loss. The kernel does not return it, so this calls an inner function of the CPU's kernel.
template <class T>
std::vector<T> query_losses(Run<T, ha::Cpu>& run, ha::SparseOptions options, ha::dsa::Config const& config, ha::Sequences const& s,
                            ha::dsa::Inputs<In<T>> x, ha::dsa::Saved<Out<T>> saved) {
  std::vector<T> losses(static_cast<std::size_t>(s.tokens()));
  ha::dsa::KeySets const sets{run.backend(), options, config, s, saved.indices};
  ha::dsa::query_losses<T>(run.backend(), sets, config, s, x, saved.lse, saved.index_lse, losses.data());
  return losses;
}
// The indexer's loss, over all visible keys or over the selected ones. The files have no v, so v is zero here.
template <class T, class B> void dsa_kl(Run<T, B>& run) {
  Case const& c = run.c();
  ha::SparseOptions const options{.top_k = c.option("top_k").get<int>()};
  bool const selected = c.word("over") == "selected";
  REQUIRE((selected || c.word("over") == "visible"));
  auto config = dsa_config(run);
  config.stage = selected ? ha::Stage::sparse : ha::Stage::dense_warm_up;
  ha::SequencesOn<B> const s{run.backend(), c.sequences()};
  auto const inputs = ha::DSA::inputs(config, s);
  ha::dsa::Inputs<Owned<T, B>> const x{.q = run.read("q", inputs.q),
                                       .k = run.read("k", inputs.k),
                                       .v = ha::zeros<T>(run.backend(), inputs.v),
                                       .index_q = run.read("index_q", inputs.index_q),
                                       .index_k = run.read("index_k", inputs.index_k),
                                       .index_w = run.read("index_w", inputs.index_w)};
  ha::dsa::Outputs<Owned<T, B>> const d_y{.o = {}, .auxiliary_loss = run.read("d_loss", Shape<1>{1})};
  auto y = run.unset(ha::DSA::outputs(config, s));
  auto saved = run.unset(dsa_saved(options, config, s));
  auto d_x = run.unset(inputs);
  run.expect_scores(largest_score(run, config.scale, x.q, x.k));
  dsa_passes(run.backend(), options, config, s, in(x), y, saved, in(d_y), out(d_x));
  if (selected) compare_selection(run, saved.indices);
  run.compare("lse", saved.lse);
  run.compare("loss", y.auxiliary_loss);
  if constexpr (std::is_same_v<B, ha::Cpu>) run.compare("loss_rows", query_losses(run, options, config, s, in(x), out(saved)));
  else c.pass_over("loss_rows");
  run.compare("d_index_q", d_x.index_q);
  run.compare("d_index_k", d_x.index_k);
  run.compare("d_index_w", d_x.index_w);
  CHECK((is_zero(run, d_x.q) && is_zero(run, d_x.k) && is_zero(run, d_x.v)));
  for (char const* name : {"target", "index_scores"}) c.pass_over(name);   // the library never has them in memory
}

// A whole layer with parameters of the given shapes. `names` gives their names in the file.
template <class Policy, class T, class B, class Params, class Names>
void layer(Run<T, B>& run, typename Policy::Config const& config, Params const& shapes, Names names) {
  using Layer = ha::Attention<Policy>;
  Case const& c = run.c();
  ha::SequencesOn<B> const s{run.backend(), c.sequences()};
  Shape<2> const rows{c.tokens(), c.size("C")};
  auto params = run.unset(shapes), d_params = run.unset(shapes);
  run.read(names(out(params)));
  auto const x = run.read("x", rows), d_y = run.read("d_y", rows);
  typename Layer::template Saved<Owned<T, B>> saved;
  auto const y = Layer::forward(run.backend(), config, s, in(params), in(x), saved);
  auto const d_x = Layer::backward(run.backend(), config, s, in(params), in(x), std::move(saved), in(d_y), out(d_params));
  run.compare("y", y);
  run.compare("d_x", d_x);
  run.compare_gradients(names(out(d_params)));
}

// Positions count from 0 here and from `offset` in the file. Scores are the same, because they depend only on differences of positions.
template <int percent, class T, class B> void full_layer_with(Run<T, B>& run) {
  using Policy = ha::FullAttention<ha::FullOptions{.rotary_percent = percent}>;
  Case const& c = run.c();
  auto const config = Policy::complete({.num_heads = c.size("H"),
                                        .num_kv_heads = c.size("HK"),
                                        .head_dim = c.size("D"),
                                        .rope_theta = c.real("theta"),
                                        .norm_eps = c.real("eps")},
                                       c.size("C"), c.size("H"));
  layer<Policy>(run, config, ha::Attention<Policy>::params(config, c.size("C")), [&](auto const& p) {
    return std::vector{fused("q_proj.weight", config.num_heads, p.w.q, p.w_gate),
                       one("k_proj.weight", p.w.k),
                       one("v_proj.weight", p.w.v),
                       one("o_proj.weight", p.w_o),
                       one("q_norm.weight", p.prepare.q_norm),
                       one("k_norm.weight", p.prepare.k_norm)};
  });
}
template <class T, class B> void full_layer(Run<T, B>& run) {
  Case const& c = run.c();
  Index const percent = std::lround(100 * c.real("rotary_fraction"));
  REQUIRE(c.size("D") * percent / 200 * 2 == c.size("rotary_dim"));
  ha::with_constant<25, 50, 75, 100>(
      percent, [&](auto known) { full_layer_with<static_cast<int>(known.value)>(run); },
      [&] { FAIL("layers with " << percent << " % rotary are not compiled here; 25, 50, 75 and 100 % are"); });
}

// The layout qwen3_next groups rows of the projections by key head, and stacks the convolutions.
template <class P> auto fused_names(P const& p, Index heads) {
  return std::vector{fused("in_proj_qkvz.weight", heads, p.w.q, p.w.k, p.w.v, p.w_gate),
                     fused("in_proj_ba.weight", heads, p.w.beta, p.w.g),
                     fused("conv1d.weight", 1, p.prepare.conv_q, p.prepare.conv_k, p.prepare.conv_v),
                     one("A_log", p.prepare.a_log),
                     one("dt_bias", p.prepare.dt_bias),
                     one("norm.weight", p.finish.norm),
                     one("out_proj.weight", p.w_o)};
}
// The layout fla has one matrix for each projection. A projection that an option turns off has none.
template <class P> auto separate_names(P const& p) {
  std::vector names{one("q_proj.weight", p.w.q),       one("k_proj.weight", p.w.k),         one("v_proj.weight", p.w.v),
                    one("a_proj.weight", p.w.g),       one("b_proj.weight", p.w.beta),      one("A_log", p.prepare.a_log),
                    one("dt_bias", p.prepare.dt_bias), one("o_norm.weight", p.finish.norm), one("o_proj.weight", p.w_o)};
  if (!p.w_gate.empty()) names.push_back(one("g_proj.weight", p.w_gate));
  if (p.prepare.conv_q.empty()) return names;
  names.push_back(one("q_conv1d.weight", p.prepare.conv_q));
  names.push_back(one("k_conv1d.weight", p.prepare.conv_k));
  names.push_back(one("v_conv1d.weight", p.prepare.conv_v));
  return names;
}

// The convolution's width in the type only sets the shapes of its parameters. With the file's shapes, one type runs all widths.
template <ha::GdnOptions O, class T, class B> void gdn_layer_with(Run<T, B>& run) {
  using Policy = ha::GatedDeltaNet<O>;
  Case const& c = run.c();
  auto const config = Policy::complete({.num_heads = c.size("H"),
                                        .num_value_heads = c.size("HV"),
                                        .key_dim = c.size("K"),
                                        .value_dim = c.size("V"),
                                        .norm_eps = c.real("eps")},
                                       c.size("C"), c.size("H"));
  auto shapes = ha::Attention<Policy>::params(config, c.size("C"));
  for (Shape<2>* conv : {&shapes.prepare.conv_q, &shapes.prepare.conv_k, &shapes.prepare.conv_v})
    if (O.conv_width > 0) conv->extent[1] = c.size("W");
  bool const is_fused = c.word("layout") == "qwen3_next";
  layer<Policy>(run, config, shapes, [&](auto const& p) { return is_fused ? fused_names(p, config.num_heads) : separate_names(p); });
}
template <int width, class T, class B> void gdn_layer_with(Run<T, B>& run) {
  bool const output_gate = run.c().is("use_gate"), negative = run.c().is("allow_neg_eigval");
  if (output_gate && negative) gdn_layer_with<ha::GdnOptions{width, true, true}>(run);
  else if (output_gate) gdn_layer_with<ha::GdnOptions{width, true, false}>(run);
  else if (negative) gdn_layer_with<ha::GdnOptions{width, false, true}>(run);
  else gdn_layer_with<ha::GdnOptions{width, false, false}>(run);
}
template <class T, class B> void gdn_layer(Run<T, B>& run) {
  run.c().is("use_short_conv") ? gdn_layer_with<4>(run) : gdn_layer_with<0>(run);
}

template <class B>
inline constexpr std::array policies_on{
    Family<B>{"dsa", dsa<double, B>, dsa<float, B>},
    Family<B>{"dsa_kl", dsa_kl<double, B>, dsa_kl<float, B>},
    Family<B>{"full", full<double, B>, full<float, B>},
    Family<B>{"gdn", gdn<double, B>, gdn<float, B>},
};
template <class B> inline constexpr std::array layers_on{Family<B>{"full_layer", full_layer<double, B>, full_layer<float, B>},
                                                         Family<B>{"gdn_layer", gdn_layer<double, B>, gdn_layer<float, B>}};

}  // namespace golden
#endif
