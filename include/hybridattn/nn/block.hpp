// A block: two residual branches, each with a norm.
//   before:  h = x + Attention(norm(x))   y = h + FeedForward(norm(h))
//   after:   h = x + norm(Attention(x))   y = h + norm(FeedForward(h))
#ifndef HYBRIDATTN_NN_BLOCK_HPP
#define HYBRIDATTN_NN_BLOCK_HPP

#include <hybridattn/nn/attention.hpp>
#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/ops/rms_norm/rms_norm.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// The config that all blocks of a model share.
struct BlockConfig {
  Index model_dim = 128;   // C
  RmsNorm::Options norm;
  FeedForwardConfig feed_forward;
  Initialization initialization;
  Stage stage = Stage::language_model;

  // Fills in every 0. Throws Error on numbers that are not allowed.
  BlockConfig completed() const {
    check_at_least("model", "model_dim", model_dim, 1);
    check_positive("model", "norm.eps", norm.eps);
    initialization.check_numbers();
    BlockConfig c = *this;
    c.feed_forward = feed_forward.completed(model_dim);
    return c;
  }
};

// The place of a residual branch's norm: before or after the branch's attention or feed-forward layer.
enum class NormPlacement { before, after };

// The config of one policy's layers.
template <AttentionPolicy P> struct LayerConfig {
  typename P::Config policy = {};
  NormPlacement norm_placement = NormPlacement::before;
};

