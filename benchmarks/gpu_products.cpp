// Linear layers by the library's own matrix products and, where the program has it, by cuBLAS: whether they are right, and their times
// beside the FMA peak of the same device, a line of JSON for each. Exit status 1: a result is wrong.
//   gpu_products [LARGEST]    square layers of 256, 512, ... LARGEST features, with as many tokens (2048)
#include "gpu_times.hpp"
#include "work.hpp"

#include <hybridattn/ops/linear/linear.hpp>

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

namespace {

using namespace bench;

template <class S> struct Layer {
  ha::Held<S, 2> x, w, y, d_y, d_x, d_w;   // all [N, N]
  HYBRIDATTN_FIELDS(x, w, y, d_y, d_x, d_w)
};
template <class T, class B> struct LayerOn {
  B& backend;
  Layer<ha::Owned<T, B>> layer;

  // The same numbers on every machine and in every scalar.
  LayerOn(B& on, Index N) : backend(on) {
    ha::Shape<2> const square{N, N};
    layer = ha::allocate<T>(on, Layer<ha::Shapes>{square, square, square, square, square, square});
    fill_like_a_layer(on, layer);
  }
  void forward() { ha::On<ha::Linear, B>::template forward<T>(backend, in(layer.x), in(layer.w), out(layer.y)); }
  void backward() {
    ha::On<ha::Linear, B>::template backward<T>(backend, in(layer.x), in(layer.w), in(layer.d_y), out(layer.d_x), out(layer.d_w),
                                                ha::Into::overwrite);
  }
};

struct Results {
  std::vector<double> y, d_x, d_w;
};
template <class T, class B> Results results(B& backend, Index N) {
  LayerOn<T, B> on{backend, N};
  on.forward();
  on.backward();
  auto const values = [&](auto const& tensor) {
    auto const list = download(backend, tensor);
    return std::vector<double>(list.begin(), list.end());
  };
  return {values(on.layer.y), values(on.layer.d_x), values(on.layer.d_w)};
}
double largest_difference(std::vector<double> const& x, std::vector<double> const& y) {
  double largest = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    double const difference = std::abs(x[i] - y[i]);
    if (!(difference <= largest)) largest = difference;   // NaN stays
  }
  return largest;
}
// The budget of laws in float: twice the error of float on the CPU, and four roundings of the largest value.
bool is_right(char const* products, Results const& found, Results const& in_float, Results const& truth) {
  bool all = true;
  auto const judge = [&](char const* name, auto member) {
    double largest = 0;
    for (double value : truth.*member) largest = std::max(largest, std::abs(value));
    double const allowed =
        2 * largest_difference(in_float.*member, truth.*member) + 4 * double{std::numeric_limits<float>::epsilon()} * largest;
    double const error = largest_difference(found.*member, truth.*member);
    if (error <= allowed) return;
    std::fprintf(stderr, "gpu_products: %s by %s differs by %g, allowed is %g\n", name, products, error, allowed);
    all = false;
  };
  judge("y", &Results::y);
  judge("d_x", &Results::d_x);
  judge("d_w", &Results::d_w);
  return all;
}

void report(char const* products, char const* pass, Index N, Times time, double flops, double peak) {
  double const gflops = flops / time.median / 1e6;
  std::printf(
      "{\"products\": \"%s\", \"pass\": \"%s\", \"N\": %td, \"least_ms\": %.4f, \"median_ms\": %.4f, \"gflops\": %.1f, \"share\": %.4f}\n",
      products, pass, N, time.least, time.median, gflops, gflops / peak);
  std::fflush(stdout);
}
void time_products(Gpu& gpu, char const* products, Index N, double peak) {
  std::vector<std::unique_ptr<LayerOn<float, Gpu>>> layers;
  for (int i = 0; i < sets; ++i) layers.push_back(std::make_unique<LayerOn<float, Gpu>>(gpu, N));
  double const flops = 2.0 * static_cast<double>(N) * static_cast<double>(N) * static_cast<double>(N);
  auto const of = [&](int i) -> LayerOn<float, Gpu>& { return *layers[static_cast<std::size_t>(i)]; };
  report(products, "forward", N, times(gpu, [&](int i) { of(i).forward(); }), flops, peak);
  report(products, "backward", N, times(gpu, [&](int i) { of(i).backward(); }), 2 * flops, peak);
}

}  // namespace

int main(int argc, char** argv) try {
  Index const largest = argc > 1 ? std::atoll(argv[1]) : 2048;
  struct Named {
    char const* name;
    std::unique_ptr<Gpu> gpu;
  };
  std::vector<Named> machines;
  machines.push_back({"own", std::make_unique<Gpu>()});
#if HYBRIDATTN_CUBLAS
  machines.push_back({"cublas", std::make_unique<Gpu>(ha::CudaOptions{.products = ha::Products::cublas})});
#endif
  double const peak = peak_gflops(*machines.front().gpu);
  Index const judged = std::min<Index>(256, largest);
  ha::Cpu cpu;
  Results const truth = results<double>(cpu, judged), in_float = results<float>(cpu, judged);
  bool all_right = true;
  for (auto& [name, gpu] : machines) {
    all_right = is_right(name, results<float>(*gpu, judged), in_float, truth) && all_right;
    for (Index N = judged; N <= largest; N *= 2) time_products(*gpu, name, N, peak);
  }
  return all_right ? 0 : 1;
} catch (ha::Error const& error) {
  std::fprintf(stderr, "gpu_products: %s\n", error.what());
  return 2;
}
