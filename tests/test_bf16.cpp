// bf16 as the scalar of a model: the type, training with masters in float, checkpoints, generation and memory.
#include "decoding.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/io.hpp>
#include <hybridattn/train/checkpoint.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>

using namespace decoding;
using ha::bf16;

namespace {

using Mixed =
    ha::Stack<ha::FullAttention<ha::FullOptions{.window = 7}>, ha::GDN, ha::Full, ha::SparseAttention<ha::SparseOptions{.top_k = 9}>>;
using Model = ha::LanguageModel<Mixed>;
Model model() {
  return Model{{.vocab_size = 24,
                .model_dim = 32,
                .num_heads = 2,
                .feed_forward = {.num_experts = 3, .top_k = 2, .expert_dim = 24, .shared_dim = 8, .balance_coefficient = 0.01}}};
}

// A model in training.
template <class T> struct Run {
  ha::Cpu cpu{1};
  Model model = ::model();
  Model::Params<ha::Owned<T, ha::Cpu>> params = model.initialize<T>(cpu, ha::Seed{1});
  ha::AdamW<decltype(params)> optimizer;
  ha::RecallTask task{ha::Seed{2}, {.vocab_size = 24, .pairs = 4}};

  explicit Run(double learning_rate = 1e-3) : optimizer(cpu, params, {.learning_rate = learning_rate}) {}
  double step() { return train_step(cpu, model, params, optimizer, make_batch(cpu, task.next_batch(2, 24))).loss.mean(); }
  std::vector<std::vector<double>> values() {
    std::vector<std::vector<double>> list;
    ha::zip(
        [&](ha::Path const&, auto const& tensor) {
          auto const host = download(cpu, tensor);
          list.emplace_back(host.begin(), host.end());
        },
        params);
    return list;
  }
};

}  // namespace

TEST_CASE("every bf16 is a float, and rounding it to bf16 changes nothing", "[type]") {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits <= 0xffff; ++bits) {
    bf16 const x = bf16::from_bits(static_cast<std::uint16_t>(bits)), again{static_cast<float>(x)};
    bool const nan = std::isnan(static_cast<float>(x));
    wrong += nan ? !std::isnan(static_cast<float>(again)) : again.bits != x.bits;
  }
  CHECK(wrong == 0);
}
TEST_CASE("a number is rounded to the nearest bf16, a tie to the even one", "[type]") {
  ha::Random random{ha::Seed{1}, "floats"};
  auto const value = [](std::uint32_t bits) {
    return static_cast<double>(static_cast<float>(bf16::from_bits(static_cast<std::uint16_t>(bits))));
  };
  int wrong = 0;
  for (int i = 0; i < 200000; ++i) {
    auto const bits = static_cast<std::uint32_t>(random.bits());
    // Every fourth number is a tie.
    float const x = std::bit_cast<float>(i % 4 == 0 ? (bits & 0xffff0000) | 0x8000 : bits);
    if (!std::isfinite(x) || std::abs(x) > 3e38f) continue;
    std::uint32_t const below = std::bit_cast<std::uint32_t>(x) >> 16, above = below + 1;   // in size
    double const to_below = std::abs(static_cast<double>(x) - value(below)), to_above = std::abs(value(above) - static_cast<double>(x));
    std::uint32_t const expected = to_below < to_above || (to_below == to_above && below % 2 == 0) ? below : above;
    wrong += bf16(x).bits != expected;
  }
  CHECK(wrong == 0);
  CHECK(bf16(1.0 + 0x1p-8).bits == bf16(1).bits);
  CHECK(bf16(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(bf16(-std::numeric_limits<double>::infinity()).bits == 0xff80);
  CHECK(bf16(-0.0).bits == 0x8000);
  CHECK(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(0x7f800001)))));
}