template <AttentionPolicy P> struct Block {
  using Policy = P;
  using Layer = Attention<P>;
  using Config = LayerConfig<P>;

  template <class S> struct Params {
    Wide<S, 1> attention_norm;  // [C]
    typename Layer::template Params<S> attention;
    Wide<S, 1> feed_forward_norm;  // [C]
    FeedForward::Params<S> feed_forward;
    HYBRIDATTN_FIELDS(attention_norm, attention, feed_forward_norm, feed_forward)
  };
  // [N, C] each: inputs of the norms, and outputs of norms that the next layer reads.
  template <class S> struct Saved {
    Held<S, 2> x, x_normed;  // x_normed is empty where norms come after
    typename Layer::template Saved<S> attention;
    Held<S, 2> attended, h, h_normed;  // attended is empty where norms come before, h_normed where they come after
    FeedForward::Saved<S> feed_forward;
    Held<S, 2> fed;  // empty where norms come before
    HYBRIDATTN_FIELDS(x, x_normed, attention, attended, h, h_normed, feed_forward, fed)
  };

  static Params<Shapes> params(BlockConfig const& c, Config const& own, Index layer) {
    return {.attention_norm = {c.model_dim},
            .attention = Layer::params(own.policy, c.model_dim),
            .feed_forward_norm = {c.model_dim},
            .feed_forward = FeedForward::params(c.feed_forward, layer, c.model_dim)};
  }
  static Params<Shapes> gradients(BlockConfig const& c, Config const& own, Index layer) {
    auto shapes = c.stage == Stage::dense_warm_up ? Params<Shapes>{} : params(c, own, layer);
    shapes.attention = Layer::gradients(own.policy, c.model_dim, c.stage);
    return shapes;
  }
  static Params<Starts> starts(BlockConfig const& c, Config const& own) {
    auto const neutral = Initial::constant(c.norm.weight == NormWeight::plain ? 1 : 0);
    return {.attention_norm = neutral,
            .attention = Layer::starts(own.policy, c.model_dim, c.initialization),
            .feed_forward_norm = neutral,
            .feed_forward = FeedForward::starts(c.feed_forward, c.model_dim, c.initialization)};
  }
  static Saved<Shapes> saved(BlockConfig const& c, Config const& own, Index layer, Sequences const& s) {
    bool const before = own.norm_placement == NormPlacement::before;
    Shape<2> const x{s.tokens(), c.model_dim}, normed = before ? x : Shape<2>{}, made = before ? Shape<2>{} : x;
    return {.x = x,
            .x_normed = normed,
            .attention = Layer::saved(own.policy, s),
            .attended = made,
            .h = x,
            .h_normed = normed,
            .feed_forward = FeedForward::saved(c.feed_forward, layer, c.model_dim, s.tokens()),
            .fed = made};
  }

  // x [N, C] -> y [N, C]. x is moved into saved. With a cache, see Attention::forward.
  template <class B, class T, class Cache = NoCache>
  static Tensor<T, 2, B> forward(B& backend, BlockConfig const& c, Config const& own, Index layer, SequencesOn<B> const& s,
                                 Params<In<T>> const& p, Tensor<T, 2, B> x, Saved<Owned<T, B>>& saved, Cache const& cache = {}) {
    bool const before = own.norm_placement == NormPlacement::before;
    saved.x = std::move(x);
    if (before) saved.x_normed = normed(backend, c, saved.x, p.attention_norm);
    saved.h = Layer::forward(backend, own.policy, s, p.attention, in(before ? saved.x_normed : saved.x), saved.attention, cache);
    if (!before) {
      saved.attended = std::move(saved.h);
      saved.h = normed(backend, c, saved.attended, p.attention_norm);
    }
    On<Add, B>::forward(backend, flat(in(saved.x)), flat(out(saved.h)));
    if constexpr (!std::is_same_v<Cache, NoCache>)   // frees memory: long prompts need it below
      saved.x_normed = {}, saved.attention = {}, saved.attended = {};

    if (before) saved.h_normed = normed(backend, c, saved.h, p.feed_forward_norm);
    auto y =
        FeedForward::forward(backend, c.feed_forward, layer, p.feed_forward, in(before ? saved.h_normed : saved.h), saved.feed_forward);
    if (!before) {
      saved.fed = std::move(y);
      y = normed(backend, c, saved.fed, p.feed_forward_norm);
    }
    On<Add, B>::forward(backend, flat(in(saved.h)), flat(out(y)));
    return y;
  }

  // Returns d_x [N, C], in the memory of d_y: each residual branch adds its gradient.
  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, BlockConfig const& c, Config const& own, Index layer, SequencesOn<B> const& s,
                                  Params<In<T>> const& p, Saved<Owned<T, B>> saved, Tensor<T, 2, B> d_y, Params<Out<T>> const& d_p) {
    bool const before = own.norm_placement == NormPlacement::before;
    auto const feed_forward = [&](View<T const, 2> d_fed) {
      return FeedForward::backward(backend, c.feed_forward, layer, p.feed_forward, in(before ? saved.h_normed : saved.h),
                                   std::move(saved.feed_forward), d_fed, d_p.feed_forward);
    };
    auto const attention = [&](View<T const, 2> d_attended) {
      return Layer::backward(backend, own.policy, s, p.attention, in(before ? saved.x_normed : saved.x), std::move(saved.attention),
                             d_attended, d_p.attention);
    };
    if (before) {
      On<RmsNorm, B>::backward(backend, c.norm, in(saved.h), p.feed_forward_norm, in(feed_forward(in(d_y))), out(d_y),
                               d_p.feed_forward_norm, Into::add);
      On<RmsNorm, B>::backward(backend, c.norm, in(saved.x), p.attention_norm, in(attention(in(d_y))), out(d_y), d_p.attention_norm,
                               Into::add);
      return d_y;
    }
    Tensor<T, 2, B> d_made{backend, d_y.shape()};
    On<RmsNorm, B>::backward(backend, c.norm, in(saved.fed), p.feed_forward_norm, in(d_y), out(d_made), d_p.feed_forward_norm,
                             Into::overwrite);
    On<Add, B>::forward(backend, flat(in(feed_forward(in(d_made)))), flat(out(d_y)));
    On<RmsNorm, B>::backward(backend, c.norm, in(saved.attended), p.attention_norm, in(d_y), out(d_made), d_p.attention_norm,
                             Into::overwrite);
    On<Add, B>::forward(backend, flat(in(attention(in(d_made)))), flat(out(d_y)));
    return d_y;
  }
  // Backward of the policy's auxiliary loss alone.
  template <class B, class T>
  static void auxiliary_backward(B& backend, Config const& own, SequencesOn<B> const& s, Params<In<T>> const& p, Saved<Owned<T, B>> saved,
                                 Params<Out<T>> const& d_p) {
    bool const before = own.norm_placement == NormPlacement::before;
    Layer::auxiliary_backward(backend, own.policy, s, p.attention, in(before ? saved.x_normed : saved.x), std::move(saved.attention),
                              d_p.attention);
  }

 private:
  template <class B, class T>
  static Tensor<T, 2, B> normed(B& backend, BlockConfig const& c, Tensor<T, 2, B> const& x, Wide<In<T>, 1> w) {
    Tensor<T, 2, B> y{backend, x.shape()};
    On<RmsNorm, B>::forward(backend, c.norm, in(x), w, out(y));
    return y;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
