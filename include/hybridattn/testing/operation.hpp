// Makes the Subject of the laws from an operation on a backend in a scalar. operations.hpp names the groups of the library's operations.
#ifndef HYBRIDATTN_TESTING_OPERATION_HPP
#define HYBRIDATTN_TESTING_OPERATION_HPP

#include <hybridattn/tensor/sequences_on.hpp>
#include <hybridattn/testing/fenced.hpp>
#include <hybridattn/testing/machine.hpp>
#include <hybridattn/testing/subject.hpp>

#include <functional>
#include <memory>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace testing::detail {
// AnyScalar stands for a model's scalar, AnyWide for the scalar of Wide tensors, which is never narrower than float.
struct AnyScalar {};
struct AnyWide {};
}  // namespace testing::detail
template <> struct WideOf<testing::detail::AnyScalar> {
  using type = testing::detail::AnyWide;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// A tensor whose elements have the type E, whatever the scalar is, such as sums in double or losses.
namespace detail {
template <class S, class E, int Rank> struct OfType;
template <class E, int Rank> struct OfType<Shapes, E, Rank> {
  using type = Shape<Rank>;
};
template <class T, class E, int Rank> struct OfType<In<T>, E, Rank> {
  using type = View<E const, Rank>;
};
template <class T, class E, int Rank> struct OfType<Out<T>, E, Rank> {
  using type = View<E, Rank>;
};
}  // namespace detail
template <class S, class E, int Rank> using OfType = typename detail::OfType<S, E, Rank>::type;

// Operation<Op> names an operation's groups, as a policy does, and says how to call the operation with them:
//
//   template <> struct Operation<Op> : PlainOperation {
//     Config, sizes()                                     its arguments on the host, and those that it is judged at
//     Inputs<S>,  inputs(config, sequences)               a shape whose extents are 0 makes an empty view
//     Outputs<S>, outputs(config, sequences)
//     forward<B, T>(backend, config, sequences, x, y)     calls On<Op, B>::forward
//     backward<B, T>(backend, config, sequences, x, y, d_y, d_x)
//   };
//
// A tensor whose first axis counts tokens has rows. With rows_stand_alone, no row depends on another one.
template <class Op> struct Operation;

struct PlainOperation {
  // Whether each row is a sequence of its own. Otherwise the operation works on sequences, as a policy does.
  static constexpr bool rows_stand_alone = true;
  // Whether an input is a table of the whole batch, so that no part of the batch can be judged by itself.
  template <class Config> static bool has_tables(Config const&) { return false; }
  // Results that may be in the memory of an argument. {"y", "x"} says that forward's y may be in x, {"d_x", "d_y"} that backward's d_x
  // may be in d_y, and {"d_x", "x"} that d_x may be in x.
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {}; }
  // Whether a result ("y" or "d_x") is computed from what its memory holds before, for example by adding to it.
  template <class Config> static bool starts_from(Config const&, std::string_view) { return false; }
  // Whether backward makes the gradient of an input, and whether it takes the gradient of an output. Whole numbers have no gradient.
  template <class Config> static bool has_gradient(Config const&, std::string_view) { return true; }
  template <class Config> static bool takes_gradient(Config const&, std::string_view) { return true; }
  // Sets the inputs that are not noise. Tables of the batch must not be drawn from `random`, so that they are the same for every seed.
  template <class Config> static void draw(Config const&, Sequences const&, Random&, HostGroup&) {}
  // Where backward takes a gradient of a result as a number of the host, returns the config with this number.
  template <class Config> static Config with_upstream(Config c, HostGroup const&) { return c; }
};

template <class Op>
concept HasOperation = requires { Operation<Op>::sizes(); };

namespace detail {

// A tensor of a group before it has memory.
struct Declared {
  std::string name;
  Element const* element;
  std::vector<Index> extents;
  RowsOf rows = RowsOf::other;
};
// Finds out what the first axis of each tensor counts, from its shapes for two sequences of five tokens and for three of seven.
inline std::vector<Declared> with_rows(std::vector<Declared> list, std::vector<Declared> const& few, std::vector<Declared> const& more) {
  for (std::size_t i = 0; i < list.size(); ++i) {
    auto const counts = [&](Index two, Index three) { return few[i].extents[0] == two && more[i].extents[0] == three; };
    list[i].rows = counts(10, 21) ? RowsOf::tokens : counts(2, 3) ? RowsOf::sequences : RowsOf::other;
  }
  return list;
}
// How a scalar and its wide type are in memory.
struct Elements {
  Element const *scalar, *wide;
};
template <class T> inline constexpr Elements elements_in{&element_of<T>, &element_of<wide_t<T>>};

struct Declare {
  std::vector<Declared>& list;
  Elements elements;
  template <class E, int Rank> void operator()(Path const& path, Shape<Rank> const& shape, View<E const, Rank> const&) const {
    Element const* element;
    if constexpr (std::is_same_v<E, AnyScalar>) element = elements.scalar;
    else if constexpr (std::is_same_v<E, AnyWide>) element = elements.wide;
    else element = &element_of<E>;
    list.push_back({path.str(), element, {shape.extent, shape.extent + Rank}});
  }
};
template <template <class> class G> std::vector<Declared> declared(G<Shapes> const& shapes, Elements elements) {
  std::vector<Declared> list;
  zip(Declare{list, elements}, shapes, G<In<AnyScalar>>{});
  return list;
}

template <class B> using Blocks = std::vector<FencedBlock<B>*>;
// Views of blocks, in the order of the group's fields.
template <class B> struct NextView {
  FencedBlock<B>* const* next;
  template <class E, int Rank> void operator()(Path const&, View<E, Rank>& view) { view = (*next++)->template view<E, Rank>(); }
};
template <class Group, class B> Group views(Blocks<B> const& blocks) {
  Group group;
  NextView<B> next{blocks.data()};
  zip(next, group);
  return group;
}

// Calls an operation with its config, in one scalar on one backend. The interface does not depend on the operation's type.
template <class B> struct Call {
  virtual ~Call() = default;
  virtual bool has_backward() const = 0;
  virtual void forward(B&, SequencesOn<B> const&, Blocks<B> const& x, Blocks<B> const& y) const = 0;
  virtual void backward(B&, SequencesOn<B> const&, HostGroup const& upstream, Blocks<B> const& x, Blocks<B> const& y, Blocks<B> const& d_y,
                        Blocks<B> const& d_x) const = 0;
};
template <class Op, class B, class T> struct CallOf final : Call<B> {
  using O = Operation<Op>;
  using Config = typename O::Config;
  template <class S> using Inputs = typename O::template Inputs<S>;
  template <class S> using Outputs = typename O::template Outputs<S>;
  static constexpr bool with_backward = requires(B& b, Config c, SequencesOn<B> s, Inputs<In<T>> x, Outputs<In<T>> y, Inputs<Out<T>> d_x) {
    O::template backward<B, T>(b, c, s, x, y, y, d_x);
  };
  Config config;

  explicit CallOf(Config c) : config(c) {}
  bool has_backward() const override { return with_backward; }
  void forward(B& backend, SequencesOn<B> const& s, Blocks<B> const& x, Blocks<B> const& y) const override {
    O::template forward<B, T>(backend, config, s, views<Inputs<In<T>>>(x), views<Outputs<Out<T>>>(y));
  }
  void backward([[maybe_unused]] B& backend, [[maybe_unused]] SequencesOn<B> const& s, [[maybe_unused]] HostGroup const& upstream,
                [[maybe_unused]] Blocks<B> const& x, [[maybe_unused]] Blocks<B> const& y, [[maybe_unused]] Blocks<B> const& d_y,
                [[maybe_unused]] Blocks<B> const& d_x) const override {
    if constexpr (with_backward)
      O::template backward<B, T>(backend, O::with_upstream(config, upstream), s, views<Inputs<In<T>>>(x), views<Outputs<In<T>>>(y),
                                 views<Outputs<In<T>>>(d_y), views<Inputs<Out<T>>>(d_x));
  }
};

// Some results are added to what their memory holds before. For a result of forward, the old values are one more input. For a gradient,
// they are the gradient of one more output, which is the input itself.
inline std::string before(std::string const& output) { return output + " before"; }
inline std::string passed_on(std::string const& input) { return input + " passed on"; }

// An operation as lists of tensors, without a type.
struct Description {
  std::vector<Declared> inputs, outputs;
  std::vector<std::pair<std::string_view, std::string_view>> in_place;
  std::function<bool(std::string const&)> starts_from, has_gradient;
};

// A tensor of zeros.
inline HostTensor host_tensor(Declared const& d, std::string name) {
  HostTensor tensor{std::move(name), d.rows, d.element->whole, d.extents, {}, d.element->eps};
  Index count = d.element->numbers;
  for (Index const extent : d.extents) count *= extent;
  if (d.element->numbers > 1) tensor.shape.push_back(d.element->numbers);
  tensor.values.resize(static_cast<std::size_t>(count));
  return tensor;
}

// Declared tensors in memory.
template <class B> struct Placed {
  std::vector<Declared> const& declared;
  std::vector<FencedBlock<B>> blocks;

  Placed(B& backend, std::vector<Declared> const& list, Surroundings const& around) : declared(list), blocks(list.size()) {
    for (std::size_t i = 0; i < blocks.size(); ++i)
      blocks[i].place(backend, *list[i].element, list[i].extents, around.spaced, {around.unwritten, around.fence});
  }
  void write(B& backend, HostGroup const& values) {
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].write(backend, values[i].values);
  }
  HostGroup read(B& backend, std::string& trespass) const {
    HostGroup group;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      HostTensor& tensor = group.emplace_back(host_tensor(declared[i], declared[i].name));
      blocks[i].read(backend, tensor, trespass);
    }
    return group;
  }
  Blocks<B> all() {
    Blocks<B> list;
    for (FencedBlock<B>& block : blocks) list.push_back(&block);
    return list;
  }
};

