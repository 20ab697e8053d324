// The step before full attention in a layer: norm and rotary on queries and keys.
#ifndef HYBRIDATTN_ATTENTION_FULL_STEPS_HPP
#define HYBRIDATTN_ATTENTION_FULL_STEPS_HPP

#include <hybridattn/attention/full/types.hpp>
#include <hybridattn/attention/heads.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::full {

template <class S> struct PrepareParams {
  Wide<S, 1> q_norm, k_norm;  // [D], empty without qk_norm
  HYBRIDATTN_FIELDS(q_norm, k_norm)
};

template <FullOptions O> struct Prepare {
  template <class S> using Params = PrepareParams<S>;

  static constexpr bool changes = O.qk_norm != QkNorm::none || O.rotary_percent > 0;
  static constexpr bool makes(std::string_view input) { return changes && input != "v"; }

  static Params<Shapes> params(Config const& c) {
    Shape<1> const weight{O.qk_norm == QkNorm::none ? 0 : c.head_dim};
    return {.q_norm = weight, .k_norm = weight};
  }
  static Params<Starts> starts(Config const& c) { return {.q_norm = norm(c).start(), .k_norm = norm(c).start()}; }

  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<Out<T>> x) {
    if constexpr (changes) {
      auto const turn = rotation<T>(backend, c, s);
      norm(c).forward(backend, turn, raw.q, p.q_norm, x.q);
      norm(c).forward(backend, turn, raw.k, p.k_norm, x.k);
    }
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<In<T>>,
                       Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    if constexpr (changes) {
      auto const turn = rotation<T>(backend, c, s);
      norm(c).backward(backend, turn, raw.q, p.q_norm, d_x.q, d_raw.q, d_p.q_norm);
      norm(c).backward(backend, turn, raw.k, p.k_norm, d_x.k, d_raw.k, d_p.k_norm);
    }
  }

 private:
  static HeadNorm norm(Config const& c) { return {O.qk_norm, c.norm_eps}; }
  template <class T, class B> static Rotation<T, B> rotation(B& backend, Config const& c, SequencesOn<B> const& s) {
    return {backend, s, c.head_dim, O.rotary_percent, O.rotary, c.rope_theta};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif
