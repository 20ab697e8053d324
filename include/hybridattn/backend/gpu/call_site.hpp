// Where a kernel calls a word of simt.hpp.
#ifndef HYBRIDATTN_BACKEND_GPU_CALL_SITE_HPP
#define HYBRIDATTN_BACKEND_GPU_CALL_SITE_HPP

#include <hybridattn/core/config.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::simt {

// A line of source. As a default argument, here() is the line that calls the function: void f(CallSite at = CallSite::here()).
struct CallSite {
  char const* file = "";
  int line = 0;

  static HYBRIDATTN_HD constexpr CallSite here(char const* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::simt
#endif
