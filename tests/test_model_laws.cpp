// The laws of Block, Stack and LanguageModel, mixtures of experts included.
#include "catch.hpp"
#include "error_of.hpp"
#include "latent.hpp"

#include <hybridattn/hybridattn.hpp>

#include <cstring>
#include <limits>

namespace ha = hybridattn;
using ha::Index;

namespace {

using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = 5}>;
using Windowed = ha::FullAttention<ha::FullOptions{.window = 7}>;
using One = ha::Stack<ha::GDN>;
using Mixed = ha::Stack<ha::GDN, Sparse, ha::Full, Windowed>;
// Every option has another value than its default, and one policy has inputs that are not projections.
using Bare =
    ha::Stack<latent::Attention, ha::GatedDeltaNet<ha::GdnOptions{.conv_width = 0, .output_gate = false, .negative_eigenvalues = true}>,
              ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 0}>,
              ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::plain, .rotary_percent = 50, .rotary = ha::Rotary::interleaved}>,
              ha::SparseAttention<ha::SparseOptions{.top_k = 0,
                                                    .top_k_percent = 40,
                                                    .qk_norm = ha::QkNorm::none,
                                                    .output_gate = false,
                                                    .rotary_percent = 100,
                                                    .index_rotary_percent = 50,
                                                    .index_norm = true}>>;

template <class Stack> typename ha::LanguageModel<Stack>::Config small_config() {
  typename ha::LanguageModel<Stack>::Config config{.vocab_size = 19,
                                                   .model_dim = 24,
                                                   .num_heads = 2,
                                                   .feed_forward = {.hidden_dim = 20,
                                                                    .num_experts = 4,
                                                                    .top_k = 2,
                                                                    .expert_dim = 12,
                                                                    .shared_dim = 8,
                                                                    .decoder_sparse_step = 2,
                                                                    .balance_coefficient = 0.1},
                                                   .initialization = {.linear_deviation = 0, .embedding_deviation = 1}};
  if constexpr (std::is_same_v<Stack, Bare>) latent::norms_after(typename Stack::Kinds{}, config);
  return config;
}

std::vector<std::int32_t> some_tokens(Index count, std::uint64_t seed = 1) {
  ha::Random random{ha::Seed{seed}, "tokens"};
  std::vector<std::int32_t> tokens;
  for (Index i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>(random.below(19)));
  return tokens;
}

// A model with its parameters and what it computes from tokens.
template <class Stack, class T> struct Fixture {
  ha::Cpu cpu;
  ha::LanguageModel<Stack> model;
  typename ha::LanguageModel<Stack>::template Params<ha::Owned<T, ha::Cpu>> params = model.template initialize<T>(cpu, ha::Seed{3});

  explicit Fixture(int threads = 2, typename ha::LanguageModel<Stack>::Config const& config = small_config<Stack>())
      : cpu(threads), model(config) {}

  auto batch(ha::Sequences const& s, std::vector<std::int32_t> const& tokens) {
    std::vector<std::int32_t> targets(tokens.rbegin(), tokens.rend());
    return make_batch(cpu, s, tokens, targets);
  }
  std::vector<T> logits(ha::Sequences const& s, std::vector<std::int32_t> const& tokens) {
    auto const saved = model.forward(cpu, params, batch(s, tokens));
    return download(cpu, model.logits(cpu, params, saved));
  }
  // The stack's gradient of its input, from a gradient of its output.
  std::vector<T> d_x(ha::Sequences const& s, std::vector<T> const& x, std::vector<T> const& d_y) {
    auto const& c = model.stack_config();
    auto const tensor = [&](std::vector<T> const& values) {
      ha::Tensor<T, 2, ha::Cpu> result{cpu, {s.tokens(), c.block.model_dim}};
      upload(cpu, values, result);
      return result;
    };
    typename Stack::template Saved<ha::Owned<T, ha::Cpu>> saved;
    auto gradients = ha::allocate<T>(cpu, Stack::gradients(c));
    auto const p = in(params);
    ha::SequencesOn<ha::Cpu> const on_cpu{cpu, s};
    auto const y = Stack::forward(cpu, c, on_cpu, p.blocks, tensor(x), saved);
    return download(cpu, Stack::backward(cpu, c, on_cpu, p.blocks, std::move(saved), tensor(d_y), out(gradients)));
  }
};

