// The threads of a Cpu: each task runs once, errors, loops in loops, the environment, fork().
#include "catch.hpp"
#include "error_of.hpp"
#include "in_child.hpp"

#include <hybridattn/hybridattn.hpp>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <sys/resource.h>
#include <thread>

namespace ha = hybridattn;
using ha::Index;

namespace {

std::vector<float> gdn_forward(ha::Cpu& cpu) {
  auto const s = ha::Sequences::equal(4, 64);
  auto const c = ha::GDN::complete({.key_dim = 16}, 0, 2);
  auto x = ha::allocate<float>(cpu, ha::GDN::inputs(c, s));
  auto y = ha::allocate<float>(cpu, ha::GDN::outputs(c, s));
  auto saved = ha::allocate<float>(cpu, ha::GDN::saved(c, s));
  ha::zip([&](ha::Path const&, auto& tensor) { ha::On<ha::Fill, ha::Cpu>::forward(cpu, .1f, flat(out(tensor))); }, x);
  ha::On<ha::GDN, ha::Cpu>::forward(cpu, c, s, in(x), out(y), out(saved));
  return download(cpu, y.o);
}

// 0 + 1 + ... + (count - 1), by tasks.
Index sum_of_tasks(ha::Cpu& cpu, Index count) {
  std::atomic<Index> sum = 0;
  ha::parallel_for(cpu, count, [&](Index task, int) { sum += task; });
  return sum;
}

// Whether two tasks run side by side: each waits for the other, for some seconds.
bool has_two_threads(ha::Cpu& cpu) {
  using Clock = std::chrono::steady_clock;
  auto const end = Clock::now() + std::chrono::seconds(20);
  std::atomic<int> came = 0;
  ha::parallel_for(cpu, 2, [&](Index, int) {
    for (++came; came < 2 && Clock::now() < end;) std::this_thread::yield();
  });
  return Clock::now() < end;
}

}  // namespace

TEST_CASE("each task runs once, on a thread of the Cpu, in loops that follow each other at once") {
  for (int threads : {1, 2, 3, 16}) {
    ha::Cpu cpu{threads};
    std::vector<int> ran(200);
    std::vector<std::atomic<int>> on(static_cast<std::size_t>(threads));
    Index tasks = 0;
    for (Index round = 0; round < 2000; ++round) {
      Index const count = round * 7 % 201;
      ha::parallel_for(cpu, count, [&](Index task, int thread) {
        ++ran[static_cast<std::size_t>(task)];
        ++on[static_cast<std::size_t>(thread)];
      });
      tasks += count;
    }
    Index all = 0;
    for (auto const& of_thread : on) all += of_thread;
    CHECK(all == tasks);
    std::vector<int> expected(200);
    for (Index round = 0; round < 2000; ++round)
      for (Index task = 0; task < round * 7 % 201; ++task) ++expected[static_cast<std::size_t>(task)];
    CHECK(ran == expected);
  }
}

TEST_CASE("the caller does the tasks of a thread that does not come, and waits for the task that a thread has begun") {
  ha::Cpu cpu{2};
  auto const caller = std::this_thread::get_id();
  std::atomic<bool> helper_began = false, helper_ended = false, all_others_ended = false;
  std::atomic<int> by_caller = 0;
  auto const wait_for = [](std::atomic<bool>& flag) {
    while (!flag) std::this_thread::yield();
  };
  ha::parallel_for(cpu, 100, [&](Index, int thread) {
    if (std::this_thread::get_id() != caller) {
      CHECK(thread == 1);
      helper_began = true;
      wait_for(all_others_ended);
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      helper_ended = true;
      return;
    }
    wait_for(helper_began);
    if (++by_caller == 99) all_others_ended = true;
  });
  CHECK(by_caller == 99);
  CHECK(helper_ended);
}

TEST_CASE("a loop in a loop runs on its own thread; another Cpu has other threads") {
  ha::Cpu cpu{3};
  std::atomic<int> elsewhere = 0;
  std::atomic<Index> sum = 0;
  ha::parallel_for(cpu, 20, [&](Index, int) {
    auto const here = std::this_thread::get_id();
    ha::parallel_for(cpu, 5, [&](Index, int thread) { elsewhere += thread != 0 || std::this_thread::get_id() != here; });
    ha::Cpu own{2};
    sum += sum_of_tasks(own, 10);
  });
  CHECK(elsewhere == 0);
  CHECK(sum == 20 * 45);
}

TEST_CASE("threads of a program compute side by side, each with a Cpu of its own") {
  std::atomic<int> wrong = 0;
  auto const user = [&] {
    ha::Cpu cpu{3};
    for (Index count = 0; count < 500; ++count) wrong += sum_of_tasks(cpu, count) != count * (count - 1) / 2;
  };
  std::thread first(user), second(user);
  first.join(), second.join();
  CHECK(wrong == 0);
}

