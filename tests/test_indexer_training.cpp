// Training of DSA's indexer in a model: which parameters each stage changes, and whether the indexer learns.
#include "catch.hpp"
#include "latent.hpp"

#include <hybridattn/hybridattn.hpp>

#include <cstring>
#include <map>
#include <string>

namespace ha = hybridattn;
using ha::Index;
using ha::Stage;

namespace {

// Indexers whose inputs are plain projections, have rotary positions and a norm, or are made by Prepare.
using Bare = ha::SparseAttention<ha::SparseOptions{.top_k = 6}>;
using Normed = ha::SparseAttention<ha::SparseOptions{.top_k = 9, .index_rotary_percent = 50, .index_norm = true}>;
using Rotated = ha::SparseAttention<ha::SparseOptions{.top_k = 4, .qk_norm = ha::QkNorm::none, .index_rotary_percent = 100}>;
using Mixed = ha::Stack<Bare, ha::Full, Normed, Rotated, latent::Indexed>;
constexpr Index vocab_size = 19, tokens_in_batch = 60;

ha::LanguageModel<Mixed>::Config small_config() {
  return {.vocab_size = vocab_size,
          .model_dim = 24,
          .num_heads = 2,
          .feed_forward =
              {.hidden_dim = 20, .num_experts = 4, .top_k = 2, .expert_dim = 12, .decoder_sparse_step = 2, .balance_coefficient = 0.1},
          .initialization = {.linear_deviation = 0, .embedding_deviation = 1}};
}

template <class T> using Values = std::map<std::string, std::vector<T>>;
template <class T, class Group> Values<T> values_of(ha::Cpu& cpu, Group const& group) {
  Values<T> values;
  ha::zip([&](ha::Path const& path, auto const& tensor) { values[path.str()] = download(cpu, tensor); }, group);
  return values;
}
template <class T> bool same_bits(std::vector<T> const& a, std::vector<T> const& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
bool is_indexer(std::string const& path) { return path.find("index_") != path.npos; }
// The paths of the indexers' parameters, or of all others, whose values differ.
template <class T> std::vector<std::string> changed(Values<T> const& before, Values<T> const& after, bool of_indexers) {
  std::vector<std::string> paths;
  for (auto const& [path, values] : before)
    if (is_indexer(path) == of_indexers && !same_bits(values, after.at(path))) paths.push_back(path);
  return paths;
}
template <class T> Index count_present(Values<T> const& values, bool of_indexers) {
  return std::count_if(values.begin(), values.end(),
                       [&](auto const& entry) { return is_indexer(entry.first) == of_indexers && !entry.second.empty(); });
}

template <class T> struct Fixture {
  using Params = ha::LanguageModel<Mixed>::Params<ha::Owned<T, ha::Cpu>>;
  ha::Cpu cpu;
  ha::LanguageModel<Mixed> model;
  Params params = model.initialize<T>(cpu, ha::Seed{3});
  ha::AdamW<Params> optimizer;

  explicit Fixture(ha::LanguageModel<Mixed>::Config const& config = small_config(),
                   ha::AdamWOptions const& options = {.learning_rate = 1e-2}, int threads = 1)
      : cpu(threads), model(config), optimizer(cpu, params, options) {}

  ha::TokenBatch<ha::Cpu> batch(Index count = 3, std::uint64_t seed = 1, Index first = 0) {
    ha::Random random{ha::Seed{seed}, "tokens"};
    std::vector<std::int32_t> tokens;
    for (Index i = 0; i < tokens_in_batch; ++i) tokens.push_back(static_cast<std::int32_t>(random.below(vocab_size)));
    std::vector<std::int32_t> targets(tokens.begin() + 1, tokens.end());
    targets.push_back(0);
    auto const part = [&](auto const& all) {
      return std::span(all).subspan(static_cast<std::size_t>(first * 20), static_cast<std::size_t>(20 * count));
    };
    return make_batch(cpu, ha::Sequences::equal(count, 20), part(tokens), part(targets));
  }
  auto backward(Stage stage, double scale = 1.0 / tokens_in_batch, double auxiliary_scale = 1) {
    auto const staged = model.at(stage);
    auto const b = batch();
    return staged.backward(cpu, params, b, staged.forward(cpu, params, b), scale, auxiliary_scale);
  }
  Values<T> gradients(Stage stage, double scale = 1.0 / tokens_in_batch, double auxiliary_scale = 1) {
    return values_of<T>(cpu, backward(stage, scale, auxiliary_scale).params);
  }
  double policy_loss(Stage stage, double auxiliary_scale = 1) {
    return download(cpu, backward(stage, 1.0 / tokens_in_batch, auxiliary_scale).losses)[0].policy;
  }
  auto step(Stage stage, std::uint64_t seed = 1) { return train_step(cpu, model, params, optimizer, batch(3, seed), {.stage = stage}); }
};

}  // namespace

TEST_CASE("the dense warm-up moves the indexers and nothing else: every other parameter keeps every bit, and its moments", "[laws]") {
  Fixture<float> f;
  f.step(Stage::language_model);
  auto const params = values_of<float>(f.cpu, f.params), mean = values_of<float>(f.cpu, f.optimizer.moments().mean),
             square = values_of<float>(f.cpu, f.optimizer.moments().square);
  for (std::uint64_t seed : {2u, 3u}) f.step(Stage::dense_warm_up, seed);
  CHECK(changed(params, values_of<float>(f.cpu, f.params), false).empty());
  CHECK(changed(mean, values_of<float>(f.cpu, f.optimizer.moments().mean), false).empty());
  CHECK(changed(square, values_of<float>(f.cpu, f.optimizer.moments().square), false).empty());
  auto const moved = changed(params, values_of<float>(f.cpu, f.params), true);
  CHECK(std::ssize(moved) == count_present(params, true));
  CHECK(moved.size() == 4 * 3 + 2);   // three matrices a layer, and the weight and bias of one norm
}

TEST_CASE("the loss of the model moves no indexer, and sparse training moves everything", "[laws]") {
  Fixture<float> f;
  auto const start = values_of<float>(f.cpu, f.params);
  f.step(Stage::language_model);
  auto const middle = values_of<float>(f.cpu, f.params);
  CHECK(changed(start, middle, true).empty());
  CHECK(std::ssize(changed(start, middle, false)) == count_present(start, false));
  f.step(Stage::sparse);
  auto const end = values_of<float>(f.cpu, f.params);
  CHECK(std::ssize(changed(middle, end, true)) == count_present(middle, true));
  CHECK(std::ssize(changed(middle, end, false)) == count_present(middle, false));
}

TEST_CASE("in sparse training each loss gives what it gives alone, bitwise", "[laws]") {
  Fixture<float> f;
  auto const both = f.gradients(Stage::sparse), main = f.gradients(Stage::language_model), index = f.gradients(Stage::sparse, 0),
             twice = f.gradients(Stage::sparse, 1.0 / tokens_in_batch, 2);
  CHECK(changed(both, main, false).empty());
  CHECK(changed(both, index, true).empty());
  CHECK(count_present(main, true) == 0);
  CHECK(count_present(both, true) == 14);
  for (auto const& [path, values] : both) {
    if (!is_indexer(path)) continue;
    auto doubled = values;
    for (float& x : doubled) x *= 2;
    INFO(path);
    CHECK(same_bits(doubled, twice.at(path)));   // the weight of its loss alone scales the gradient
    CHECK((values.empty() || values != std::vector<float>(values.size())));
  }
}

TEST_CASE("sparse training takes the model where its own loss takes it, and the indexers where theirs does, clipped or not, bitwise",
          "[laws]") {
  for (double max_norm : {0.0, 0.01, 0.1}) {
    INFO("max_norm " << max_norm);
    ha::AdamWOptions const options{.learning_rate = 1e-2, .max_norm = max_norm};
    auto config = small_config(), louder = small_config();
    louder.policy<Bare>().index_loss = 100;
    Fixture<float> with{config, options}, loud{louder, options}, without{config, options};
    auto const result = with.step(Stage::sparse);
    without.step(Stage::language_model);
    CHECK((max_norm == 0 || result.gradient_norm > max_norm));   // so that the step clips
    auto const params = values_of<float>(with.cpu, with.params);
    CHECK(changed(params, values_of<float>(without.cpu, without.params), false).empty());
    loud.step(Stage::sparse);
    CHECK(changed(params, values_of<float>(loud.cpu, loud.params), false).empty());

    auto quieter = small_config();   // changes the gradients of all other parameters
    quieter.feed_forward.balance_coefficient = 0;
    Fixture<float> quiet{quieter, options};
    quiet.step(Stage::sparse);
    auto const others = values_of<float>(quiet.cpu, quiet.params);
    CHECK(!changed(params, others, false).empty());
    CHECK(changed(params, others, true).empty());
  }
}

TEST_CASE("a tensor's first gradient counts as its first, whatever steps passed it by") {
  for (auto const& [before, after] :
       {std::pair{Stage::dense_warm_up, Stage::language_model}, {Stage::language_model, Stage::dense_warm_up}}) {
    Fixture<float> late, early;
    for (int step = 0; step < 3; ++step)   // at a rate of 0: moments change, parameters do not
      train_step(late.cpu, late.model, late.params, late.optimizer, late.batch(), {.rate = 0, .stage = before});
    late.step(after);
    early.step(after);
    auto const params = values_of<float>(early.cpu, early.params);
    CHECK(changed(params, values_of<float>(late.cpu, late.params), after == Stage::dense_warm_up).empty());
  }
}

TEST_CASE("a weight of 0 leaves the indexers a gradient of zero") {
  auto config = small_config();
  config.policy<Bare>().index_loss = 0;
  Fixture<float> f{config};
  for (auto const& [path, values] : f.gradients(Stage::dense_warm_up)) {
    if (values.empty()) continue;
    INFO(path);
    CHECK((values == std::vector<float>(values.size())) == path.starts_with("blocks.0."));
  }
}

TEST_CASE("the indexers' loss is a weighted mean over tokens, summed over layers") {
  auto config = small_config();
  config.policy<Normed>().index_loss = 3;
  Fixture<double> f, weighted{config};
  for (Stage stage : {Stage::dense_warm_up, Stage::sparse}) {
    auto const staged = f.model.at(stage);
    auto const batch = f.batch();
    auto const saved = staged.forward(f.cpu, f.params, batch);
    std::vector<double> sums;   // of the layers with an indexer
    saved.blocks.for_each(
        [&](auto, std::size_t, auto const& kept) {
          if constexpr (requires { kept.attention.outputs.auxiliary_loss; })
            sums.push_back(download(f.cpu, kept.attention.outputs.auxiliary_loss).at(0));
        },
        saved.blocks);
    REQUIRE(sums.size() == 4);
    CHECK(sums[0] > 0);
    CHECK(f.policy_loss(stage) == Approx((sums[0] + sums[1] + sums[2] + sums[3]) / tokens_in_batch));
    CHECK(weighted.policy_loss(stage) == Approx((sums[0] + 3 * sums[1] + sums[2] + sums[3]) / tokens_in_batch));
    CHECK(f.policy_loss(stage, 7) == f.policy_loss(stage));   // the scale of its gradient does not change the reported loss
  }
  CHECK(f.policy_loss(Stage::language_model) == 0);
}

TEST_CASE("the indexers' loss falls in the dense warm-up, while the model's stays where it is") {
  Fixture<float> f;
  auto const first = f.step(Stage::dense_warm_up);
  ha::StepResult last;
  for (int step = 1; step < 30; ++step) last = f.step(Stage::dense_warm_up);
  INFO("from " << first.policy_loss << " to " << last.policy_loss);
  CHECK(last.policy_loss < 0.5 * first.policy_loss);
  CHECK(last.loss.loss == first.loss.loss);
}

TEST_CASE("every gradient of an indexer equals finite differences through the whole model", "[laws]") {
  for (Stage stage : {Stage::dense_warm_up, Stage::sparse}) {
    Fixture<double> f;
    auto const gradients = f.gradients(stage);
    ha::zip(
        [&](ha::Path const& path, auto& tensor) {
          if (!is_indexer(path.str()) || !tensor) return;
          auto const values = download(f.cpu, tensor);
          auto const& gradient = gradients.at(path.str());
          ha::Random random{ha::Seed{5}, path.str()};
          double along = 0, losses[2];
          std::vector<double> direction;
          for (double g : gradient) along += g * direction.emplace_back(random.normal());
          for (int side : {0, 1}) {
            auto moved = values;
            for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += (side == 0 ? 1e-6 : -1e-6) * direction[i];
            upload(f.cpu, moved, tensor);
            losses[side] = f.policy_loss(stage);
          }
          upload(f.cpu, values, tensor);
          double const slope = (losses[0] - losses[1]) / 2e-6;
          INFO(path.str() << ": gradient " << along << ", difference " << slope);
          CHECK(std::abs(along - slope) <= 1e-7 * (1e-2 + std::abs(slope)));
        },
        f.params);
  }
}

TEST_CASE("in every stage, steps over parts of a batch are one step over it, and threads change no bit") {
  for (Stage stage : {Stage::dense_warm_up, Stage::sparse}) {
    // The balancing loss of a batch is not the mean over the batch's parts, so it is off here.
    auto config = small_config();
    config.feed_forward.balance_coefficient = 0;
    Fixture<double> whole{config}, parts{config}, on_three{config, {.learning_rate = 1e-2}, 3};
    auto const at_once = whole.step(stage);
    std::vector<ha::TokenBatch<ha::Cpu>> thirds;
    for (Index i : {0, 1, 2}) thirds.push_back(parts.batch(1, 1, i));
    auto const result = accumulated_step(parts.cpu, parts.model, parts.params, parts.optimizer,
                                         std::span<ha::TokenBatch<ha::Cpu> const>(thirds), {.stage = stage});
    CHECK(result.policy_loss == Approx(at_once.policy_loss).epsilon(1e-12));
    CHECK(result.gradient_norm == Approx(at_once.gradient_norm).epsilon(1e-11));
    on_three.step(stage);
    auto const a = values_of<double>(whole.cpu, whole.params), b = values_of<double>(parts.cpu, parts.params),
               c = values_of<double>(on_three.cpu, on_three.params);
    for (auto const& [path, values] : a) {
      double worst = 0;
      for (std::size_t i = 0; i < values.size(); ++i) worst = std::max(worst, std::abs(values[i] - b.at(path)[i]));
      INFO(path);
      CHECK(worst < 1e-7);   // Adam's first step divides a gradient by its size, which enlarges the rounding of tiny gradients
      CHECK(same_bits(values, c.at(path)));
    }
  }
}

TEST_CASE("Saved takes the bytes announced in every stage, and no step but a stage's first allocates") {
  Fixture<float> f;
  auto const batch = f.batch();
  f.model.forward(f.cpu, f.params, batch);   // makes the rotary angles, which belong to the batch
  for (Stage stage : {Stage::dense_warm_up, Stage::sparse, Stage::language_model}) {
    auto const staged = f.model.at(stage);
    auto const before = f.cpu.pool().in_use();
    auto const saved = staged.forward(f.cpu, f.params, batch);
    // Saved includes one number for each layer, its loss.
    CHECK(f.cpu.pool().in_use() - before == ha::bytes<float>(staged.saved(batch.sequences)));
  }
  for (Stage stage : {Stage::dense_warm_up, Stage::sparse}) {
    f.step(stage);
    auto const allocations = f.cpu.pool().allocations();
    f.step(stage, 2);
    CHECK(f.cpu.pool().allocations() == allocations);
  }
}