TEST_CASE("a model in bf16 learns as in float", "[train]") {
  Run<float> in_float;
  Run<bf16> in_bf16;
  for (int i = 0; i < 30; ++i) CHECK(in_bf16.step() == Approx(in_float.step()).margin(0.02));
}
TEST_CASE("masters in float add up steps that bf16 is too coarse for", "[train]") {
  Run<bf16> run{1e-5};
  auto const before = run.values();
  for (int i = 0; i < 60; ++i) run.step();
  auto const after = run.values();
  // A step moves a parameter by 1e-5. A weight of 0.02 has neighbours at a distance of 1e-4.
  std::size_t moved = 0, all = 0;
  for (std::size_t i = 0; i < before.size(); ++i)
    for (std::size_t e = 0; e < before[i].size(); ++e) moved += before[i][e] != after[i][e], ++all;
  INFO(moved << " of " << all);
  CHECK(moved > all / 2);
  ha::zip(
      [&](ha::Path const& path, auto const& master, auto const& parameter) {
        auto const exact = download(run.cpu, master);
        auto const rounded = download(run.cpu, parameter);
        INFO(path.str());
        for (std::size_t e = 0; e < exact.size(); ++e)
          REQUIRE(rounded[e] == static_cast<typename std::remove_cvref_t<decltype(rounded)>::value_type>(exact[e]));
      },
      run.optimizer.masters(), run.params);
}
TEST_CASE("a step of one's own takes the gradients in bf16 that backward returns", "[train]") {
  Run<bf16> own, other;
  auto const host = own.task.next_batch(2, 24);
  auto const batch = make_batch(own.cpu, host);
  double const scale = 1 / static_cast<double>(std::ranges::count_if(host.targets, [](std::int32_t target) { return target >= 0; }));
  auto gradients = own.model.backward(own.cpu, own.params, batch, own.model.forward(own.cpu, own.params, batch), scale);
  double const norm = own.optimizer.step(own.cpu, own.params, gradients.params);
  CHECK(norm == train_step(other.cpu, other.model, other.params, other.optimizer, make_batch(other.cpu, host)).gradient_norm);
  bool const same = own.values() == other.values();
  CHECK(same);
}
TEST_CASE("several batches are added up in float", "[train]") {
  // Of one batch taken twice, the mean gradient is that of the batch, to the last bit: bf16 sums would round.
  Run<bf16> once, twice;
  auto const host = once.task.next_batch(2, 24);
  std::vector<ha::TokenBatch<ha::Cpu>> batches;
  for (int i = 0; i < 2; ++i) batches.push_back(make_batch(twice.cpu, host));
  double const norm = train_step(once.cpu, once.model, once.params, once.optimizer, make_batch(once.cpu, host)).gradient_norm;
  double const mean =
      accumulated_step(twice.cpu, twice.model, twice.params, twice.optimizer, std::span<ha::TokenBatch<ha::Cpu> const>(batches))
          .gradient_norm;
  CHECK(mean == Approx(norm).epsilon(1e-3));
}

TEST_CASE("a run in bf16 continues from its checkpoint with the same bits", "[checkpoint]") {
  ScratchFolder const scratch;
  auto const path = scratch / "run.safetensors";
  Run<bf16> run;
  for (int i = 0; i < 3; ++i) run.step();
  save_checkpoint(run.cpu, path, run.model, run.params, run.optimizer, {.step = 3, .data = run.task.state()});
  double const expected[] = {run.step(), run.step()};

  Run<bf16> other{1e-3};
  auto const done = load_checkpoint(other.cpu, path, other.model, other.params, other.optimizer);
  other.task.restore(done.data);
  CHECK(other.step() == expected[0]);
  CHECK(other.step() == expected[1]);
  bool const same = other.values() == run.values();
  CHECK(same);

  ha::Safetensors const file{path};
  CHECK(file.info("embedding").dtype == "BF16");
  CHECK(file.info("norm").dtype == "F32");
  CHECK(file.info("optimizer.master.embedding").dtype == "F32");
  CHECK(file.info("optimizer.mean.embedding").dtype == "F32");
  CHECK(ha::read_checkpoint_header(path).dtype == "BF16");
  Run<float> in_float;
  CHECK_THROWS_WITH(load_checkpoint(in_float.cpu, path, in_float.model, in_float.params, in_float.optimizer),
                    Catch::Contains("dtype: 'BF16' in the file, 'F32' in the model"));

  // The parameters alone, to generate.
  auto const params = ha::load_parameters<bf16>(run.cpu, path, run.model);
  auto const generated = generate(run.cpu, run.model, params, {{1, 2, 3}, {4}}, {.max_new_tokens = 8, .sampling = {.temperature = 0}});
  CHECK(generated.tokens[0].size() == 8);
}

namespace {

// Larger weights than a model in training has, so that attention prefers some tokens.
Model::Config config_to_decode() {
  auto config = model().config();
  config.initialization = {.linear_deviation = 0, .embedding_deviation = 1};
  return config;
}
template <class T> struct Decoder : WithParams<Mixed, T> {
  explicit Decoder(int threads = 2) : WithParams<Mixed, T>(config_to_decode(), threads) {}
};

}  // namespace