TEST_CASE("what a task throws arrives behind the loop: the error of the smallest task, on any number of threads") {
  for (int threads : {1, 2, 7}) {
    ha::Cpu cpu{threads};
    for (int round = 0; round < 20; ++round)
      CHECK(error_of([&] { ha::parallel_for(cpu, 100, [](Index task, int) { ha::check(task % 30 != 17, "task ", task, " fails"); }); }) ==
            "task 17 fails");
    CHECK_THROWS_AS(ha::parallel_blocks(cpu, 100, 10, [](Index, Index) { throw std::bad_alloc(); }), std::bad_alloc);
    std::vector<int> ran(100);
    ha::parallel_for(cpu, 100, [&](Index task, int) { ++ran[static_cast<std::size_t>(task)]; });
    CHECK(ran == std::vector<int>(100, 1));
  }
}

TEST_CASE("threads beyond reason are refused") {
  CHECK(ha::Cpu{ha::Cpu::thread_limit()}.threads() == ha::Cpu::thread_limit());
  CHECK(ha::Cpu::thread_limit() >= 256);
  for (int threads : {ha::Cpu::thread_limit() + 1, 100'000, std::numeric_limits<int>::max()})
    CHECK(says(error_of([&] { ha::Cpu{threads}; }),
               {std::to_string(threads).c_str(), "allows at most", std::to_string(ha::Cpu::thread_limit()).c_str()}));
  CHECK(says(error_of([] { ha::Cpu{-1}; }), {"-1 threads"}));
  CHECK(says(error_of([] { ha::Cpu{std::numeric_limits<int>::min()}; }), {"-2147483648 threads"}));
  ha::Cpu many{64};
  CHECK(gdn_forward(many).size() == 4 * 64 * 2 * 16);
}

#if !HYBRIDATTN_ASAN && !HYBRIDATTN_TSAN   // whose memory is beyond any limit
TEST_CASE("a thread that the system refuses is an error, and the Cpu is as before") {
  CHECK(in_child([] {
          ha::Cpu many{200}, one{1};
          rlimit const limit{Index{1} << 28, Index{1} << 28};
          setrlimit(RLIMIT_AS, &limit);   // 200 stacks need more
          bool right = says(error_of([&] { sum_of_tasks(many, 10); }), {"Cpu: the system refuses thread ", " of 200: "});
          right = right && sum_of_tasks(one, 10) == 45;
          rlimit const none{RLIM_INFINITY, Index{1} << 28};
          setrlimit(RLIMIT_AS, &none);
          return right && says(error_of([&] { sum_of_tasks(many, 10); }), {"of 200"}) ? 0 : 1;
        }) == 0);
}
#endif

// The test below runs this one with its own environment.
TEST_CASE("threads of the environment", "[.environment]") {
  std::string const error = error_of([] {
    ha::Cpu cpu;
    std::printf("%d\n", cpu.threads());
    REQUIRE(gdn_forward(cpu).size() == 4 * 64 * 2 * 16);
  });
  if (error != no_error) std::printf("%s\n", error.c_str());
}
TEST_CASE("OMP_NUM_THREADS says how many threads a Cpu has; what is no number is refused") {
  auto const says_with = [](std::string const& value, std::string const& expected) {
    std::string const program = std::filesystem::read_symlink("/proc/self/exe").string();
    std::FILE* const out = popen(("OMP_NUM_THREADS='" + value + "' '" + program + "' '[.environment]' 2>&1").c_str(), "r");
    std::string text;
    for (int c = std::fgetc(out); c != EOF; c = std::fgetc(out)) text += static_cast<char>(c);
    pclose(out);
    INFO(value << ": " << text);
    CHECK(text.find(expected) != text.npos);
  };
  for (std::string const value : {"1", "2", "5"}) says_with(value, value + "\n");
  says_with("3,2", "3\n");
  says_with("", std::to_string(ha::cpu::processors()) + "\n");
  for (std::string const value : {"0", "-3", "garbage", "1e9", "2x", " ", "99999999999999999999"})
    says_with(value, "OMP_NUM_THREADS is '" + value + "'; allowed: a number");
  says_with("100000", "100000 threads, which OMP_NUM_THREADS asks for");
}

TEST_CASE("a Cpu works in a child after fork(), whatever threads its parent used") {
  ha::Cpu two{2}, one{1};
  auto const here = gdn_forward(two);
  CHECK(in_child([&] {
          ha::Cpu fresh{3};
          bool const right = gdn_forward(fresh) == here && gdn_forward(one) == here && gdn_forward(two) == here;
          bool const have_threads = has_two_threads(fresh) && has_two_threads(two);
          bool const right_in_its_child = in_child([&] { return gdn_forward(two) == here ? 0 : 1; }) == 0;
          return right && have_threads && right_in_its_child ? 0 : 1;
        }) == 0);
  CHECK(gdn_forward(two) == here);
  CHECK(has_two_threads(two));
}
