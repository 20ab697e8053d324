// A Subject is a policy or an operation that the laws judge. It takes tensors on the host and returns tensors on the host. The laws are
// ordinary functions. Only the code that makes a Subject of a policy (adaptor.hpp) or of an operation (operation.hpp), on a backend and
// in a scalar, is a template.
#ifndef HYBRIDATTN_TESTING_SUBJECT_HPP
#define HYBRIDATTN_TESTING_SUBJECT_HPP

#include <hybridattn/core/type_name.hpp>
#include <hybridattn/testing/host_tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// What a forward and a backward read. Without d_outputs there is no backward.
struct Case {
  Sequences sequences;
  HostGroup inputs, d_outputs;
  bool carried = true;   // with the states that pass from one part of a sequence to the next
};

// The earlier run on the same backend, which leaves its numbers in scratch memory: none, one on the same inputs, or one on NaNs.
enum class Leftovers { none, numbers, nan };

// The circumstances of a run. The result must not depend on them.
struct Surroundings {
  int threads = 1;
  double unwritten = not_a_number;   // in all results before they are written
  double fence = not_a_number;       // in the memory beside all tensors
  bool spaced = false;               // rows of inputs, outputs and gradients with gaps between them
  Leftovers leftovers = Leftovers::none;
  bool in_place = false;             // a result stands in the memory of an argument, wherever an operation allows it
};

struct Result {
  HostGroup outputs, saved, gradients;   // gradients have the names of their inputs
  std::string trespass;                  // where a run wrote outside its results, or ""
  std::size_t scratch = 0;               // bytes of the backend's pool that the run took at most, on top of the tensors
  std::ptrdiff_t kept = 0;               // and those that it did not give back
};

struct Footprint {   // of a run on one thread
  std::size_t announced_saved, taken_saved;   // bytes
  std::size_t scratch;
  std::ptrdiff_t kept;
  std::size_t later_allocations;              // of a second run on the same backend
};

namespace detail {

// Lengths at which a kernel has no block, whole blocks, or a block that is not full.
inline Sequences all_lengths() { return packed({1, 0, 2, 63, 64, 65, 130}); }

}  // namespace detail

class Subject {
 public:
  virtual ~Subject() = default;

  virtual std::string name() const = 0;
  virtual double eps() const = 0;         // of the scalar
  virtual double tolerance() const = 0;   // of a result in double, relative to the largest element
  // Kinds of inputs. The first is ordinary and smooth, because finite differences are taken there.
  virtual std::vector<std::string> kinds() const = 0;
  // Batches on which the laws judge. No sequence may depend on another, so an operation on rows has sequences of one token.
  virtual Sequences batch() const { return detail::all_lengths(); }
  virtual Sequences small_batch() const { return packed({1, 2, 0, 19, 40}); }
  virtual bool has_tables() const { return false; }           // an input is a table of the whole batch
  virtual bool works_in_place() const { return false; }       // a result may stand in the memory of an argument
  virtual bool has_states() const { return false; }           // an input initial_x for an output final_x
  virtual bool saved_is_linear() const { return true; }       // in the number of tokens
  virtual bool detached(std::string_view) const { return false; }
  virtual bool by_head(std::string_view) const { return false; }   // the input's gradient is judged head by head

  // Two seeds differ in every value.
  virtual Case sample(std::string const& kind, Sequences const& sequences, std::uint64_t seed, bool carried) const = 0;
  virtual Result run(Case const& x, Surroundings const& around) const = 0;
  // The result of the reference loops in the subject's scalar or in double, with the choices in `chosen`.
  virtual Result loops(Case const& x, HostGroup const& chosen, bool in_double) const = 0;
  virtual Footprint footprint(Sequences const& sequences) const = 0;

  // Of the scalar that it computes in.
  double eps_of_sums() const { return eps() == epsilon_of<bf16> ? epsilon_of<float> : eps(); }
  bool in_double() const { return eps() == std::numeric_limits<double>::epsilon(); }
};

// Tokens first .. last of sequence `index`.
struct Part {
  Index index, first, last;
};

namespace detail {

// Returns the rows of tokens or of sequences that belong to the parts, one part after the other.
inline HostTensor rows_of(HostTensor const& from, Sequences const& sequences, std::vector<Part> const& parts) {
  if (from.rows == RowsOf::other || from.values.empty()) return from;
  HostTensor to = from;
  to.values.clear();
  to.shape[0] = 0;
  auto const append = [&](Index first, Index count) {
    to.values.insert(to.values.end(), from.row(first), from.row(first) + count * from.row_size());
    to.shape[0] += count;
  };
  for (Part const& part : parts) {
    if (from.rows == RowsOf::sequences) append(part.index, 1);
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

namespace detail {
// A run must not change its arguments. If it did, `trespass` names the first number that changed.
inline void note_overwritten(HostGroup const& before, HostGroup const& after, std::string& trespass) {
  if (std::string const changed = first_difference(before, after); trespass.empty() && !changed.empty())
    trespass = sentence("a run overwrites what it reads: ", changed);
}
}  // namespace detail

// A batch of parts of the sequences of another one.
inline Case cut(Case const& x, std::vector<Part> const& parts) {
  std::vector<Index> lengths;
  for (Part const& part : parts) lengths.push_back(part.last - part.first);
  return {packed(lengths), detail::rows_of(x.inputs, x.sequences, parts), detail::rows_of(x.d_outputs, x.sequences, parts), x.carried};
}
inline Case forward_only(Case x) {
  x.d_outputs.clear();
  return x;
}
// Replaces the rows of x for which wanted(tensor, row) holds by those of y.
template <class Wanted> void replace_rows(HostGroup& x, HostGroup const& y, Wanted wanted) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (Index row = 0; row < x[i].row_count(); ++row)
      if (wanted(x[i], row)) std::copy_n(y[i].row(row), y[i].row_size(), x[i].row(row));
}
// Sets all values to NaN. Whole numbers stay, because they are indices.
inline HostGroup all_nan(HostGroup x) {
  for (HostTensor& tensor : x)
    if (!tensor.whole) std::fill(tensor.values.begin(), tensor.values.end(), not_a_number);
  return x;
}

// The inputs of the earlier run that `leftovers` asks for.
inline Case earlier(Case const& x, Leftovers leftovers) {
  return leftovers == Leftovers::nan ? Case{x.sequences, all_nan(x.inputs), all_nan(x.d_outputs), x.carried} : x;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
