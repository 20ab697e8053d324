// A policy as the laws use it.
#ifndef HYBRIDATTN_TESTING_ANY_POLICY_HPP
#define HYBRIDATTN_TESTING_ANY_POLICY_HPP

#include <hybridattn/testing/subject.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// The calls of a decoding. Call c reads calls[c][i] more tokens of sequence i.
using Calls = std::vector<std::vector<Index>>;
struct Decoded {
  HostGroup outputs;                   // of the tokens read, at their rows in the case; tensors without token rows are empty
  HostGroup cache;                     // at the end
  std::string trespass;
  std::ptrdiff_t kept = 0;             // bytes of the pool that are not given back, besides the cache
  std::size_t later_allocations = 0;   // of the calls after the second
};

class AnyPolicy : public Subject {
 public:
  virtual bool overflows_like_loops() const = 0;   // NaN and infinity, with its sign, are where the reference has them
  // What is wrong with the choices in `saved`, or "".
  virtual std::string wrong_choice(Case const& x, HostGroup const& saved) const = 0;
  virtual bool decodes() const = 0;
  // Decodes the tokens of x in these calls, with a cache that has just enough room.
  virtual Decoded decode(Case const& x, Calls const& calls, Surroundings const& around) const = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
