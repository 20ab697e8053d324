// Makes a backend for the laws.
#ifndef HYBRIDATTN_TESTING_MACHINE_HPP
#define HYBRIDATTN_TESTING_MACHINE_HPP

#include <hybridattn/testing/fake.hpp>

#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// make(schedule) makes a backend that works in another order for each schedule 1, 2, ..., because no result may depend on the order. A
// backend with several orders specialises this. A backend that an int constructs must specialise it, because the int may mean something
// else than a schedule.
template <class B> struct Machine {
  static_assert(!std::is_constructible_v<B, int>, "say what the schedules of this backend are: specialise testing::Machine");
  static B make(int) { return B(); }
};
// A backend whose own number is a schedule says so.
template <class B> requires B::takes_schedule struct Machine<B> {
  static B make(int schedule) { return B(schedule); }
};
// For Cpu and Fake the schedule is the number of threads.
template <> struct Machine<Cpu> {
  static Cpu make(int schedule) { return Cpu(schedule); }
};
template <> struct Machine<Fake> {
  static Fake make(int schedule) { return Fake(schedule); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
