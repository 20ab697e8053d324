// Forward and backward of each policy on one core, as a share of the FMA peak measured in the same process.
//   BM_forward<Full>/T:1024/D:64   one sequence, one head (DSA: 4 indexer heads, top_k 64), float
//   BM_forward<DSA, warm_up>, <DSA, sparse>   in the stages that train its indexer
//   BM_forward<DSA, language_model, 16>       16 heads that share keys
// Counters: GFLOP/s (what the equations need, causal), share (of the peak), of_probe (of a tile timed before and after the sample), tokens/s.
// And one token of one sequence after others that stand in a cache:
//   BM_decode<Full>/context:4096/D:64   8 heads, 2 key/value heads (GDN: 8 states)
// Counters: bytes/s (of the cache, read or written once), tokens/s.
#include "peak.hpp"
#include "work.hpp"

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/ops/linear/linear.hpp>

#include <benchmark/benchmark.h>

namespace ha = hybridattn;
using bench::backward_flops;
using bench::fill_like_a_layer;
using bench::forward_flops;
using ha::Index;

namespace {

// Names as they stand in the table.
using Full = ha::Full;
using GDN = ha::GDN;
using DSA = ha::DSA;
constexpr auto language_model = ha::Stage::language_model, warm_up = ha::Stage::dense_warm_up, sparse = ha::Stage::sparse;

template <class Policy, ha::Stage stage, int heads> typename Policy::Config config_of(Index D) {
  auto config = Policy::complete({}, heads * D, heads);
  if constexpr (heads > 1) config.num_kv_heads = 1;
  if constexpr (requires { config.stage; }) config.stage = stage;
  return config;
}
template <class Policy, ha::Stage stage, int heads> struct Case {
  ha::Cpu cpu{1};
  Index T, D;
  ha::Sequences sequences = ha::Sequences::equal(1, T);
  typename Policy::Config config = config_of<Policy, stage, heads>(D);
  typename Policy::template Inputs<ha::Owned<float, ha::Cpu>> x = ha::allocate<float>(cpu, Policy::inputs(config, sequences));
  typename Policy::template Inputs<ha::Owned<float, ha::Cpu>> d_x = ha::allocate<float>(cpu, Policy::inputs(config, sequences));
  typename Policy::template Outputs<ha::Owned<float, ha::Cpu>> y = ha::allocate<float>(cpu, Policy::outputs(config, sequences));
  typename Policy::template Outputs<ha::Owned<float, ha::Cpu>> d_y = ha::allocate<float>(cpu, Policy::outputs(config, sequences));
  typename Policy::template Saved<ha::Owned<float, ha::Cpu>> saved = ha::allocate<float>(cpu, Policy::saved(config, sequences));

  explicit Case(benchmark::State const& state) : T(state.range(0)), D(state.range(1)) {
    fill_like_a_layer(cpu, x);
    fill_like_a_layer(cpu, d_y);
    if (stage == warm_up) d_y.o = {};   // the attention itself is frozen
    forward();
  }
  void forward() { ha::On<Policy, ha::Cpu>::forward(cpu, config, sequences, in(x), out(y), out(saved)); }
  void backward() { ha::On<Policy, ha::Cpu>::backward(cpu, config, sequences, in(x), in(y), in(saved), in(d_y), out(d_x)); }
};

// Times the loop over `state`, with a probe before and after it.
template <class F> void measure(benchmark::State& state, double flops, Index tokens, F f) {
  using benchmark::Counter;
  double const before = bench::probe();
  for (auto _ : state) f();
  double const probed = (before + bench::probe()) / 2;
  state.counters["GFLOP/s"] = Counter(flops / 1e9, Counter::kIsIterationInvariantRate);
  state.counters["share"] = Counter(flops / 1e9 / bench::peak(), Counter::kIsIterationInvariantRate);
  state.counters["of_probe"] = Counter(flops / 1e9 / probed, Counter::kIsIterationInvariantRate);
  state.counters["tokens/s"] = Counter(static_cast<double>(tokens), Counter::kIsIterationInvariantRate);
}

template <class Policy, ha::Stage stage = language_model, int heads = 1> void BM_forward(benchmark::State& state) {
  Case<Policy, stage, heads> c{state};
  measure(state, forward_flops(c.config, c.T), c.T, [&] { c.forward(); });
}
template <class Policy, ha::Stage stage = language_model, int heads = 1> void BM_backward(benchmark::State& state) {
  Case<Policy, stage, heads> c{state};
  measure(state, backward_flops(c.config, c.T), c.T, [&] { c.backward(); });
}

// Bytes of its cache that a step has to read or write.
double step_bytes(ha::full::Cache<ha::Shapes> const& cache, Index) { return static_cast<double>(ha::bytes<float>(cache)); }
double step_bytes(ha::gdn::Cache<ha::Shapes> const& cache, Index) { return 2 * sizeof(float) * static_cast<double>(cache.state.count()); }
double step_bytes(ha::dsa::Cache<ha::Shapes> const& cache, Index context) {
  double const chosen = static_cast<double>(std::min<Index>(context, 64)) / static_cast<double>(context);
  return sizeof(float) * (static_cast<double>(cache.index_keys.count()) + 2 * chosen * static_cast<double>(cache.keys.count()));
}

template <class Policy> void BM_decode(benchmark::State& state) {
  ha::Cpu cpu{1};
  Index const context = state.range(0), D = state.range(1);
  auto config = Policy::complete({}, 8 * D, 8);
  if constexpr (requires { config.num_kv_heads; }) config.num_kv_heads = 2;
  auto const shapes = Policy::cache(config, 1, context);
  Index const past = context - 1, length = 1;
  auto const sequences = ha::Sequences::continuing({&past, 1}, {&length, 1});
  auto cache = ha::allocate<float>(cpu, shapes);
  auto x = ha::allocate<float>(cpu, Policy::inputs(config, sequences));
  auto y = ha::allocate<float>(cpu, Policy::outputs(config, sequences));
  fill_like_a_layer(cpu, cache);
  fill_like_a_layer(cpu, x);
  for (auto _ : state) ha::On<Policy, ha::Cpu>::extend(cpu, config, sequences, in(x), out(cache), out(y));
  using benchmark::Counter;
  state.counters["bytes/s"] = Counter(step_bytes(shapes, context), Counter::kIsIterationInvariantRate);
  state.counters["tokens/s"] = Counter(1, Counter::kIsIterationInvariantRate);
}

// The products of a layer for N tokens: y [N, M] = x [N, C] w^T, and the gradients d_x and d_w.
enum class Product { y, d_x, d_w };
template <Product product> void BM_linear(benchmark::State& state) {
  ha::Cpu cpu{1};
  Index const N = state.range(0), C = state.range(1), M = state.range(2);
  ha::Tensor<float, 2, ha::Cpu> x{cpu, {N, C}}, w{cpu, {M, C}}, y{cpu, {N, M}};
  std::fill_n(out(x).data, N * C, 0.5f);
  std::fill_n(out(w).data, M * C, 0.25f);
  std::fill_n(out(y).data, N * M, 0.125f);
  using Linear = ha::On<ha::Linear, ha::Cpu>;
  measure(state, 2.0 * static_cast<double>(N * C * M), N, [&] {
    if (product == Product::y) Linear::forward(cpu, in(x), in(w), out(y));
    if (product == Product::d_x) Linear::backward(cpu, in(x), in(w), in(y), out(x), ha::View<float, 2>{}, ha::Into::overwrite);
    if (product == Product::d_w) Linear::backward(cpu, in(x), in(w), in(y), ha::View<float, 2>{}, out(w), ha::Into::overwrite);
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "D"})->ArgsProduct({{128, 256, 512, 1024, 2048, 4096}, {16, 32, 64, 128, 256}})->Unit(benchmark::kMicrosecond);
}

void stages(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "D"})->ArgsProduct({{1024, 4096}, {64}})->Unit(benchmark::kMicrosecond);
}