template <class T> std::vector<T> noise(Index count, char const* name) {
  ha::Random random{ha::Seed{5}, name};
  std::vector<T> values;
  for (Index i = 0; i < count; ++i) values.push_back(static_cast<T>(random.normal()));
  return values;
}
// All elements of a group, one tensor after the other.
template <class Stack, class T, class Group> std::vector<T> all_values(Fixture<Stack, T>& f, Group const& group) {
  std::vector<T> all;
  ha::zip(
      [&](ha::Path const&, auto const& tensor) {
        auto const values = download(f.cpu, tensor);
        all.insert(all.end(), values.begin(), values.end());
      },
      group);
  return all;
}
template <class T> bool same_bits(T const* a, T const* b, Index count) {
  return std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}
template <class T> bool same_bits(std::vector<T> const& a, std::vector<T> const& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), std::ssize(a));
}

// Compares every gradient of the model, along a random direction, with the difference of two forwards.
template <class Stack> void check_finite_differences(Fixture<Stack, double>& f) {
  auto const batch = f.batch(ha::Sequences::equal(2, 13), some_tokens(26));
  auto const evaluate = [&] { return f.model.backward(f.cpu, f.params, batch, f.model.forward(f.cpu, f.params, batch), 1.0 / 26); };
  auto const gradients = evaluate();
  ha::zip(
      [&](ha::Path const& path, auto& tensor, auto const& gradient) {
        if (!tensor || !gradient) return;
        auto const values = download(f.cpu, tensor), g = download(f.cpu, gradient),
                   direction = noise<double>(std::ssize(values), "direction");
        double along = 0, step = 1e-6, loss[2];
        for (std::size_t i = 0; i < g.size(); ++i) along += g[i] * direction[i];
        for (int side : {0, 1}) {
          auto moved = values;
          for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += (side == 0 ? step : -step) * direction[i];
          upload(f.cpu, moved, tensor);
          auto const losses = download(f.cpu, evaluate().losses)[0];
          loss[side] = losses.loss.mean() + losses.auxiliary();
        }
        upload(f.cpu, values, tensor);
        double const difference = (loss[0] - loss[1]) / (2 * step);
        INFO(path.str() << ": gradient " << along << ", difference " << difference);
        CHECK(std::abs(along - difference) <= 1e-7 * (1e-1 + std::abs(difference)));
      },
      f.params, gradients.params);
}

}  // namespace

TEMPLATE_TEST_CASE("a model is causal in forward, bitwise", "[laws]", One, Mixed, Bare) {
  Fixture<TestType, float> f;
  auto const s = ha::Sequences::equal(1, 67);
  auto const tokens = some_tokens(67);
  auto const before = f.logits(s, tokens);
  for (Index t : {1, 8, 40, 64, 66}) {
    auto changed = tokens;
    for (Index i = t; i < 67; ++i)
      changed[static_cast<std::size_t>(i)] = (changed[static_cast<std::size_t>(i)] + 1 + static_cast<int>(i % 5)) % 19;
    auto const after = f.logits(s, changed);
    CHECK(same_bits(before.data(), after.data(), t * 19));
    CHECK_FALSE(same_bits(before, after));
  }
}

TEMPLATE_TEST_CASE("a stack is causal in backward, bitwise", "[laws]", One, Mixed, Bare) {
  Fixture<TestType, float> f;
  Index const T = 67, C = 24;
  auto const s = ha::Sequences::equal(1, T);
  auto const x = noise<float>(T * C, "x"), d_y = noise<float>(T * C, "d_y");
  auto const before = f.d_x(s, x, d_y);
  for (Index t : {1, 8, 40, 64, 66}) {
    auto changed = d_y;
    for (Index i = 0; i < t * C; ++i) changed[static_cast<std::size_t>(i)] *= -2;
    auto const after = f.d_x(s, x, changed);
    CHECK(same_bits(before.data() + t * C, after.data() + t * C, (T - t) * C));
    CHECK_FALSE(same_bits(before, after));
  }
}

