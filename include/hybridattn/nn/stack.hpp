// A Stack is a list of policies. Its parameters, saved tensors and gradients are lists with one element for each layer.
#ifndef HYBRIDATTN_NN_STACK_HPP
#define HYBRIDATTN_NN_STACK_HPP

#include <hybridattn/nn/block.hpp>
#include <hybridattn/nn/layers.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <AttentionPolicy... Policies> struct Stack {
  static_assert(sizeof...(Policies) > 0, "a Stack has at least one layer: Stack<GDN, Full>");
  using Blocks = Plan<Block<Policies>...>;
  static constexpr std::size_t depth = sizeof...(Policies);

  template <class S> struct OfRole {
    template <class Block> using Params = typename Block::template Params<S>;
    template <class Block> using Saved = typename Block::template Saved<S>;
  };
  template <class S> struct Params : Layers<Blocks, OfRole<S>::template Params> {};
  template <class S> struct Saved : Layers<Blocks, OfRole<S>::template Saved> {};

  // Each policy once.
  using Kinds = Distinct<Policies...>;
  // The config of each policy's layers, found by type: layers.get<GDN>().policy.
  using LayerConfigs = ByType<LayerConfig, Kinds>;
  struct Config {
    BlockConfig block;
    LayerConfigs layers;
  };
  // Fills in every 0 from the model's width and heads. Throws Error on sizes that do not fit.
  static Config completed(Config c, Index num_heads) {
    c.block = c.block.completed();
    complete(Kinds{}, c, num_heads);
    return at(c, c.block.stage);
  }

  // The config in another stage of training.
  static Config at(Config c, Stage stage) {
    c.block.stage = stage;
    set_stage(Kinds{}, c, stage);
    return c;
  }

  static Params<Shapes> params(Config const& c) {
    return filled<Params<Shapes>>(
        c, [&](auto block, auto const& own, Index layer) { return decltype(block)::type::params(c.block, own, layer); });
  }
  static Params<Shapes> gradients(Config const& c) {
    return filled<Params<Shapes>>(
        c, [&](auto block, auto const& own, Index layer) { return decltype(block)::type::gradients(c.block, own, layer); });
  }
  static Params<Starts> starts(Config const& c) {
    return filled<Params<Starts>>(c, [&](auto block, auto const& own, Index) { return decltype(block)::type::starts(c.block, own); });
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) {
    return filled<Saved<Shapes>>(
        c, [&](auto block, auto const& own, Index layer) { return decltype(block)::type::saved(c.block, own, layer, s); });
  }

  template <class B, class T>
  static Tensor<T, 2, B> forward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params, Tensor<T, 2, B> x,
                                 Saved<Owned<T, B>>& saved) {
    params.for_each(
        [&](auto block, std::size_t layer, auto& p, auto& kept) {
          using Block = typename decltype(block)::type;
          x = Block::forward(backend, c.block, layer_config<Block>(c), static_cast<Index>(layer), s, p, std::move(x), kept);
        },
        params, saved);
    return x;
  }
  // Forward of tokens that follow those in the caches, one cache for each layer. Saves no tensors for backward.
  template <class B, class T, class Caches>
  static Tensor<T, 2, B> extend(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params, Tensor<T, 2, B> x,
                                Caches const& caches) {
    params.for_each(
        [&](auto block, std::size_t layer, auto& p, auto& cache) {
          using Block = typename decltype(block)::type;
          typename Block::template Saved<Owned<T, B>> kept;
          x = Block::forward(backend, c.block, layer_config<Block>(c), static_cast<Index>(layer), s, p, std::move(x), kept, cache);
        },
        params, caches);
    return x;
  }
  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params,
                                  Saved<Owned<T, B>> saved, Tensor<T, 2, B> d_y, Params<Out<T>> const& d_params) {
    params.for_each_reversed(
        [&](auto block, std::size_t layer, auto& p, auto& kept, auto& d_p) {
          using Block = typename decltype(block)::type;
          d_y = Block::backward(backend, c.block, layer_config<Block>(c), static_cast<Index>(layer), s, p, std::move(kept), std::move(d_y),
                                d_p);
        },
        params, saved, d_params);
    return d_y;
  }

  // Backward of the policies' auxiliary losses alone. No gradient passes from one layer to another.
  template <class B, class T>
  static void auxiliary_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params,
                                 Saved<Owned<T, B>> saved, Params<Out<T>> const& d_params) {
    params.for_each(
        [&](auto block, std::size_t, auto& p, auto& kept, auto& d_p) {
          using Block = typename decltype(block)::type;
          Block::auxiliary_backward(backend, layer_config<Block>(c), s, p, std::move(kept), d_p);
        },
        params, saved, d_params);
  }

  template <class Block> static auto const& layer_config(Config const& c) { return c.layers.template get<typename Block::Policy>(); }

 private:
  template <class... Ps> static void complete(Types<Ps...>, Config& c, Index num_heads) {
    auto const complete_one = [&]<class P>(LayerConfig<P>& own) {
      own.policy = P::complete(own.policy, c.block.model_dim, num_heads);
      check_stage(P::name, own.policy, c.block.stage);
    };
    (complete_one(c.layers.template get<Ps>()), ...);
  }
  // All layers must have the model's stage. Otherwise a policy would not compute the loss that the stage trains it by.
  static void check_stage(std::string_view policy, auto const& config, Stage stage) {
    if constexpr (requires { config.stage; })
      check(config.stage == Stage::language_model || config.stage == stage, policy, ": the stage in its config is ", name_of(config.stage),
            ", the stage of the model is ", name_of(stage), "; keep the default in the ",
            "config, and set the stage of a step by StepOptions::stage");
  }
  template <class... Ps> static void set_stage(Types<Ps...>, Config& c, Stage stage) {
    auto const set = [&](auto& policy) {
      if constexpr (requires { policy.stage; }) policy.stage = stage;
    };
    (set(c.layers.template get<Ps>().policy), ...);
  }
  // A list whose elements are f(block, config of the block's policy, layer's number).
  template <class List, class F> static List filled(Config const& c, F f) {
    List list;
    list.for_each([&](auto block, std::size_t layer,
                      auto& element) { element = f(block, layer_config<typename decltype(block)::type>(c), static_cast<Index>(layer)); },
                  list);
    return list;
  }
};

namespace detail {
template <class... Ps> struct PolicyList {
  template <int times> static constexpr std::size_t depth() {
    static_assert(times > 0, "Repeat: the number of repetitions must be at least 1: Repeat<3, GDN, Full>");
    return times > 0 ? static_cast<std::size_t>(times) * sizeof...(Ps) : 0;
  }
  template <std::size_t i> using At = std::tuple_element_t<i, std::tuple<Ps...>>;
  template <class Indices> struct Repeated;
  template <std::size_t... i> struct Repeated<std::index_sequence<i...>> {
    using type = Stack<At<i % sizeof...(Ps)>...>;
  };
};
}  // namespace detail

// Repeat<3, GDN, GDN, GDN, Full> has 12 layers.
template <int times, AttentionPolicy... Policies>
using Repeat = typename detail::PolicyList<Policies...>::template Repeated<
    std::make_index_sequence<detail::PolicyList<Policies...>::template depth<times>()>>::type;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
