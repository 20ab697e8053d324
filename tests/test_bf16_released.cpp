// A released model in bf16: its parameters, its logits beside those in float, and the folder that it writes.
#include "catch.hpp"
#include "golden.hpp"
#include "released.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/store/hugging_face.hpp>

#include <cstdio>

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
using ha::bf16, ha::Index;

namespace {

using Model = ModelOf<50, "LFFL">;
std::filesystem::path folder() { return golden::folder().parent_path() / "models/qwen3_next_tiny"; }

double largest_difference(std::vector<float> const& x, std::vector<float> const& y) {
  REQUIRE(x.size() == y.size());
  double largest = 0;
  for (std::size_t i = 0; i < x.size(); ++i) largest = std::max(largest, std::abs(static_cast<double>(x[i]) - static_cast<double>(y[i])));
  return largest;
}

}  // namespace

TEST_CASE("a released model in bf16 agrees with its logits in float, within the budget of rounding the weights") {
  ha::Cpu cpu;
  Model const model{hf::config<Model>(folder())};
  auto const in_float = hf::load<float>(cpu, model, folder());
  auto const in_bf16 = hf::load<bf16>(cpu, model, folder());
  auto rounded = ha::allocate_together<float>(cpu, model.params());   // the weights in bf16, all else in float
  convert(cpu, in_bf16, rounded);
  std::vector<std::int32_t> tokens;
  for (Index i = 0; i < 24; ++i) tokens.push_back(static_cast<std::int32_t>(i * 5 % model.config().vocab_size));
  auto const batch = make_batch(cpu, ha::Sequences::equal(2, 12), tokens, tokens);
  auto const logits = [&](auto const& params) { return download(cpu, model.logits(cpu, params, model.forward(cpu, params, batch))); };
  auto const truth = logits(in_float);
  double const of_weights = largest_difference(logits(rounded), truth), of_all = largest_difference(logits(in_bf16), truth);
  double largest = 0;
  for (float logit : truth) largest = std::max(largest, std::abs(static_cast<double>(logit)));
  std::printf("logits up to %.3f: rounded weights change them by %.4f, bf16 by %.4f\n", largest, of_weights, of_all);
  CHECK(of_weights > 0);
  CHECK(of_all <= 4 * of_weights + 4 * ha::epsilon_of<bf16> * largest);
}

TEST_CASE("a model in bf16 is written as BF16, and read back with the same bits") {
  ha::Cpu cpu;
  ScratchFolder const scratch;
  Model const model{hf::config<Model>(folder())};
  auto const params = hf::load<bf16>(cpu, model, folder());
  hf::save(cpu, model, params, scratch / "saved", hf::format(folder()));
  ha::Safetensors const file{scratch / "saved/model.safetensors"};
  CHECK(file.info("model.embed_tokens.weight").dtype == "BF16");
  CHECK(file.info("model.norm.weight").dtype == "F32");
  CHECK(nlohmann::json::parse(std::ifstream(scratch / "saved/config.json"))["dtype"] == "bfloat16");
  auto const again = hf::load<bf16>(cpu, model, scratch / "saved");
  ha::zip(
      [&](ha::Path const& path, auto const& x, auto const& y) {
        INFO(path.str());
        auto const a = download(cpu, x);
        auto const b = download(cpu, y);
        CHECK(std::ranges::equal(a, b));
      },
      params, again);
}