TEMPLATE_TEST_CASE("a sequence does not depend on its neighbours, and a packed batch is its sequences, bitwise", "[laws]", One, Mixed,
                   Bare) {
  Fixture<TestType, float> f;
  std::vector<Index> const offsets{0, 1, 34, 34, 67};
  auto const tokens = some_tokens(67);
  auto const whole = f.logits(ha::Sequences::packed(offsets), tokens);
  for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
    Index const first = offsets[i], length = offsets[i + 1] - first;
    if (length == 0) continue;
    std::vector<std::int32_t> const part(tokens.begin() + first, tokens.begin() + first + length);
    auto const alone = f.logits(ha::Sequences::equal(1, length), part);
    CHECK(same_bits(alone.data(), whole.data() + first * 19, length * 19));
  }
}

TEMPLATE_TEST_CASE("a training step gives the same bits at any number of threads", "[laws]", One, Mixed, Bare) {
  std::vector<std::vector<float>> results;
  for (int threads : {1, 2, 3}) {
    Fixture<TestType, float> f{threads};
    ha::AdamW optimizer{f.cpu, f.params, {.learning_rate = 1e-2}};
    for (int step = 0; step < 3; ++step)
      train_step(f.cpu, f.model, f.params, optimizer, f.batch(ha::Sequences::equal(3, 40), some_tokens(120)));
    auto& all = results.emplace_back();
    ha::zip(
        [&](ha::Path const&, auto const& p) {
          for (float value : download(f.cpu, p)) all.push_back(value);
        },
        f.params);
  }
  CHECK(same_bits(results[0], results[1]));
  CHECK(same_bits(results[0], results[2]));
}

TEMPLATE_TEST_CASE("every gradient of a model equals finite differences", "[laws]", One, Mixed, Bare) {
  Fixture<TestType, double> f;
  check_finite_differences(f);
}

TEST_CASE("every gradient equals finite differences with a tied head, plain norms and ungated experts that are not renormalised",
          "[laws]") {
  auto config = small_config<One>();
  config.norm.weight = ha::NormWeight::plain;
  config.tie_embedding = true;
  config.feed_forward.decoder_sparse_step = 1;
  config.feed_forward.gated = false;
  config.feed_forward.renormalise = false;
  config.feed_forward.shared_dim = -1;
  config.feed_forward.balance = ha::Balance::pooled;
  Fixture<One, double> f{2, config};
  check_finite_differences(f);
}

TEMPLATE_TEST_CASE("what a run on NaN leaves in memory reaches no later run, bitwise", "[laws]", One, Mixed, Bare) {
  Index const T = 41, C = 24;
  auto const s = ha::Sequences::equal(1, T);
  auto const x = noise<float>(T * C, "x"), d_y = noise<float>(T * C, "d_y");
  std::vector<float> const poison(static_cast<std::size_t>(T * C), std::numeric_limits<float>::quiet_NaN());
  Fixture<TestType, float> fresh, used;
  auto const poisoned = used.d_x(s, poison, poison);
  CHECK(std::isnan(poisoned.front()));
  CHECK(same_bits(fresh.d_x(s, x, d_y), used.d_x(s, x, d_y)));
}

TEMPLATE_TEST_CASE("a stack's backward is linear in the gradient of its output", "[laws]", One, Mixed, Bare) {
  Fixture<TestType, double> f;
  Index const T = 41, C = 24;
  auto const s = ha::Sequences::equal(1, T);
  auto const x = noise<double>(T * C, "x"), a = noise<double>(T * C, "a"), b = noise<double>(T * C, "b");
  auto both = a;
  for (std::size_t i = 0; i < both.size(); ++i) both[i] = 2 * a[i] - 3 * b[i];
  auto const from_a = f.d_x(s, x, a), from_b = f.d_x(s, x, b), from_both = f.d_x(s, x, both);
  double error = 0, size = 0;
  for (std::size_t i = 0; i < both.size(); ++i) {
    error = std::max(error, std::abs(from_both[i] - (2 * from_a[i] - 3 * from_b[i])));
    size = std::max(size, std::abs(from_both[i]));
  }
  CHECK(error <= 1024 * std::numeric_limits<double>::epsilon() * size);
}

TEST_CASE("the indexer has no gradient and is not touched, not even by decay", "[laws]") {
  Fixture<Mixed, float> f;
  auto const index_weights = [&] {
    std::vector<float> all;
    ha::zip(
        [&](ha::Path const& path, auto const& p) {
          if (path.str().find("index_") != std::string::npos)
            for (float value : download(f.cpu, p)) all.push_back(value);
        },
        f.params);
    return all;
  };
  auto const before = index_weights();
  REQUIRE_FALSE(before.empty());
  ha::AdamW optimizer{f.cpu, f.params, {.learning_rate = 1e-2}};
  train_step(f.cpu, f.model, f.params, optimizer, f.batch(ha::Sequences::equal(1, 20), some_tokens(20)));
  CHECK(same_bits(before, index_weights()));
}

