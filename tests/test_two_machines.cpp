// A whole model has the bits of the CPU on a device whose memory the host cannot read and that refuses memory of the host. Tested are
// every policy, dense layers and mixtures, every stage of training, and decoding.
#include "catch.hpp"
#include "counting.hpp"
#include "error_of.hpp"
#include "latent.hpp"
#include "recorder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/io.hpp>
#include <hybridattn/testing/fake.hpp>

#include <unistd.h>

#include <filesystem>
#include <set>

namespace ha = hybridattn;
using ha::Index;

namespace {

using Fake = ha::testing::Fake;
using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = 5, .index_rotary_percent = 50, .index_norm = true}>;
using Windowed = ha::FullAttention<ha::FullOptions{.window = 7, .qk_norm = ha::QkNorm::plain, .rotary = ha::Rotary::interleaved}>;
using Stack = ha::Stack<ha::GDN, Windowed, Sparse, latent::Attention>;
using Model = ha::LanguageModel<Stack>;

Model::Config config(bool mixture, ha::Balance balance = ha::Balance::per_layer) {
  Model::Config c{.vocab_size = 19, .model_dim = 24, .num_heads = 2, .feed_forward = {.hidden_dim = 20}};
  if (mixture)
    c.feed_forward = {.hidden_dim = 20,
                      .num_experts = 4,
                      .top_k = 2,
                      .expert_dim = 12,
                      .shared_dim = 8,
                      .decoder_sparse_step = 2,
                      .balance_coefficient = 0.1,
                      .balance = balance};
  c.tie_embedding = mixture;
  if (mixture) latent::norms_after(Stack::Kinds{}, c);
  return c;
}
std::vector<std::int32_t> tokens(Index count, std::uint64_t seed) {
  ha::Random random{ha::Seed{seed}, "tokens"};
  std::vector<std::int32_t> list;
  for (Index i = 0; i < count; ++i) list.push_back(static_cast<std::int32_t>(random.below(19)));
  return list;
}

// Runs a model on a backend. The results are numbers on the host.
template <class B> struct Run {
  B backend{2};
  Model model;
  typename Model::template Params<ha::Owned<float, B>> params;
  std::vector<double> numbers;
  std::vector<float> values;

  explicit Run(Model::Config const& c) : model(c), params(model.template initialize<float>(backend, ha::Seed{3})) {}

  auto batch(std::uint64_t seed) {
    return make_batch(backend, ha::Sequences::packed(std::vector<Index>{0, 9, 9, 10, 26}), tokens(26, seed), tokens(26, seed + 1));
  }
  void keep(ha::StepResult const& result) {
    numbers.insert(numbers.end(), {result.loss.loss, static_cast<double>(result.loss.correct), result.auxiliary_loss, result.policy_loss,
                                   result.gradient_norm});
  }
  template <class Tensor> void keep_values(Tensor const& tensor) {
    auto const more = download(backend, tensor);
    values.insert(values.end(), more.begin(), more.end());
  }
  void train(ha::Stage stage) {
    ha::AdamW optimizer{backend, params, {.learning_rate = 0.01}};
    auto const first = batch(1);
    for (int step = 0; step < 2; ++step) keep(train_step(backend, model, params, optimizer, first, {.stage = stage}));
    std::vector<ha::TokenBatch<B>> both;
    both.push_back(batch(5));
    both.push_back(batch(7));
    keep(accumulated_step(backend, model, params, optimizer, std::span<ha::TokenBatch<B> const>(both), {.stage = stage}));
    numbers.push_back(model.loss(backend, params, first).loss);
    ha::zip([&](ha::Path const&, auto const& tensor) { keep_values(tensor); }, params);
  }
  void decode() {
    auto cache = ha::make_cache<float>(backend, model, {.batch = 2, .capacity = 20});
    keep_values(extend(backend, model, params, {{1, 2, 3}, {4}}, cache));
    keep_values(extend_to_last(backend, model, params, {{5}, {6, 7}}, cache));
    for (auto const& list : generate(backend, model, params, {{1, 2}, {3}}, {.max_new_tokens = 5, .sampling = {.temperature = 0}}).tokens)
      numbers.insert(numbers.end(), list.begin(), list.end());
  }
};

