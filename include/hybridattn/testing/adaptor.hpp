// Makes the Subject of the laws from a policy on a backend in a scalar. Only this template is compiled for each such triple.
#ifndef HYBRIDATTN_TESTING_ADAPTOR_HPP
#define HYBRIDATTN_TESTING_ADAPTOR_HPP

#include <hybridattn/tensor/in_float.hpp>
#include <hybridattn/testing/any_policy.hpp>
#include <hybridattn/testing/fenced.hpp>
#include <hybridattn/testing/machine.hpp>
#include <hybridattn/testing/traits.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

template <int Rank> bool counts(Shape<Rank> const& shape, Index count) {
  if constexpr (Rank == 0) return false;
  else return shape[0] == count;
}

// Functions for zip. They are named types and not lambdas, so that equal groups share their instantiations.
template <class B> struct Place {
  B& backend;
  bool spaced;
  Unwritten unwritten;
  void operator()(Path const&, auto const& shape, auto& tensor) const { tensor.place(backend, shape, spaced, unwritten); }
};
template <class B> struct Write {
  B& backend;
  HostGroup const& values;
  void operator()(Path const& path, auto& tensor) const {
    if (HostTensor const* const found = values.find(path.str())) tensor.write(backend, found->values);
  }
};
template <class B> struct Read {
  B& backend;
  HostGroup& values;
  std::string& trespass;
  void operator()(Path const& path, auto& tensor) const { tensor.read(backend, values.at(path.str()), trespass); }
};
struct ToView {
  void operator()(Path const&, auto& tensor, auto& view) const { view = tensor.view(); }
};

}  // namespace detail