TEMPLATE_TEST_CASE("Saved takes the bytes announced, and no step but the first allocates", "[laws]", One, Mixed, Bare) {
  Fixture<TestType, float> f;
  auto const s = ha::Sequences::equal(2, 33);
  auto const batch = f.batch(s, some_tokens(66));
  f.model.forward(f.cpu, f.params, batch);   // makes the rotary angles, which belong to the batch
  auto const before = f.cpu.pool().in_use();
  {
    auto const saved = f.model.forward(f.cpu, f.params, batch);
    CHECK(f.cpu.pool().in_use() - before == ha::bytes<float>(f.model.saved(s)));
  }
  ha::AdamW optimizer{f.cpu, f.params, {.learning_rate = 1e-2}};
  train_step(f.cpu, f.model, f.params, optimizer, batch);
  auto const after_one = f.cpu.pool().allocations();
  for (int step = 0; step < 4; ++step) train_step(f.cpu, f.model, f.params, optimizer, batch);
  CHECK(f.cpu.pool().allocations() == after_one);
}

TEST_CASE("what Full and GDN save is linear in T, and what DSA saves is T k") {
  auto const saved_bytes = []<class Stack>(Stack, Index T) {
    return ha::bytes<float>(ha::LanguageModel<Stack>{small_config<Stack>()}.saved(ha::Sequences::equal(1, T)));
  };
  for (auto const bytes : {saved_bytes(One{}, 0), saved_bytes(Mixed{}, 0)}) CHECK(bytes < 1000);
  auto const constant = saved_bytes(Mixed{}, 0);
  CHECK(saved_bytes(One{}, 4096) - saved_bytes(One{}, 0) == 4 * (saved_bytes(One{}, 1024) - saved_bytes(One{}, 0)));
  CHECK(saved_bytes(Mixed{}, 4096) - constant == 4 * (saved_bytes(Mixed{}, 1024) - constant));
}

TEST_CASE("accumulating over two batches is one step on both") {
  Fixture<Mixed, double> whole, parts;
  auto const tokens = some_tokens(40);
  ha::AdamW optimizer_whole{whole.cpu, whole.params, {.learning_rate = 1e-2}},
      optimizer_parts{parts.cpu, parts.params, {.learning_rate = 1e-2}};
  std::vector<std::int32_t> targets(tokens.rbegin(), tokens.rend());
  // The balancing loss of a batch is not the mean over the batch's halves, so it is off here.
  auto config = small_config<Mixed>();
  config.feed_forward.balance_coefficient = 0;
  ha::LanguageModel<Mixed> const model{config};
  auto const at_once =
      train_step(whole.cpu, model, whole.params, optimizer_whole, make_batch(whole.cpu, ha::Sequences::equal(2, 20), tokens, targets));
  std::vector<ha::TokenBatch<ha::Cpu>> halves;
  for (int half : {0, 1})
    halves.push_back(make_batch(parts.cpu, ha::Sequences::equal(1, 20), std::span(tokens).subspan(static_cast<std::size_t>(20 * half), 20),
                                std::span(targets).subspan(static_cast<std::size_t>(20 * half), 20)));
  auto const accumulated =
      accumulated_step(parts.cpu, model, parts.params, optimizer_parts, std::span<ha::TokenBatch<ha::Cpu> const>(halves));
  CHECK(at_once.loss.mean() == Approx(accumulated.loss.mean()).epsilon(1e-12));
  CHECK(at_once.gradient_norm == Approx(accumulated.gradient_norm).epsilon(1e-11));
  ha::zip(
      [&](ha::Path const& path, auto const& a, auto const& b) {
        auto const x = download(whole.cpu, a), y = download(parts.cpu, b);
        double worst = 0;
        for (std::size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::abs(x[i] - y[i]));
        INFO(path.str());
        CHECK(worst < 1e-7);   // Adam's first step divides a gradient by its size, which enlarges the rounding of tiny gradients
      },
      whole.params, parts.params);
}

