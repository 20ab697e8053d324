// Every barrier of the library's kernels is needed: a kernel that passes one of them without waiting computes something else in one of
// the schedules, or the emulator reports it.
#include "catch.hpp"

#include <hybridattn/emulator.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>
#include <hybridattn/testing/policies.hpp>

#include <functional>
#include <map>
#include <set>

namespace ha = hybridattn;
using ha::testing::Subject;

namespace {

using Barrier = std::pair<std::string, int>;   // file and line

ha::testing::Result run(Subject const& subject, int schedule) {
  auto const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  return subject.run(x, {.threads = schedule});
}
// The barriers that kernels reach in f.
std::set<Barrier> reached_in(std::function<void()> const& f) {
  auto& mutation = ha::emulator::mutation();
  mutation.records = true;
  f();
  mutation.records = false;
  std::set<Barrier> barriers;
  for (auto const& at : mutation.reached) barriers.insert({at.file, at.line});
  mutation.reached.clear();
  return barriers;
}
std::string first_difference(ha::testing::Result const& a, ha::testing::Result const& b) {
  for (auto const group : {&ha::testing::Result::outputs, &ha::testing::Result::saved, &ha::testing::Result::gradients})
    if (std::string const found = ha::testing::first_difference(a.*group, b.*group); !found.empty()) return found;
  return {};
}
// Whether a run without this barrier is noticed.
bool is_noticed(Subject const& subject, ha::testing::Result const& expected, Barrier const& barrier) {
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
  template <class Op> void judge_operation() {
    for (auto const& size : ha::testing::Operation<Op>::sizes()) judge(ha::testing::OperationOn<Op, ha::Emulator, float>{size});
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
template <class... Ops> void judge_operations(Barriers& barriers, std::tuple<Ops...> const*) { (barriers.judge_operation<Ops>(), ...); }

}  // namespace

TEST_CASE("every barrier of every operation is noticed when it is left out") {
  Barriers barriers;
  judge_operations(barriers, static_cast<ha::testing::AllOperations const*>(nullptr));
  CHECK(barriers.count() > 10);
  barriers.check_all();
}
TEST_CASE("every barrier of full attention is noticed when it is left out") {
  Barriers barriers;
  for (ha::Index const dim : {8, 130})
    barriers.judge(ha::testing::Adaptor<ha::Full, ha::Emulator, float>{{.num_heads = 2, .num_kv_heads = 1, .head_dim = dim}});
  CHECK(barriers.count() > 10);
  barriers.check_all();
}
