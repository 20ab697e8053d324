// Uses all parts of the library: training, checkpoints, released folders, decoding, Eigen's matrices, the laws. It is compiled with the
// headers as ordinary headers and with all warnings that docs/conventions.md names, and must give no warning.
#include <hybridattn/eigen.hpp>
#include <hybridattn/hybridattn.hpp>
#include <hybridattn/infer/generate.hpp>
#include <hybridattn/io.hpp>
#include <hybridattn/support_matrix.hpp>
#include <hybridattn/testing.hpp>

#include <cstdio>

namespace ha = hybridattn;

namespace {

using Windowed = ha::FullAttention<ha::FullOptions{.window = 16}>;
using Share = ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 50}>;

template <class T, class Model> double train(Model const& model, ha::DataSource& data) {
  ha::Cpu cpu;
  auto params = model.template initialize<T>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params};
  ha::Schedule const schedule{.warmup_steps = 1, .total_steps = 10, .min_rate = 0.1};
  auto const batch = make_batch(cpu, data.next_batch(2, 32));
  train_step(cpu, model, params, optimizer, batch, {.rate = schedule(0)});
  save_checkpoint(cpu, "warnings.safetensors", model, params, optimizer, {.step = 1, .data = data.state()});
  data.restore(load_checkpoint(cpu, "warnings.safetensors", model, params, optimizer).data);
  auto const found = generate(cpu, model, params, {{1, 2, 3}}, {.max_new_tokens = 2, .sampling = {.temperature = 0.5, .top_k = 3}});
  return model.loss(cpu, params, batch).mean() + static_cast<double>(found.tokens.size());
}
template <class Policy> bool keeps_the_laws() {
  bool all = true;
  for (auto const& [law, holds, why] : ha::testing::judge<Policy, ha::Cpu, float>()) all = all && holds;
  for (auto const& [law, holds, why] : ha::testing::judge<Policy, ha::testing::Fake, double>()) all = all && holds;
  return all;
}

}  // namespace

int main(int argc, char** argv) try {
  ha::check(argc == 3, "usage: warnings FOLDER TEXT");
  using Hybrid = ha::LanguageModel<ha::Stack<ha::GDN, ha::Full, Windowed, ha::DSA>>;
  Hybrid const model{{.model_dim = 32, .num_heads = 2, .feed_forward = {.num_experts = 4, .shared_dim = 16}, .layers = {}}};
  ha::Windows text{ha::ByteText(ha::read_text(argv[2]))};
  ha::RecallTask recall{ha::Seed{2}, {}};
  double const found = train<float>(model, text) + train<double>(model, recall);

  using Released = ha::LanguageModel<ha::Pattern<"LLLF">>;
  ha::Cpu cpu;
  Released const released{ha::hugging_face::config<Released>(argv[1])};
  auto const params = ha::hugging_face::load<float>(cpu, released, argv[1]);
  ha::hugging_face::save(cpu, released, params, "copy", ha::hugging_face::format(argv[1]));

  ha::RowMajorMatrix<float> matrix(4, 6);
  matrix.setZero();
  float const sum = ha::as_eigen(ha::view_of(matrix)).sum() + ha::as_eigen(ha::heads_of(matrix, 2), 1).sum();
  std::printf("%s\n", ha::support_matrix().c_str());
  bool const lawful = keeps_the_laws<ha::GDN>() && keeps_the_laws<Windowed>() && keeps_the_laws<ha::DSA>();
  return lawful && found > 0 && sum == 0.0f ? 0 : 1;
} catch (ha::Error const& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
