// A kernel with a mistake, on the emulator of a GPU: threads without an element return before the barrier that the others wait at.
#include <hybridattn/emulator.hpp>

#include <cstdio>
#include <vector>

namespace ha = hybridattn;
using ha::Index;

// The elements of each block of 64, in reverse order.
struct Reverse {
  static constexpr int threads = 64;
  struct Params {
    ha::View<float const, 1> x;
    ha::View<float, 1> y;
  };
  struct Shared {
    float x[threads];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    int const thread = ha::simt::thread_id();
    Index const i = ha::simt::block_x() * threads + thread;
    if (i >= p.x.extent(0)) return;
    shared.x[thread] = p.x(i);
    ha::simt::sync_block();
    p.y(i) = shared.x[threads - 1 - thread];
  }
};

int main() {
  ha::Emulator gpu;
  ha::Tensor<float, 1, ha::Emulator> x{gpu, {100}}, y{gpu, {100}};
  upload(gpu, std::vector<float>(100, 1.0f), x);
  try {
    launch<Reverse>(gpu, {.x = ha::ceil_div(100, Reverse::threads)}, {in(x), out(y)});
  } catch (ha::Error const& error) {
    std::puts(error.what());
  }
}
