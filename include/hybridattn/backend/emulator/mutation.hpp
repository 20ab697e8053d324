// Leaves out one barrier of a kernel at run time, so that a test can show that the laws notice it.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_MUTATION_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_MUTATION_HPP

#include <hybridattn/backend/gpu/call_site.hpp>

#include <cstring>
#include <mutex>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

inline bool same(simt::CallSite a, simt::CallSite b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// Of all emulators of the program. Change it only while no kernel runs.
struct Mutation {
  bool records = false;
  std::vector<simt::CallSite> reached;   // the barriers that kernels reach while `records` is true
  simt::CallSite left_out;               // the barrier that kernels pass without waiting; line 0: none

  // Whether a kernel passes this barrier without waiting.
  bool passes(simt::CallSite at) {
    if (records) record(at);
    return left_out.line != 0 && same(left_out, at);
  }

 private:
  void record(simt::CallSite at) {
    std::lock_guard const lock(mutex_);
    for (simt::CallSite known : reached)
      if (same(known, at)) return;
    reached.push_back(at);
  }
  std::mutex mutex_;
};
inline Mutation& mutation() {
  static Mutation only;
  return only;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif
