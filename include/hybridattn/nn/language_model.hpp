// tokens -> embedding -> Stack -> norm -> logits -> loss, and back. A model has only its configuration. The caller owns
// parameters, activations and gradients.
#ifndef HYBRIDATTN_NN_LANGUAGE_MODEL_HPP
#define HYBRIDATTN_NN_LANGUAGE_MODEL_HPP

#include <hybridattn/nn/balance_loss.hpp>
#include <hybridattn/nn/stack.hpp>
#include <hybridattn/nn/token_batch.hpp>
#include <hybridattn/ops/cross_entropy/cross_entropy.hpp>
#include <hybridattn/ops/embedding/embedding.hpp>

#include <array>
#include <span>

namespace hybridattn::inline HYBRIDATTN_ABI {

// For loops over the tensors of a model. Named, so that a layer in several models is visited by one instantiation.
namespace detail {
struct CountElements {
  Index count = 0;

  template <int Rank> [[gnu::noinline]] void operator()(Path const& path, Shape<Rank> shape) {
    try {
      count = size_sum(count, shape.count());
    } catch (Error const& error) {
      fail(path.str(), ": ", error.what());
    }
  }
};
template <class B> struct DrawFirstValues {
  B& backend;
  Seed seed;

  template <class T, int Rank> [[gnu::noinline]] void operator()(Path const& path, Tensor<T, Rank, B>& tensor, Initial const& start) const {
    Random random{seed, path.str()};
    std::vector<T> host;
    resize(host, tensor.shape().count(), "a parameter's first values");
    for (T& element : host) element = static_cast<T>(start.draw(random));
    upload(backend, host, tensor);
  }
};
}  // namespace detail

template <class S_> class LanguageModel {
 public:
  using Stack = S_;

  struct Config {
    Index vocab_size = 256;   // V
    Index model_dim = 128;    // C
    Index num_heads = 4;      // the default of every policy's heads
    FeedForwardConfig feed_forward = {};
    RmsNorm::Options norm = {};
    bool tie_embedding = false;   // the head is the embedding
    Initialization initialization = {};
    typename Stack::LayerConfigs layers = {};

    // The sizes of one policy of the stack: config.policy<GDN>().num_value_heads = 8.
    template <class Policy> auto& policy() { return layers.template get<Policy>().policy; }
    template <class Policy> auto const& policy() const { return layers.template get<Policy>().policy; }
    // The place of the norms in this policy's layers: config.norm_placement<Full>() = NormPlacement::after.
    template <class Policy> NormPlacement& norm_placement() { return layers.template get<Policy>().norm_placement; }
    template <class Policy> NormPlacement norm_placement() const { return layers.template get<Policy>().norm_placement; }
  };

  template <class S> struct Params {
    Held<S, 2> embedding;  // [V, C]
    typename Stack::template Params<S> blocks;
    Wide<S, 1> norm;       // [C]
    Held<S, 2> head;       // [V, C], empty when the head is the embedding
    HYBRIDATTN_FIELDS(embedding, blocks, norm, head)
  };
  template <class S> struct Saved {
    typename Stack::template Saved<S> blocks;
    Held<S, 2> x, x_normed;  // [N, C]
    HYBRIDATTN_FIELDS(blocks, x, x_normed)
  };
  // The losses of a batch, and the gradients of their sum.
  template <class T, class B> struct Gradients {
    Tensor<BatchLosses, 1, B> losses;  // [1]
    Params<Owned<T, B>> params;
    View<T, 1> all;                    // the block of memory with all gradients; empty in bf16
  };

  explicit LanguageModel(Config config = {}) : config_(std::move(config)) {
    check_at_least("model", "vocab_size", config_.vocab_size, 1);
    check_at_least("model", "num_heads", config_.num_heads, 1);
    check(config_.vocab_size <= largest_int32, "model: vocab_size ", config_.vocab_size, " is not allowed; it must be at most ",
          largest_int32, ", since a token is an int32");
    stack_ = Stack::completed({{config_.model_dim, config_.norm, config_.feed_forward, config_.initialization}, config_.layers},
                              config_.num_heads);
    gradients_ = shapes(Stack::gradients(stack_));
    byte_count(parameter_count(), sizeof(double));   // throws where the bytes are too many for any scalar
  }
  // The same model in another stage of training: the same parameters, other gradients.
  LanguageModel at(Stage stage) const {
    LanguageModel model = *this;
    model.stack_ = Stack::at(stack_, stage);
    model.gradients_ = model.shapes(Stack::gradients(model.stack_));
    if (stage == Stage::dense_warm_up) model.gradients_.embedding = {}, model.gradients_.norm = {}, model.gradients_.head = {};
    return model;
  }
  Stage stage() const { return stack_.block.stage; }
  Config const& config() const { return config_; }
  typename Stack::Config const& stack_config() const { return stack_; }

  Params<Shapes> params() const { return shapes(Stack::params(stack_)); }
  // The shapes of the gradients. Empty for parameters that the stage does not train.
  Params<Shapes> const& gradients() const { return gradients_; }
  // For each parameter, in order: whether the policies' auxiliary losses train it.
  std::vector<bool> detached() const {
    std::vector<bool> list;
    zip([&](Path const&, auto const& shape) { list.push_back(shape.count() > 0); }, at(Stage::dense_warm_up).gradients());
    return list;
  }
  Saved<Shapes> saved(Sequences const& s) const {
    Shape<2> const x{s.tokens(), config_.model_dim};
    return {.blocks = Stack::saved(stack_, s), .x = x, .x_normed = x};
  }
  // Throws Error, with the tensor's path, where the number of elements is too large.
  Index parameter_count() const {
    detail::CountElements elements;
    zip(elements, params());
    return elements.count;
  }

  // Each tensor has a generator of its own, seeded by the seed and the tensor's path. So two models give equal initial values to
  // tensors of equal path and shape.
  template <class T, class B> Params<Owned<T, B>> initialize(B& backend, Seed seed) const {
    Params<Starts> const starts{.embedding = config_.initialization.embedding(),
                                .blocks = Stack::starts(stack_),
                                .norm = Initial::constant(config_.norm.weight == NormWeight::plain ? 1 : 0),
                                .head = config_.initialization.linear(config_.model_dim)};
    auto params = allocate_together<T>(backend, this->params());
    zip(detail::DrawFirstValues<B>{backend, seed}, params, starts);
    return params;
  }

  // Returns the tensors for backward. logits() reads the last normed activations in them. Throws Error where a token or a target is
  // not in the vocabulary.
  template <class B, class T> Saved<Owned<T, B>> forward(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch) const {
    check(batch.sequences.tokens() > 0, "batch: it has no tokens; a batch holds at least 1");
    check(!batch.sequences.any_continue(), "batch: a sequence follows tokens of a cache; call extend() to continue from a cache");
    batch.token_range.check_tokens(config_.vocab_size);
    batch.target_range.check_targets(config_.vocab_size);
    auto const p = in(params);
    Saved<Owned<T, B>> saved;
    Tensor<T, 2, B> x{backend, {batch.sequences.tokens(), config_.model_dim}};
    On<Embedding, B>::forward(backend, in(batch.tokens), p.embedding, out(x));
    saved.x = Stack::forward(backend, stack_, batch.sequences, p.blocks, std::move(x), saved.blocks);
    saved.x_normed = {backend, saved.x.shape()};
    On<RmsNorm, B>::forward(backend, config_.norm, in(saved.x), p.norm, out(saved.x_normed));
    return saved;
  }

  template <class B, class Other> auto forward(B&, Other const&, TokenBatch<B> const&) const {
    static_assert(sizeof(Other) == 0, "forward reads parameters that own their memory: pass what initialize() returned");
    return Saved<Owned<float, B>>{};
  }

  // All logits [N, V] in one tensor, never narrower than float. Training does not use this function and never stores them.
  template <class B, class T>
  Tensor<wide_t<T>, 2, B> logits(B& backend, Params<Owned<T, B>> const& params, Saved<Owned<T, B>> const& saved) const {
    Tensor<wide_t<T>, 2, B> result{backend, {saved.x_normed.shape()[0], config_.vocab_size}};
    On<Linear, B>::forward(backend, in(saved.x_normed), head(in(params)), out(result));
    return result;
  }
  template <class B, class T> LossSum loss(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch) const {
    auto const saved = forward(backend, params, batch);
    Tensor<LossSum, 1, B> sum{backend, {1}};
    On<Fill, B>::forward(backend, LossSum{}, out(sum));
    On<CrossEntropy, B>::forward(backend, in(saved.x_normed), head(in(params)), in(batch.targets), out(sum));
    return download(backend, sum)[0];
  }

  // Loss and gradients of scale * (sum of the loss over counted tokens) + auxiliary_scale * (load balancing and the policies'
  // auxiliary losses), for the losses that the stage trains. Consumes `saved`. The scale [1] is on the machine.
  template <class B, class T>
  Gradients<T, B> backward(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch, Saved<Owned<T, B>>&& saved,
                           View<double const, 1> scale, double auxiliary_scale = 1) const {
    auto const p = in(params);
    Gradients<T, B> result{{backend, {1}}, {}, {}};
    result.params = allocate_together<T>(backend, gradients(), &result.all);
    auto const d_p = out(result.params);
    BatchLosses* const losses = out(result.losses).data;   // on the machine
    View<LossSum, 1> const loss{&losses->loss, {1}};
    On<Fill, B>::forward(backend, BatchLosses{}, out(result.losses));
    add_policy_losses<T>(backend, batch.sequences.tokens(), auxiliary_scale, saved.blocks, View<double, 1>{&losses->policy, {1}});
    if (stage() == Stage::dense_warm_up) {
      On<CrossEntropy, B>::forward(backend, in(saved.x_normed), head(p), in(batch.targets), loss);
      Stack::auxiliary_backward(backend, stack_, batch.sequences, p.blocks, std::move(saved.blocks), d_p.blocks);
      return result;
    }
    add_balance_loss(backend, auxiliary_scale, saved.blocks, View<double, 1>{&losses->balance, {1}});
    View<T, 2> const d_head = config_.tie_embedding ? d_p.embedding : d_p.head;
    Tensor<T, 2, B> d_normed{backend, saved.x_normed.shape()};
    On<CrossEntropy, B>::backward(backend, in(saved.x_normed), head(p), in(batch.targets), scale, out(d_normed), d_head, loss);
    Tensor<T, 2, B> d_x{backend, saved.x.shape()};
    On<RmsNorm, B>::backward(backend, config_.norm, in(saved.x), p.norm, in(d_normed), out(d_x), d_p.norm, Into::overwrite);
    d_x = Stack::backward(backend, stack_, batch.sequences, p.blocks, std::move(saved.blocks), std::move(d_x), d_p.blocks);
    On<Embedding, B>::backward(backend, in(batch.tokens), in(d_x), d_p.embedding, config_.tie_embedding ? Into::add : Into::overwrite);
    return result;
  }

  // The same with a scale on the host.
  template <class B, class T>
  Gradients<T, B> backward(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch, Saved<Owned<T, B>>&& saved,
                           double scale, double auxiliary_scale = 1) const {
    Tensor<double, 1, B> there{backend, {1}};
    On<Fill, B>::forward(backend, scale, out(there));
    return backward(backend, params, batch, std::move(saved), in(there), auxiliary_scale);
  }

  template <class B, class T>
  auto backward(B&, Params<Owned<T, B>> const&, TokenBatch<B> const&, Saved<Owned<T, B>>&, double, double = 1) const {
    static_assert(sizeof(T) == 0, "backward consumes what forward saved: pass std::move(saved)");
    return Gradients<T, B>{};
  }

 private:
  Params<Shapes> shapes(typename Stack::template Params<Shapes> blocks) const {
    Shape<2> const table{config_.vocab_size, config_.model_dim};
    return {
        .embedding = table, .blocks = std::move(blocks), .norm = {config_.model_dim}, .head = config_.tie_embedding ? Shape<2>{} : table};
  }
  template <class T> View<T const, 2> head(Params<In<T>> const& p) const { return config_.tie_embedding ? p.embedding : p.head; }

  // Adds the load-balancing loss of all mixture layers to a sum; writes its part of each router's gradient into Saved.
  template <class B, class T>
  void add_balance_loss(B& backend, double scale, typename Stack::template Saved<Owned<T, B>>& blocks, View<double, 1> sum) const {
    auto const& c = stack_.block.feed_forward;
    if (c.balance_coefficient == 0) return;
    std::array<FeedForward::Saved<Owned<T, B>>*, Stack::depth> mixtures;
    std::size_t count = 0;
    blocks.for_each_layer(
        [&](int i, auto& block) {
          if (c.is_mixture(i)) mixtures[count++] = &block.feed_forward;
        },
        blocks);
    balance_loss<B, T>(backend, c, scale, std::span(mixtures).first(count), sum);
  }
  // Adds the weighted auxiliary losses of all policies to a sum; writes the gradient of each weighted loss into Saved.
  template <class T, class B>
  void add_policy_losses(B& backend, Index tokens, double scale, typename Stack::template Saved<Owned<T, B>>& blocks,
                         View<double, 1> sum) const {
    blocks.for_each(
        [&](auto block, std::size_t, auto& kept) {
          using Block = typename decltype(block)::type;
          if constexpr (HasAuxiliaryLoss<typename Block::Policy>) {
            if (!kept.attention.outputs.auxiliary_loss) return;
            double const weight = Block::Policy::auxiliary_weight(Stack::template layer_config<Block>(stack_).policy, tokens);
            On<Fill, B>::forward(backend, static_cast<wide_t<T>>(scale * weight), out(kept.attention.d_auxiliary_loss));
            On<AddWeighted, B>::forward(backend, weight, in(kept.attention.outputs.auxiliary_loss), sum);
          }
        },
        blocks);
  }

  Config config_;
  typename Stack::Config stack_;
  Params<Shapes> gradients_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
