// An attention layer: x -> project -> prepare -> the policy -> finish -> w_o. Decoding is the same forward with a cache.
#ifndef HYBRIDATTN_NN_ATTENTION_HPP
#define HYBRIDATTN_NN_ATTENTION_HPP

#include <hybridattn/attention/policy.hpp>
#include <hybridattn/nn/initialization.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/ops/linear/linear.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Takes the place of a policy's cache where sequences are whole.
struct NoCache {};

template <AttentionPolicy Policy> struct Attention {
  using Config = typename Policy::Config;
  using Prepare = typename Policy::Prepare;
  using Finish = typename Policy::Finish;
  static constexpr bool finishes = !std::is_same_v<Finish, NoStep>;

  template <class S> using Inputs = typename Policy::template Inputs<S>;
  template <class S> using Projections = typename ProjectionsOf<Policy>::template Group<S>;
  template <class S> struct Params {
    Projections<Matrix<S>> w;  // [H*D, C] or [H, C], one for each projection
    Held<S, 2> w_gate;    // [H*D, C], empty without an output gate
    Held<S, 2> w_o;       // [C, H*D]
    typename Prepare::template Params<S> prepare;
    typename Finish::template Params<S> finish;
    HYBRIDATTN_FIELDS(w, w_gate, w_o, prepare, finish)
  };
  template <class S> struct Saved {
    Projections<S> raw;  // the projections that Prepare changes; other projections are inputs and lie there
    Inputs<S> inputs;
    typename Policy::template Outputs<S> outputs;
    Held<S, 3> z, finished;  // [N, H, D]; z is empty without a gate, finished without a Finish
    typename Policy::template Saved<S> policy;
    Wide<S, 1> d_auxiliary_loss;  // [1], 0 or what the model writes between the passes; empty without an auxiliary loss
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
    zip([&](Path const&, auto const& projection, auto& w) { w = {projection.count(), model_dim}; },
        ProjectionsOf<Policy>::shapes(c, one_token), shapes.w);
    return shapes;
  }
  // The gradients' shapes. A parameter that the stage does not train has an empty shape: its gradient is not computed.
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

  // x [N, C] -> y [N, C]. With a cache, the tokens follow those in the cache, and backward cannot be called.
  template <class B, class T, class Cache = NoCache>
  static Tensor<T, 2, B> forward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>>& saved, Cache const& cache = {}) {
    constexpr bool decodes = !std::is_same_v<Cache, NoCache>;
    static_assert(decodes || HasForward<Policy, B, T>,
                  "this policy has no forward on this backend: write On<Policy, Backend>::forward(Backend&, Config const&, "
                  "Sequences const&, Inputs<In<T>>, Outputs<Out<T>>, Saved<Out<T>>)");
    static_assert(decodes || HasBackward<Policy, B, T>,
                  "this policy has no backward on this backend: write On<Policy, Backend>::backward(Backend&, Config const&, "
                  "Sequences const&, Inputs<In<T>>, Outputs<In<T>>, Saved<In<T>>, Outputs<In<T>> d_outputs, Inputs<Out<T>> d_inputs)");
    auto shapes = Attention::saved(c, s);
    if constexpr (decodes) shapes.policy = {};   // only backward reads these tensors
    saved = allocate<T>(backend, shapes);
    for_each_projection(
        [&](Path const&, auto const& projection, auto const& w) { On<Linear, B>::forward(backend, x, w, as_rows(projection)); },
        out(saved.raw), out(saved.inputs), p.w);
    prepare<T>(backend, c, s, in(saved.raw), p.prepare, cache, out(saved.inputs));
    if constexpr (decodes) {
      On<Policy, B>::extend(backend, c, s, in(saved.inputs), cache, out(saved.outputs));
    } else {
      if constexpr (HasAuxiliaryLoss<Policy>) On<Fill, B>::forward(backend, wide_t<T>(0), out(saved.d_auxiliary_loss));
      On<Policy, B>::forward(backend, c, s, in(saved.inputs), out(saved.outputs), out(saved.policy));
    }
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
  // Backward of the auxiliary loss alone, for the parameters that it trains. x gets no gradient.
  template <class B, class T>
  static void auxiliary_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>> saved, Params<Out<T>> const& d_p) {
    if constexpr (HasAuxiliaryLoss<Policy>) project_backward<B, T>(backend, c, s, p, x, saved, nullptr, View<T, 2>{}, Into::add, d_p);
  }

 private:
  static Projections<Shapes> raw(Config const& c, Sequences const& s) {
    auto shapes = ProjectionsOf<Policy>::shapes(c, s);
    if constexpr (!NamesProjections<Policy>)
      zip(
          [](Path const& path, auto& projection) {
            if (!Prepare::makes(path.name)) projection = {};
          },
          shapes);
    return shapes;
  }
  // Calls f(path, projection, ...) for each projection or its gradient, with its leaves in other groups. A projection that Prepare does
  // not change lies in the place of its input.
  template <class F, class Raw, class Places, class... Groups>
  static void for_each_projection(F f, Raw const& raw, Places const& inputs, Groups const&... groups) {
    if constexpr (NamesProjections<Policy>) {
      zip(f, raw, groups...);
    } else {
      zip(
          [&](Path const& path, auto const& projection, auto const& input, auto const&... leaves) {
            if (Prepare::makes(path.name)) f(path, projection, leaves...);
            else f(path, input, leaves...);
          },
          raw, inputs, groups...);
    }
  }
  template <class T, class B, class Cache>
  static void prepare(B& backend, Config const& c, SequencesOn<B> const& s, Projections<In<T>> const& raw,
                      typename Prepare::template Params<In<T>> const& p, [[maybe_unused]] Cache const& cache,
                      Inputs<Out<T>> const& inputs) {
    if constexpr (!std::is_same_v<Cache, NoCache> && requires { Prepare::extend(backend, c, s, raw, p, cache, inputs); }) {
      Prepare::extend(backend, c, s, raw, p, cache, inputs);
    } else {
      static_assert(std::is_same_v<Cache, NoCache> || !NamesExtend<Prepare>,
                    "Prepare::extend takes the arguments of Prepare::forward, with Cache<Out<T>> before the inputs");
      if constexpr (!std::is_same_v<Prepare, NoStep>) Prepare::forward(backend, c, s, raw, p, inputs);
    }
  }
  // Backward of the policy, Prepare and the projections. Without d_o it computes the gradients of the auxiliary loss only. A detached
  // projection has a gradient where the stage trains the projection's matrix.
  template <class B, class T>
  static void project_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                               Saved<Owned<T, B>> const& saved, Tensor<T, 3, B> const* d_o, View<T, 2> d_x, Into into,
                               Params<Out<T>> const& d_p) {
    bool trains_detached = false;
    if constexpr (HasAuxiliaryLoss<Policy>) {
      auto const find = [&](Path const& path, auto const& d_w) { trains_detached |= Policy::detached(path.name) && !d_w.empty(); };
      zip(find, d_p.w);
      zip(find, d_p.prepare);
    }
    auto const has_gradient = [&](Path const& path) { return Policy::detached(path.name) ? trains_detached : d_o != nullptr; };
    auto const allocate_gradients = [&](Path const& path, auto const& tensor, auto& gradient) {
      if (has_gradient(path)) gradient = {backend, tensor.shape()};
    };
    Inputs<Owned<T, B>> d_inputs;
    Projections<Owned<T, B>> d_raw;
    zip(allocate_gradients, saved.raw, d_raw);
    zip(allocate_gradients, saved.inputs, d_inputs);
    typename Policy::template Outputs<In<T>> d_outputs{};
    if (d_o != nullptr) d_outputs.o = in(*d_o);
    if constexpr (HasAuxiliaryLoss<Policy>) d_outputs.auxiliary_loss = in(saved.d_auxiliary_loss);
    On<Policy, B>::backward(backend, c, s, in(saved.inputs), in(saved.outputs), in(saved.policy), d_outputs, out(d_inputs));
    if constexpr (!std::is_same_v<Prepare, NoStep>)
      Prepare::backward(backend, c, s, in(saved.raw), p.prepare, in(saved.inputs), in(d_inputs), out(d_raw), d_p.prepare);
    for_each_projection(
        [&](Path const& path, auto const& d_projection, auto const& w, auto const& d_w) {
          if (!has_gradient(path)) return;
          bool const detached = Policy::detached(path.name);
          On<Linear, B>::backward(backend, x, w, as_rows(d_projection), detached ? View<T, 2>{} : d_x, d_w, into);
          if (!detached) into = Into::add;
        },
        in(d_raw), in(d_inputs), p.w, d_p.w);
    if (into == Into::overwrite && !d_x.empty()) On<Fill, B>::forward(backend, T(0), flat(d_x));   // every projection is detached
  }
  static auto const& finished(auto const& saved) {
    if constexpr (finishes) return saved.finished;
    else return saved.outputs.o;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
