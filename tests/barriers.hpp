// Leaves out every barrier of a kernel in turn. A kernel without one of its barriers must compute something else in one of the schedules, or
// make a mistake that the emulator reports.
#ifndef HYBRIDATTN_TESTS_BARRIERS_HPP
#define HYBRIDATTN_TESTS_BARRIERS_HPP

#include "catch.hpp"

#include <hybridattn/emulator.hpp>
#include <hybridattn/testing/subject.hpp>

#include <functional>
#include <map>
#include <set>

namespace barriers {

namespace ha = hybridattn;
using ha::testing::Subject;

using Barrier = std::pair<std::string, int>;  // file and line

inline ha::testing::Result run(Subject const& subject, int schedule) {
  auto const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  return subject.run(x, {.threads = schedule});
}
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
// Whether a run without this barrier is noticed.
inline bool is_noticed(Subject const& subject, ha::testing::Result const& expected, Barrier const& barrier) {
  ha::emulator::mutation().left_out = {barrier.first.c_str(), barrier.second};
  bool noticed = false;
  for (int schedule = 1; schedule <= 6 && !noticed; ++schedule) {
    try {
      noticed = !first_difference(run(subject, schedule), expected).empty();
    } catch (ha::Error const&) {
      noticed = true;
    }
  }
  ha::emulator::mutation().left_out = {};
  return noticed;
}

// Whether each barrier that some subject reaches is noticed with one of them.
class Barriers {
 public:
  void judge(Subject const& subject) {
    auto const expected = run(subject, 1);
    for (Barrier const& barrier : reached_in([&] { run(subject, 1); }))
      if (bool& known = noticed_[barrier]; !known) known = is_noticed(subject, expected, barrier);
  }
  void check_all() const {
    for (auto const& [barrier, noticed] : noticed_) {
      INFO("the barrier at " << barrier.first << ":" << barrier.second);
      CHECK(noticed);
    }
  }
  std::size_t count() const { return noticed_.size(); }

 private:
  std::map<Barrier, bool> noticed_;
};

}  // namespace barriers

#endif
