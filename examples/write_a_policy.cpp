// A policy of one's own: judged by the library's laws, then trained in one stack with full attention. It is minGRU (arXiv
// 2410.01201): each channel remembers one number h, and a gate says how much of it gives way to the new value.
//   (1) h_t = h_{t-1} + z_t (v_t - h_{t-1})    z_t = sigmoid(f_t), o_t = h_t; before the first token h is 0
//   (2) X_t = d_o_t + (1 - z_{t+1}) X_{t+1}    d_v_t = z_t X_t    d_f_t = z_t (1 - z_t) (v_t - h_{t-1}) X_t
// where X is the gradient of h.
#include "program.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/testing.hpp>
#if WITH_EMULATOR   // of a GPU, where Boost.Context is installed
#include <hybridattn/emulator.hpp>
#endif

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
  struct Loops;

  static Config complete(Config c, Index model_dim, Index) { return {c.width == 0 ? model_dim : c.width}; }
  static ha::Shape<3> channels(Config const& c, ha::Sequences const& s) { return {s.tokens(), 1, c.width}; }
  static Inputs<ha::Shapes> inputs(Config const& c, ha::Sequences const& s) { return {channels(c, s), channels(c, s)}; }
  static Outputs<ha::Shapes> outputs(Config const& c, ha::Sequences const& s) { return {channels(c, s)}; }
  static Saved<ha::Shapes> saved(Config const&, ha::Sequences const&) { return {}; }
};

// The equations, for one channel of one sequence and for all of them. HYBRIDATTN_HD lets a GPU run them too.
struct MinGru::Loops {
  template <class T> static HYBRIDATTN_HD void channel(ha::Sequence s, Index d, Inputs<ha::In<T>> x, Outputs<ha::Out<T>> y) {
    T h = 0;
    for (Index t = s.start; t < s.start + s.length; ++t) y.o(t, 0, d) = h += ha::sigmoid(x.f(t, 0, d)) * (x.v(t, 0, d) - h);   // (1)
  }
  template <class T>
  static HYBRIDATTN_HD void channel(ha::Sequence s, Index d, Inputs<ha::In<T>> x, Outputs<ha::In<T>> y, Outputs<ha::In<T>> d_y,
                                    Inputs<ha::Out<T>> d_x) {
    T X = 0;
    for (Index t = s.start + s.length; t-- > s.start;) {
      T const z = ha::sigmoid(x.f(t, 0, d)), before = t == s.start ? T(0) : y.o(t - 1, 0, d);
      X += d_y.o(t, 0, d);                                                                                                     // (2)
      d_x.v(t, 0, d) = z * X;
      d_x.f(t, 0, d) = z * (1 - z) * (x.v(t, 0, d) - before) * X;
      X *= 1 - z;
    }
  }
  template <class T> static Index scratch(Config const&, ha::Sequences const&) { return 0; }
  template <class T>
  static HYBRIDATTN_HD void forward(Config const& c, ha::View<ha::Sequence const, 1> s, Inputs<ha::In<T>> x, Outputs<ha::Out<T>> y,
                                    Saved<ha::Out<T>>, ha::View<T, 1>) {
    for (Index task = 0; task < s.count() * c.width; ++task) channel<T>(s(task / c.width), task % c.width, x, y);
  }
  template <class T>
  static HYBRIDATTN_HD void backward(Config const& c, ha::View<ha::Sequence const, 1> s, Inputs<ha::In<T>> x, Outputs<ha::In<T>> y,
                                     Saved<ha::In<T>>, Outputs<ha::In<T>> d_y, Inputs<ha::Out<T>> d_x, ha::View<T, 1>) {
    for (Index task = 0; task < s.count() * c.width; ++task) channel<T>(s(task / c.width), task % c.width, x, y, d_y, d_x);
  }
};

// On a GPU one thread runs the loops. This is right and slow, until the policy has kernels.
template <ha::GpuBackend B> struct ha::On<MinGru, B> : ha::FromLoops<MinGru, B> {};

// The CPU computes channels side by side. A faster version is judged against these loops: they become MinGru::Reference.
template <> struct ha::On<MinGru, ha::Cpu> {
  template <class T>
  static void forward(Cpu& cpu, MinGru::Config const& c, Sequences const& s, MinGru::Inputs<In<T>> x, MinGru::Outputs<Out<T>> y,
                      MinGru::Saved<Out<T>>) {
    parallel_for(cpu, s.count() * c.width, [&](Index task, int) {
      MinGru::Loops::channel<T>(s[static_cast<std::size_t>(task / c.width)], task % c.width, x, y);
    });
  }
  template <class T>
  static void backward(Cpu& cpu, MinGru::Config const& c, Sequences const& s, MinGru::Inputs<In<T>> x, MinGru::Outputs<In<T>> y,
                       MinGru::Saved<In<T>>, MinGru::Outputs<In<T>> d_y, MinGru::Inputs<Out<T>> d_x) {
    parallel_for(cpu, s.count() * c.width, [&](Index task, int) {
      MinGru::Loops::channel<T>(s[static_cast<std::size_t>(task / c.width)], task % c.width, x, y, d_y, d_x);
    });
  }
};

// Prints a line for each law; returns how many are broken.
template <class B, class T> int judge(char const* where) {
  int broken = 0;
  for (auto const& [law, holds, why] : ha::testing::judge<MinGru, B, T>()) {
    std::printf("%-8s  %-27s  %-6s  %s\n", where, law.c_str(), holds ? "holds" : "BROKEN", why.c_str());
    broken += !holds;
  }
  return broken;
}

// Trains a stack of the policy and full attention on any machine. Returns the last loss.
template <class B> double train(B& backend, Index steps) {
  std::string numbers;
  for (int n = 0; n < 2000; ++n) numbers += std::to_string(n) + " and ";
  ha::Windows text{ha::ByteText(numbers)};
  ha::LanguageModel<ha::Stack<MinGru, ha::Full>> const model{{.model_dim = 64}};
  auto params = model.initialize<float>(backend, ha::Seed{1});
  ha::AdamW optimizer{backend, params, {.learning_rate = 3e-3}};
  double loss = 0;
  for (Index step = 1; step <= steps; ++step) {
    loss = train_step(backend, model, params, optimizer, make_batch(backend, text.next_batch(4, 64))).loss.mean();
    if (step % 20 == 0) std::printf("step %3td  loss %.3f\n", step, loss);
  }
  return loss;
}

int run() {
  int broken = judge<ha::Cpu, float>("float") + judge<ha::Cpu, double>("double");
#if WITH_EMULATOR
  broken += judge<ha::Emulator, float>("emulator");
#endif
  if (broken > 0) return 1;
  ha::Cpu cpu;
  train(cpu, 100);
  return 0;
}

int main(int argc, char** argv) { return program::run_without_options("write_a_policy", argc, argv, run); }