void shared_keys(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "D"})->ArgsProduct({{1024, 4096}, {32, 64, 128}})->Unit(benchmark::kMicrosecond);
}

void contexts(benchmark::internal::Benchmark* b) {
  b->ArgNames({"context", "D"})->ArgsProduct({{1024, 4096}, {64, 128}})->Unit(benchmark::kMicrosecond);
}

// Layers of a small model, its head with a vocabulary of 49152, one token, and a larger layer.
void layers(benchmark::internal::Benchmark* b) {
  b->ArgNames({"N", "C", "M"})->Unit(benchmark::kMicrosecond);
  b->Args({64, 64, 64})->Args({256, 128, 512})->Args({256, 128, 49152})->Args({1, 512, 512})->Args({2048, 512, 512});
}

BENCHMARK(BM_forward<Full>)->Apply(shapes);
BENCHMARK(BM_backward<Full>)->Apply(shapes);
BENCHMARK(BM_forward<GDN>)->Apply(shapes);
BENCHMARK(BM_backward<GDN>)->Apply(shapes);
BENCHMARK(BM_forward<DSA>)->Apply(shapes);
BENCHMARK(BM_backward<DSA>)->Apply(shapes);
BENCHMARK_TEMPLATE(BM_forward, DSA, warm_up)->Apply(stages);
BENCHMARK_TEMPLATE(BM_backward, DSA, warm_up)->Apply(stages);
BENCHMARK_TEMPLATE(BM_forward, DSA, sparse)->Apply(stages);
BENCHMARK_TEMPLATE(BM_backward, DSA, sparse)->Apply(stages);
BENCHMARK_TEMPLATE(BM_forward, DSA, language_model, 16)->Apply(shared_keys);
BENCHMARK_TEMPLATE(BM_backward, DSA, language_model, 16)->Apply(shared_keys);
BENCHMARK(BM_decode<Full>)->Apply(contexts);
BENCHMARK(BM_decode<GDN>)->Apply(contexts);
BENCHMARK(BM_decode<DSA>)->Apply(contexts);
BENCHMARK(BM_linear<Product::y>)->Apply(layers);
BENCHMARK(BM_linear<Product::d_x>)->Apply(layers);
BENCHMARK(BM_linear<Product::d_w>)->Apply(layers);

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("fma_peak_gflops", std::to_string(bench::peak()));
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