template <class Work> void check_same_bits(bool mixture, Work work) {
  Run<ha::Cpu> cpu{config(mixture)};
  Run<Fake> fake{config(mixture)};
  work(cpu);
  work(fake);
  CHECK(cpu.numbers == fake.numbers);
  CHECK(cpu.values == fake.values);
  CHECK(!cpu.values.empty());
}

}  // namespace

TEST_CASE("a model trains on a device that the host cannot read, with the bits of the CPU", "[laws]") {
  for (bool const mixture : {false, true})
    for (ha::Stage const stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})
      check_same_bits(mixture, [&](auto& run) { run.train(stage); });
}
TEST_CASE("a model decodes on a device that the host cannot read, with the bits of the CPU", "[laws]") {
  for (bool const mixture : {false, true}) check_same_bits(mixture, [](auto& run) { run.decode(); });
}

TEST_CASE("a device refuses memory of the host, alone or in a group") {
  Fake fake;
  std::vector<float> host(8);
  ha::Tensor<float, 1, Fake> tensor{fake, {8}};
  auto const refusal = Catch::Matchers::Contains("an operation was given memory of the host");
  CHECK_THROWS_WITH((ha::On<ha::Fill, Fake>::forward(fake, 0.0f, ha::View<float, 1>{host.data(), {8}})), refusal);
  CHECK_NOTHROW((ha::On<ha::Fill, Fake>::forward(fake, 0.0f, out(tensor))));
  ha::Full::Config const c{.num_heads = 1, .num_kv_heads = 1, .head_dim = 8};
  auto const s = ha::SequencesOn<Fake>{fake, ha::Sequences::equal(1, 1)};
  auto x = ha::allocate<float>(fake, ha::Full::inputs(c, s));
  auto y = ha::allocate<float>(fake, ha::Full::outputs(c, s));
  auto saved = ha::allocate<float>(fake, ha::Full::saved(c, s));
  auto inputs = ha::in(x);
  inputs.v.data = host.data();
  CHECK_THROWS_WITH((ha::On<ha::Full, Fake>::forward(fake, c, s, inputs, ha::out(y), ha::out(saved))), refusal);
}

TEST_CASE("rotary angles are made once for a batch and a size, whatever the layers and passes") {
  Run<Counting> run{config(false)};
  ha::AdamW optimizer{run.backend, run.params};
  auto const batch = run.batch(1);
  for (int step = 0; step < 3; ++step) train_step(run.backend, run.model, run.params, optimizer, batch, {.stage = ha::Stage::sparse});
  CHECK(run.backend.angles == 2);   // for heads of 12, of which 25 % turn, and for the indexer's, of which 50 % turn
  auto cache = ha::make_cache<float>(run.backend, run.model, {.batch = 1, .capacity = 20});
  run.backend.reset();
  for (int call = 0; call < 3; ++call) extend(run.backend, run.model, run.params, {{1, 2, 3}}, cache);
  CHECK(run.backend.angles == 3 * 2);
}

// Steps that the host does not wait for.
namespace {

template <class B> struct TrainingOn : Run<B> {
  using Base = Run<B>;
  ha::AdamW<decltype(Base::params)> optimizer{Base::backend, Base::params, {.learning_rate = 10}};
  std::vector<ha::TokenBatch<B>> batches;

  explicit TrainingOn(bool mixture, ha::Balance balance = ha::Balance::per_layer) : Base(config(mixture, balance)) {
    for (std::uint64_t seed : {1u, 3u, 5u}) batches.push_back(Base::batch(seed));
  }
  auto start(std::size_t count, ha::StepOptions options = {.rate = 1e-3}) {
    return start_step(Base::backend, Base::model, Base::params, optimizer, std::span<ha::TokenBatch<B> const>(batches).first(count),
                      options);
  }
  // Refills the batches with other tokens. The last `without` tokens have no target.
  void refill_batches(std::uint64_t seed, std::size_t without) {
    for (auto& batch : batches) {
      auto targets = tokens(26, ++seed);
      std::fill_n(targets.rbegin(), without, -1);
      refill(Base::backend, batch, tokens(26, ++seed), targets);
    }
  }
  // The values of all parameters and moments.
  std::vector<float> const& state() {
    this->values.clear();
    for (auto const* group : {&this->params, &optimizer.moments().mean, &optimizer.moments().square})
      ha::zip([&](ha::Path const&, auto const& tensor) { this->keep_values(tensor); }, *group);
    return this->values;
  }
};
using Training = TrainingOn<Counting>;

}  // namespace

