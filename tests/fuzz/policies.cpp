// A random policy computes a random batch: forward, backward and decoding against its loops in double, with fences around every
// tensor, and its sequences alone. An input is the numbers that all this is drawn by.
#include "policies.hpp"

#include <hybridattn/testing/decoding_laws.hpp>

namespace {

using namespace fuzz;
namespace laws = ha::testing;

SomePolicy some_policy(FuzzedDataProvider& data) {
  static constexpr SomePolicy (*makers[])(FuzzedDataProvider&) = {some_full, some_gdn, some_dsa};
  return data.PickValueInArray(makers)(data);
}
// Up to five sequences; most are short, some go beyond the blocks of 64 tokens, and some are empty.
ha::Sequences some_sequences(FuzzedDataProvider& data) {
  std::vector<Index> lengths(data.ConsumeIntegralInRange<std::size_t>(1, 5));
  Index left = 200;
  for (Index& length : lengths)
    left -= length = std::min(left, data.ConsumeIntegralInRange<Index>(0, data.ConsumeIntegralInRange<int>(0, 3) == 0 ? 140 : 9));
  return laws::packed(lengths);
}
laws::Surroundings some_surroundings(FuzzedDataProvider& data) {
  static constexpr double unwritten[] = {laws::not_a_number, laws::not_a_number, 3, -1e6};
  return {.threads = 1,
          .unwritten = data.PickValueInArray(unwritten),
          .spaced = data.ConsumeBool(),
          .leftovers = data.ConsumeBool() ? laws::Leftovers::nan : laws::Leftovers::none};
}

struct Draw {
  SomePolicy policy;
  ha::Sequences sequences;
  std::string kind;
  std::uint64_t seed;
  laws::Surroundings around;
  bool carried;
};
Draw some_draw(FuzzedDataProvider& data) {
  Draw draw{.policy = some_policy(data), .sequences = some_sequences(data), .kind = {}, .seed = 0, .around = {}, .carried = false};
  auto const kinds = draw.policy->kinds();
  draw.kind = kinds[data.ConsumeIntegralInRange<std::size_t>(0, kinds.size() - 1)];
  draw.seed = data.ConsumeIntegral<std::uint16_t>();
  draw.around = some_surroundings(data);
  draw.carried = data.ConsumeBool();
  return draw;
}
// In words, for whoever reads a finding.
std::string described(Draw const& draw, laws::Case const& x) {
  std::string text = draw.policy->name() + ", kind " + draw.kind + ", seed " + std::to_string(draw.seed) + ", lengths";
  for (ha::Sequence const s : x.sequences) text += " " + std::to_string(s.length);
  for (laws::HostTensor const& tensor : x.inputs) text += ", " + tensor.name + " [" + laws::listed(tensor.shape) + "]";
  return text + (draw.around.spaced ? ", spaced" : "");
}

// The first result that is beyond `times` the budget of true values.
std::string wrong_values(laws::AnyPolicy const& policy, laws::Result const& result, laws::detail::Judges const& judges, double times) {
  auto const wrong = [&](laws::HostGroup laws::Result::* part) {
    return laws::detail::beyond_budget(policy, result.*part, judges.truth.*part, judges.truth.*part, judges.naive.*part, times);
  };
  return laws::detail::first_of([&] { return wrong(&laws::Result::outputs); }, [&] { return wrong(&laws::Result::saved); },
                                [&] { return wrong(&laws::Result::gradients); });
}
// In less than double the budget is missed by luck: once in a hundred batches by little, and never three times.
std::string wrong_values(Draw const& draw, laws::Result const& result, laws::detail::Judges const& judges) {
  std::string why = wrong_values(*draw.policy, result, judges, draw.policy->in_double() ? 1 : 4);
  for (std::uint64_t again : {1u, 2u})
    if (!why.empty() && !draw.policy->in_double()) {
      laws::Case const x = draw.policy->sample(draw.kind, draw.sequences, draw.seed + again, draw.carried);
      laws::Result const other = draw.policy->run(x, draw.around);
      why = wrong_values(*draw.policy, other, laws::detail::judges_of(*draw.policy, x, other), 2);
    }
  return why;
}

std::string wrong_run(Draw const& draw, laws::Case const& x, laws::Result const& result, laws::detail::Judges const& judges) {
  laws::AnyPolicy const& policy = *draw.policy;
  return laws::detail::first_of(
      [&] { return result.trespass; }, [&] { return result.kept == 0 ? std::string() : "memory of the pool is kept"; },
      [&] { return laws::detail::first_not_finite(result.outputs, true); },
      [&] { return laws::detail::first_not_finite(result.gradients, true); },
      [&] { return policy.wrong_choice(x, laws::detail::choices_in(result.saved)); }, [&] { return wrong_values(draw, result, judges); });
}

// Sequence `index` of the batch, which must be the same alone, bit for bit.
std::string differs_alone(Draw const& draw, laws::Case const& x, laws::Result const& whole, Index index) {
  std::vector<laws::Part> const own{{index, 0, x.sequences[static_cast<std::size_t>(index)].length}};
  laws::Result const alone = draw.policy->run(laws::cut(x, own), {});
  auto const has_rows = [](laws::HostTensor const& tensor, Index) { return tensor.rows != laws::RowsOf::other; };
  auto const different = [&](laws::HostGroup laws::Result::* part) {
    return laws::first_difference(laws::detail::rows_of(whole.*part, x.sequences, own), alone.*part, has_rows);
  };
  return laws::detail::first_of([&] { return different(&laws::Result::outputs); }, [&] { return different(&laws::Result::gradients); });
}

// Calls that give each sequence all its tokens, some at a time.
laws::Calls some_calls(FuzzedDataProvider& data, ha::Sequences const& s) {
  Index const most = data.ConsumeIntegralInRange<Index>(1, 70);
  return laws::detail::calls_of(s, [&](Index call, Index, Index) {
    return call > 20 ? Index{200} : data.ConsumeIntegralInRange<Index>(0, most);   // whatever the bytes are, it ends
  });
}
std::string wrong_decoding(Draw const& draw, laws::Calls const& calls) {
  laws::AnyPolicy const& policy = *draw.policy;
  laws::Case const x = laws::detail::sample_to_decode(policy, draw.kind, draw.sequences, draw.seed);
  laws::detail::Judges const judges = laws::detail::judges_of(policy, x, policy.run(x, {}));
  laws::Decoded const decoded = policy.decode(x, calls, draw.around);
  return laws::detail::first_of([&] { return decoded.trespass; },
                                [&] { return decoded.kept == 0 ? std::string() : "memory of the pool is kept"; },
                                [&] {
                                  return laws::detail::beyond_budget(policy, decoded.outputs, judges.truth.outputs, judges.truth.outputs,
                                                                     judges.naive.outputs, policy.in_double() ? 1 : 8);
                                });
}

// Values that no training should meet. The kernels must end and stay in their memory, and tokens before them keep their bits.
std::string harmed(FuzzedDataProvider& data, Draw const& draw, laws::Case x, laws::Result const& before) {
  static constexpr float infinity = std::numeric_limits<float>::infinity();
  // Floats, so that a tensor of floats holds exactly these.
  static constexpr float bad[] = {
      std::numeric_limits<float>::quiet_NaN(), infinity, -infinity, 1e38f, -1e38f, 1e30f, 1e20f, 1e-45f, 3e9f, -3e9f};
  Index const sequence = data.ConsumeIntegralInRange<Index>(0, x.sequences.count() - 1);
  ha::Sequence const s = x.sequences[static_cast<std::size_t>(sequence)];
  if (s.length == 0) return {};
  Index const token = data.ConsumeIntegralInRange<Index>(0, s.length - 1);
  auto const is_early = [&](laws::HostTensor const& tensor, Index row) {
    return tensor.rows == laws::RowsOf::tokens && (x.sequences.owners()(row) != sequence || row < s.start + token);
  };
  for (laws::HostTensor& tensor : x.inputs)
    if (tensor.rows == laws::RowsOf::tokens && tensor.row_size() > 0 && data.ConsumeBool())
      tensor.row(s.start + token)[data.ConsumeIntegralInRange<Index>(0, tensor.row_size() - 1)] =
          static_cast<double>(data.PickValueInArray(bad));
  laws::Result const after = draw.policy->run(x, draw.around);
  return laws::detail::first_of([&] { return after.trespass; },
                                [&] { return laws::first_difference(before.outputs, after.outputs, is_early); });
}

void check(Draw const& draw, FuzzedDataProvider& data) {
  laws::Case const x = draw.policy->sample(draw.kind, draw.sequences, draw.seed, draw.carried);
  laws::Result const result = draw.policy->run(x, draw.around);
  laws::detail::Judges const judges = laws::detail::judges_of(*draw.policy, x, result);
  auto const require = [&](std::string const& why, char const* where) { demand(why.empty(), where, why, " (", described(draw, x), ")"); };
  require(wrong_run(draw, x, result, judges), "");
  switch (data.ConsumeIntegralInRange<int>(0, 3)) {   // one more look; all of them would take too long
    case 0:
      require(differs_alone(draw, x, result, data.ConsumeIntegralInRange<Index>(0, x.sequences.count() - 1)), "in the batch and alone: ");
      break;
    case 1:
      require(harmed(data, draw, x, result), "with bad values: ");
      break;
    default:
      if (draw.policy->decodes()) require(wrong_decoding(draw, some_calls(data, x.sequences)), "in decoding: ");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* bytes, std::size_t size) {
  FuzzedDataProvider data{bytes, size};
  accepts([&] {
    Draw const draw = some_draw(data);   // throws where the sizes do not fit
    must("a legal run", [&] { check(draw, data); });
  });
  return 0;
}
