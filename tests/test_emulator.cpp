// The emulator: what its words compute, and which mistakes of a kernel it reports.
#include "catch.hpp"
#include "error_of.hpp"

#include <hybridattn/emulator.hpp>

#include <unistd.h>

#include <numeric>

namespace ha = hybridattn;
namespace simt = ha::simt;
using ha::Index;

namespace {

// Runs a kernel on one block and returns what it wrote into `count` elements of y, which begin as zeros.
template <class K, class T = typename K::Element> std::vector<T> run(int schedule = 1, Index count = K::threads) {
  ha::Emulator gpu{schedule};
  ha::Tensor<T, 1, ha::Emulator> y{gpu, {count}};
  upload(gpu, std::vector<T>(static_cast<std::size_t>(count)), y);
  launch<K>(gpu, {}, {out(y)});
  return download(gpu, y);
}
template <class T> struct Into {
  ha::View<T, 1> y;
};
template <class K> std::string mistake_of(int schedule = 1) {
  return error_of([&] { run<K>(schedule); });
}
bool holds(std::string const& text, std::string const& part) {
  INFO(text);
  return text.find(part) != text.npos;
}

// What most kernels of this file have.
template <class T, int count = 64> struct Plain {
  using Element = T;
  static constexpr int threads = count;
  using Params = Into<T>;
  struct Shared {};
};

}  // namespace

// ---- words

namespace {
template <class T> struct Shuffles : Plain<T> {
  static void run(typename Plain<T>::Shared&, Into<T> const& p) {
    T const own = static_cast<T>(simt::thread_id());
    T const sum = simt::shuffle(own, 3) + simt::shuffle_xor(own, 1) + simt::shuffle_up(own, 2) + simt::shuffle_down(own, 4);
    p.y(simt::thread_id()) = sum;
  }
};
struct Votes : Plain<std::uint32_t> {
  static void run(Shared&, Params const& p) {
    int const lane = simt::lane();
    bool const both = simt::any(lane == 7) && !simt::all(lane == 7) && simt::all(true) && !simt::any(false);
    p.y(simt::thread_id()) = both ? simt::ballot(lane % 2 == 1) ^ simt::match_any(Index{lane} % 5) : 0;
  }
};
struct Sums : Plain<double, 96> {
  struct Shared {
    double of_warps[3];
  };
  static void run(Shared& shared, Params const& p) {
    double const own = simt::thread_id();
    p.y(simt::thread_id()) = ha::gpu::sum_block(shared.of_warps, own) + simt::sum_lanes<8>(own) + simt::largest_of_lanes<4>(own);
  }
};
struct Counts : Plain<int> {
  static void run(Shared&, Params const& p) {
    simt::atomic_add(&p.y(0), 2);
    simt::atomic_max(&p.y(1), simt::thread_id());
  }
};
}  // namespace

TEMPLATE_TEST_CASE("shuffles give the value of the lane that is asked, and one's own where there is none", "", int, std::uint64_t, float,
                   double) {
  auto const y = run<Shuffles<TestType>>();
  for (int i = 0; i < 64; ++i) {
    int const lane = i % 32, warp = i / 32 * 32;
    int const sum = 3 + (lane ^ 1) + (lane < 2 ? lane : lane - 2) + (lane + 4 < 32 ? lane + 4 : lane) + 4 * warp;
    CHECK(static_cast<int>(y[static_cast<std::size_t>(i)]) == sum);
  }
}
TEST_CASE("votes and matches are sets of lanes") {
  auto const y = run<Votes>();
  for (int lane = 0; lane < 32; ++lane) {
    std::uint32_t equal = 0;
    for (int other = lane % 5; other < 32; other += 5) equal |= 1u << other;
    CHECK(y[static_cast<std::size_t>(lane)] == (0xaaaaaaaau ^ equal));
  }
}
TEST_CASE("sums over lanes and blocks") {
  auto const y = run<Sums>();
  for (int i = 0; i < 96; ++i) CHECK(y[static_cast<std::size_t>(i)] == 95 * 96 / 2 + i / 8 * 8 * 8 + 28 + i / 4 * 4 + 3);
}
TEST_CASE("integer atomics count every thread") {
  auto const y = run<Counts>();
  CHECK(y[0] == 128);
  CHECK(y[1] == 63);
}
TEST_CASE("a thread for each element, whatever their number") {
  struct Number {
    ha::View<int, 1> y;
    void operator()(Index i) const { y(i) += static_cast<int>(i) + 1; }
  };
  for (Index const count : {0, 1, 127, 128, 129, 1000}) {
    ha::Emulator gpu;
    ha::Tensor<int, 1, ha::Emulator> y{gpu, {1000}};
    upload(gpu, std::vector<int>(1000), y);
    for_each(gpu, count, Number{out(y)});
    auto const written = download(gpu, y);
    CHECK(std::accumulate(written.begin(), written.end(), 0) == count * (count + 1) / 2);
  }
}