TEST_CASE("from the second step on nothing goes to or from the machine inside a step, and one download reads it", "[laws]") {
  for (bool const mixture : {false, true})
    for (ha::Stage const stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})
      for (std::size_t const count : {1u, 3u}) {
        Training run{mixture, count == 1 ? ha::Balance::per_layer : ha::Balance::pooled};
        run.start(count, {.rate = 1e-3, .stage = stage}).read();
        run.backend.reset();
        for (double const rate : {1e-3, 1e-4}) run.start(count, {.rate = rate, .stage = stage});
        CHECK(run.backend.uploads == 0);
        CHECK(run.backend.downloads == 0);
        CHECK(run.backend.waits == 0);
        CHECK(run.backend.operations > 0);
        run.start(count, {.rate = 1e-3, .stage = stage}).read();
        CHECK(run.backend.downloads == 1);
        CHECK(run.optimizer.steps() == 4);
      }
}
TEST_CASE("steps that are read late have the bits of steps that are read at once", "[laws]") {
  Training at_once{true}, late{true};
  for (int step = 0; step < 4; ++step) {
    auto const expected = at_once.start(2, {.rate = 1e-3 / (step + 1)}).read();
    auto const pending = late.start(2, {.rate = 1e-3 / (step + 1)});
    if (step != 3) continue;
    auto const result = pending.read();
    CHECK(result.loss.loss == expected.loss.loss);
    CHECK(result.auxiliary_loss == expected.auxiliary_loss);
    CHECK(result.gradient_norm == expected.gradient_norm);
  }
  for (Training* run : {&at_once, &late}) ha::zip([&](ha::Path const&, auto const& tensor) { run->keep_values(tensor); }, run->params);
  CHECK(at_once.values == late.values);
}
TEST_CASE("a read names the first bad step since the last one; a bad step moves nothing and counts nowhere", "[laws]") {
  using Catch::Matchers::Contains;
  Training run{false};
  run.start(1).read();
  auto const values = [&] {
    run.values.clear();
    ha::zip([&](ha::Path const&, auto const& tensor) { run.keep_values(tensor); }, run.params);
    ha::zip([&](ha::Path const&, auto const& tensor) { run.keep_values(tensor); }, run.optimizer.moments().square);
    return run.values;
  };
  auto const first = run.start(1);
  CHECK_THROWS_WITH((run.start(1), first.read()), Contains("the step is not the last one any more"));
  run.start(1).read();
  CHECK(run.optimizer.steps() == 4);

  auto const before = values();
  run.start(1, {.rate = 1e38});   // would make parameters NaN or infinite
  run.start(1, {.rate = 1e38});
  CHECK(before == values());
  run.start(1);   // counts as the fifth
  auto const path = std::filesystem::temp_directory_path() / ("bad_step_" + std::to_string(getpid()));
  std::string const bad = "step 5: the update of embedding would make the parameter itself a NaN or an infinity";
  auto const sentence = error_of([&] { save_checkpoint(run.backend, path, run.model, run.params, run.optimizer); });
  CHECK_THAT(sentence, Contains(bad));
  CHECK(!std::filesystem::exists(path));
  CHECK_THAT(sentence, Contains("; its loss was ") && !Contains("was 0"));
  run.start(1).read();   // the error above has named the bad step, so training goes on
  CHECK(run.optimizer.steps() == 6);
  CHECK(std::ranges::max(run.optimizer.updates(run.backend)) == 6);
  run.start(1, {.rate = 1e38});
  CHECK_THROWS_WITH(run.start(1).read(), Contains("step 7: the update of embedding"));

  // Every read of a bad step throws. train_step first reads steps that were not read, and changes nothing if one is bad.
  auto const twice = run.start(1, {.rate = 1e38});
  CHECK_THROWS_WITH(twice.read(), Contains("step 8: the update of embedding"));
  CHECK_THROWS_WITH(twice.read(), Contains("step 8: it was bad, as an earlier read of it said"));
  run.start(1, {.rate = 1e38});
  auto const untouched = values();
  CHECK_THROWS_WITH(train_step(run.backend, run.model, run.params, run.optimizer, run.batches[0]), Contains("step 8: the update"));
  CHECK(untouched == values());
  // After a step that could not be started, no earlier step can be read.
  auto const good = run.start(1, {.rate = 0});
  auto const wrong = make_batch(run.backend, ha::Sequences::equal(1, 1), std::vector<std::int32_t>{40}, std::vector<std::int32_t>{1});
  CHECK_THROWS_WITH(start_step(run.backend, run.model, run.params, run.optimizer, wrong), Contains("token 40 at place 0"));
  CHECK_THROWS_WITH(good.read(), Contains("the step is not the last one any more"));
  run.optimizer.read(run.backend);

  // A loss that is NaN, found by a later read and by train_step.
  ha::On<ha::Fill, Counting>::forward(run.backend, std::nanf(""), flat(ha::out(run.params.norm)));
  run.start(1);
  CHECK_THROWS_WITH(run.start(1).read(), Contains("step 9: the loss is nan; the first gradient that is not finite is that of embedding"));
  CHECK_THROWS_WITH(train_step(run.backend, run.model, run.params, run.optimizer, run.batches[0]),
                    Contains("step 9: the loss is nan; the first tensor that is not finite is the parameter norm"));
}