// One forward and backward.
template <class B> class OperationRun {
 public:
  OperationRun(B& backend, Description const& description, Call<B> const& call, Case const& x, Surroundings const& around)
      : backend_(backend), description_(description), call_(call), case_(x), around_(around), sequences_(backend, x.sequences),
        inputs_(backend, description.inputs, around), outputs_(backend, description.outputs, around) {}

  Result run() {
    inputs_.write(backend_, case_.inputs);
    start(outputs_, case_.inputs, "", before);
    forward();
    result_.outputs = outputs_.read(backend_, result_.trespass);
    pass_on();
    result_.gradients = no_gradients();
    if (call_.has_backward() && !case_.d_outputs.empty()) backward();
    note_overwritten(declared_part(case_.inputs, inputs_), inputs_.read(backend_, result_.trespass), result_.trespass);
    return std::move(result_);
  }

 private:
  void forward() {
    Blocks<B> arguments = inputs_.all();
    share(arguments, inputs_, case_.inputs, "", outputs_, "");
    measured([&] { call_.forward(backend_, sequences_, arguments, outputs_.all()); });
  }
  void backward() {
    Placed<B> d_outputs{backend_, description_.outputs, around_};
    d_outputs.write(backend_, case_.d_outputs);
    std::vector<Declared> const wanted = those_with_a_gradient();
    Placed<B> gradients{backend_, wanted, around_};
    start(gradients, case_.d_outputs, "d_", passed_on);
    Blocks<B> upstream = d_outputs.all(), arguments = inputs_.all();
    share(upstream, d_outputs, case_.d_outputs, "d_", gradients, "d_");
    share(arguments, inputs_, case_.inputs, "", gradients, "d_");
    measured([&] { call_.backward(backend_, sequences_, case_.d_outputs, arguments, outputs_.all(), upstream, gradients.all()); });
    result_.gradients = gradients.read(backend_, result_.trespass);
    note_overwritten(declared_part(case_.d_outputs, d_outputs), d_outputs.read(backend_, result_.trespass), result_.trespass);
  }

  // The inputs as gradients. An input without a gradient has extents of 0.
  std::vector<Declared> those_with_a_gradient() const {
    std::vector<Declared> list = description_.inputs;
    for (Declared& d : list)
      if (d.element->whole || !description_.has_gradient(d.name)) std::fill(d.extents.begin(), d.extents.end(), 0);
    return list;
  }
  HostGroup no_gradients() const {
    HostGroup group;
    for (Declared const& d : description_.inputs) group.emplace_back(host_tensor(d, d.name)).values.clear();
    return group;
  }
  // Writes old values to the results that start from them.
  void start(Placed<B>& results, HostGroup const& from, std::string const& prefix, std::string (*name)(std::string const&)) {
    for (std::size_t i = 0; i < results.blocks.size(); ++i)
      if (description_.starts_from(prefix + results.declared[i].name))
        if (HostTensor const* const values = from.find(name(results.declared[i].name))) results.blocks[i].write(backend_, values->values);
  }
  // For a run in place, writes an argument's values to the block of its result and passes this block as the argument too.
  void share(Blocks<B>& arguments, Placed<B> const& named, HostGroup const& values, std::string const& argument_prefix, Placed<B>& results,
             std::string const& result_prefix) {
    for (auto const& [result, argument] : description_.in_place)
      for (std::size_t r = 0; r < results.blocks.size(); ++r)
        for (std::size_t a = 0; a < arguments.size(); ++a)
          if (around_.in_place && !values[a].values.empty() && result == result_prefix + results.declared[r].name &&
              argument == argument_prefix + named.declared[a].name) {
            results.blocks[r].write(backend_, values[a].values);
            arguments[a] = &results.blocks[r];
          }
  }
  template <class F> void measured(F f) {
    auto const in_use = backend_.pool().in_use();
    backend_.pool().reset_peak();
    f();
    result_.scratch = std::max(result_.scratch, backend_.pool().peak() - in_use);
    result_.kept += static_cast<std::ptrdiff_t>(backend_.pool().in_use()) - static_cast<std::ptrdiff_t>(in_use);
  }
  void pass_on() {
    for (std::size_t i = 0; i < description_.inputs.size(); ++i)
      if (std::string const& name = description_.inputs[i].name; description_.starts_from("d_" + name))
        result_.outputs.emplace_back(case_.inputs[i]).name = passed_on(name);
  }
  static HostGroup declared_part(HostGroup const& group, Placed<B> const& placed) {
    return HostGroup(group.begin(), group.begin() + std::ssize(placed.blocks));
  }

  B& backend_;
  Description const& description_;
  Call<B> const& call_;
  Case const& case_;
  Surroundings const& around_;
  SequencesOn<B> sequences_;
  Placed<B> inputs_, outputs_;
  Result result_;
};

