// How the laws make a backend.
#ifndef HYBRIDATTN_TESTING_MACHINE_HPP
#define HYBRIDATTN_TESTING_MACHINE_HPP

#include <hybridattn/testing/fake.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// make(schedule) makes one that does its work in another order for each schedule, from 1 on, where it can: no result may depend on it.
// A backend with schedules has a specialisation.
template <class B> struct Machine {
  static B make(int) { return B(); }
};
// On so many threads.
template <> struct Machine<Cpu> {
  static Cpu make(int schedule) { return Cpu(schedule); }
};
template <> struct Machine<Fake> {
  static Fake make(int schedule) { return Fake(schedule); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