template <class P, class B, class T> class Adaptor : public AnyPolicy {
  static_assert(ImplementedOn<P, B, T>, "a policy is judged where it has both a forward and a backward");
  using Config = typename P::Config;
  template <class S> using Inputs = typename P::template Inputs<S>;
  template <class S> using Outputs = typename P::template Outputs<S>;
  template <class S> using Saved = typename P::template Saved<S>;

 public:
  explicit Adaptor(Config config, std::string name = type_name<P>()) : config_(P::complete(config, 32, 2)), name_(std::move(name)) {}

  std::string name() const override { return name_ + ", " + type_name<T>(); }
  double eps() const override { return epsilon_of<T>; }
  double tolerance() const override { return Reference<P>::tolerance; }
  std::vector<std::string> kinds() const override { return Samples<P>::kinds(); }
  bool saved_is_linear() const override { return Samples<P>::saved_is_linear; }
  bool overflows_like_loops() const override { return Samples<P>::overflows_like_loops; }
  bool detached(std::string_view input) const override { return P::detached(input); }
  bool by_head(std::string_view input) const override { return Samples<P>::by_head(input); }
  bool has_states() const override {
    HostGroup const group = empty_group(Samples<P>::inputs(config_, Sequences::equal(1, 1)), inputs_of);
    return std::any_of(group.begin(), group.end(), [](HostTensor const& x) { return x.name.starts_with("initial_"); });
  }

  Case sample(std::string const& kind, Sequences const& s, std::uint64_t seed, bool carried) const override {
    Case x{s, empty_group(input_shapes(s, carried), inputs_of), empty_group(output_shapes(s, carried), outputs_of), carried};
    Random random{Seed{seed}, kind}, upstream{Seed{seed}, "upstream"};
    Samples<P>::draw(kind, random, x.inputs);
    for (HostTensor& tensor : x.d_outputs) set_normal(tensor, upstream);
    round_inputs(x.inputs);
    round_inputs(x.d_outputs);
    return x;
  }

  Result run(Case const& x, Surroundings const& around) const override {
    B backend = Machine<B>::make(around.threads);
    if (around.leftovers != Leftovers::none) run_on<T>(backend, earlier(x, around.leftovers), around, {}, kernel());
    return run_on<T>(backend, x, around, {}, kernel());
  }
  Result loops(Case const& x, HostGroup const& chosen, bool in_double) const override {
    Cpu cpu{1};
    if (in_double) return run_on<double>(cpu, x, {}, chosen, Loops{});
    return run_on<T>(cpu, x, {}, chosen, Loops{});
  }

  std::string wrong_choice(Case const& x, HostGroup const& saved) const override {
    if constexpr (requires { &Choices<P>::wrong; }) {
      Cpu cpu{1};
      Inputs<FencedRole<double, Cpu>> inputs;
      Saved<FencedRole<double, Cpu>> choices;
      fill(cpu, input_shapes(x.sequences, x.carried), inputs, x.inputs);
      fill(cpu, P::saved(config_, x.sequences), choices, saved);
      return Choices<P>::wrong(config_, x.sequences, views<Inputs, In<double>>(inputs), views<Saved, In<double>>(choices),
                               epsilon_of<wide_t<T>>);
    }
    return {};
  }

  Footprint footprint(Sequences const& s) const override {
    B backend = Machine<B>::make(1);
    Case const x = sample(kinds().front(), s, 1, true);
    Result const first = run_on<T>(backend, x, {}, {}, kernel());
    auto const allocations = backend.pool().allocations();
    run_on<T>(backend, x, {}, {}, kernel());
    auto const later = backend.pool().allocations() - allocations, before = backend.pool().in_use();
    [[maybe_unused]] auto const saved = allocate<T>(backend, P::saved(config_, s));
    return {bytes<T>(P::saved(config_, s)), backend.pool().in_use() - before, first.scratch, first.kept, later};
  }

  bool decodes() const override { return Decodes<P, B, T>; }
  Decoded decode([[maybe_unused]] Case const& x, [[maybe_unused]] Calls const& calls,
                 [[maybe_unused]] Surroundings const& around) const override {
    if constexpr (Decodes<P, B, T>) {
      B backend = Machine<B>::make(around.threads);
      if (around.leftovers != Leftovers::none) decode_on(backend, earlier(x, around.leftovers), calls, around);
      return decode_on(backend, x, calls, around);
    } else {
      fail(name(), " does not decode");
    }
  }

 private:
  struct Kernel {
    template <class... Args> static void forward(B& backend, Args const&... args) { On<P, B>::forward(backend, args...); }
    template <class... Args> static void backward(B& backend, Args const&... args) { On<P, B>::backward(backend, args...); }
  };
  struct Loops {
    // Loops on tensors in bf16 compute in float too, and round what they write.
    template <class... Args> static void forward(Cpu& cpu, Args const&... args) {
      in_float(cpu, [](auto const&... floats) { Reference<P>::forward(floats...); }, args...);
    }
    template <class... Args> static void backward(Cpu& cpu, Args const&... args) {
      in_float(cpu, [](auto const&... floats) { Reference<P>::backward(floats...); }, args...);
    }
  };
  static Kernel kernel() { return {}; }

  auto input_shapes(Sequences const& s, bool carried) const { return carried ? Samples<P>::inputs(config_, s) : P::inputs(config_, s); }
  auto output_shapes(Sequences const& s, bool carried) const { return carried ? Samples<P>::outputs(config_, s) : P::outputs(config_, s); }

  static constexpr auto inputs_of = [](Config const& c, Sequences const& s) { return Samples<P>::inputs(c, s); };
  static constexpr auto outputs_of = [](Config const& c, Sequences const& s) { return Samples<P>::outputs(c, s); };
  static constexpr auto saved_of = [](Config const& c, Sequences const& s) { return P::saved(c, s); };

  // Tensors of the given shapes, all values 0. What a first axis counts follows from its extents in two batches of other sizes.
  template <class G, class ShapesOf> HostGroup empty_group(G const& shapes, ShapesOf shapes_of) const {
    HostGroup group;
    auto const few = shapes_of(config_, Sequences::equal(2, 5)), more = shapes_of(config_, Sequences::equal(3, 7));
    typename Whole32<G>::type const types{};
    zip(
        [&](Path const& path, auto const& shape, auto const& a, auto const& b, auto const& view) {
          HostTensor& tensor = group.emplace_back();
          tensor.name = path.str();
          tensor.rows = detail::counts(a, 10) && detail::counts(b, 21) ? RowsOf::tokens
                        : detail::counts(a, 2) && detail::counts(b, 3) ? RowsOf::sequences
                                                                       : RowsOf::other;
          tensor.whole = std::is_integral_v<std::remove_cvref_t<decltype(*view.data)>>;
          tensor.eps = epsilon_of<std::remove_cvref_t<decltype(*view.data)>>;
          tensor.values.resize(static_cast<std::size_t>(shape.count()));
          for (Index extent : shape.extent) tensor.shape.push_back(extent);
        },
        shapes, few, more, types);
    return group;
  }
  template <class G> struct Whole32;
  template <template <class> class G> struct Whole32<G<Shapes>> {
    using type = G<In<T>>;
  };

  template <template <class> class G, class S, class Tensors> static G<S> views(Tensors& tensors) {
    G<S> result;
    zip(detail::ToView{}, tensors, result);
    return result;
  }
  template <class M, class G, class Tensors>
  static void fill(M& backend, G const& shapes, Tensors& tensors, HostGroup const& values, Surroundings const& around = {}) {
    zip(detail::Place<M>{backend, around.spaced, {around.unwritten, around.fence}}, shapes, tensors);
    zip(detail::Write<M>{backend, values}, tensors);
  }
  template <class M, class Tensors> static HostGroup values(M& backend, Tensors& tensors, HostGroup group, std::string& trespass) {
    zip(detail::Read<M>{backend, group, trespass}, tensors);
    return group;
  }

  // Runs forward and backward of Which, the kernel or the loops, in the scalar U on the backend M.
  template <class U, class M, class Which>
  Result run_on(M& backend, Case const& x, Surroundings const& around, HostGroup const& chosen, Which) const {
    using Role = FencedRole<U, M>;
    SequencesOn<M> const s{backend, x.sequences};
    auto const in_shapes = input_shapes(s, x.carried);
    auto const out_shapes = output_shapes(s, x.carried);
    auto const saved_shapes = P::saved(config_, s);
    Inputs<Role> inputs, gradients;
    Outputs<Role> outputs, d_outputs;
    Saved<Role> saved;
    bool const has_backward = !x.d_outputs.empty();
    fill(backend, in_shapes, inputs, x.inputs, around);
    fill(backend, out_shapes, outputs, {}, around);
    if (has_backward) {
      fill(backend, in_shapes, gradients, {}, around);
      fill(backend, out_shapes, d_outputs, x.d_outputs, around);
    }
    fill(backend, saved_shapes, saved, chosen, {.unwritten = around.unwritten, .fence = around.fence});  // a layer keeps these in one piece

    Result result;
    auto const before = backend.pool().in_use();
    backend.pool().reset_peak();
    auto const read = views<Inputs, In<U>>(inputs);
    Which::forward(backend, config_, s, read, views<Outputs, Out<U>>(outputs), views<Saved, Out<U>>(saved));
    if (has_backward)
      Which::backward(backend, config_, s, read, views<Outputs, In<U>>(outputs), views<Saved, In<U>>(saved),
                      views<Outputs, In<U>>(d_outputs), views<Inputs, Out<U>>(gradients));
    result.scratch = backend.pool().peak() - before;
    result.kept = static_cast<std::ptrdiff_t>(backend.pool().in_use()) - static_cast<std::ptrdiff_t>(before);

    result.outputs = values(backend, outputs, empty_group(out_shapes, outputs_of), result.trespass);
    result.saved = values(backend, saved, empty_group(saved_shapes, saved_of), result.trespass);
    detail::note_overwritten(x.inputs, values(backend, inputs, empty_group(in_shapes, inputs_of), result.trespass), result.trespass);
    if (!has_backward) return result;
    result.gradients = values(backend, gradients, empty_group(in_shapes, inputs_of), result.trespass);
    detail::note_overwritten(x.d_outputs, values(backend, d_outputs, empty_group(out_shapes, outputs_of), result.trespass),
                             result.trespass);
    return result;
  }

  Decoded decode_on(B& backend, Case const& x, Calls const& calls, Surroundings const& around) const {
    auto const cache_of = [&](Config const& c, Sequences const& s) {
      return P::cache(c, s.count(), std::max<Index>(1, x.sequences.longest()));
    };
    typename P::template Cache<FencedRole<T, B>> cache;
    fill(backend, cache_of(config_, x.sequences), cache, {}, {.unwritten = around.unwritten, .fence = around.fence});
    Decoded result;
    result.outputs = empty_group(output_shapes(x.sequences, false), outputs_of);
    for (HostTensor& tensor : result.outputs)
      if (tensor.rows != RowsOf::tokens) tensor.values.clear();
    auto const before = backend.pool().in_use();
    std::size_t allocations = 0;
    std::vector<Index> past(x.sequences.size());
    for (std::size_t call = 0; call < calls.size(); ++call) {
      if (call <= 2) allocations = backend.pool().allocations();
      extend(backend, x, {backend, Sequences::continuing(past, calls[call])}, around, cache, result);
      for (std::size_t i = 0; i < past.size(); ++i) past[i] += calls[call][i];
    }
    result.later_allocations = backend.pool().allocations() - allocations;
    result.kept = static_cast<std::ptrdiff_t>(backend.pool().in_use()) - static_cast<std::ptrdiff_t>(before);
    result.cache = values(backend, cache, empty_group(cache_of(config_, x.sequences), cache_of), result.trespass);
    return result;
  }
  // Makes one call and copies its outputs to their places in result.outputs.
  template <class Cache>
  void extend(B& backend, Case const& x, SequencesOn<B> const& s, Surroundings const& around, Cache& cache, Decoded& result) const {
    std::vector<Part> parts;
    for (std::size_t i = 0; i < s.size(); ++i) parts.push_back({static_cast<Index>(i), s[i].past, s[i].past + s[i].length});
    Inputs<FencedRole<T, B>> inputs;
    Outputs<FencedRole<T, B>> outputs;
    fill(backend, input_shapes(s, false), inputs, detail::rows_of(x.inputs, x.sequences, parts), around);
    fill(backend, output_shapes(s, false), outputs, {}, around);
    On<P, B>::extend(backend, config_, s, views<Inputs, In<T>>(inputs), views<P::template Cache, Out<T>>(cache),
                     views<Outputs, Out<T>>(outputs));
    HostGroup const part = values(backend, outputs, empty_group(output_shapes(s, false), outputs_of), result.trespass);
    values(backend, inputs, empty_group(input_shapes(s, false), inputs_of), result.trespass);
    for (std::size_t tensor = 0; tensor < part.size(); ++tensor) {
      HostTensor& whole = result.outputs[tensor];
      if (whole.rows != RowsOf::tokens) continue;
      for (std::size_t i = 0; i < s.size(); ++i)
        std::copy_n(part[tensor].row(s[i].start), s[i].length * whole.row_size(), whole.row(x.sequences[i].start + s[i].past));
    }
  }

  Config config_;
  std::string name_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