// The facts about an operation with its config that do not depend on the scalar.
struct Facts {
  virtual ~Facts() = default;
  virtual Description describe(Sequences const& s, Elements elements) const = 0;
  virtual void draw(Sequences const& s, Random& random, HostGroup& inputs) const = 0;
  virtual bool takes_gradient(std::string_view output) const = 0;
  virtual bool rows_stand_alone() const = 0;
  virtual bool has_tables() const = 0;
};
template <class Op> struct FactsOf final : Facts {
  using O = Operation<Op>;
  typename O::Config config;

  explicit FactsOf(typename O::Config c) : config(c) {}
  Description describe(Sequences const& s, Elements elements) const override {
    auto const declare = [&](auto const& shapes, auto const& few, auto const& more) {
      return with_rows(declared(shapes, elements), declared(few, elements), declared(more, elements));
    };
    Sequences const few = Sequences::equal(2, 5), more = Sequences::equal(3, 7);
    return {declare(O::inputs(config, s), O::inputs(config, few), O::inputs(config, more)),
            declare(O::outputs(config, s), O::outputs(config, few), O::outputs(config, more)), O::in_place(),
            [this](std::string const& result) { return O::starts_from(config, result); },
            [this](std::string const& input) { return O::has_gradient(config, input); }};
  }
  void draw(Sequences const& s, Random& random, HostGroup& inputs) const override { O::draw(config, s, random, inputs); }
  bool takes_gradient(std::string_view output) const override { return O::takes_gradient(config, output); }
  bool rows_stand_alone() const override { return O::rows_stand_alone; }
  bool has_tables() const override { return O::has_tables(config); }
};

class AnyOperation : public Subject {
 public:
  std::string name() const override { return name_; }
  double eps() const override { return eps_; }
  double tolerance() const override { return 1e-12; }
  std::vector<std::string> kinds() const override { return {"noise"}; }
  Sequences batch() const override { return facts_->rows_stand_alone() ? Sequences::equal(150, 1) : Subject::batch(); }
  Sequences small_batch() const override { return facts_->rows_stand_alone() ? Sequences::equal(40, 1) : Subject::small_batch(); }
  bool has_tables() const override { return facts_->has_tables(); }
  bool works_in_place() const override { return !describe(Sequences::equal(1, 1)).in_place.empty(); }
  bool has_states() const override {
    auto const inputs = describe(Sequences::equal(1, 1)).inputs;
    return std::any_of(inputs.begin(), inputs.end(), [](Declared const& d) { return d.name.starts_with("initial_") && d.extents[0] > 0; });
  }
  Case sample(std::string const&, Sequences const& s, std::uint64_t seed, bool carried) const override {
    Description const d = describe(s);
    Case x{s, tensors_of(d.inputs), tensors_of(d.outputs), carried};
    for (Declared const& output : d.outputs)
      if (d.starts_from(output.name)) x.inputs.push_back(host_tensor(output, before(output.name)));
    for (Declared const& input : d.inputs)
      if (d.starts_from("d_" + input.name)) x.d_outputs.push_back(host_tensor(input, passed_on(input.name)));
    Random random{Seed{seed}, "inputs"}, upstream{Seed{seed}, "upstream"};
    for (HostTensor& tensor : x.inputs)
      if (!tensor.whole) set_normal(tensor, random);
    facts_->draw(s, random, x.inputs);
    for (HostTensor& tensor : x.d_outputs)
      if (!tensor.whole && facts_->takes_gradient(tensor.name)) set_normal(tensor, upstream);
    for (std::size_t i = 0; i < d.outputs.size(); ++i)   // a loss has a gradient, its counts have none
      if (d.outputs[i].element->numbers > 1) std::fill(x.d_outputs[i].values.begin() + 1, x.d_outputs[i].values.end(), 0);
    round_inputs(x.inputs);
    round_inputs(x.d_outputs);
    return x;
  }

