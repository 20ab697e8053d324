// A block, residual pre-norm: h = x + Attention(norm(x)); y = h + FeedForward(norm(h)).
#ifndef HYBRIDATTN_NN_BLOCK_HPP
#define HYBRIDATTN_NN_BLOCK_HPP

#include <hybridattn/nn/attention.hpp>
#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/ops/rms_norm/rms_norm.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// What all blocks of a model have in common.
struct BlockConfig {
  Index model_dim = 128;   // C
  RmsNorm::Options norm;
  FeedForwardConfig feed_forward;
  Initialization initialization;
  Stage stage = Stage::language_model;

  // With every 0 filled in; throws on numbers that no block can have.
  BlockConfig completed() const {
    check_at_least("model", "model_dim", model_dim, 1);
    check_positive("model", "norm.eps", norm.eps);
    initialization.check_numbers();
    BlockConfig c = *this;
    c.feed_forward = feed_forward.completed(model_dim);
    return c;
  }
};

template <AttentionPolicy P> struct Block {
  using Policy = P;
  using Mixer = Attention<P>;

  template <class S> struct Params {
    Wide<S, 1> attention_norm;  // [C]
    typename Mixer::template Params<S> attention;
    Wide<S, 1> feed_forward_norm;  // [C]
    FeedForward::Params<S> feed_forward;
    HYBRIDATTN_FIELDS(attention_norm, attention, feed_forward_norm, feed_forward)
  };
  template <class S> struct Saved {
    Held<S, 2> x, x_normed;  // [N, C]
    typename Mixer::template Saved<S> attention;
    Held<S, 2> h, h_normed;  // [N, C]
    FeedForward::Saved<S> feed_forward;
    HYBRIDATTN_FIELDS(x, x_normed, attention, h, h_normed, feed_forward)
  };

  static Params<Shapes> params(BlockConfig const& c, typename P::Config const& mixer, Index layer) {
    return {.attention_norm = {c.model_dim},
            .attention = Mixer::params(mixer, c.model_dim),
            .feed_forward_norm = {c.model_dim},
            .feed_forward = FeedForward::params(c.feed_forward, layer, c.model_dim)};
  }
  static Params<Shapes> gradients(BlockConfig const& c, typename P::Config const& mixer, Index layer) {
    auto shapes = c.stage == Stage::dense_warm_up ? Params<Shapes>{} : params(c, mixer, layer);
    shapes.attention = Mixer::gradients(mixer, c.model_dim, c.stage);
    return shapes;
  }
  static Params<Starts> starts(BlockConfig const& c, typename P::Config const& mixer) {
    auto const neutral = Initial::constant(c.norm.weight == NormWeight::plain ? 1 : 0);
    return {.attention_norm = neutral,
            .attention = Mixer::starts(mixer, c.model_dim, c.initialization),
            .feed_forward_norm = neutral,
            .feed_forward = FeedForward::starts(c.feed_forward, c.model_dim, c.initialization)};
  }
  static Saved<Shapes> saved(BlockConfig const& c, typename P::Config const& mixer, Index layer, Sequences const& s) {
    Shape<2> const x{s.tokens(), c.model_dim};
    return {.x = x,
            .x_normed = x,
            .attention = Mixer::saved(mixer, s),
            .h = x,
            .h_normed = x,
            .feed_forward = FeedForward::saved(c.feed_forward, layer, c.model_dim, s.tokens())};
  }

  // x moves into Saved.
  template <class B, class T>
  static Tensor<T, 2, B> forward(B& backend, BlockConfig const& c, typename P::Config const& mixer, Index layer, SequencesOn<B> const& s,
                                 Params<In<T>> const& p, Tensor<T, 2, B> x, Saved<Owned<T, B>>& saved) {
    saved.x = std::move(x);
    saved.x_normed = {backend, saved.x.shape()};
    On<RmsNorm, B>::forward(backend, c.norm, in(saved.x), p.attention_norm, out(saved.x_normed));
    saved.h = Mixer::forward(backend, mixer, s, p.attention, in(saved.x_normed), saved.attention);
    On<Add, B>::forward(backend, flat(in(saved.x)), flat(out(saved.h)));
    saved.h_normed = {backend, saved.h.shape()};
    On<RmsNorm, B>::forward(backend, c.norm, in(saved.h), p.feed_forward_norm, out(saved.h_normed));
    auto y = FeedForward::forward(backend, c.feed_forward, layer, p.feed_forward, in(saved.h_normed), saved.feed_forward);
    On<Add, B>::forward(backend, flat(in(saved.h)), flat(out(y)));
    return y;
  }

  // d_y becomes d_h, then d_x: what a residual branch gives is added to it.
  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, BlockConfig const& c, typename P::Config const& mixer, Index layer, SequencesOn<B> const& s,
                                  Params<In<T>> const& p, Saved<Owned<T, B>> saved, Tensor<T, 2, B> d_y, Params<Out<T>> const& d_p) {
    {
      auto const d_normed = FeedForward::backward(backend, c.feed_forward, layer, p.feed_forward, in(saved.h_normed),
                                                  std::move(saved.feed_forward), in(d_y), d_p.feed_forward);
      On<RmsNorm, B>::backward(backend, c.norm, in(saved.h), p.feed_forward_norm, in(d_normed), out(d_y), d_p.feed_forward_norm, Into::add);
    }
    auto const d_normed =
        Mixer::backward(backend, mixer, s, p.attention, in(saved.x_normed), std::move(saved.attention), in(d_y), d_p.attention);
    On<RmsNorm, B>::backward(backend, c.norm, in(saved.x), p.attention_norm, in(d_normed), out(d_y), d_p.attention_norm, Into::add);
    return d_y;
  }
  // Of the policy's auxiliary loss alone.
  template <class B, class T>
  static void auxiliary_backward(B& backend, typename P::Config const& mixer, SequencesOn<B> const& s, Params<In<T>> const& p,
                                 Saved<Owned<T, B>> saved, Params<Out<T>> const& d_p) {
    Mixer::auxiliary_backward(backend, mixer, s, p.attention, in(saved.x_normed), std::move(saved.attention), d_p.attention);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
