// Errors: one clear sentence that names the offending value and the allowed ones.
#ifndef HYBRIDATTN_CORE_CHECK_HPP
#define HYBRIDATTN_CORE_CHECK_HPP

#include <hybridattn/core/config.hpp>

#include <sstream>
#include <stdexcept>
#include <string>

namespace hybridattn {

// Everything the library throws. Its name carries no flags (HYBRIDATTN_ABI), so that it can be caught in any part of a program.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace hybridattn

namespace hybridattn::inline HYBRIDATTN_ABI {

// Throws Error with the parts written one after the other. The sentence is only built when it is needed.
template <class... Parts> [[noreturn, gnu::cold, gnu::noinline]] void fail(Parts const&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw Error(sentence.str());
}
template <class... Parts> void check(bool holds, Parts const&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