TEST_CASE("a Saved serves one backward") {
  Fixture<One, float> f;
  auto const batch = f.batch(ha::Sequences::equal(1, 9), some_tokens(9));
  auto saved = f.model.forward(f.cpu, f.params, batch);
  auto const gradients = f.model.backward(f.cpu, f.params, batch, std::move(saved), 1);
  CHECK_THROWS_AS(f.model.backward(f.cpu, f.params, batch, std::move(saved), 1), ha::Error);
}

// A step that cannot be taken. It is the second one, so that the moments are not all 0.
template <class Stack, class T> struct BadStep {
  using Params = typename ha::LanguageModel<Stack>::template Params<ha::Owned<T, ha::Cpu>>;
  Fixture<Stack, T> f;
  ha::AdamWOptions options;
  ha::AdamW<Params> optimizer{f.cpu, f.params, options};
  ha::TokenBatch<ha::Cpu> batch = f.batch(ha::Sequences::equal(1, 9), some_tokens(9));

  explicit BadStep(ha::AdamWOptions const& with = {}, ha::Stage stage = ha::Stage::language_model) : options(with) {
    train_step(f.cpu, f.model, f.params, optimizer, batch, {.rate = 0, .stage = stage});
  }
  // Returns the message of the Error that `step` throws. Parameters and moments must then have their old values.
  template <class Step> std::string refused(Step step) {
    auto const before = everything();
    std::string const sentence = error_of(step);
    CHECK(same_bits(before, everything()));
    CHECK(optimizer.steps() == 1);
    CHECK(std::ranges::max(optimizer.updates(f.cpu)) == 1);
    return sentence;
  }
  std::string refused(ha::StepOptions step = {}) {
    return refused([&] { train_step(f.cpu, f.model, f.params, optimizer, batch, step); });
  }
  Params gradients(T value) {
    auto result = ha::allocate<T>(f.cpu, f.model.gradients());
    ha::zip([&](ha::Path const&, auto& g) { ha::On<ha::Fill, ha::Cpu>::forward(f.cpu, value, flat(out(g))); }, result);
    return result;
  }

 private:
  std::vector<T> everything() {
    auto values = all_values(f, f.params);
    for (Params const* moments : {&optimizer.moments().mean, &optimizer.moments().square}) {
      auto const more = all_values(f, *moments);
      values.insert(values.end(), more.begin(), more.end());
    }
    return values;
  }
};

TEST_CASE("a loss that is not finite is named with its step and the first tensor that is not, and nothing is touched") {
  using Catch::Matchers::Contains;
  float const nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  {
    BadStep<Mixed, float> bad;
    out(bad.f.params.head).data[3] = nan;
    CHECK(bad.refused() == "step 2: the loss is nan; the first tensor that is not finite is the parameter head");
  }
  {
    BadStep<Mixed, float> bad;
    out(bad.f.params.blocks.arrays[boost::hana::size_c<2>][0].attention.w.k).data[1] = inf;
    CHECK(bad.refused() == "step 2: the loss is nan; the first tensor that is not finite is the parameter blocks.2.attention.w.k");
  }
  {   // finite parameters whose activations overflow
    BadStep<Mixed, float> bad;
    for (float& x : std::span(out(bad.f.params.blocks.arrays[boost::hana::size_c<2>][0].attention.w_o).data, 24 * 24)) x = 3e38f;
    CHECK_THAT(bad.refused(), Contains("step 2: the loss is nan; the first tensor that is not finite is the activation blocks.2.h"));
  }
  {   // in the second of two batches
    BadStep<One, float> bad;
    out(bad.f.params.embedding).data[18 * 24] = nan;   // of token 18
    std::vector<ha::TokenBatch<ha::Cpu>> batches;
    for (std::int32_t token : {4, 18}) {
      std::vector<std::int32_t> const tokens{token, 4}, targets{1, 2};
      batches.push_back(make_batch(bad.f.cpu, ha::Sequences::equal(1, 2), tokens, targets));
    }
    auto const both = [&] {
      accumulated_step(bad.f.cpu, bad.f.model, bad.f.params, bad.optimizer, std::span<ha::TokenBatch<ha::Cpu> const>(batches));
    };
    CHECK(bad.refused(both) == "step 2: the loss is nan; the first tensor that is not finite is the parameter embedding");
  }
  for (ha::Stage stage : {ha::Stage::dense_warm_up, ha::Stage::sparse}) {   // only the indexer's loss depends on it
    BadStep<Mixed, float> bad{{}, stage};
    out(bad.f.params.blocks.arrays[boost::hana::size_c<1>][0].attention.w.index_w).data[0] = nan;
    CHECK(bad.refused({.stage = stage}) ==
          "step 2: the auxiliary loss is nan; the first tensor that is not finite is the parameter blocks.1.attention.w.index_w");
  }
}

