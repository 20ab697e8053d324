// Operators, feed-forward layers, the optimiser and the schedule against golden values.
#ifndef HYBRIDATTN_TESTS_GOLDEN_OPERATIONS_HPP
#define HYBRIDATTN_TESTS_GOLDEN_OPERATIONS_HPP

#include "golden.hpp"

#include <hybridattn/nn/balance_loss.hpp>
#include <hybridattn/ops/causal_conv1d/causal_conv1d.hpp>
#include <hybridattn/ops/cross_entropy/cross_entropy.hpp>
#include <hybridattn/ops/gdn_gate/gdn_gate.hpp>
#include <hybridattn/ops/l2_norm/l2_norm.hpp>
#include <hybridattn/ops/rms_norm/rms_norm.hpp>
#include <hybridattn/ops/rope/rope.hpp>
#include <hybridattn/tensor/sequences_on.hpp>
#include <hybridattn/train/adamw.hpp>
#include <hybridattn/train/schedule.hpp>

namespace golden {

using ha::On;

template <class T, class B> void rms_norm(Run<T, B>& run) {
  Case const& c = run.c();
  Shape<2> const rows{c.tokens(), c.size("C")};
  Shape<1> const channels{c.size("C")};
  ha::RmsNorm::Options const options{c.is("zero_centered") ? ha::NormWeight::zero_centred : ha::NormWeight::plain, c.real("eps")};
  auto const x = run.read("x", rows), d_y = run.read("d_y", rows);
  auto const w = run.read("weight", channels);
  auto y = run.unset(rows), d_x = run.unset(rows);
  auto d_w = run.unset(channels);
  On<ha::RmsNorm, B>::forward(run.backend(), options, in(x), in(w), out(y));
  On<ha::RmsNorm, B>::backward(run.backend(), options, in(x), in(w), in(d_y), out(d_x), out(d_w), ha::Into::overwrite);
  run.compare("y", y);
  run.compare("d_x", d_x);
  run.compare("d_weight", d_w);
}

template <class T, class B> void gated_rms_norm(Run<T, B>& run) {
  Case const& c = run.c();
  Shape<2> const rows{c.tokens() * c.size("HV"), c.size("V")};
  Shape<1> const channels{c.size("V")};
  double const eps = c.real("eps");
  auto const x = run.read("x", rows), z = run.read("z", rows), d_y = run.read("d_y", rows);
  auto const w = run.read("weight", channels);
  auto y = run.unset(rows), d_x = run.unset(rows), d_z = run.unset(rows);
  auto d_w = run.unset(channels);
  On<ha::GatedRmsNorm, B>::forward(run.backend(), eps, in(x), in(z), in(w), out(y));
  On<ha::GatedRmsNorm, B>::backward(run.backend(), eps, in(x), in(z), in(w), in(d_y), out(d_x), out(d_z), out(d_w));
  run.compare("y", y);
  run.compare("d_x", d_x);
  run.compare("d_z", d_z);
  run.compare("d_weight", d_w);
}

// The operator has one eps. Another eps is the same function of a stretched x: y(x, eps) = y(a x, a^2 eps).
template <class T, class B> void l2_norm(Run<T, B>& run) {
  Case const& c = run.c();
  Shape<2> const rows{c.tokens() * c.size("H"), c.size("D")};
  T const stretch = static_cast<T>(std::sqrt(ha::L2Norm::eps / c.real("eps")));
  auto const stretched = [&](auto const& values) {
    std::vector<T> result(values.begin(), values.end());
    for (T& value : result) value *= stretch;
    return result;
  };
  auto const x = run.make(stretched(c.doubles("x")), rows), d_y = run.read("d_y", rows);
  auto y = run.unset(rows), d_x = run.unset(rows);
  On<ha::L2Norm, B>::forward(run.backend(), in(x), out(y));
  On<ha::L2Norm, B>::backward(run.backend(), in(x), in(d_y), out(d_x));
  run.compare("y", y);
  run.compare("d_x", stretched(ha::download(run.backend(), d_x)));
}

template <class T, class B> void rope(Run<T, B>& run) {
  Case const& c = run.c();
  Shape<3> const shape{c.tokens(), c.size("H"), c.size("D")};
  ha::Rope::Options const options{c.size("rotary_dim"), c.real("theta"), c.is("interleaved")};
  auto const x = run.read("x", shape), d_y = run.read("d_y", shape);
  auto const positions = run.read_integers("positions", c.tokens());
  Index const largest = std::ranges::max(c.integers("positions"));
  auto angles = run.unset(Shape<3>{largest + 1, 2, options.rotary_dim / 2});
  auto y = run.unset(shape), d_x = run.unset(shape);
  On<ha::RopeAngles, B>::forward(run.backend(), options, {}, out(angles));
  On<ha::Rope, B>::forward(run.backend(), options, in(angles), in(positions), in(x), out(y));
  On<ha::Rope, B>::backward(run.backend(), options, in(angles), in(positions), in(d_y), out(d_x));
  run.compare("y", y);
  run.compare("d_x", d_x);
}

template <class T, class B> void causal_conv1d(Run<T, B>& run) {
  Case const& c = run.c();
  ha::SequencesOn<B> const s{run.backend(), c.sequences()};
  Shape<2> const rows{c.tokens(), c.size("C")}, taps{c.size("C"), c.size("W")};
  Shape<3> const states{s.count(), c.size("W") - 1, c.size("C")};
  auto const activation = c.word("activation") == "silu" ? ha::Activation::silu : ha::Activation::none;
  auto const x = run.read("x", rows), d_y = run.read("d_y", rows), w = run.read("weight", taps);
  auto const initial_state = run.read_if_there("initial_state", states), d_final_state = run.read_if_there("d_final_state", states);
  auto y = run.unset(rows), d_x = run.unset(rows), d_w = run.unset(taps);
  auto final_state = run.unset(states);
  auto d_initial_state = initial_state ? run.unset(states) : Tensor<T, 3, B>{};
  On<ha::CausalConv1d, B>::forward(run.backend(), activation, s, in(x), in(w), in(initial_state), out(y), out(final_state));
  On<ha::CausalConv1d, B>::backward(run.backend(), activation, s, in(x), in(w), in(initial_state), in(d_y), in(d_final_state), out(d_x),
                                    out(d_w), out(d_initial_state));
  run.compare("y", y);
  run.compare("final_state", final_state);
  run.compare("d_x", d_x);
  run.compare("d_weight", d_w);
  if (c.contains("d_initial_state")) run.compare("d_initial_state", d_initial_state);
}

// The operator also makes beta, which the files do not have.
template <class T, class B> void gdn_gate(Run<T, B>& run) {
  Case const& c = run.c();
  Shape<2> const gates{c.tokens(), c.size("HV")};
  Shape<1> const heads{c.size("HV")};
  auto const a = run.read("a", gates), d_g = run.read("d_g", gates), zero = ha::zeros<T>(run.backend(), gates);
  auto const a_log = run.read("A_log", heads), dt_bias = run.read("dt_bias", heads);
  auto g = run.unset(gates), beta = run.unset(gates), d_a = run.unset(gates), d_b = run.unset(gates);
  auto d_a_log = run.unset(heads), d_dt_bias = run.unset(heads);
  On<ha::GdnGate, B>::forward(run.backend(), 1, in(a), in(zero), in(a_log), in(dt_bias), out(g), out(beta));
  On<ha::GdnGate, B>::backward(run.backend(), 1, in(a), in(zero), in(a_log), in(dt_bias), in(d_g), in(zero), out(d_a), out(d_b),
                               out(d_a_log), out(d_dt_bias));
  run.compare("g", g);
  run.compare("d_a", d_a);
  run.compare("d_A_log", d_a_log);
  run.compare("d_dt_bias", d_dt_bias);
  run.compare("beta of b = 0", ha::download(run.backend(), beta), std::vector<double>(static_cast<std::size_t>(gates.count()), 0.5));
}

template <class T, class B> void swiglu(Run<T, B>& run) {
  Case const& c = run.c();
  Shape<2> const rows{c.tokens(), c.size("C")};
  Index const F = c.size("intermediate");
  auto const names = [](auto const& p) {
    return std::vector{one("gate_proj.weight", p.gate), one("up_proj.weight", p.up), one("down_proj.weight", p.down)};
  };
  auto params = run.unset(ha::Mlp::params(rows[1], F, true)), d_params = run.unset(ha::Mlp::params(rows[1], F, true));
  auto saved = run.unset(ha::Mlp::saved(rows[0], F, true)), d = run.unset(ha::Mlp::saved(rows[0], F, true));
  run.read(names(out(params)));
  auto const x = run.read("x", rows), d_y = run.read("d_y", rows);
  auto y = run.unset(rows), d_x = run.unset(rows);
  ha::Mlp::forward(run.backend(), in(params), in(x), out(saved), out(y));
  ha::Mlp::backward(run.backend(), in(params), in(x), in(saved), in(d_y), out(d), out(d_x), ha::Into::overwrite, out(d_params));
  run.compare("y", y);
  run.compare("d_x", d_x);
  run.compare_gradients(names(out(d_params)));
}

inline ha::FeedForwardConfig mixture(Case const& c, double balance_coefficient) {
  ha::FeedForwardConfig config;
  config.num_experts = c.size("E");
  config.top_k = c.size("top_k");
  config.expert_dim = c.size("intermediate");
  config.shared_dim = c.size("shared") == 0 ? -1 : c.size("shared");
  config.balance_coefficient = balance_coefficient;
  return config.completed(c.size("C"));
}
template <class T> std::vector<Fused<T>> mixture_names(ha::FeedForward::Params<ha::Out<T>> const& p, Index num_experts) {
  std::vector<Fused<T>> names{one("gate.weight", p.router), one("experts.down_proj", p.experts.down),
                              fused("experts.gate_up_proj", num_experts, p.experts.gate, p.experts.up)};
  if (p.shared.gate.empty()) return names;
  names.push_back(one("shared_expert.gate_proj.weight", p.shared.gate));
  names.push_back(one("shared_expert.up_proj.weight", p.shared.up));
  names.push_back(one("shared_expert.down_proj.weight", p.shared.down));
  names.push_back(one("shared_expert_gate.weight", p.shared_gate));
  return names;
}

template <class T, class B>
double balance_loss(Run<T, B>& run, ha::FeedForwardConfig const& config, double scale, ha::FeedForward::Saved<ha::Owned<T, B>>& saved) {
  auto value = ha::zeros<double>(run.backend(), Shape<1>{1});
  auto* const layer = &saved;
  ha::balance_loss<B, T>(run.backend(), config, scale, std::span(&layer, 1), out(value));
  return ha::download(run.backend(), value)[0];
}

// The router's decisions: probabilities, chosen experts, and the loss that balances them (with coefficient one).
template <class T, class B> void compare_routing(Run<T, B>& run, ha::FeedForward::Saved<ha::Owned<T, B>>& saved) {
  auto probabilities = run.c().doubles("router_logits");
  auto const E = static_cast<std::size_t>(run.c().size("E"));
  for (std::size_t row = 0; row < probabilities.size(); row += E) {
    double sum = 0;
    for (std::size_t e = row; e < row + E; ++e) sum += probabilities[e] = std::exp(probabilities[e]);
    for (std::size_t e = row; e < row + E; ++e) probabilities[e] /= sum;
  }
  run.compare("softmax of router_logits", ha::download(run.backend(), saved.probabilities), probabilities);

  auto const chosen = ha::download(run.backend(), saved.chosen);
  std::vector<std::int64_t> ascending(chosen.begin(), chosen.end());
  auto const k = static_cast<std::ptrdiff_t>(run.c().size("top_k"));
  for (auto row = ascending.begin(); row != ascending.end(); row += k) std::sort(row, row + k);
  run.compare_integers("selected_experts", ascending);

  run.compare("aux_loss", {static_cast<T>(balance_loss(run, mixture(run.c(), 1), 0, saved))});
}

template <class T, class B> void moe(Run<T, B>& run) {
  Case const& c = run.c();
  Shape<2> const rows{c.tokens(), c.size("C")};
  auto const config = mixture(c, c.doubles("d_aux_loss").at(0));
  auto params = run.unset(ha::FeedForward::params(config, 0, rows[1])), d_params = run.unset(ha::FeedForward::params(config, 0, rows[1]));
  run.read(mixture_names(out(params), config.num_experts));
  auto const x = run.read("x", rows), d_y = run.read("d_y", rows);

  ha::FeedForward::Saved<ha::Owned<T, B>> saved;
  auto const y = ha::FeedForward::forward(run.backend(), config, 0, in(params), in(x), saved);
  compare_routing(run, saved);
  balance_loss(run, config, 1, saved);
  auto const d_x = ha::FeedForward::backward(run.backend(), config, 0, in(params), in(x), std::move(saved), in(d_y), out(d_params));
  run.compare("y", y);
  run.compare("d_x", d_x);
  run.compare_gradients(mixture_names(out(d_params), config.num_experts));
}

// The target of each position. It is the position's own label or, with `shift`, that of the next position, and the last one has no target.
inline std::vector<std::int32_t> targets(Case const& c) {
  auto const labels = c.integers("labels");
  Index const T = c.size("T"), shift = c.is("shift") ? 1 : 0;
  std::vector<std::int32_t> result;
  for (Index n = 0; n < c.tokens(); ++n)
    result.push_back(n % T + shift < T ? static_cast<std::int32_t>(labels[static_cast<std::size_t>(n + shift)]) : -100);
  return result;
}

template <class T, class B> void cross_entropy(Run<T, B>& run) {
  Case const& c = run.c();
  auto const goals = targets(c);
  auto const labels = run.make(goals, Shape<1>{c.tokens()});
  auto const counted = std::ranges::count_if(goals, [](auto target) { return target >= 0; });
  double const scale = c.doubles("d_loss").at(0) / static_cast<double>(counted);   // the files hold means
  Shape<2> const logits_shape{c.tokens(), c.size("vocab")};
  Shape<1> const single{1};
  auto sum = run.make(std::vector<ha::LossSum>(1), single);
  auto const factor = run.make(std::vector{scale}, single);
  if (c.contains("logits")) {
    auto const logits = run.read("logits", logits_shape);
    auto d_logits = run.unset(logits_shape);
    On<ha::SoftmaxLoss, B>::forward(run.backend(), in(logits), in(labels), in(factor), out(d_logits), out(sum));
    run.compare("d_logits", d_logits);
  } else {
    Shape<2> const rows{c.tokens(), c.size("C")}, weights{c.size("vocab"), c.size("C")};
    auto const x = run.read("x", rows), w = run.read("weight", weights);
    auto d_x = run.unset(rows), d_w = run.unset(weights);
    On<ha::CrossEntropy, B>::backward(run.backend(), in(x), in(w), in(labels), in(factor), out(d_x), out(d_w), out(sum));
    run.compare("d_x", d_x);
    run.compare("d_weight", d_w);
    auto again = run.make(std::vector<ha::LossSum>(1), single);
    On<ha::CrossEntropy, B>::forward(run.backend(), in(x), in(w), in(labels), out(again));
    CHECK(ha::download(run.backend(), sum)[0].loss == ha::download(run.backend(), again)[0].loss);
  }
  ha::LossSum const loss = ha::download(run.backend(), sum)[0];
  CHECK(loss.count == counted);
  run.compare("loss", {static_cast<T>(loss.mean())});
}

// The tensors of a case of AdamW, as vectors. A case with fewer tensors leaves the last ones empty.
template <class S> struct Trajectory {
  ha::Held<S, 1> param_0, param_1, param_2, param_3, param_4, param_5;
  HYBRIDATTN_FIELDS(param_0, param_1, param_2, param_3, param_4, param_5)
};

inline ha::AdamWOptions adamw_options(Case const& c) {
  ha::AdamWOptions options{.learning_rate = c.real("learning_rate"),
                           .beta_1 = c.real("beta1"),
                           .beta_2 = c.real("beta2"),
                           .epsilon = c.real("eps"),
                           .weight_decay = c.real("weight_decay"),
                           .max_norm = c.option_or("max_norm", 0.0),
                           .bias_correction = c.is("bias_correction"),
                           .decays = {}};
  auto const decay = c.option("decay");
  if (!decay.is_null())
    options.decays = [decay](std::string_view path) {
      auto const number = static_cast<std::size_t>(path.back() - '0');
      return number < decay.size() && decay[number].template get<bool>();
    };
  return options;
}

// Computes the moments by single steps, with the norms of the file, and compares them.
template <class T, class B> void compare_moments(Run<T, B>& run, std::string const& number, Shape<2> steps) {
  auto const options = adamw_options(run.c());
  auto const gradients = run.read("grad_" + number, steps);
  auto const norms = run.c().doubles("grad_norm");
  Shape<1> const line{steps[1]};
  auto mean = ha::zeros<T>(run.backend(), line), square = ha::zeros<T>(run.backend(), line), p = ha::zeros<T>(run.backend(), line);
  for (Index step = 0; step < steps[0]; ++step) {
    double const norm = norms[static_cast<std::size_t>(step)];
    ha::AdamWRates const rates{.learning_rate = 0,
                               .beta_1 = options.beta_1,
                               .beta_2 = options.beta_2,
                               .epsilon = 1,
                               .weight_decay = 0,
                               .correction_1 = 1,
                               .correction_2 = 1,
                               .gradient_scale = options.max_norm == 0 ? 1 : std::min(1.0, options.max_norm / (norm + 1e-6))};
    Shape<1> const single{1};
    auto const numbers = run.make(std::vector<ha::StepNumbers>(1), single);
    auto const rates_there = run.make(std::vector{rates}, single);
    ha::AdamWTensor<T> const tensor{out(p).data, in(gradients).row(step), out(mean).data, out(square).data, steps[1], 0};
    auto const tensors = run.make(std::vector{tensor}, single);
    On<ha::AdamWStep, B>::forward(run.backend(), in(tensors), in(rates_there), in(numbers));
  }
  run.compare("exp_avg_" + number, mean);
  run.compare("exp_avg_sq_" + number, square);
}

template <class T, class B> void adamw(Run<T, B>& run) {
  Case const& c = run.c();
  Index const steps = c.size("steps");
  auto const shapes = c.option("shapes").get<std::vector<std::vector<Index>>>();
  REQUIRE(shapes.size() <= 6);
  Trajectory<ha::Owned<T, B>> params, gradients;
  std::vector<std::vector<T>> all_gradients, all_params(shapes.size());
  ha::zip(
      [&](ha::Path const&, auto& p, auto& g) {
        if (all_gradients.size() == shapes.size()) return;
        auto const number = std::to_string(all_gradients.size());
        Index count = 1;
        for (Index extent : shapes[all_gradients.size()]) count *= extent;
        p = run.read("initial_param_" + number, Shape<1>{count});
        g = run.unset(Shape<1>{count});
        all_gradients.push_back(ha::download(run.backend(), run.read("grad_" + number, Shape<2>{steps, count})));
        compare_moments(run, number, {steps, count});
      },
      params, gradients);

  ha::AdamW optimizer{run.backend(), params, adamw_options(c)};
  std::vector<T> norms;
  for (Index step = 0; step < steps; ++step) {
    auto from = all_gradients.begin();
    ha::zip(
        [&](ha::Path const&, auto& g) {
          if (!g) return;
          auto const count = static_cast<std::size_t>(g.shape()[0]);
          ha::upload(run.backend(), std::span<T const>(*from++).subspan(static_cast<std::size_t>(step) * count, count), g);
        },
        gradients);
    norms.push_back(static_cast<T>(optimizer.step(run.backend(), params, gradients)));
    auto to = all_params.begin();
    ha::zip(
        [&](ha::Path const&, auto const& p) {
          if (p) std::ranges::copy(ha::download(run.backend(), p), std::back_inserter(*to++));
        },
        params);
  }
  run.compare("grad_norm", norms);
  for (std::size_t i = 0; i < shapes.size(); ++i) run.compare("param_" + std::to_string(i), all_params[i]);
}

template <class B> void schedule(Run<double, B>& run) {
  Case const& c = run.c();
  REQUIRE(c.real("num_cycles") == 0.5);
  ha::Schedule const rate{
      .warmup_steps = c.size("warmup_steps"), .total_steps = c.size("total_steps"), .min_rate = c.option_or("min_lr_rate", 0.0)};
  std::vector<double> rates;
  for (Index step = 0; step <= rate.total_steps; ++step) rates.push_back(c.real("learning_rate") * rate(step));
  run.compare("lr", rates);
}

template <class B>
inline constexpr std::array operations_on{
    Family<B>{"adamw", adamw<double, B>, adamw<float, B>},
    Family<B>{"causal_conv1d", causal_conv1d<double, B>, causal_conv1d<float, B>},
    Family<B>{"cross_entropy", cross_entropy<double, B>, cross_entropy<float, B>},
    Family<B>{"gated_rms_norm", gated_rms_norm<double, B>, gated_rms_norm<float, B>},
    Family<B>{"gdn_gate", gdn_gate<double, B>, gdn_gate<float, B>},
    Family<B>{"l2_norm", l2_norm<double, B>, l2_norm<float, B>},
    Family<B>{"moe", moe<double, B>, moe<float, B>},
    Family<B>{"rms_norm", rms_norm<double, B>, rms_norm<float, B>},
    Family<B>{"rope", rope<double, B>, rope<float, B>},
    Family<B>{"schedule", schedule<B>},
    Family<B>{"swiglu", swiglu<double, B>, swiglu<float, B>},
};

}  // namespace golden
#endif
