// Released models in folders of the Hugging Face layout, compared with all that the published implementation computes from them.
#ifndef HYBRIDATTN_TESTS_RELEASED_MODELS_HPP
#define HYBRIDATTN_TESTS_RELEASED_MODELS_HPP

#include "catch.hpp"

#include "compare.hpp"
#include "golden.hpp"
#include "released.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/infer/generate.hpp>
#include <hybridattn/io.hpp>
#include <hybridattn/testing/machine.hpp>

#include <map>
#include <memory>

namespace released {

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;
using ha::Index;

using Json = nlohmann::json;

// What a model computes from a batch, under the names of the golden files.
struct Tensor {
  std::vector<Index> shape;
  std::vector<double> elements;
};
using Values = std::map<std::string, Tensor>;

// Tokens of several sequences; position t predicts token t + 1.
struct Tokens {
  std::span<std::int64_t const> ids;
  Index length = 0;

  template <class B> ha::TokenBatch<B> batch(B& backend) const {
    std::vector<std::int32_t> tokens(ids.begin(), ids.end()), targets(tokens.begin() + 1, tokens.end());
    targets.push_back(0);
    for (auto last = length - 1; last < std::ssize(targets); last += length) targets[static_cast<std::size_t>(last)] = ha::no_target;
    return ha::make_batch(backend, ha::Sequences::equal(std::ssize(ids) / length, length), tokens, targets);
  }
};

// A folder's model. The interface does not depend on the model's type.
struct AnyModel {
  virtual ~AnyModel() = default;
  virtual void set_balance(double coefficient) = 0;
  // Logits, losses, activations between the parts, and every gradient.
  virtual Values evaluate(Tokens tokens) = 0;
  virtual ha::StepResult train(Tokens tokens) = 0;
  virtual Values parameters() = 0;
  virtual void save(fs::path const& folder) = 0;
};

template <class Model, class T, class B> struct ModelIn final : AnyModel {
  using Params = typename Model::template Params<ha::Owned<T, B>>;
  B backend = ha::testing::Machine<B>::make(1);   // one thread of the CPU, as the models are tiny
  Model model;
  Params params;
  hf::Format format;
  ha::AdamW<Params> optimizer;

  explicit ModelIn(fs::path const& folder)
      : model(hf::config<Model>(folder)), params(hf::load<T>(backend, model, folder)), format(hf::format(folder)),
        optimizer(backend, params, {.learning_rate = 1e-3, .beta_1 = 0.9, .beta_2 = 0.999, .weight_decay = 0.1, .max_norm = 1}) {}

  void set_balance(double coefficient) override {
    auto config = model.config();
    config.feed_forward.balance_coefficient = coefficient;
    model = Model{config};
  }
  Values evaluate(Tokens tokens) override {
    auto const batch = tokens.batch(backend);
    auto saved = model.forward(backend, params, batch);
    Values values;
    keep(values, "logits", model.logits(backend, params, saved));
    keep(values, "hidden.layer" + std::to_string(Model::Stack::depth - 1), saved.x);
    keep(values, "hidden.final_norm", saved.x_normed);
    saved.blocks.for_each_layer([&](int i, auto const& block) { keep_block(values, i, block); }, saved.blocks);
    auto const result = model.backward(backend, params, batch, std::move(saved), 1 / static_cast<double>(batch.counted));
    auto const losses = download(backend, result.losses)[0];
    values["loss"] = {{}, {losses.loss.mean() + losses.auxiliary()}};
    values["aux_loss"] = {{}, {losses.auxiliary()}};
    keep_group(values, "grad.", result.params);
    return values;
  }
  ha::StepResult train(Tokens tokens) override {
    if constexpr (sizeof(T) == 8) return train_step(backend, model, params, optimizer, tokens.batch(backend));
    else return {};   // only in double
  }
  Values parameters() override {
    Values values;
    keep_group(values, "final.", params);
    return values;
  }
  void save(fs::path const& folder) override { hf::save(backend, model, params, folder, format); }

 private:
  template <class E, int Rank> void keep(Values& values, std::string const& name, ha::Tensor<E, Rank, B> const& tensor) {
    auto const elements = download(backend, tensor);
    auto const shape = tensor.shape();
    values[name] = {{shape.extent, shape.extent + Rank}, {elements.begin(), elements.end()}};
  }
  void keep_block(Values& values, int i, auto const& block) {
    std::string const layer = ".layer" + std::to_string(i);
    keep(values, i == 0 ? "hidden.embedding" : "hidden.layer" + std::to_string(i - 1), block.x);
    keep(values, "mixer_input" + layer, block.x_normed);
    keep(values, "mixer" + layer, block.h);   // includes the residual, which is subtracted below
    auto& mixed = values["mixer" + layer].elements;
    auto const x = download(backend, block.x);
    for (std::size_t n = 0; n < x.size(); ++n) mixed[n] -= static_cast<double>(x[n]);
    if (!block.feed_forward.chosen) return;
    keep(values, "probabilities" + layer, block.feed_forward.probabilities);
    keep(values, "experts" + layer, block.feed_forward.chosen);
  }
  void keep_group(Values& values, std::string const& prefix, Params const& group) {
    hf::for_each_tensor(
        backend, model, group,
        [&](std::string const& name, hf::Extents const& shape, std::vector<T> const& elements) {
          values[prefix + name] = {shape, {elements.begin(), elements.end()}};
        },
        format);
  }
};

// The largest error and the name of its values. A NaN counts as the largest.
struct Worst {
  double error = 0;
  std::string where;
  bool compared = false;
  void add(double more, std::string const& name) {
    compared = true;
    if (!std::isnan(error) && !(more <= error)) error = more, where = name;
  }
};
// max|a - b| / max(max|b|, 1e-3)
template <class T> double difference(std::vector<T> const& ours, std::vector<double> const& theirs) {
  REQUIRE(ours.size() == theirs.size());
  Worst worst;
  double largest = 1e-3;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    worst.add(std::abs(static_cast<double>(ours[i]) - theirs[i]), "");
    largest = std::max(largest, std::abs(theirs[i]));
  }
  return worst.error / largest;
}