// ---- mistakes, a kernel for each

namespace {
struct OtherBarrier : Plain<int> {
  static void run(Shared&, Params const&) {
    if (simt::thread_id() < 32) simt::sync_block();
    else simt::sync_block();
  }
};
struct EndsEarly : Plain<int> {
  static void run(Shared&, Params const&) {
    if (simt::thread_id() == 0) return;
    simt::sync_block();
  }
};
struct LaneMissing : Plain<int> {
  static void run(Shared&, Params const& p) {
    if (simt::lane() == 5) return;
    p.y(simt::thread_id()) = simt::shuffle(1, 0);
  }
};
struct OtherWord : Plain<int> {
  static void run(Shared&, Params const& p) {
    p.y(simt::thread_id()) = simt::lane() < 16 ? simt::shuffle_xor(1, 1) : static_cast<int>(simt::ballot(true));
  }
};
struct Deadlock : Plain<int> {
  static void run(Shared&, Params const&) {
    if (simt::thread_id() % 2 == 0) simt::sync_block();
    else simt::sync_warp();
  }
};
struct BesideShared : Plain<int> {
  struct Shared {
    int x[4];
  };
  static void run(Shared& shared, Params const&) {
    int* volatile const x = shared.x;
    if (simt::thread_id() == 0) x[4] = 1;
  }
};
struct Unwritten : Plain<float> {
  struct Shared {
    float x[64];
  };
  static void run(Shared& shared, Params const& p) { p.y(simt::thread_id()) = shared.x[simt::thread_id()]; }
};
struct Throws : Plain<int> {
  static void run(Shared&, Params const&) { ha::check(simt::thread_id() != 9, "thread 9 is not satisfied"); }
};
// Each thread reads what its neighbour in another warp wrote. The barrier between is left out.
template <bool with_barrier> struct Neighbour : Plain<int> {
  struct Shared {
    int x[64];
  };
  static void run(Shared& shared, Params const& p) {
    shared.x[simt::thread_id()] = simt::thread_id();
    if (with_barrier) simt::sync_block();
    p.y(simt::thread_id()) = shared.x[(simt::thread_id() + 32) % 64];
  }
};
}  // namespace

