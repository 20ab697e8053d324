// A policy of one's own: judged by the library's laws, then trained in one stack with full attention. It is minGRU (arXiv
// 2410.01201): each channel remembers one number h, and a gate says how much of it gives way to the new value.
//   (1) h_t = h_{t-1} + z_t (v_t - h_{t-1})    z_t = sigmoid(f_t), o_t = h_t; before the first token h is 0
//   (2) X_t = d_o_t + (1 - z_{t+1}) X_{t+1}    d_v_t = z_t X_t    d_f_t = z_t (1 - z_t) (v_t - h_{t-1}) X_t
// where X is the gradient of h.
#include "program.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/testing.hpp>

#include <cstdio>
#include <string>

namespace ha = hybridattn;
using ha::Index;

struct MinGru : ha::PolicyDefaults {
  static constexpr std::string_view name = "minGRU";

  struct Config {
    Index width = 0;   // 0: the model's
  };
  template <class S> struct Inputs {   // the layer makes each of them by a projection of x
    ha::Held<S, 3> f, v;               // [N, 1, width]: one head
    HYBRIDATTN_FIELDS(f, v)
  };
  template <class S> struct Outputs {
    ha::Held<S, 3> o;                  // [N, 1, width]
    HYBRIDATTN_FIELDS(o)
  };
  template <class S> using Saved = ha::Nothing<S>;   // backward gets inputs and outputs anyway

  static Config complete(Config c, Index model_dim, Index) { return {c.width == 0 ? model_dim : c.width}; }
  static ha::Shape<3> channels(Config const& c, ha::Sequences const& s) { return {s.tokens(), 1, c.width}; }
  static Inputs<ha::Shapes> inputs(Config const& c, ha::Sequences const& s) { return {channels(c, s), channels(c, s)}; }
  static Outputs<ha::Shapes> outputs(Config const& c, ha::Sequences const& s) { return {channels(c, s)}; }
  static Saved<ha::Shapes> saved(Config const&, ha::Sequences const&) { return {}; }
};

// How the CPU computes it. Loops will do. A fast version is then judged against them: they become MinGru::Reference.
template <> struct ha::On<MinGru, ha::Cpu> {
  // f(sequence, channel), each whole on one thread.
  template <class F> static void for_each_channel(Cpu& cpu, MinGru::Config const& c, Sequences const& s, F f) {
    parallel_for(cpu, s.count() * c.width, [&](Index task, int) { f(s[static_cast<std::size_t>(task / c.width)], task % c.width); });
  }
  template <class T>
  static void forward(Cpu& cpu, MinGru::Config const& c, Sequences const& s, MinGru::Inputs<In<T>> x, MinGru::Outputs<Out<T>> y,
                      MinGru::Saved<Out<T>>) {
    for_each_channel(cpu, c, s, [&](Sequence sequence, Index d) {
      T h = 0;
      for (Index t = sequence.start; t < sequence.start + sequence.length; ++t)
        y.o(t, 0, d) = h += sigmoid(x.f(t, 0, d)) * (x.v(t, 0, d) - h);                            // (1)
    });
  }
  template <class T>
  static void backward(Cpu& cpu, MinGru::Config const& c, Sequences const& s, MinGru::Inputs<In<T>> x, MinGru::Outputs<In<T>> y,
                       MinGru::Saved<In<T>>, MinGru::Outputs<In<T>> d_y, MinGru::Inputs<Out<T>> d_x) {
    for_each_channel(cpu, c, s, [&](Sequence sequence, Index d) {
      T X = 0;
      for (Index t = sequence.start + sequence.length; t-- > sequence.start;) {
        T const z = sigmoid(x.f(t, 0, d)), before = t == sequence.start ? T(0) : y.o(t - 1, 0, d);
        X += d_y.o(t, 0, d);                                                                       // (2)
        d_x.v(t, 0, d) = z * X;
        d_x.f(t, 0, d) = z * (1 - z) * (x.v(t, 0, d) - before) * X;
        X *= 1 - z;
      }
    });
  }
};

// Prints a line for each law; returns how many are broken.
template <class T> int judge(char const* scalar) {
  int broken = 0;
  for (auto const& [law, holds, why] : ha::testing::judge<MinGru, ha::Cpu, T>()) {
    std::printf("%-6s  %-27s  %-6s  %s\n", scalar, law.c_str(), holds ? "holds" : "BROKEN", why.c_str());
    broken += !holds;
  }
  return broken;
}

int run() {
  int const broken = judge<float>("float") + judge<double>("double");
  if (broken > 0) return 1;

  std::string numbers;
  for (int n = 0; n < 2000; ++n) numbers += std::to_string(n) + " and ";
  ha::Windows text{ha::ByteText(numbers)};
  ha::Cpu cpu;
  ha::LanguageModel<ha::Stack<MinGru, ha::Full>> const model{{.model_dim = 64}};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params, {.learning_rate = 3e-3}};
  for (int step = 1; step <= 100; ++step) {
    auto const result = train_step(cpu, model, params, optimizer, make_batch(cpu, text.next_batch(4, 64)));
    if (step % 20 == 0) std::printf("step %3d  loss %.3f\n", step, result.loss.mean());
  }
  return 0;
}

int main(int argc, char** argv) { return program::run_without_options("write_a_policy", argc, argv, run); }