TEMPLATE_TEST_CASE("a gradient that is not finite, or makes a parameter or a moment so, is named, and nothing is touched", "", float,
                   double) {
  using T = TestType;
  using Catch::Matchers::Contains;
  constexpr T most = std::numeric_limits<T>::max();
  BadStep<One, T> bad{{.learning_rate = 1, .max_norm = 0}};
  auto const with = [&](T value, auto set) {
    auto gradients = bad.gradients(value);
    set(gradients);
    return bad.refused([&] { bad.optimizer.step(bad.f.cpu, bad.f.params, gradients); });
  };
  auto const w_o = [](auto& group) { return out(group.blocks.arrays[boost::hana::size_c<0>][0].attention.w_o).data; };
  for (T value : {std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()})
    CHECK(with(0, [&](auto& g) { w_o(g)[7] = value; }) == "step 2: the gradient of blocks.0.attention.w_o holds a NaN or an infinity");
  // The square of this gradient overflows in the scalar.
  std::string const large = with(0, [&](auto& g) { w_o(g)[7] = most; });
  if (std::is_same_v<T, double>) CHECK(large == "step 2: the gradient of blocks.0.attention.w_o is too large for its norm");
  else CHECK(large == "step 2: the update of blocks.0.attention.w_o would make the mean of the squared gradients a NaN or an infinity");
  // Bad values in moments and parameters.
  auto const spoiled = [&](auto& group, T value) {
    T* const at = w_o(group) + 7;
    T const before = std::exchange(*at, value);
    std::string const sentence = with(1, [](auto&) {});
    *at = before;
    return sentence;
  };
  std::string const update = "step 2: the update of blocks.0.attention.w_o would make ";
  T const nan = std::numeric_limits<T>::quiet_NaN();
  CHECK(spoiled(bad.optimizer.moments().mean, nan) == update + "the mean of the gradients a NaN or an infinity");
  CHECK(spoiled(bad.optimizer.moments().square, nan) == update + "the mean of the squared gradients a NaN or an infinity");
  CHECK(spoiled(bad.optimizer.moments().square, T(-1)) == update + "the parameter itself a NaN or an infinity");
  CHECK(spoiled(bad.f.params, nan) == update + "the parameter itself a NaN or an infinity");
}

// A model in which one element of a gradient has this value for every batch.
struct Steep : ha::LanguageModel<One> {
  float gradient = 0;

  auto backward(ha::Cpu& cpu, auto const& params, auto const& batch, auto&& saved, ha::View<double const, 1> scale, double share) const {
    auto result = ha::LanguageModel<One>::backward(cpu, params, batch, std::move(saved), scale, share);
    out(result.params.blocks.arrays[boost::hana::size_c<0>][0].attention.w_o).data[7] = gradient;
    return result;
  }
};

TEST_CASE("a gradient that overflows only in the sum over batches is refused with step and tensor, and nothing is touched") {
  BadStep<One, float> bad;
  std::vector<ha::TokenBatch<ha::Cpu>> batches;
  for (std::uint64_t seed : {1u, 2u}) batches.push_back(bad.f.batch(ha::Sequences::equal(1, 9), some_tokens(9, seed)));
  auto const step = [&](float gradient, std::size_t count) {
    Steep const model{bad.f.model, gradient};
    return accumulated_step(bad.f.cpu, model, bad.f.params, bad.optimizer, std::span<ha::TokenBatch<ha::Cpu> const>(batches).first(count));
  };
  CHECK(bad.refused([&] { step(3e38f, 2); }) == "step 2: the gradient of blocks.0.attention.w_o holds a NaN or an infinity");
  CHECK(bad.refused([&] { step(-3e38f, 2); }) == "step 2: the gradient of blocks.0.attention.w_o holds a NaN or an infinity");
  // Finite are the gradient of one batch, and the sum of two halves.
  CHECK(step(3e38f, 1).gradient_norm == Approx(3e38));
  CHECK(step(1.5e38f, 2).gradient_norm == Approx(3e38));
}

