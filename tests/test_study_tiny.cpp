// Compares logits, loss and every gradient of the study's small model with those of the study's code, which was made causal first.
#include "catch.hpp"

#include "../examples/study_models.hpp"

#include <hybridattn/io/safetensors.hpp>

#include <cstdio>

namespace ha = hybridattn;
using ha::Index;

namespace {

using Sparse = study::Sparse1Of<12>;
using Tiny = ha::Stack<study::Linear1, Sparse, study::Full1, study::Linear1>;
using Model = ha::LanguageModel<Tiny>;

Model tiny_model() {
  Model::Config c{
      .vocab_size = 48,
      .model_dim = 32,
      .num_heads = 4,
      .feed_forward = {.hidden_dim = 32, .num_experts = 4, .top_k = 2, .expert_dim = 8, .shared_dim = 0, .decoder_sparse_step = 2},
      .norm = {ha::NormWeight::zero_centred, 1e-6}};
  c.policy<study::Linear1>() = {.num_heads = 2, .key_dim = 8, .value_dim = 8};
  c.policy<study::Full1>() = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 8};
  c.policy<Sparse>() = {.num_heads = 4, .head_dim = 8, .index_heads = 4, .index_dim = 8, .index_scale = 1};
  return Model{c};
}

// Rows of one of the checkpoint's tensors: `repeat` blocks of `count` rows. A block begins `step` rows after the one before.
struct Rows {
  std::string name;
  Index first = 0, count = -1, step = 0, repeat = 1;
};

std::vector<Rows> mixer_rows(std::string const& layer, std::string const& field) {
  constexpr Index D = 8;
  std::string const linear = layer + "linear_attn.", full = layer + "self_attn.", sparse = layer + "dsa_attn.";
  std::map<std::string, Rows> const rows_of = {
      {"0 w.q", {linear + "in_proj_qkvz.weight", 0, D, 4 * D, 2}},
      {"0 w.k", {linear + "in_proj_qkvz.weight", D, D, 4 * D, 2}},
      {"0 w.v", {linear + "in_proj_qkvz.weight", 2 * D, D, 4 * D, 2}},
      {"0 w_gate", {linear + "in_proj_qkvz.weight", 3 * D, D, 4 * D, 2}},
      {"0 w.beta", {linear + "in_proj_ba.weight", 0, 1, 2, 2}},
      {"0 w.g", {linear + "in_proj_ba.weight", 1, 1, 2, 2}},
      {"0 w_o", {linear + "out_proj.weight"}},
      {"0 prepare.conv_q", {linear + "conv1d.weight", 0, 16}},
      {"0 prepare.conv_k", {linear + "conv1d.weight", 16, 16}},
      {"0 prepare.conv_v", {linear + "conv1d.weight", 32, 16}},
      {"0 prepare.a_log", {linear + "A_log"}},
      {"0 prepare.dt_bias", {linear + "dt_bias"}},
      {"0 finish.norm", {linear + "norm.weight"}},
      {"1 w.q", {sparse + "qkv.weight", 0, 32}},
      {"1 w.k", {sparse + "qkv.weight", 32, 32}},
      {"1 w.v", {sparse + "qkv.weight", 64, 32}},
      {"1 w_o", {sparse + "w_o.weight"}},
      {"1 w.index_q", {sparse + "indexer.q_proj.weight"}},
      {"1 w.index_k", {sparse + "indexer.k_proj.weight"}},
      {"1 w.index_w", {sparse + "indexer.w_proj.weight"}},
      {"2 w.q", {full + "q_proj.weight", 0, D, 2 * D, 4}},
      {"2 w_gate", {full + "q_proj.weight", D, D, 2 * D, 4}},
      {"2 w.k", {full + "k_proj.weight"}},
      {"2 w.v", {full + "v_proj.weight"}},
      {"2 w_o", {full + "o_proj.weight"}},
      {"2 prepare.q_norm", {full + "q_norm.weight"}},
      {"2 prepare.k_norm", {full + "k_norm.weight"}},
  };
  std::string const kind = layer.ends_with("layers.1.") ? "1 " : layer.ends_with("layers.2.") ? "2 " : "0 ";
  REQUIRE(rows_of.contains(kind + field));
  return {rows_of.at(kind + field)};
}

std::vector<Rows> feed_forward_rows(std::string const& layer, std::string const& field) {
  std::string const mlp = layer + "mlp.";
  if (field == "router") return {{mlp + "gate.weight"}};
  if (field == "shared_gate") return {{mlp + "shared_expert_gate.weight"}};
  std::string const projection = field.substr(field.find('.') + 1) + "_proj.weight";
  if (field.starts_with("dense.")) return {{mlp + projection}};
  std::vector<Rows> rows;
  for (int e = 0; e < 4; ++e) rows.push_back({mlp + "experts." + std::to_string(e) + "." + projection});
  return rows;
}

