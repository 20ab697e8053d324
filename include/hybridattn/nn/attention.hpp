// An attention layer: x -> project -> prepare -> the policy -> finish -> w_o. Each input of the policy is one projection of x.
#ifndef HYBRIDATTN_NN_ATTENTION_HPP
#define HYBRIDATTN_NN_ATTENTION_HPP

#include <hybridattn/attention/policy.hpp>
#include <hybridattn/nn/initialization.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/ops/linear/linear.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <AttentionPolicy Policy> struct Attention {
  using Config = typename Policy::Config;
  using Prepare = typename Policy::Prepare;
  using Finish = typename Policy::Finish;
  static constexpr bool finishes = !std::is_same_v<Finish, NoStep>;

  template <class S> using Inputs = typename Policy::template Inputs<S>;
  template <class S> struct Params {
    Inputs<Matrix<S>> w;  // [H*D, C] or [H, C], one for each input
    Held<S, 2> w_gate;    // [H*D, C], or nothing without an output gate
    Held<S, 2> w_o;       // [C, H*D]
    typename Prepare::template Params<S> prepare;
    typename Finish::template Params<S> finish;
    HYBRIDATTN_FIELDS(w, w_gate, w_o, prepare, finish)
  };
  template <class S> struct Saved {
    Inputs<Narrow<S>> raw;  // the projections that Prepare makes something of; the others are inputs at once
    Inputs<S> inputs;
    typename Policy::template Outputs<S> outputs;
    Held<S, 3> z, finished;  // [N, H, D], or nothing
    typename Policy::template Saved<S> policy;
    State<S, 1> d_auxiliary_loss;  // [1], 0 unless it is written between the passes, or nothing
    HYBRIDATTN_FIELDS(raw, inputs, outputs, z, finished, policy, d_auxiliary_loss)
  };

  static Params<Shapes> params(Config const& c, Index model_dim) {
    auto const one_token = Sequences::equal(1, 1);
    Index const width = Policy::outputs(c, one_token).o.count();
    Params<Shapes> shapes{.w = {},
                          .w_gate = {Finish::gated ? width : 0, Finish::gated ? model_dim : 0},
                          .w_o = {model_dim, width},
                          .prepare = Prepare::params(c),
                          .finish = Finish::params(c)};
    zip([&](Path const&, auto const& input, auto& w) { w = {input.count(), model_dim}; }, Policy::inputs(c, one_token), shapes.w);
    return shapes;
  }
  // What a stage does not train has no gradient at all, not even a zero one.
  static Params<Shapes> gradients(Config const& c, Index model_dim, Stage stage) {
    auto shapes = params(c, model_dim);
    zip(
        [&](Path const& path, auto& shape) {
          if (!trains(stage, Policy::detached(path.name))) shape = {};
        },
        shapes);
    return shapes;
  }
  static Params<Starts> starts(Config const& c, Index model_dim, Initialization const& init) {
    Index const width = Policy::outputs(c, Sequences::equal(1, 1)).o.count();
    Params<Starts> result{
        .w = {}, .w_gate = init.linear(model_dim), .w_o = init.linear(width), .prepare = Prepare::starts(c), .finish = Finish::starts(c)};
    zip([&](Path const&, Initial& start) { start = init.linear(model_dim); }, result.w);
    return result;
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) {
    auto const outputs = Policy::outputs(c, s);
    Saved<Shapes> shapes{.raw = raw(c, s),
                         .inputs = Policy::inputs(c, s),
                         .outputs = outputs,
                         .z = {},
                         .finished = {},
                         .policy = Policy::saved(c, s),
                         .d_auxiliary_loss = {}};
    if constexpr (HasAuxiliaryLoss<Policy>) shapes.d_auxiliary_loss = outputs.auxiliary_loss;
    if constexpr (Finish::gated) shapes.z = outputs.o;
    if constexpr (finishes) shapes.finished = outputs.o;
    return shapes;
  }

  template <class B, class T>
  static Tensor<T, 2, B> forward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>>& saved) {
    static_assert(HasForward<Policy, B, T>,
                  "this policy has no forward on this backend: write On<Policy, Backend>::forward(Backend&, Config const&, "
                  "Sequences const&, Inputs<In<T>>, Outputs<Out<T>>, Saved<Out<T>>)");
    static_assert(HasBackward<Policy, B, T>,
                  "this policy has no backward on this backend: write On<Policy, Backend>::backward(Backend&, Config const&, "
                  "Sequences const&, Inputs<In<T>>, Outputs<In<T>>, Saved<In<T>>, Outputs<In<T>> d_outputs, Inputs<Out<T>> d_inputs)");
    saved = allocate<T>(backend, Attention::saved(c, s));
    if constexpr (HasAuxiliaryLoss<Policy>) On<Fill, B>::forward(backend, wide_t<T>(0), out(saved.d_auxiliary_loss));
    zip(
        [&](Path const& path, auto const& w, auto& raw, auto& input) {
          auto const made = Prepare::makes(path.name) ? as_rows(out(raw)) : as_rows(out(input));
          On<Linear, B>::forward(backend, x, w, made);
        },
        p.w, saved.raw, saved.inputs);
    if constexpr (!std::is_same_v<Prepare, NoStep>) Prepare::forward(backend, c, s, in_narrow<T>(saved.raw), p.prepare, out(saved.inputs));
    On<Policy, B>::forward(backend, c, s, in(saved.inputs), out(saved.outputs), out(saved.policy));
    if constexpr (Finish::gated) On<Linear, B>::forward(backend, x, p.w_gate, as_rows(out(saved.z)));
    if constexpr (finishes) Finish::forward(backend, c, in(saved.outputs.o), in(saved.z), p.finish, out(saved.finished));
    Tensor<T, 2, B> y{backend, x.shape};
    On<Linear, B>::forward(backend, as_rows(in(finished(saved))), p.w_o, out(y));
    return y;
  }

  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                  Saved<Owned<T, B>> saved, View<T const, 2> d_y, Params<Out<T>> const& d_p) {
    Tensor<T, 2, B> d_x{backend, x.shape};
    Tensor<T, 3, B> d_o{backend, saved.outputs.o.shape()};
    On<Linear, B>::backward(backend, as_rows(in(finished(saved))), p.w_o, d_y, as_rows(out(d_o)), d_p.w_o, Into::overwrite);
    if constexpr (finishes) {
      auto const d_finished = std::move(d_o);
      Tensor<T, 3, B> d_z{backend, saved.z.shape()};
      d_o = {backend, saved.outputs.o.shape()};
      Finish::backward(backend, c, in(saved.outputs.o), in(saved.z), p.finish, in(d_finished), out(d_o), out(d_z), d_p.finish);
      if constexpr (Finish::gated) On<Linear, B>::backward(backend, x, p.w_gate, as_rows(in(d_z)), out(d_x), d_p.w_gate, Into::overwrite);
    }
    project_backward<B, T>(backend, c, s, p, x, saved, &d_o, out(d_x), Finish::gated ? Into::add : Into::overwrite, d_p);
    return d_x;
  }
  // Of the auxiliary loss alone, to the parameters it trains; nothing reaches x.
  template <class B, class T>
  static void auxiliary_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>> saved, Params<Out<T>> const& d_p) {
    if constexpr (HasAuxiliaryLoss<Policy>) project_backward<B, T>(backend, c, s, p, x, saved, nullptr, View<T, 2>{}, Into::add, d_p);
  }

 private:
  static Inputs<Narrow<Shapes>> raw(Config const& c, Sequences const& s) {
    Inputs<Narrow<Shapes>> shapes{};
    zip(
        [](Path const& path, auto const& input, auto& raw) {
          if (Prepare::makes(path.name)) raw = input;
        },
        Policy::inputs(c, s), shapes);
    return shapes;
  }
  // Through the policy, Prepare and the projections. Without d_o only the auxiliary loss has a gradient. An input that is
  // detached is wanted where its matrix has a gradient.
  template <class B, class T>
  static void project_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                               Saved<Owned<T, B>> const& saved, Tensor<T, 3, B> const* d_o, View<T, 2> d_x, Into into,
                               Params<Out<T>> const& d_p) {
    Inputs<Owned<T, B>> d_inputs;
    Inputs<Narrow<Owned<T, B>>> d_raw;
    zip(
        [&](Path const& path, auto const& d_w, auto const& raw, auto const& input, auto& d_r, auto& d_input) {
          if (Policy::detached(path.name) ? d_w.empty() : d_o == nullptr) return;
          d_r = {backend, raw.shape()};
          d_input = {backend, input.shape()};
        },
        d_p.w, saved.raw, saved.inputs, d_raw, d_inputs);
    typename Policy::template Outputs<In<T>> d_outputs{};
    if (d_o != nullptr) d_outputs.o = in(*d_o);
    if constexpr (HasAuxiliaryLoss<Policy>) d_outputs.auxiliary_loss = in(saved.d_auxiliary_loss);
    On<Policy, B>::backward(backend, c, s, in(saved.inputs), in(saved.outputs), in(saved.policy), d_outputs, out(d_inputs));
    if constexpr (!std::is_same_v<Prepare, NoStep>)
      Prepare::backward(backend, c, s, in_narrow<T>(saved.raw), p.prepare, in(saved.inputs), in(d_inputs), out_narrow<T>(d_raw),
                        d_p.prepare);
    zip(
        [&](Path const& path, auto const& w, auto& d_w, auto const& d_made, auto const& d_input) {
          bool const detached = Policy::detached(path.name);
          if (detached ? d_w.empty() : d_o == nullptr) return;
          auto const d_projection = Prepare::makes(path.name) ? as_rows(in(d_made)) : as_rows(in(d_input));
          On<Linear, B>::backward(backend, x, w, d_projection, detached ? View<T, 2>{} : d_x, d_w, into);
          if (!detached) into = Into::add;
        },
        p.w, d_p.w, d_raw, d_inputs);
  }
  // `in` and `out` for a group whose role is composed.
  template <class T, class B> static Inputs<Narrow<In<T>>> in_narrow(Inputs<Narrow<Owned<T, B>>> const& raw) {
    Inputs<Narrow<In<T>>> views;
    zip(detail::ToIn{}, raw, views);
    return views;
  }
  template <class T, class B> static Inputs<Narrow<Out<T>>> out_narrow(Inputs<Narrow<Owned<T, B>>>& raw) {
    Inputs<Narrow<Out<T>>> views;
    zip(detail::ToOut{}, raw, views);
    return views;
  }
  static auto const& finished(auto const& saved) {
    if constexpr (finishes) return saved.finished;
    else return saved.outputs.o;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
