// What every attention policy says about itself, and what it may leave to these defaults.
//
// A policy P declares
//   P::Config                                   its sizes, as values; 0 stands for a default
//   P::complete(config, model_dim, num_heads)   the config with every 0 filled in; throws Error on sizes that do not fit
//   P::Inputs<S>,  P::inputs(config, sequences)   what the equations read
//   P::Outputs<S>, P::outputs(config, sequences)  what they make: o [N, H, D] first
//   P::Saved<S>,   P::saved(config, sequences)    what backward must remember besides inputs and outputs
//   On<P, Backend>                              forward and backward, see backend.hpp
// and, to decode, declares too
//   P::Cache<S>,  P::cache(config, batch, capacity)   all that later tokens of `batch` sequences of at most `capacity` tokens
//                                               need of earlier ones, with what Prepare needs; the first axis counts sequences
//   On<P, Backend>::extend(backend, config, sequences, x, cache, y)
//                                               y.o of tokens that follow the sequence[i].past tokens that stand in the cache,
//                                               any number of each sequence, 0 included; then they stand there too. What the
//                                               cache holds of a sequence with past 0 is never read. Nothing else is written.
// A layer projects x to each input (x w^T), and P::Prepare changes some of them. A policy whose inputs are not projections of x names
// what is, and its Prepare makes the inputs of them:
//   P::Projections<S>, P::projections(config, sequences)   tensors of tokens, each with a matrix of its own
// and may have an auxiliary loss: Outputs::auxiliary_loss [1], which trains the inputs that P::detached names, and nothing else.
// A view that is not there is not wanted: backward without d_y.o is that of the other outputs alone.
// `sequences` is a SequencesOn<Backend>: a policy whose kernels read no table of it on the machine takes a Sequences const&.
// N is the number of tokens of all sequences together; tensors are [N, H, D], which is [B, T, H, D] with B and T as one axis.
#ifndef HYBRIDATTN_ATTENTION_POLICY_HPP
#define HYBRIDATTN_ATTENTION_POLICY_HPP

#include <hybridattn/core/allowed.hpp>
#include <hybridattn/tensor/initial.hpp>
#include <hybridattn/tensor/roles.hpp>
#include <hybridattn/tensor/sequences_on.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// A step around the policy that does nothing, with no parameters: its tensors are used as they are.
// A Prepare has, besides this, forward(backend, config, sequences, raw, params, inputs) and
// backward(backend, config, sequences, raw, params, inputs, d_inputs, d_raw, d_params), where raw are the projections; a Finish has
// forward(backend, config, o, z, params, y) and backward(backend, config, o, z, params, d_y, d_o, d_z, d_params), where z is
// the gate's projection of x, if it is gated. Backwards overwrite. A Prepare that looks at earlier tokens has for decoding
// extend(backend, config, sequences, raw, params, cache, inputs), where its part of the cache is read, then brought up to date.
struct NoStep {
  static constexpr bool gated = false;
  template <class S> using Params = Nothing<S>;
  template <class Config> static Params<Shapes> params(Config const&) { return {}; }
  template <class Config> static Params<Starts> starts(Config const&) { return {}; }
  // Inputs that the step makes from the projection of their name; the others are that projection. Asked where P has no Projections.
  static constexpr bool makes(std::string_view) { return false; }
};

// What a step trains. A policy that computes something else in another stage has a `Stage stage` in its Config.
enum class Stage {
  language_model,  // all that the model's loss reaches; auxiliary losses are not computed, what they train stays as it is
  dense_warm_up,   // only what the auxiliary losses train, everything else is frozen; a sparse policy attends to every key
  sparse           // both, each by its own loss
};
inline constexpr bool trains(Stage stage, bool detached) {
  return detached ? stage != Stage::language_model : stage != Stage::dense_warm_up;
}

struct PolicyDefaults {
  static constexpr std::string_view name = "a policy without a name";   // in tables and checkpoints
  using Prepare = NoStep;   // from the projections to Inputs: convolution, norms, rotary, gates
  using Finish = NoStep;    // from o and the gate's projection to what the output matrix reads
  // Inputs, projections, and parameters of Prepare, that only the auxiliary loss trains; their gradient stops before x.
  static constexpr bool detached(std::string_view) { return false; }
  // What a batch's auxiliary loss counts in training.
  template <class Config> static double auxiliary_weight(Config const&, [[maybe_unused]] Index tokens) { return 1; }
};

