// Leaves out every barrier of a kernel in turn. A kernel without one of its barriers must compute something else in one of the schedules,
// make a mistake that the emulator reports, or have a race that the thread sanitizer reports. Only the sanitizer notices a barrier
// beside a shuffle or a vote, where lanes wait for each other anyway.
#ifndef HYBRIDATTN_TESTS_BARRIERS_HPP
#define HYBRIDATTN_TESTS_BARRIERS_HPP

#include "catch.hpp"

#include <hybridattn/emulator.hpp>
#include <hybridattn/testing/subject.hpp>

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <map>
#include <set>

namespace barriers {

namespace ha = hybridattn;
using ha::testing::Subject;

using Barrier = std::pair<std::string, int>;  // file and line

// A run of a subject, on tokens of a batch.
struct Run {
  Subject const& subject;
  ha::testing::Case x;
  bool in_place;   // results stand in the memory of arguments, where the subject allows it

  ha::testing::Result operator()(int schedule) const { return subject.run(x, {.threads = schedule, .in_place = in_place}); }
};
// The barriers that kernels reach in f.
inline std::set<Barrier> reached_in(std::function<void()> const& f) {
  auto& mutation = ha::emulator::mutation();
  mutation.records = true;
  f();
  mutation.records = false;
  std::set<Barrier> barriers;
  for (auto const& at : mutation.reached) barriers.insert({at.file, at.line});
  mutation.reached.clear();
  return barriers;
}
inline std::string first_difference(ha::testing::Result const& a, ha::testing::Result const& b) {
  for (auto const group : {&ha::testing::Result::outputs, &ha::testing::Result::saved, &ha::testing::Result::gradients})
    if (std::string const found = ha::testing::first_difference(a.*group, b.*group); !found.empty()) return found;
  return {};
}
// Whether a run without this barrier differs from the expected one in some schedule, or is an error.
inline bool differs(Run const& run, ha::testing::Result const& expected, Barrier const& barrier) {
  ha::emulator::mutation().left_out = {barrier.first.c_str(), barrier.second};
  try {
    for (int schedule = 1; schedule <= 6; ++schedule)
      if (!first_difference(run(schedule), expected).empty()) return true;
    return false;
  } catch (ha::Error const&) {
    return true;
  }
}
// The same, or the run ends its process: by a race under the thread sanitizer (halt_on_error=1), or by an index that a kernel reads too
// early. So it runs in a child, on one thread: the thread sanitizer wants no others after fork().
inline bool is_noticed(Run const& run, ha::testing::Result const& expected, Barrier const& barrier) {
  pid_t const child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    for (int const signal : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL}) std::signal(signal, SIG_DFL);
    alarm(60);  // ends a loop without an end
    _exit(differs(run, expected, barrier) ? 1 : 0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  return status != 0;
}

// Whether each barrier that some subject reaches is noticed with one of them. Only barriers in files of a folder are left out.
class Barriers {
 public:
  explicit Barriers(std::string folder) : folder_(std::move(folder)) {
    INFO("run this test with OMP_NUM_THREADS=1");
    REQUIRE(ha::Cpu{}.threads() == 1);
  }
  void judge(Subject const& subject) { judge(subject, subject.small_batch()); }
  void judge(Subject const& subject, ha::Sequences const& batch) {
    for (bool const in_place : {false, true})
      if (!in_place || subject.works_in_place()) judge(Run{subject, subject.sample(subject.kinds().front(), batch, 1, true), in_place});
  }
  void check_all() const {
    for (auto const& [barrier, noticed] : noticed_) {
      INFO("the barrier at " << barrier.first << ":" << barrier.second);
      CHECK(noticed);
    }
  }
  std::size_t count() const { return noticed_.size(); }

 private:
  void judge(Run const& run) {
    auto const expected = run(1);
    for (Barrier const& barrier : reached_in([&] { run(1); })) {
      if (barrier.first.find(folder_) == barrier.first.npos) continue;
      if (bool& known = noticed_[barrier]; !known) known = is_noticed(run, expected, barrier);
    }
  }
  std::string folder_;
  std::map<Barrier, bool> noticed_;
};

}  // namespace barriers

#endif