TEST_CASE("a model in bf16 decodes the logits of the whole forward, however the prompts are split", "[decode]") {
  auto const tokens = some_tokens(lengths);
  Decoder<bf16> f;
  Decoder<double> exact;
  convert(exact.cpu, f.params, exact.params);
  auto const truth = exact.whole(tokens);
  auto const whole = f.whole(tokens);
  double const error = max_difference(whole, truth), largest = max_abs(truth);
  CHECK(error < 16 * ha::epsilon_of<bf16> * largest);   // some roundings in each of four layers
  // Sums in another order turn few roundings, and a turned one changes a logit by no more than bf16 does.
  Rows<double> expected;
  for (auto const& logits : whole) expected.emplace_back(logits.begin(), logits.end());
  auto const check = [&](char const* split, auto next) {
    auto const decoded = f.decoded(tokens, next);
    double const difference = max_difference(decoded, expected);
    std::size_t same = 0, all = 0;
    for (std::size_t i = 0; i < whole.size(); ++i)
      for (std::size_t e = 0; e < whole[i].size(); ++e) same += decoded[i][e] == whole[i][e], ++all;
    std::printf("logits up to %.3f, error %.4f in bf16; decoded %s, %zu of %zu are the same, the largest difference is %.4f\n", largest,
                error, split, same, all, difference);
    CHECK(same > all / 2);
    CHECK(difference <= error);
  };
  check("token by token", one_by_one);
  check("half, then token by token", half_then_one);
  check("in pieces", in_pieces());
  check("at once", at_once);
}
TEST_CASE("what a sequence decodes in bf16 depends on no neighbour and on no number of threads, bitwise", "[decode]") {
  auto const tokens = some_tokens(lengths);
  Decoder<bf16> f{1}, g{3};
  auto const batch = f.decoded(tokens, half_then_one);
  CHECK(same_bits(batch, g.decoded(tokens, half_then_one)));
  for (std::size_t i = 0; i < tokens.size(); ++i) CHECK(same_bits(Rows<float>{batch[i]}, f.decoded({tokens[i]}, half_then_one)));
}
TEST_CASE("the first layer's keys and values in a cache in bf16 have the same bits, however the prompts are split", "[decode]") {
  auto const tokens = some_tokens({40, 7, 12});
  Decoder<bf16> f;
  auto const first_layer = [&](auto next) {
    auto cache = f.cache(3, 40);
    f.decoded(tokens, next, cache);
    std::vector<std::vector<std::uint16_t>> bits;
    auto const add = [&](auto const& tensor) {
      auto& of_tensor = bits.emplace_back();
      for (bf16 const x : download(f.cpu, tensor)) of_tensor.push_back(x.bits);
    };
    cache.layers().for_each_layer(
        [&](int layer, auto const& of_layer) {
          if constexpr (requires { of_layer.keys; })
            if (layer == 0) add(of_layer.keys), add(of_layer.values);
        },
        cache.layers());
    return bits;
  };
  auto const expected = first_layer(one_by_one);
  REQUIRE(expected.size() == 2);
  REQUIRE(expected[0].size() == 3 * 7 * 32);   // rings, all of them written
  CHECK(same_bits(first_layer(half_then_one), expected));
  CHECK(same_bits(first_layer(in_pieces()), expected));
  CHECK(same_bits(first_layer(at_once), expected));
}
TEST_CASE("a sequence in bf16 that is forgotten begins anew, among others that go on", "[decode]") {
  Decoder<bf16> f;
  auto const first = some_tokens({12, 17}, 1), second = some_tokens({8, 5}, 2);
  auto cache = f.cache(2, 40);
  f.decoded(first, half_then_one, cache);
  cache.forget(0);
  auto const again = f.decoded(second, one_by_one, cache);
  CHECK(same_bits(Rows<float>{again[0]}, f.decoded({second[0]}, one_by_one)));
  cache.forget();
  CHECK(same_bits(f.decoded(second, half_then_one, cache), f.decoded(second, half_then_one)));
}
TEST_CASE("a cache in bf16 takes the bytes announced, two for each key, and no step but the first allocates", "[decode]") {
  Decoder<bf16> f;
  auto const announced = [&](Index capacity) { return ha::bytes<bf16>(cache_shapes(f.model, {.batch = 2, .capacity = capacity})); };
  // Of a token: keys and values of two layers, and the indexer's keys. The window and Gated DeltaNet keep no more of a longer sequence.
  Index const numbers = 2 * 32 + 2 * 32 + 16;
  CHECK(announced(140) - announced(40) == static_cast<std::size_t>(2 * 100 * numbers) * sizeof(bf16));
  auto const before = f.cpu.pool().in_use();
  auto cache = f.cache(2, 40);
  CHECK(f.cpu.pool().in_use() - before == announced(40));
  extend(f.cpu, f.model, f.params, some_tokens({5, 9}), cache);
  TokenLists next = some_tokens({1, 1});
  extend(f.cpu, f.model, f.params, next, cache);
  auto const allocations = f.cpu.pool().allocations(), kept = f.cpu.pool().in_use();
  for (int step = 0; step < 20; ++step) {
    next[0][0] = next[1][0] = static_cast<std::int32_t>(step % V);   // tokens of other experts
    extend(f.cpu, f.model, f.params, next, cache);
  }
  CHECK(f.cpu.pool().allocations() == allocations);
  CHECK(f.cpu.pool().in_use() == kept);
}
TEST_CASE("without temperature a model in bf16 generates the likeliest tokens of what it decodes", "[decode]") {
  Decoder<bf16> f;
  auto const prompts = some_tokens({3, 11});
  auto const generated = generate(f.cpu, f.model, f.params, prompts, {.max_new_tokens = 12, .sampling = {.temperature = 0}}).tokens;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    REQUIRE(generated[i].size() == 12);
    auto text = prompts[i];
    text.insert(text.end(), generated[i].begin(), generated[i].end());
    auto const as_generated = [&](Index call, Index) { return call == 0 ? std::ssize(prompts[i]) : 1; };
    auto const logits = f.decoded({text}, as_generated)[0];
    Index const vocabulary = f.model.config().vocab_size;
    for (std::size_t t = prompts[i].size(); t < text.size(); ++t) {
      auto const row = logits.begin() + static_cast<Index>(t - 1) * vocabulary;
      CHECK(text[t] == std::max_element(row, row + vocabulary) - row);
    }
  }
}
TEST_CASE("a sequence in bf16 draws the same tokens in a batch as alone with its own seed", "[decode]") {
  Decoder<bf16> f;
  auto const prompts = some_tokens({3, 11, 1});
  auto const drawn = [&](TokenLists const& of, std::uint64_t seed) {
    return generate(f.cpu, f.model, f.params, of, {.max_new_tokens = 10, .seed = ha::Seed{seed}}).tokens;
  };
  auto const batch = drawn(prompts, 5);
  CHECK(drawn(prompts, 5) == batch);
  CHECK(drawn(prompts, 6) != batch);
  for (std::size_t i = 0; i < prompts.size(); ++i) CHECK(drawn({prompts[i]}, 5 + i)[0] == batch[i]);
}