TEST_CASE("a learning rate that takes a parameter out of the numbers is refused with step and tensor, and nothing is touched") {
  using Catch::Matchers::Contains;
  for (ha::Stage stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse}) {
    BadStep<Mixed, float> bad{{.learning_rate = 3e38}, stage};
    char const* const first = stage == ha::Stage::dense_warm_up ? "blocks.1.attention.w.index_q" : "embedding";
    CHECK(bad.refused({.rate = 10, .stage = stage}) ==
          std::string("step 2: the update of ") + first + " would make the parameter itself a NaN or an infinity");
  }
  BadStep<One, float> bad;
  std::vector<std::int32_t> const tokens{4, 5}, targets{1, 2};
  bad.batch = make_batch(bad.f.cpu, ha::Sequences::equal(1, 2), tokens, targets);
  float& unused = out(bad.f.params.embedding).data[18 * 24];   // of a token that is not in the batch
  float const before = std::exchange(unused, std::nanf(""));
  CHECK(bad.refused() == "step 2: the update of embedding would make the parameter itself a NaN or an infinity");
  unused = before;
  for (double rate : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()})
    CHECK_THAT(bad.refused({.rate = rate}), Contains("rate") && Contains("it must be a number >= 0"));
}

TEST_CASE("what cannot be is refused with the value and what is allowed") {
  using Catch::Matchers::Contains;
  Fixture<One, float> f;
  CHECK_THROWS_WITH(f.logits(ha::Sequences::equal(1, 3), {1, 19, 2}), Contains("token 19 at place 1") && Contains("0 .. 18"));
  CHECK_THROWS_WITH(f.logits(ha::Sequences::equal(1, 3), {1, -4, 2}), Contains("token -4"));
  CHECK_THROWS_WITH(make_batch(f.cpu, ha::Sequences::equal(1, 4), std::vector<std::int32_t>{1}, std::vector<std::int32_t>{1}),
                    Contains("4 tokens"));
  auto config = small_config<One>();
  config.num_heads = 5;
  CHECK_THROWS_WITH(ha::LanguageModel<One>{config}, Contains("model_dim 24") && Contains("num_heads 5"));
  config = small_config<One>();
  config.feed_forward.top_k = 0;
  CHECK_THROWS_WITH(ha::LanguageModel<One>{config}, Contains("top_k 0") && Contains("1 .. 4"));
  config = small_config<One>();
  config.policy<ha::GDN>() = {.num_heads = 2, .num_value_heads = 3};
  CHECK_THROWS_WITH(ha::LanguageModel<One>{config}, Contains("3 heads") && Contains("2 key/value heads"));
}

// Runs a backward of a model whose parameters are all NaN, so that free memory holds NaN afterwards.
template <class Stack> void leave_nan(Fixture<Stack, float>& f, ha::LanguageModel<Stack> const& model,
                                      ha::TokenBatch<ha::Cpu> const& batch) {
  auto params = model.template initialize<float>(f.cpu, ha::Seed{3});
  ha::zip([&](ha::Path const&, auto& p) { ha::On<ha::Fill, ha::Cpu>::forward(f.cpu, std::nanf(""), flat(out(p))); }, params);
  model.backward(f.cpu, params, batch, model.forward(f.cpu, params, batch), 1);
}

TEMPLATE_TEST_CASE("nothing to predict is no loss and no gradient, and so are weights of 0, whatever memory held", "", One, Mixed, Bare) {
  Fixture<TestType, float> f;
  auto const tokens = some_tokens(18), ignored = std::vector<std::int32_t>(18, -100);
  auto const s = ha::Sequences::packed(std::vector<Index>{0, 9, 9, 18});
  for (ha::Stage stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})
    for (auto const& targets : {ignored, tokens}) {
      auto const model = f.model.at(stage);
      auto const batch = make_batch(f.cpu, s, tokens, targets);
      leave_nan(f, model, batch);
      auto const result = model.backward(f.cpu, f.params, batch, model.forward(f.cpu, f.params, batch), 0, 0);
      auto const loss = download(f.cpu, result.losses)[0].loss;
      CHECK(loss.count == (targets == tokens ? 18 : 0));
      CHECK((loss.mean() == 0) == (targets == ignored));
      ha::zip(
          [&](ha::Path const& path, auto const& gradient) {
            INFO("stage " << static_cast<int>(stage) << ", " << path.str());
            auto const values = download(f.cpu, gradient);
            CHECK(values == std::vector<float>(values.size()));   // -0 included
          },
          result.params);
    }
}

