// The step before sparse attention in a layer: norm and rotary on queries and keys, and those of the indexer.
#ifndef HYBRIDATTN_ATTENTION_DSA_STEPS_HPP
#define HYBRIDATTN_ATTENTION_DSA_STEPS_HPP

#include <hybridattn/attention/dsa/types.hpp>
#include <hybridattn/attention/heads.hpp>
#include <hybridattn/ops/layer_norm/layer_norm.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class S> struct PrepareParams {
  Wide<S, 1> q_norm, k_norm;                  // [D], empty without qk_norm
  Wide<S, 1> index_norm_weight, index_norm_bias;  // [DI], empty without index_norm
  HYBRIDATTN_FIELDS(q_norm, k_norm, index_norm_weight, index_norm_bias)
};

template <SparseOptions O> struct Prepare {
  template <class S> using Params = PrepareParams<S>;

  static constexpr bool changes = O.qk_norm != QkNorm::none || O.rotary_percent > 0;
  static constexpr bool makes(std::string_view input) {
    if (input == "q" || input == "k") return changes;
    if (input == "index_q") return O.index_rotary_percent > 0;
    return input == "index_k" && (O.index_rotary_percent > 0 || O.index_norm);
  }

  static Params<Shapes> params(Config const& c) {
    Shape<1> const weight{O.qk_norm == QkNorm::none ? 0 : c.head_dim}, index_weight{O.index_norm ? c.index_dim : 0};
    return {.q_norm = weight, .k_norm = weight, .index_norm_weight = index_weight, .index_norm_bias = index_weight};
  }
  static Params<Starts> starts(Config const& c) {
    return {.q_norm = norm(c).start(),
            .k_norm = norm(c).start(),
            .index_norm_weight = Initial::constant(1),
            .index_norm_bias = Initial::constant(0)};
  }

  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<Out<T>> x) {
    if constexpr (changes) {
      Rotation<T, B> const turn{backend, s, c.head_dim, O.rotary_percent, O.rotary, c.rope_theta};
      norm(c).forward(backend, turn, raw.q, p.q_norm, x.q);
      norm(c).forward(backend, turn, raw.k, p.k_norm, x.k);
    }
    View<T const, 2> index_k = raw.index_k;
    if constexpr (O.index_norm) {
      On<LayerNorm, B>::forward(backend, c.norm_eps, raw.index_k, p.index_norm_weight, p.index_norm_bias, x.index_k);
      index_k = x.index_k;
    }
    if constexpr (O.index_rotary_percent > 0) {
      Rotation<T, B> const turn{backend, s, c.index_dim, O.index_rotary_percent, Rotary::half_split, c.rope_theta};
      turn.forward(backend, raw.index_q, x.index_q);
      turn.forward(backend, one_head(index_k), one_head(x.index_k));
    }
  }
  // Computes the gradients that are not empty views: d_raw.q and d_raw.k, those of the indexer, or both.
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<In<T>>,
                       Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    if constexpr (changes) {
      if (!d_raw.q.empty()) {
        Rotation<T, B> const turn{backend, s, c.head_dim, O.rotary_percent, O.rotary, c.rope_theta};
        norm(c).backward(backend, turn, raw.q, p.q_norm, d_x.q, d_raw.q, d_p.q_norm);
        norm(c).backward(backend, turn, raw.k, p.k_norm, d_x.k, d_raw.k, d_p.k_norm);
      }
    }
    if constexpr (O.index_rotary_percent > 0 || O.index_norm) {
      if (!d_raw.index_k.empty()) index_backward(backend, c, s, raw, p, d_x, d_raw, d_p);
    }
  }

 private:
  // Backward of the rotary, then of the norm, as in HeadNorm.
  template <class B, class T>
  static void index_backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p,
                             Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    [[maybe_unused]] Tensor<T, 2, B> turned;
    View<T const, 2> d_normed = d_x.index_k;
    if constexpr (O.index_rotary_percent > 0) {
      Rotation<T, B> const turn{backend, s, c.index_dim, O.index_rotary_percent, Rotary::half_split, c.rope_theta};
      if constexpr (O.index_norm) turned = {backend, d_x.index_k.shape};
      View<T, 2> const d_index_k = O.index_norm ? out(turned) : d_raw.index_k;
      turn.backward(backend, d_x.index_q, d_raw.index_q);
      turn.backward(backend, one_head(d_normed), one_head(d_index_k));
      d_normed = d_index_k;
    }
    if constexpr (O.index_norm)
      On<LayerNorm, B>::backward(backend, c.norm_eps, raw.index_k, p.index_norm_weight, d_normed, d_raw.index_k, d_p.index_norm_weight,
                                 d_p.index_norm_bias);
  }
  static HeadNorm norm(Config const& c) { return {O.qk_norm, c.norm_eps}; }
  template <class T> static View<T, 3> one_head(View<T, 2> x) { return {x.data, {x.extent(0), 1, x.extent(1)}}; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