TEST_CASE("a step that was recorded has the bits of a new one when it is replayed on other tokens, at another rate", "[laws]") {
  for (bool const mixture : {false, true})
    for (ha::Stage const stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse}) {
      TrainingOn<Recorder> recorded{mixture, ha::Balance::pooled};
      TrainingOn<ha::Cpu> plain{mixture, ha::Balance::pooled};
      auto const both = [&](auto work) { work(recorded), work(plain); };
      both([&](auto& run) { run.start(3, {.rate = 1e-3, .stage = stage}).read(); });
      recorded.backend.record([&] { recorded.start(3, {.rate = 1e-3, .stage = stage}); });
      plain.start(3, {.rate = 1e-3, .stage = stage});
      CHECK(recorded.state() == plain.state());
      CHECK(recorded.backend.recorded() > 0);

      std::uint64_t seed = 21;
      for (double const rate : {1e-3, 1e-3, 1e-4, 1e38}) {   // the last step is bad and changes nothing
        both([&](auto& run) { run.refill_batches(seed, seed % 5); });
        seed += 11;
        recorded.optimizer.set_rate(recorded.backend, rate);
        recorded.backend.replay();
        recorded.optimizer.replayed();
        plain.start(3, {.rate = rate, .stage = stage});
        CHECK(recorded.state() == plain.state());
        if (rate > 1) continue;
        auto const got = recorded.optimizer.read(recorded.backend), expected = plain.optimizer.read(plain.backend);
        CHECK(got.counted == expected.counted);
        CHECK(got.counted < 3 * 26);
        ha::Index known = 0;   // the count that the host knows
        for (auto const& batch : plain.batches) known += batch.counted;
        CHECK(got.counted == known);
        CHECK(got.loss.loss == expected.loss.loss);
        CHECK(got.auxiliary_loss == expected.auxiliary_loss);
        CHECK(got.gradient_norm == expected.gradient_norm);
      }
      both([&](auto& run) {
        CHECK_THROWS_WITH(run.optimizer.read(run.backend), Catch::Matchers::StartsWith("step 6: the update of "));
        CHECK(run.optimizer.steps() == 5);
        CHECK(run.optimizer.started() == 6);
      });
    }
}

