// A policy as the laws see it: tensors on the host go in, tensors on the host come out. The laws are ordinary run-time code
// over this; only Adaptor, which makes one of a policy, a backend and a scalar, is a template.
#ifndef HYBRIDATTN_TESTING_ANY_POLICY_HPP
#define HYBRIDATTN_TESTING_ANY_POLICY_HPP

#include <hybridattn/testing/host_tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// What a forward and a backward read.
struct Case {
  Sequences sequences;
  HostGroup inputs, d_outputs;
  bool carried = true;   // with the states that pass from one part of a sequence to the next
};

// What surrounds a run, and must not matter.
struct Surroundings {
  int threads = 1;
  double unwritten = not_a_number;   // in all results before they are written, and in the memory beside all tensors
  bool spaced = false;               // rows of inputs, outputs and gradients with gaps between them
  bool leftovers = false;            // scratch memory holds what a run on NaNs left
};

struct Result {
  HostGroup outputs, saved, gradients;   // gradients have the names of their inputs
  std::string trespass;                  // where a run wrote outside, or nothing
  std::size_t scratch = 0;               // bytes of the backend's pool that the run took at most, on top of the tensors
  std::ptrdiff_t kept = 0;               // and those that it did not give back
};

struct Footprint {   // of a run on one thread
  std::size_t announced_saved, taken_saved;   // bytes
  std::size_t scratch;
  std::ptrdiff_t kept;
  std::size_t later_allocations;              // of a second run on the same backend
};

// Decoding: in call c, calls[c][i] more tokens of sequence i.
using Calls = std::vector<std::vector<Index>>;
struct Decoded {
  HostGroup outputs;                   // of all tokens that the calls gave, at their places in the whole; what counts no tokens is empty
  HostGroup cache;                     // at the end
  std::string trespass;
  std::ptrdiff_t kept = 0;             // bytes of the pool that are not given back, besides the cache
  std::size_t later_allocations = 0;   // of the calls after the second
};

class AnyPolicy {
 public:
  virtual ~AnyPolicy() = default;

  virtual std::string name() const = 0;
  virtual double eps() const = 0;             // of the scalar
  virtual double tolerance() const = 0;       // of a result in double, relative to the largest element
  // Kinds of inputs. The first is ordinary and smooth: finite differences are taken there.
  virtual std::vector<std::string> kinds() const = 0;
  virtual bool has_states() const = 0;        // an input initial_x for an output final_x
  virtual bool saved_is_linear() const = 0;   // in the number of tokens
  virtual bool overflows_like_loops() const = 0;   // NaN and infinite results are so, with their sign, where the reference's are
  virtual bool detached(std::string_view input) const = 0;
  virtual bool by_head(std::string_view input) const = 0;   // its gradient is judged head by head

  // Two seeds differ in every value.
  virtual Case sample(std::string const& kind, Sequences const& sequences, std::uint64_t seed, bool carried) const = 0;
  virtual Result run(Case const& x, Surroundings const& around) const = 0;
  // The reference loops in the policy's scalar or in double, with the choices that `chosen` holds.
  virtual Result loops(Case const& x, HostGroup const& chosen, bool in_double) const = 0;
  // What is wrong with the choices in `saved`, or "".
  virtual std::string wrong_choice(Case const& x, HostGroup const& saved) const = 0;
  virtual Footprint footprint(Sequences const& sequences) const = 0;
  virtual bool decodes() const = 0;
  // The tokens of x, with a cache that just holds them.
  virtual Decoded decode(Case const& x, Calls const& calls, Surroundings const& around) const = 0;

  bool in_double() const { return eps() == std::numeric_limits<double>::epsilon(); }
};

// Tokens first .. last of sequence `index`.
struct Part {
  Index index, first, last;
};

namespace detail {

// Rows of tokens or sequences from `from`, of a batch of `from_sequences`, to the rows of consecutive parts.
inline HostTensor rows_of(HostTensor const& from, Sequences const& sequences, std::vector<Part> const& parts) {
  if (from.rows == Rows::other || from.values.empty()) return from;
  HostTensor to = from;
  to.values.clear();
  to.shape[0] = 0;
  auto const append = [&](Index first, Index count) {
    to.values.insert(to.values.end(), from.row(first), from.row(first) + count * from.row_size());
    to.shape[0] += count;
  };
  for (Part const& part : parts) {
    if (from.rows == Rows::sequences) append(part.index, 1);
    else append(sequences[static_cast<std::size_t>(part.index)].start + part.first, part.last - part.first);
  }
  return to;
}
inline HostGroup rows_of(HostGroup const& from, Sequences const& sequences, std::vector<Part> const& parts) {
  HostGroup to;
  for (HostTensor const& tensor : from) to.push_back(rows_of(tensor, sequences, parts));
  return to;
}

}  // namespace detail

// A batch of parts of the sequences of another one.
inline Case cut(Case const& x, std::vector<Part> const& parts) {
  std::vector<Index> lengths;
  for (Part const& part : parts) lengths.push_back(part.last - part.first);
  return {packed(lengths), detail::rows_of(x.inputs, x.sequences, parts), detail::rows_of(x.d_outputs, x.sequences, parts), x.carried};
}
// x, with the rows that `wanted(tensor, row)` names taken from y.
template <class Wanted> void replace_rows(HostGroup& x, HostGroup const& y, Wanted wanted) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (Index row = 0; row < x[i].row_count(); ++row)
      if (wanted(x[i], row)) std::copy_n(y[i].row(row), y[i].row_size(), x[i].row(row));
}
inline HostGroup all_nan(HostGroup x) {
  for (HostTensor& tensor : x) std::fill(tensor.values.begin(), tensor.values.end(), not_a_number);
  return x;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
