// The sentence of what is thrown.
#ifndef HYBRIDATTN_TESTS_ERROR_OF_HPP
#define HYBRIDATTN_TESTS_ERROR_OF_HPP

#include <hybridattn/core/check.hpp>

#include <string>

inline constexpr char const* no_error = "no error";

// What f throws says; `no_error` where it returns. Exceptions that are not the library's pass.
template <class F> std::string error_of(F f) {
  try {
    f();
  } catch (hybridattn::Error const& error) {
    return error.what();
  }
  return no_error;
}

#endif