TEST_CASE("threads that wait at different barriers are an error that says who waits where") {
  std::string const text = mistake_of<OtherBarrier>();
  CHECK(holds(text, "Emulator: kernel OtherBarrier, block (0, 0, 0): thread 32 waits at another sync_block than other threads of its block"));
  CHECK(holds(text, "\n  threads 0 to 31: at sync_block, test_emulator.cpp:"));
  CHECK(holds(text, "\n  thread 32: at sync_block, test_emulator.cpp:"));
  CHECK(holds(text, "\n  threads 33 to 63: could go on"));
}
TEST_CASE("a thread that ends while others wait for it is an error, in every schedule") {
  for (int schedule = 1; schedule <= 8; ++schedule) {
    CHECK(holds(mistake_of<EndsEarly>(schedule), " ended"));
    CHECK(holds(mistake_of<LaneMissing>(schedule), " of its warp"));
  }
  CHECK(holds(mistake_of<EndsEarly>(1), "thread 1 waits for threads that have ended"));
  CHECK(holds(mistake_of<EndsEarly>(2), "thread 0 ends while other threads of its block wait for it"));
}
TEST_CASE("lanes of a warp that wait at different words are an error") {
  CHECK(holds(mistake_of<OtherWord>(), "thread 16 waits at ballot while other lanes of its warp wait at shuffle_xor"));
}
TEST_CASE("threads that wait for each other are an error") {
  CHECK(holds(mistake_of<Deadlock>(), "waits, and so do all others: no thread can go on"));
}
TEST_CASE("a write beside shared memory is an error") {
  CHECK(holds(mistake_of<BesideShared>(), "kernel BesideShared, block (0, 0, 0) writes beside its shared memory, 16 bytes from its start"));
}
TEST_CASE("shared memory that was not written is NaN") {
  for (float const x : run<Unwritten>()) CHECK(x != x);
}
TEST_CASE("an error inside a kernel arrives, and the emulator goes on working") {
  ha::Emulator gpu;
  ha::Tensor<int, 1, ha::Emulator> y{gpu, {64}};
  CHECK(error_of([&] { launch<Throws>(gpu, {}, {out(y)}); }) == "thread 9 is not satisfied");
  CHECK(holds(error_of([&] { launch<OtherBarrier>(gpu, {}, {out(y)}); }), "another sync_block"));
  launch<Neighbour<true>>(gpu, {}, {out(y)});
  CHECK(download(gpu, y)[3] == 35);
}
TEST_CASE("a barrier that is missing shows: schedules differ") {
  for (int schedule = 1; schedule <= 8; ++schedule) CHECK(run<Neighbour<true>>(schedule) == run<Neighbour<true>>());
  CHECK(run<Neighbour<false>>(1) != run<Neighbour<false>>(2));
}
TEST_CASE("a barrier is left out at run time, and reached barriers are known") {
  auto& mutation = ha::emulator::mutation();
  mutation.records = true;
  run<Neighbour<true>>();
  mutation.records = false;
  REQUIRE(mutation.reached.size() == 1);
  mutation.left_out = mutation.reached.front();
  CHECK(run<Neighbour<true>>(1) != run<Neighbour<true>>(2));
  mutation.left_out = {};
  mutation.reached.clear();
  CHECK(run<Neighbour<true>>(1) == run<Neighbour<true>>(2));
}

// ---- memory

TEST_CASE("the host cannot read the memory of the device, copies can") {
  ha::Emulator gpu;
  ha::Tensor<char, 1, ha::Emulator> x{gpu, {8}};
  upload(gpu, std::vector<char>{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}, x);
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  CHECK(write(ends[1], in(x).data, 8) == -1);   // the system reads it for the host
  CHECK(download(gpu, x)[7] == 'h');
  CHECK(write(ends[1], in(x).data, 8) == -1);
  close(ends[0]);
  close(ends[1]);
}
TEST_CASE("memory of the host is refused in parameters, copies and fills") {
  ha::Emulator gpu;
  std::vector<int> host(64);
  ha::Tensor<int, 1, ha::Emulator> x{gpu, {64}};
#if !defined(__clang__)
  CHECK(holds(error_of([&] { launch<Neighbour<true>>(gpu, {}, {{host.data(), {64}}}); }),
              "the parameters hold an address of the host's memory, at byte 0; a GPU cannot read it"));
#endif
  CHECK(holds(error_of([&] { gpu.copy(out(x).data, host.data(), 8); }), "memory of the host"));
  CHECK(holds(error_of([&] { gpu.fill(host.data(), std::byte{0}, 8); }), "memory of the host"));
}
TEST_CASE("launches and emulators with impossible numbers are errors") {
  ha::Emulator gpu;
  ha::Tensor<int, 1, ha::Emulator> x{gpu, {64}};
  CHECK(holds(error_of([&] { launch<Neighbour<true>>(gpu, {.y = 65536}, {out(x)}); }), "1 x 65536 x 1 blocks; a GPU takes at most"));
  CHECK(error_of([] { ha::Emulator wrong{0}; }) == "Emulator: schedule 0; schedules are numbers from 1 on");
  CHECK(error_of([] { ha::Emulator wrong{{.threads = -1}}; }) == "Cpu: -1 threads; allowed: 0 (as many as there are) and more");
  CHECK(ha::Emulator{{.schedule = 2, .threads = 3}}.threads() == 3);
  auto const launches = gpu.launches();
  launch<Neighbour<true>>(gpu, {.x = 0}, {out(x)});
  CHECK(gpu.launches() == launches);
}
