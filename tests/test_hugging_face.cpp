// Released models in folders of the Hugging Face layout, compared with all that the published implementation computes from them.
// `test_hugging_face [.table]` prints the errors of every folder.
#include "catch.hpp"

#include "compare.hpp"
#include "golden.hpp"
#include "released.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/io.hpp>

#include <cstring>
#include <map>
#include <memory>

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;
using ha::Index;

namespace {

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

  ha::TokenBatch<ha::Cpu> batch(ha::Cpu& cpu) const {
    std::vector<std::int32_t> tokens(ids.begin(), ids.end()), targets(tokens.begin() + 1, tokens.end());
    targets.push_back(0);
    for (auto last = length - 1; last < std::ssize(targets); last += length) targets[static_cast<std::size_t>(last)] = ha::no_target;
    return ha::make_batch(cpu, ha::Sequences::equal(std::ssize(ids) / length, length), tokens, targets);
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

template <class Model, class T> struct ModelIn final : AnyModel {
  using Params = typename Model::template Params<ha::Owned<T, ha::Cpu>>;
  ha::Cpu cpu{1};   // the models are tiny
  Model model;
  Params params;
  hf::Format format;
  ha::AdamW<Params> optimizer;

  explicit ModelIn(fs::path const& folder)
      : model(hf::config<Model>(folder)), params(hf::load<T>(cpu, model, folder)), format(hf::format(folder)),
        optimizer(cpu, params, {.learning_rate = 1e-3, .beta_1 = 0.9, .beta_2 = 0.999, .weight_decay = 0.1, .max_norm = 1}) {}

  void set_balance(double coefficient) override {
    auto config = model.config();
    config.feed_forward.balance_coefficient = coefficient;
    model = Model{config};
  }
  Values evaluate(Tokens tokens) override {
    auto const batch = tokens.batch(cpu);
    auto saved = model.forward(cpu, params, batch);
    Values values;
    keep(values, "logits", model.logits(cpu, params, saved));
    keep(values, "hidden.layer" + std::to_string(Model::Stack::depth - 1), saved.x);
    keep(values, "hidden.final_norm", saved.x_normed);
    saved.blocks.for_each_layer([&](int i, auto const& block) { keep_block(values, i, block); }, saved.blocks);
    auto const result = model.backward(cpu, params, batch, std::move(saved), 1 / static_cast<double>(batch.counted));
    auto const losses = download(cpu, result.losses)[0];
    values["loss"] = {{}, {losses.loss.mean() + losses.auxiliary()}};
    values["aux_loss"] = {{}, {losses.auxiliary()}};
    keep_group(values, "grad.", result.params);
    return values;
  }
  ha::StepResult train(Tokens tokens) override {
    if constexpr (sizeof(T) == 8) return train_step(cpu, model, params, optimizer, tokens.batch(cpu));
    else return {};   // only in double
  }
  Values parameters() override {
    Values values;
    keep_group(values, "final.", params);
    return values;
  }
  void save(fs::path const& folder) override { hf::save(cpu, model, params, folder, format); }

 private:
  template <class E, int Rank> void keep(Values& values, std::string const& name, ha::Tensor<E, Rank, ha::Cpu> const& tensor) {
    auto const elements = download(cpu, tensor);
    auto const shape = tensor.shape();
    values[name] = {{shape.extent, shape.extent + Rank}, {elements.begin(), elements.end()}};
  }
  void keep_block(Values& values, int i, auto const& block) {
    std::string const layer = ".layer" + std::to_string(i);
    keep(values, i == 0 ? "hidden.embedding" : "hidden.layer" + std::to_string(i - 1), block.x);
    keep(values, "mixer_input" + layer, block.x_normed);
    keep(values, "mixer" + layer, block.h);   // includes the residual, which is subtracted below
    auto& mixed = values["mixer" + layer].elements;
    auto const x = download(cpu, block.x);
    for (std::size_t n = 0; n < x.size(); ++n) mixed[n] -= static_cast<double>(x[n]);
    if (!block.feed_forward.chosen) return;
    keep(values, "probabilities" + layer, block.feed_forward.probabilities);
    keep(values, "experts" + layer, block.feed_forward.chosen);
  }
  void keep_group(Values& values, std::string const& prefix, Params const& group) {
    hf::for_each_tensor(
        cpu, model, group,
        [&](std::string const& name, hf::Extents const& shape, std::vector<T> const& elements) {
          values[prefix + name] = {shape, {elements.begin(), elements.end()}};
        },
        format);
  }
};

using Maker = std::unique_ptr<AnyModel> (*)(fs::path const&);
using Makers = std::map<std::pair<std::string, double>, Maker>;   // by pattern and share of a head that turns, in percent
template <class T, int rotary_percent, ha::Text... patterns> void add_makers(Makers& makers) {
  ((makers[{patterns.letters, rotary_percent}] = [](fs::path const& folder) -> std::unique_ptr<AnyModel> {
     return std::make_unique<ModelIn<ModelOf<rotary_percent, patterns>, T>>(folder);
   }),
   ...);
}
// The folder's model, or null if this program does not compile its type.
std::unique_ptr<AnyModel> open_model(Makers const& makers, fs::path const& folder) {
  auto const s = hf::read_settings(folder);
  auto const found = makers.find({s.pattern, rotary_percent_of(s)});
  return found == makers.end() ? nullptr : found->second(folder);
}
std::unique_ptr<AnyModel> open_in_double(fs::path const& folder) {
  Makers makers;
  add_makers<double, 25, "LFFL", "LF", "LLLF">(makers);
  add_makers<double, 50, "LFFL", "LF", "LLLF">(makers);
  add_makers<double, 100, "LFFL", "LF">(makers);
  return open_model(makers, folder);
}
std::unique_ptr<AnyModel> open_in_float(fs::path const& folder) {
  Makers makers;
  add_makers<float, 50, "LFFL", "LF">(makers);
  return open_model(makers, folder);
}

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

std::vector<Released> released_models() {
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
void compare_named(Values const& ours, ha::Safetensors const& file, std::string const& prefix, Worst& worst) {
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

std::vector<double> softmax_rows(std::vector<double> logits, std::size_t width) {
  for (std::size_t row = 0; row < logits.size(); row += width) {
    double sum = 0;
    for (std::size_t i = row; i < row + width; ++i) sum += logits[i] = std::exp(logits[i]);
    for (std::size_t i = row; i < row + width; ++i) logits[i] /= sum;
  }
  return logits;
}
// How many tokens have other experts than expected. The order of the experts does not count.
Index count_other_experts(std::vector<double> ours, std::vector<double> theirs, Index top_k) {
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
void compare_routers(Values const& ours, ha::Safetensors const& expected, Errors& e) {
  for (auto const& [name, info] : expected.tensors()) {
    if (!name.starts_with("experts.")) continue;
    std::string const layer = name.substr(7);
    auto const width = static_cast<std::size_t>(expected.info("router_logits" + layer).shape[1]);
    auto const& probabilities = ours.at("probabilities" + layer).elements;
    e.router.add(difference(probabilities, softmax_rows(expected.read_doubles("router_logits" + layer), width)), layer);
    e.experts_differ += count_other_experts(ours.at(name).elements, expected.read_doubles(name), info.shape[1]);
  }
}

void compare_passes(Released const& truth, AnyModel& model, Errors& e) {
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
void compare_auxiliary(Released const& truth, AnyModel& model, Errors& e) {
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
void compare_training(Released const& truth, AnyModel& model, Errors& e) {
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

void compare_written(Released const& truth, AnyModel& model, Errors& e) {
  ScratchFolder const scratch;
  model.save(scratch.path());
  auto const different = differing_tensor(scratch.path(), truth.folder());
  e.written.add(different.empty() ? 0 : 1, different);
  CHECK(hf::config_text(hf::read_settings(scratch.path())) == hf::config_text(hf::read_settings(truth.folder())));
}

void compare_gradients_in_float(Values const& ours, ha::Safetensors const& gradients, Errors& e) {
  for (auto const& [name, info] : gradients.tensors())
    e.float_gradients.add(difference(ours.at(name).elements, gradients.read_doubles(name)), name);
}
// The published code in float32 differs from double by up to 5e-6 (logits) and 4e-5 (gradients). Where a folder has its float32 results,
// twice their error is allowed too.
void allow_twice_published(ha::Safetensors const& published, ha::Safetensors const& expected, ha::Safetensors const& gradients, Errors& e) {
  e.float_logits_allowed =
      std::max(e.float_logits_allowed, 2 * difference(published.read_doubles("logits"), expected.read_doubles("logits")));
  for (auto const& [name, info] : published.tensors()) {
    if (!name.starts_with("grad.")) continue;
    double const error = difference(published.read_doubles(name), gradients.read_doubles(name));
    e.float_gradients_allowed = std::max(e.float_gradients_allowed, 2 * error);
  }
}
void compare_in_float(Released const& truth, AnyModel& model, Errors& e) {
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

Errors errors_of(Released const& truth) {
  Errors e;
  auto const in_double = open_in_double(truth.folder()), balanced = open_in_double(truth.folder()),
             in_float = open_in_float(truth.folder());
  INFO(truth.folder() << " has the pattern " << hf::pattern(truth.folder()) << ", or a rotary share, that open_in_double does not list");
  REQUIRE(in_double != nullptr);
  compare_written(truth, *in_double, e);
  compare_passes(truth, *in_double, e);
  compare_training(truth, *in_double, e);
  compare_auxiliary(truth, *balanced, e);
  if (in_float != nullptr) compare_in_float(truth, *in_float, e);
  return e;
}
std::map<std::string, Errors> const& all_errors() {
  static std::map<std::string, Errors> const errors = [] {
    std::map<std::string, Errors> result;
    for (auto const& truth : released_models()) result[truth.name()] = errors_of(truth);
    return result;
  }();
  return errors;
}

void check_worst(char const* what, Worst const& worst, double allowed) {
  INFO(what << ": " << worst.error << " at " << worst.where << "; allowed " << allowed);
  CHECK(worst.error <= allowed);
}

}  // namespace

TEST_CASE("released models give their own logits, losses, gradients and trained parameters, and are written back as they were") {
  CHECK((!all_errors().empty() || golden::elsewhere()));
  for (auto const& [name, e] : all_errors()) {
    INFO(name);
    check_worst("logits", e.logits, 1e-11);
    check_worst("hidden states", e.hidden, 1e-11);
    check_worst("router probabilities", e.router, 1e-11);
    check_worst("loss", e.loss, 1e-11);
    check_worst("gradients", e.gradients, 1e-10);
    check_worst("auxiliary loss", e.auxiliary_loss, 1e-11);
    check_worst("gradients with the auxiliary loss", e.auxiliary_gradients, 1e-10);
    check_worst("losses and norms of ten steps", e.training_loss, 1e-9);
    check_worst("trained parameters", e.trained, 1e-9);
    check_worst("written back", e.written, 0);
    check_worst("logits in float", e.float_logits, e.float_logits_allowed);
    check_worst("gradients in float", e.float_gradients, e.float_gradients_allowed);
    CHECK(e.experts_differ == 0);
  }
}

TEST_CASE("the errors of every released model", "[.table]") {
  std::printf("%-20s %8s %8s %8s %8s %8s %8s %8s %8s %8s %8s  float: %8s %8s\n", "folder", "written", "logits", "hidden", "router", "loss",
              "grads", "aux", "auxgrads", "steps", "trained", "logits", "grads");
  for (auto const& [name, e] : all_errors()) {
    std::printf("%-20s", name.c_str());
    for (auto const* worst : {&e.written, &e.logits, &e.hidden, &e.router, &e.loss, &e.gradients, &e.auxiliary_loss, &e.auxiliary_gradients,
                              &e.training_loss, &e.trained, &e.float_logits, &e.float_gradients}) {
      std::printf(worst == &e.float_logits ? "         " : " ");
      if (worst->compared) std::printf("%8.1e", worst->error);
      else std::printf("%8s", "-");
    }
    std::printf("\n");
  }
}