template <class P>
concept NamesProjections = requires(typename P::Config c, Sequences const& s) { P::projections(c, s); };
// The projections of P's layer, as a group over roles, and their shapes.
template <class P> struct ProjectionsOf {
  template <class S> using Group = typename P::template Inputs<Narrow<S>>;
  static Group<Shapes> shapes(typename P::Config const& c, Sequences const& s) {
    Group<Shapes> narrow{};
    zip([](Path const&, auto const& input, auto& projection) { projection = input; }, P::inputs(c, s), narrow);
    return narrow;
  }
};
template <NamesProjections P> struct ProjectionsOf<P> {
  template <class S> using Group = typename P::template Projections<S>;
  static Group<Shapes> shapes(typename P::Config const& c, Sequences const& s) { return P::projections(c, s); }
};

template <class P>
concept HasAuxiliaryLoss = requires(typename P::template Outputs<Shapes> y) { y.auxiliary_loss; };
template <class P>
concept AttentionPolicy = requires(typename P::Config c, Sequences const& s, Index n) {
  { P::complete(c, n, n) } -> std::same_as<typename P::Config>;
  { P::inputs(c, s) } -> std::same_as<typename P::template Inputs<Shapes>>;
  { P::outputs(c, s) } -> std::same_as<typename P::template Outputs<Shapes>>;
  { P::saved(c, s) } -> std::same_as<typename P::template Saved<Shapes>>;
  typename P::Prepare;
  typename P::Finish;
};

template <class P, class B, class T>
concept HasForward =
    requires(B& b, typename P::Config c, SequencesOn<B> const& s, typename P::template Inputs<In<T>> x,
             typename P::template Outputs<Out<T>> y, typename P::template Saved<Out<T>> saved) { On<P, B>::forward(b, c, s, x, y, saved); };
template <class P, class B, class T>
concept HasBackward =
    requires(B& b, typename P::Config c, SequencesOn<B> const& s, typename P::template Inputs<In<T>> x,
             typename P::template Outputs<In<T>> y, typename P::template Saved<In<T>> saved, typename P::template Outputs<In<T>> d_y,
             typename P::template Inputs<Out<T>> d_x) { On<P, B>::backward(b, c, s, x, y, saved, d_y, d_x); };
template <class P>
concept HasCache = requires(typename P::Config c, Index n) {
  { P::cache(c, n, n) } -> std::same_as<typename P::template Cache<Shapes>>;
};
template <class P, class B, class T>
concept HasExtend = HasCache<P> && requires(B& b, typename P::Config c, SequencesOn<B> const& s, typename P::template Inputs<In<T>> x,
                                            typename P::template Cache<Out<T>> cache,
                                            typename P::template Outputs<Out<T>> y) { On<P, B>::extend(b, c, s, x, cache, y); };
// Whether a step has an extend, whatever its arguments: a second one makes the name ambiguous. No final class can be asked.
struct OtherExtend {
  void extend();
};
template <class Step> struct WithOtherExtend : Step, OtherExtend {};
template <class Step>
concept NamesExtend = !std::is_final_v<Step> && !requires { &WithOtherExtend<Step>::extend; };
template <class P, class B, class T>
concept Decodes = AttentionPolicy<P> && HasExtend<P, B, T>;
template <class P, class B, class T>
concept ImplementedOn = AttentionPolicy<P> && HasForward<P, B, T> && HasBackward<P, B, T>;

// head_dim and head counts of a config, from a model's defaults; shared by policies whose heads split the width.
inline Index default_head_dim(Index head_dim, Index model_dim, Index num_heads) {
  if (head_dim != 0) return head_dim;
  check(num_heads > 0 && model_dim > 0 && model_dim % num_heads == 0, "model_dim ", model_dim, " is not a multiple of num_heads ",
        num_heads, "; set head_dim, or a num_heads that divides it");
  return model_dim / num_heads;
}
// A size that is left at 0 has a default.
inline void check_size(char const* policy, char const* name, Index size) {
  check_at_least(policy, name, size, 0, ", where 0 stands for the default");
}
inline void check_groups(char const* policy, Index heads, Index kv_heads) {
  check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, policy, ": ", heads, " heads in groups over ", kv_heads,
        " key/value heads; the first must be a positive multiple of the second");
}

// Before anything is written: a cache of `batch` sequences with room for `capacity` tokens of each must take these.
inline void check_fits(Sequences const& s, Index batch, Index capacity) {
  check(s.count() == batch, "cache: tokens of ", s.count(), " sequences, but it was made for ", batch);
  for (Index i = 0; i < batch; ++i) {
    auto const [start, length, past] = s[static_cast<std::size_t>(i)];
    check(past + length <= capacity, "cache: sequence ", i, " would have ", past, " + ", length, " tokens, but its capacity is ", capacity);
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
