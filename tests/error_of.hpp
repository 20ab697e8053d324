// Returns the message of a thrown Error.
#ifndef HYBRIDATTN_TESTS_ERROR_OF_HPP
#define HYBRIDATTN_TESTS_ERROR_OF_HPP

#include <hybridattn/core/check.hpp>

#include <algorithm>
#include <initializer_list>
#include <string>

inline constexpr char const* no_error = "no error";

// Returns the message of the Error that f throws, or `no_error` if f returns. Other exceptions are not caught.
template <class F> std::string error_of(F f) {
  try {
    f();
  } catch (hybridattn::Error const& error) {
    return error.what();
  }
  return no_error;
}

// Whether a sentence has all these parts.
inline bool says(std::string const& sentence, std::initializer_list<char const*> parts) {
  return std::all_of(parts.begin(), parts.end(), [&](char const* part) { return sentence.find(part) != sentence.npos; });
}

#endif
