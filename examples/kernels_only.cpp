// One attention, forward and backward, on plain arrays: no model, no tensors of the library.
#include "program.hpp"

#include <hybridattn/attention/full/full.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

namespace ha = hybridattn;
using ha::Index, ha::In, ha::Out;

using Policy = ha::Full;   // or one with a window: ha::FullAttention<ha::FullOptions{.window = 128}>
using Array = std::vector<float>;

Array random_numbers(Index count, char const* name) {
  ha::Random random{ha::Seed{1}, name};
  Array values(static_cast<std::size_t>(count));
  for (float& x : values) x = static_cast<float>(random.normal());
  return values;
}
double dot(Array const& x, Array const& y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

int run() {
  // Two sequences, one after the other: tokens 0 .. 99 and 100 .. 159. Four query heads share two key/value heads.
  Index const N = 160, H = 4, HK = 2, D = 32;
  auto const sequences = ha::Sequences::packed(std::vector<Index>{0, 100, N});
  auto const config = Policy::complete({.num_heads = H, .num_kv_heads = HK, .head_dim = D}, 0, 0);   // scale: D^-1/2

  // q [N, H, D] has an array of its own, k and v [N, HK, D] stand in one, token by token: k, then v.
  Array q = random_numbers(N * H * D, "q");
  Array const kv = random_numbers(N * 2 * HK * D, "kv"), d_o = random_numbers(N * H * D, "d_o");
  Array o(q.size()), lse(N * H), d_q(q.size()), d_kv(kv.size());

  // A view has a start, a shape and strides, counted in floats. Heads are contiguous; without strides everything is.
  ha::Shape<3> const queries{N, H, D}, keys{N, HK, D}, strides{2 * HK * D, D, 1};
  Policy::Inputs<In<float>> const x{.q = {q.data(), queries}, .k = {kv.data(), keys, strides}, .v = {kv.data() + HK * D, keys, strides}};
  Policy::Inputs<Out<float>> const d_x{
      .q = {d_q.data(), queries}, .k = {d_kv.data(), keys, strides}, .v = {d_kv.data() + HK * D, keys, strides}};
  Policy::Outputs<Out<float>> const y{.o = {o.data(), queries}};
  Policy::Outputs<In<float>> const d_y{.o = {d_o.data(), queries}};
  Policy::Saved<Out<float>> const saved{.lse = {lse.data(), {N, H}}};   // what backward has to know of forward

  ha::Cpu cpu;   // all threads, and a pool of scratch memory: from the second call on nothing is allocated
  ha::On<Policy, ha::Cpu>::forward(cpu, config, sequences, x, y, saved);
  ha::On<Policy, ha::Cpu>::backward(cpu, config, sequences, x, in(y), in(saved), d_y, d_x);
  std::printf("o . o %.4f   d_q . d_q %.4f   d_kv . d_kv %.4f\n", dot(o, o), dot(d_q, d_q), dot(d_kv, d_kv));

  // The loss is o . d_o. Along d_q it rises by |d_q|^2.
  float const step = 0x1p-7f;
  auto const loss_at = [&](float distance) {
    for (std::size_t i = 0; i < q.size(); ++i) q[i] += distance * d_q[i];
    ha::On<Policy, ha::Cpu>::forward(cpu, config, sequences, x, y, saved);
    for (std::size_t i = 0; i < q.size(); ++i) q[i] -= distance * d_q[i];
    return dot(o, d_o);
  };
  double const slope = (loss_at(step) - loss_at(-step)) / (2 * static_cast<double>(step)), expected = dot(d_q, d_q);
  std::printf("slope along d_q: %.4f by backward, %.4f by finite differences\n", expected, slope);
  return std::abs(slope - expected) <= 1e-3 * expected ? 0 : 1;
}

int main(int argc, char** argv) { return program::run_without_options("kernels_only", argc, argv, run); }