TEST_CASE("a step on a batch without targets changes nothing but the count of steps") {
  auto config = small_config<Mixed>();
  config.feed_forward.balance_coefficient = 0;
  Fixture<Mixed, float> f{2, config};
  auto const tokens = some_tokens(9);
  auto const batch = make_batch(f.cpu, ha::Sequences::equal(1, 9), tokens, std::vector<std::int32_t>(9, -100));
  leave_nan(f, f.model, batch);
  auto const before = all_values(f, f.params);
  ha::AdamW optimizer{f.cpu, f.params, {.weight_decay = 0}};
  CHECK(train_step(f.cpu, f.model, f.params, optimizer, batch).gradient_norm == 0);
  CHECK(same_bits(before, all_values(f, f.params)));
  CHECK(optimizer.steps() == 1);
}

TEST_CASE("a token or a target outside of the vocabulary is refused with its place, before any work") {
  Fixture<One, float> f;
  using Catch::Matchers::Contains;
  ha::AdamW optimizer{f.cpu, f.params};
  auto const before = all_values(f, f.params);
  auto const refused = [&](std::vector<std::int32_t> tokens, std::vector<std::int32_t> targets, std::string const& sentence) {
    auto const batch = make_batch(f.cpu, ha::Sequences::equal(1, 3), tokens, targets);
    CHECK_THROWS_WITH(train_step(f.cpu, f.model, f.params, optimizer, batch), Contains(sentence));
    CHECK_THROWS_WITH(f.model.loss(f.cpu, f.params, batch), Contains(sentence));
  };
  refused({0, 19, 2}, {0, 1, 2}, "token 19 at place 1 is not in the vocabulary; allowed: 0 .. 18");
  refused({0, 1, -1}, {0, 1, 2}, "token -1 at place 2 is not in the vocabulary; allowed: 0 .. 18");
  refused({0, 1, 2}, {19, 1, 2}, "target 19 at place 0 is not in the vocabulary; allowed: 0 .. 18, or < 0 for none");
  CHECK(same_bits(before, all_values(f, f.params)));

  auto batch = make_batch(f.cpu, ha::Sequences::equal(1, 3), std::vector<std::int32_t>{0, 1, 2}, std::vector<std::int32_t>{-1, -2, 18});
  CHECK(train_step(f.cpu, f.model, f.params, optimizer, batch).loss.count == 1);
  refill(f.cpu, batch, std::vector<std::int32_t>{0, 1, 2}, std::vector<std::int32_t>{3, -2, 30});
  CHECK_THROWS_WITH(train_step(f.cpu, f.model, f.params, optimizer, batch), Contains("target 30 at place 2"));
  CHECK_THROWS_WITH(refill(f.cpu, batch, std::vector<std::int32_t>{0, 1}, std::vector<std::int32_t>{3, 4}),
                    Contains("sequences of 3 tokens"));

  auto cache = ha::make_cache<float>(f.cpu, f.model, {.batch = 1, .capacity = 4});
  CHECK_THROWS_WITH(extend(f.cpu, f.model, f.params, {{1, 19}}, cache), Contains("token 19 at place 1"));
  CHECK(cache.lengths()[0] == 0);
}

TEST_CASE("a batch without tokens, or of sequences without their beginning, is refused") {
  using Catch::Matchers::Contains;
  Fixture<One, float> f;
  std::vector<std::int32_t> const none;
  for (auto const& s : {ha::Sequences::equal(0, 0), ha::Sequences::equal(3, 0)})
    CHECK_THROWS_WITH(make_batch(f.cpu, s, none, none), Contains("batch: it has no tokens"));
  CHECK_THROWS_WITH(make_batch(f.cpu, ha::Batch{}), Contains("batch: it has no tokens"));
  ha::AdamW optimizer{f.cpu, f.params};
  CHECK_THROWS_WITH(train_step(f.cpu, f.model, f.params, optimizer, ha::TokenBatch<ha::Cpu>{}), Contains("batch: it has no tokens"));
  std::vector<Index> const past{2}, length{3};
  CHECK_THROWS_WITH(f.logits(ha::Sequences::continuing(past, length), {1, 2, 3}), Contains("batch: a sequence follows tokens"));
}