// The files of a folder with the results of the published implementation.
class Released {
 public:
  explicit Released(fs::path folder) : folder_(std::move(folder)) {}

  fs::path const& folder() const { return folder_; }
  std::string name() const { return folder_.filename().string(); }
  bool has(std::string const& file) const { return fs::exists(folder_ / (file + ".safetensors")); }
  ha::Safetensors open(std::string const& file) const { return ha::Safetensors{folder_ / (file + ".safetensors")}; }
  // The `T` of all expected_t<T>.
  std::vector<std::string> lengths() const {
    std::vector<std::string> result;
    for (auto const& entry : fs::directory_iterator(folder_))
      if (auto const stem = entry.path().stem().string(); stem.starts_with("expected_t")) result.push_back(stem.substr(10));
    std::ranges::sort(result);
    return result;
  }
  double balance_coefficient() const { return Json::parse(content_of(folder_ / "config.json")).at("router_aux_loss_coef").get<double>(); }

 private:
  fs::path folder_;
};

inline std::vector<Released> released_models() {
  std::vector<Released> result;
  for (auto const& entry : fs::directory_iterator(golden::folder().parent_path() / "models")) {
    auto const name = entry.path().filename().string();
    if (name.starts_with("qwen3_next") || name.starts_with("qwen3_5")) result.emplace_back(entry.path());
  }
  std::ranges::sort(result, {}, &Released::name);
  return result;
}

struct Errors {
  Worst logits, hidden, router, loss, auxiliary_loss, gradients, auxiliary_gradients, training_loss, trained, written;
  Worst float_logits, float_gradients;
  double float_logits_allowed = 5e-6, float_gradients_allowed = 4e-5;
  Index experts_differ = 0;
};

// Compares every tensor of a file whose name begins with `prefix`.
inline void compare_named(Values const& ours, ha::Safetensors const& file, std::string const& prefix, Worst& worst) {
  for (auto const& [name, info] : file.tensors()) {
    if (!name.starts_with(prefix)) continue;
    INFO(name);
    REQUIRE(ours.contains(name));
    auto shape = info.shape;
    if (shape.size() == 3 && ours.at(name).shape.size() == 2) shape = {shape[0] * shape[1], shape[2]};   // ours: [N, C]
    CHECK(ours.at(name).shape == shape);
    worst.add(difference(ours.at(name).elements, file.read_doubles(name)), name);
  }
}

inline std::vector<double> softmax_rows(std::vector<double> logits, std::size_t width) {
  for (std::size_t row = 0; row < logits.size(); row += width) {
    double sum = 0;
    for (std::size_t i = row; i < row + width; ++i) sum += logits[i] = std::exp(logits[i]);
    for (std::size_t i = row; i < row + width; ++i) logits[i] /= sum;
  }
  return logits;
}
// How many tokens have other experts than expected. The order of the experts does not count.
inline Index count_other_experts(std::vector<double> ours, std::vector<double> theirs, Index top_k) {
  REQUIRE(ours.size() == theirs.size());
  Index others = 0;
  for (Index i = 0; i < std::ssize(ours); i += top_k) {
    auto const a = ours.begin() + i, b = theirs.begin() + i;
    std::sort(a, a + top_k);
    std::sort(b, b + top_k);
    others += !std::equal(a, a + top_k, b);
  }
  return others;
}
inline void compare_routers(Values const& ours, ha::Safetensors const& expected, Errors& e) {
  for (auto const& [name, info] : expected.tensors()) {
    if (!name.starts_with("experts.")) continue;
    std::string const layer = name.substr(7);
    auto const width = static_cast<std::size_t>(expected.info("router_logits" + layer).shape[1]);
    auto const& probabilities = ours.at("probabilities" + layer).elements;
    e.router.add(difference(probabilities, softmax_rows(expected.read_doubles("router_logits" + layer), width)), layer);
    e.experts_differ += count_other_experts(ours.at(name).elements, expected.read_doubles(name), info.shape[1]);
  }
}