TEST_CASE("parameters, gradients and moments stand in one block of memory each, and an exchange sees the gradients before the update") {
  Training run{true};
  auto const block_of = [](auto const& group) {
    std::set<ha::SharedBlock const*> blocks;
    std::size_t bytes = 0;
    ha::zip(
        [&](ha::Path const&, auto const& tensor) {
          if (!tensor) return;
          blocks.insert(tensor.shared());
          CHECK(reinterpret_cast<std::uintptr_t>(ha::in(tensor).data) % 64 == 0);
          bytes += tensor.byte_count();
        },
        group);
    REQUIRE(blocks.size() == 1);
    REQUIRE(*blocks.begin() != nullptr);
    CHECK((*blocks.begin())->bytes >= bytes);
    return *blocks.begin();
  };
  std::set<ha::SharedBlock const*> blocks{block_of(run.params), block_of(run.optimizer.moments().mean),
                                          block_of(run.optimizer.moments().square)};
  int exchanges = 0;
  auto const silence = [&](Counting& backend, auto& gradients, ha::View<ha::StepNumbers, 1>) {
    ++exchanges;
    blocks.insert(block_of(gradients));
    ha::zip([&](ha::Path const&, auto& g) { ha::On<ha::Fill, Counting>::forward(backend, 0.0f, flat(ha::out(g))); }, gradients);
  };
  auto const step =
      start_step(run.backend, run.model, run.params, run.optimizer, std::span<ha::TokenBatch<Counting> const>(run.batches), {}, silence);
  CHECK(step.read().gradient_norm == 0);
  CHECK(exchanges == 1);
  CHECK(blocks.size() == 4);
  auto const held = run.backend.pool().in_use();
  {
    auto const more = run.model.initialize<float>(run.backend, ha::Seed{1});
  }
  CHECK(run.backend.pool().in_use() == held);
}

namespace {

// An operation of a user, which one template computes on every backend.
struct Twice {};

}  // namespace

template <ha::Backend B> struct hybridattn::On<Twice, B> {
  static void forward(B& backend, View<float, 1> x) { backend.copy(x.data + 1, x.data, sizeof(float)); }
};

TEST_CASE("a backend fills, copies and waits; one text of a user's operation serves all backends") {
  Fake fake;
  ha::Tensor<float, 1, Fake> x{fake, {4}};
  fake.fill(ha::out(x).data, std::byte{0}, 16);
  CHECK(download(fake, x) == std::vector<float>(4));
  upload(fake, std::vector<float>{3, 2, 1, 0}, x);
  ha::On<Twice, Fake>::forward(fake, ha::out(x));
  fake.synchronise();
  CHECK(download(fake, x) == std::vector<float>{3, 3, 1, 0});
  float host = 0;
  CHECK(fake.owns(ha::in(x).data));
  CHECK(!fake.owns(&host));
  using Catch::Matchers::Contains;
  CHECK_THROWS_WITH(fake.copy(ha::out(x).data, &host, 4), Contains("memory of the host"));
  CHECK_THROWS_WITH(fake.fill(&host, std::byte{0}, 4), Contains("memory of the host"));
  CHECK(ha::Cpu{1}.owns(&host));
}

TEST_CASE("a rotary share of no entries turns nothing") {
  using Plain = ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::none, .rotary_percent = 25}>;
  using Indexer = ha::SparseAttention<ha::SparseOptions{.top_k = 3, .qk_norm = ha::QkNorm::none, .index_rotary_percent = 50}>;
  ha::Cpu cpu{1};
  ha::LanguageModel<ha::Stack<Plain, Indexer>>::Config c{.vocab_size = 19, .model_dim = 8, .num_heads = 2};
  c.policy<Indexer>().index_dim = 2;
  ha::LanguageModel<ha::Stack<Plain, Indexer>> const model{c};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params};
  auto const batch = make_batch(cpu, ha::Sequences::equal(1, 9), tokens(9, 1), tokens(9, 2));
  CHECK(std::isfinite(train_step(cpu, model, params, optimizer, batch, {.stage = ha::Stage::sparse}).loss.mean()));
}