// The rows of the checkpoint that hold the model's tensor at this path.
std::vector<Rows> rows_of(std::string const& path) {
  if (path == "embedding") return {{"model.embed_tokens.weight"}};
  if (path == "norm") return {{"model.norm.weight"}};
  if (path == "head") return {{"lm_head.weight"}};
  std::string const layer = "model.layers." + path.substr(7, 1) + ".", field = path.substr(9);
  if (field == "attention_norm") return {{layer + "input_layernorm.weight"}};
  if (field == "feed_forward_norm") return {{layer + "post_attention_layernorm.weight"}};
  if (field.starts_with("attention.")) return mixer_rows(layer, field.substr(10));
  return feed_forward_rows(layer, field.substr(13));
}

std::vector<double> gather(ha::Safetensors const& file, std::string const& prefix, std::string const& path) {
  std::vector<double> result;
  for (Rows const& r : rows_of(path)) {
    auto const values = file.read_doubles(prefix + r.name);
    Index const rows = file.info(prefix + r.name).shape[0], width = rows == 0 ? 0 : std::ssize(values) / rows;
    for (Index part = 0; part < r.repeat; ++part) {
      auto const from = values.begin() + (r.first + part * r.step) * width;
      result.insert(result.end(), from, from + (r.count < 0 ? rows : r.count) * width);
    }
  }
  return result;
}

double difference(std::vector<double> const& ours, std::vector<double> const& theirs) {
  REQUIRE(ours.size() == theirs.size());
  double worst = 0, largest = 1e-3;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    worst = std::max(worst, std::abs(ours[i] - theirs[i]));
    largest = std::max(largest, std::abs(theirs[i]));
  }
  return worst / largest;
}
template <class T> std::vector<double> widened(std::vector<T> const& values) { return {values.begin(), values.end()}; }

struct Errors {
  double logits = 0, loss = 0, gradients = 0;
};

template <class T> Errors errors_in() {
  std::string const folder = std::string(HYBRIDATTN_GOLDEN_DIR) + "/models/study_tiny/";
  ha::Safetensors const checkpoint{folder + "model.safetensors"}, expected{folder + "expected.safetensors"},
      truth{folder + "gradients_causal.safetensors"};
  ha::Cpu cpu;
  auto const model = tiny_model();
  auto params = ha::allocate<T>(cpu, model.params());
  ha::zip(
      [&](ha::Path const& path, auto& tensor) {
        if (!tensor) return;
        auto const values = gather(checkpoint, "", path.str());
        upload(cpu, std::vector<T>(values.begin(), values.end()), tensor);
      },
      params);

  std::vector<std::int32_t> tokens, targets;
  for (double id : expected.read_doubles("input_ids")) tokens.push_back(static_cast<std::int32_t>(id));
  for (std::size_t i = 0; i < tokens.size(); ++i) targets.push_back(i % 36 == 35 ? -1 : tokens[i + 1]);
  auto const batch = make_batch(cpu, ha::Sequences::equal(2, 36), tokens, targets);

  auto saved = model.forward(cpu, params, batch);
  Errors errors;
  errors.logits = difference(widened(download(cpu, model.logits(cpu, params, saved))), expected.read_doubles("causal.logits"));
  auto const gradients = model.backward(cpu, params, batch, std::move(saved), 1.0 / 70);
  errors.loss = std::abs(download(cpu, gradients.losses)[0].loss.mean() - expected.read_doubles("causal.loss")[0]);
  int without = 0;
  ha::zip(
      [&](ha::Path const& path, auto const& gradient, auto const& tensor) {
        if (!tensor) return;
        if (!gradient) {
          ++without;
          CHECK(path.str().find("w.index_") != std::string::npos);
          return;
        }
        double const error = difference(widened(download(cpu, gradient)), gather(truth, "grad.", path.str()));
        INFO(path.str() << " differs by " << error);
        CHECK(error <= (sizeof(T) == 8 ? 1e-10 : 1e-3));
        errors.gradients = std::max(errors.gradients, error);
      },
      gradients.params, params);
  CHECK(without == 3);   // the indexer's, which are not trained
  return errors;
}

}  // namespace

TEST_CASE("the study's small model: logits, loss and every gradient in double") {
  auto const errors = errors_in<double>();
  std::printf("study_tiny, double: logits %.1e, loss %.1e, gradients %.1e\n", errors.logits, errors.loss, errors.gradients);
  CHECK(errors.logits <= 1e-11);
  CHECK(errors.loss <= 1e-11);
}

// The published code in float32 differs from double by 5e-6 (logits) and 4e-5 (gradients).
TEST_CASE("the study's small model in float") {
  auto const errors = errors_in<float>();
  std::printf("study_tiny, float: logits %.1e, loss %.1e, gradients %.1e\n", errors.logits, errors.loss, errors.gradients);
  CHECK(errors.logits <= 2e-5);
  CHECK(errors.loss <= 2e-6);
}