inline void compare_passes(Released const& truth, AnyModel& model, Errors& e) {
  for (auto const& T : truth.lengths()) {
    auto const expected = truth.open("expected_t" + T), gradients = truth.open("gradients_t" + T);
    auto const ids = expected.read_int64s("input_ids");
    auto const ours = model.evaluate({ids, expected.info("input_ids").shape[1]});
    e.logits.add(difference(ours.at("logits").elements, expected.read_doubles("logits")), "T=" + T);
    e.loss.add(std::abs(ours.at("loss").elements[0] - expected.read_doubles("loss")[0]), "T=" + T);
    compare_named(ours, expected, "hidden.", e.hidden);
    compare_named(ours, expected, "mixer", e.hidden);   // includes mixer_input
    compare_routers(ours, expected, e);
    compare_named(ours, gradients, "grad.", e.gradients);
  }
}
inline void compare_auxiliary(Released const& truth, AnyModel& model, Errors& e) {
  for (auto const& T : truth.lengths()) {
    if (!truth.has("gradients_t" + T + "_aux")) continue;
    auto const expected = truth.open("gradients_t" + T + "_aux"), tokens = truth.open("expected_t" + T);
    auto const ids = tokens.read_int64s("input_ids");
    model.set_balance(truth.balance_coefficient());
    auto const ours = model.evaluate({ids, tokens.info("input_ids").shape[1]});
    double const unweighted = ours.at("aux_loss").elements[0] / truth.balance_coefficient();
    e.auxiliary_loss.add(std::abs(unweighted - expected.read_doubles("aux_loss")[0]), "T=" + T);
    e.auxiliary_loss.add(std::abs(ours.at("loss").elements[0] - expected.read_doubles("loss")[0]), "the sum, T=" + T);
    compare_named(ours, expected, "grad.", e.auxiliary_gradients);
  }
}
inline void compare_training(Released const& truth, AnyModel& model, Errors& e) {
  if (!truth.has("training")) return;
  auto const expected = truth.open("training");
  auto const ids = expected.read_int64s("input_ids");
  auto const shape = expected.info("input_ids").shape;
  auto const losses = expected.read_doubles("loss"), norms = expected.read_doubles("grad_norm");
  auto const size = static_cast<std::size_t>(shape[1] * shape[2]);
  for (std::size_t step = 0; step < losses.size(); ++step) {
    auto const result = model.train({std::span(ids).subspan(step * size, size), shape[2]});
    std::string const where = "step " + std::to_string(step + 1);
    e.training_loss.add(std::abs(result.loss.mean() + result.auxiliary_loss - losses[step]), where);
    e.training_loss.add(std::abs(result.gradient_norm - norms[step]) / norms[step], "norm of " + where);
  }
  compare_named(model.parameters(), expected, "final.", e.trained);
}

inline void compare_written(Released const& truth, AnyModel& model, Errors& e) {
  ScratchFolder const scratch;
  model.save(scratch.path());
  auto const different = differing_tensor(scratch.path(), truth.folder());
  e.written.add(different.empty() ? 0 : 1, different);
  CHECK(hf::config_text(hf::read_settings(scratch.path())) == hf::config_text(hf::read_settings(truth.folder())));
}

inline void compare_gradients_in_float(Values const& ours, ha::Safetensors const& gradients, Errors& e) {
  for (auto const& [name, info] : gradients.tensors())
    e.float_gradients.add(difference(ours.at(name).elements, gradients.read_doubles(name)), name);
}
// The published code in float32 differs from double by up to 5e-6 (logits) and 4e-5 (gradients). Where a folder has its float32 results,
// twice their error is allowed too.
inline void allow_twice_published(ha::Safetensors const& published, ha::Safetensors const& expected, ha::Safetensors const& gradients,
                                  Errors& e) {
  e.float_logits_allowed =
      std::max(e.float_logits_allowed, 2 * difference(published.read_doubles("logits"), expected.read_doubles("logits")));
  for (auto const& [name, info] : published.tensors()) {
    if (!name.starts_with("grad.")) continue;
    double const error = difference(published.read_doubles(name), gradients.read_doubles(name));
    e.float_gradients_allowed = std::max(e.float_gradients_allowed, 2 * error);
  }
}
inline void compare_in_float(Released const& truth, AnyModel& model, Errors& e) {
  for (auto const& T : truth.lengths()) {
    auto const expected = truth.open("expected_t" + T), gradients = truth.open("gradients_t" + T);
    auto const ids = expected.read_int64s("input_ids");
    auto const ours = model.evaluate({ids, expected.info("input_ids").shape[1]});
    e.float_logits.add(difference(ours.at("logits").elements, expected.read_doubles("logits")), "T=" + T);
    compare_gradients_in_float(ours, gradients, e);
    Errors routers;
    compare_routers(ours, expected, routers);
    e.experts_differ += routers.experts_differ;
    if (truth.has("float32_t" + T)) allow_twice_published(truth.open("float32_t" + T), expected, gradients, e);
  }
}

inline void check_worst(char const* what, Worst const& worst, double allowed) {
  INFO(what << ": " << worst.error << " at " << worst.where << "; allowed " << allowed);
  CHECK(worst.error <= allowed);
}

}  // namespace released

#endif