 protected:
  AnyOperation(std::string name, double eps, Elements elements, std::unique_ptr<Facts> facts)
      : facts_(std::move(facts)), elements_(elements), name_(std::move(name)), eps_(eps) {}
  Description describe(Sequences const& s) const { return facts_->describe(s, elements_); }
  template <class M> Result run_on(M& backend, Call<M> const& call, Elements elements, Case const& x, Surroundings const& around) const {
    Description const description = facts_->describe(x.sequences, elements);
    return OperationRun<M>{backend, description, call, x, around}.run();
  }

 private:
  static HostGroup tensors_of(std::vector<Declared> const& list) {
    HostGroup group;
    for (Declared const& d : list) group.push_back(host_tensor(d, d.name));
    return group;
  }

  std::unique_ptr<Facts> facts_;
  Elements elements_;
  std::string name_;
  double eps_;
};

// Any operation on one backend in one scalar.
template <class B, class T> class OperationIn : public AnyOperation {
 public:
  Result run(Case const& x, Surroundings const& around) const override {
    B backend = Machine<B>::make(around.threads);
    if (around.leftovers != Leftovers::none) run_here(backend, earlier(x, around.leftovers), around);
    return run_here(backend, x, around);
  }
  Result loops(Case const& x, HostGroup const&, bool in_double) const override {
    Cpu cpu{1};
    return in_double ? this->run_on(cpu, *in_double_, elements_in<double>, x, {}) : this->run_on(cpu, *on_cpu_, elements_in<T>, x, {});
  }
  Footprint footprint(Sequences const& s) const override {
    B backend = Machine<B>::make(1);
    Case const x = this->sample("noise", s, 1, true);
    Result const first = run_here(backend, x, {});
    auto const allocations = backend.pool().allocations();
    run_here(backend, x, {});
    return {0, 0, first.scratch, first.kept, backend.pool().allocations() - allocations};
  }

 protected:
  OperationIn(std::string const& name, std::unique_ptr<Facts> facts, std::unique_ptr<Call<B>> here, std::unique_ptr<Call<Cpu>> on_cpu,
              std::unique_ptr<Call<Cpu>> in_double)
      : AnyOperation(name + ", " + type_name<T>(), epsilon_of<T>, elements_in<T>, std::move(facts)), here_(std::move(here)),
        on_cpu_(std::move(on_cpu)), in_double_(std::move(in_double)) {}

 private:
  Result run_here(B& backend, Case const& x, Surroundings const& around) const {
    return this->run_on(backend, *here_, elements_in<T>, x, around);
  }

  std::unique_ptr<Call<B>> here_;
  std::unique_ptr<Call<Cpu>> on_cpu_, in_double_;
};

}  // namespace detail

// One operation on one backend in one scalar.
template <class Op, class B, class T> class OperationOn final : public detail::OperationIn<B, T> {
  template <class M, class U> using CallOf = detail::CallOf<Op, M, U>;
  using Config = typename Operation<Op>::Config;

 public:
  explicit OperationOn(Config const& c, std::string const& name = type_name<Op>())
      : detail::OperationIn<B, T>(
            name, std::unique_ptr<detail::Facts>(new detail::FactsOf<Op>(c)), std::unique_ptr<detail::Call<B>>(new CallOf<B, T>(c)),
            std::unique_ptr<detail::Call<Cpu>>(new CallOf<Cpu, T>(c)), std::unique_ptr<detail::Call<Cpu>>(new CallOf<Cpu, double>(c))) {}
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