TEST_CASE("a safetensors file has BF16, and other scalars are read as bf16", "[file]") {
  ScratchFolder const scratch;
  std::vector<bf16> const numbers{bf16(1.5), bf16(-0.0), bf16(3e38), bf16(1e-40)};
  std::vector<float> const floats{1.00390625f, -2.5f};
  ha::SafetensorsWriter writer;
  writer.add("bf16", {2, 2}, numbers);
  writer.add("float", {2}, floats);
  writer.write(scratch / "file");
  ha::Safetensors const file{scratch / "file"};
  CHECK(file.info("bf16").dtype == "BF16");
  CHECK(file.info("bf16").end - file.info("bf16").begin == 8);
  auto const back = file.read_bf16s("bf16");
  for (std::size_t i = 0; i < numbers.size(); ++i) CHECK(back[i].bits == numbers[i].bits);
  CHECK(file.read_doubles("bf16")[2] == static_cast<double>(static_cast<float>(numbers[2])));
  auto const rounded = file.read_bf16s("float");
  CHECK(static_cast<float>(rounded[0]) == 1.f);
  CHECK(static_cast<float>(rounded[1]) == -2.5f);
}

TEST_CASE("a model in bf16 keeps little more than half the bytes of activations", "[memory]") {
  auto const sequences = ha::Sequences::equal(2, 64);
  auto const saved = model().saved(sequences);
  double const in_float = static_cast<double>(ha::bytes<float>(saved)), in_bf16 = static_cast<double>(ha::bytes<bf16>(saved));
  std::printf("saved activations: %.0f bytes in float, %.0f in bf16 (%.2f)\n", in_float, in_bf16, in_bf16 / in_float);
  CHECK(in_bf16 < 0.7 * in_float);
  Run<bf16> run;
  auto const batch = make_batch(run.cpu, run.task.next_batch(2, 64));
  run.model.forward(run.cpu, run.params, batch);   // makes the batch's table of angles
  auto const before = run.cpu.pool().in_use();
  auto const kept = run.model.forward(run.cpu, run.params, batch);
  CHECK(run.cpu.pool().in_use() - before == ha::bytes<bf16>(saved));
}
TEST_CASE("a training step in bf16 takes less memory than in float, masters included, where activations are most of it", "[memory]") {
  auto const peak = []<class T>(Run<T> run) {
    auto const batch = make_batch(run.cpu, run.task.next_batch(8, 128));
    run.cpu.pool().reset_peak();
    train_step(run.cpu, run.model, run.params, run.optimizer, batch);
    return static_cast<double>(run.cpu.pool().peak());
  };
  double const in_float = peak(Run<float>{}), in_bf16 = peak(Run<bf16>{});
  std::printf("peak of a step: %.0f bytes in float, %.0f in bf16 (%.2f)\n", in_float, in_bf16, in_bf16 / in_float);
  CHECK(in_bf16 < 0.85 * in_float);
}
