// A policy whose inputs are not projections of x. It is multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) without its rotary
// part. Queries come from a vector of low rank, keys and values from one latent vector of each token:
//   a = norm(x W_a^T)   q = a W_q^T      c = norm(x W_c^T)   k = c W_k^T   v = c W_v^T      o = softmax attention
#ifndef HYBRIDATTN_TESTS_LATENT_HPP
#define HYBRIDATTN_TESTS_LATENT_HPP

#include <hybridattn/hybridattn.hpp>

namespace latent {

namespace ha = hybridattn;

using Attend = ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 0}>;

struct Config {
  Attend::Config attend;
  ha::Index query_rank = 0;    // RQ; 0: half of the model's width
  ha::Index latent_rank = 0;   // RC; 0: a quarter of it
};
template <class S> struct Projections {
  ha::Held<S, 2> queries;   // [N, RQ]
  ha::Held<S, 2> latent;    // [N, RC]
  HYBRIDATTN_FIELDS(queries, latent)
};

// From the projections to q, k and v.
struct Prepare : ha::NoStep {
  template <class S> struct Params {
    ha::Wide<S, 1> query_norm, latent_norm;   // [RQ], [RC]
    ha::Held<S, 2> w_q, w_k, w_v;             // [H*D, RQ], [HK*D, RC] twice
    HYBRIDATTN_FIELDS(query_norm, latent_norm, w_q, w_k, w_v)
  };
  static Params<ha::Shapes> params(Config const& c) {
    ha::Index const keys = c.attend.num_kv_heads * c.attend.head_dim;
    return {.query_norm = {c.query_rank},
            .latent_norm = {c.latent_rank},
            .w_q = {c.attend.num_heads * c.attend.head_dim, c.query_rank},
            .w_k = {keys, c.latent_rank},
            .w_v = {keys, c.latent_rank}};
  }
  static Params<ha::Starts> starts(Config const& c) {
    auto const uniform = [](ha::Index rank) { return ha::Initial::uniform(-std::pow(rank, -0.5), std::pow(rank, -0.5)); };
    return {.query_norm = ha::Initial::constant(1),
            .latent_norm = ha::Initial::constant(1),
            .w_q = uniform(c.query_rank),
            .w_k = uniform(c.latent_rank),
            .w_v = uniform(c.latent_rank)};
  }

  template <class B, class T>
  static void forward(B& backend, Config const&, ha::Sequences const&, Projections<ha::In<T>> raw, Params<ha::In<T>> p,
                      Attend::Inputs<ha::Out<T>> x) {
    auto const queries = normed(backend, raw.queries, p.query_norm), latent = normed(backend, raw.latent, p.latent_norm);
    ha::On<ha::Linear, B>::forward(backend, in(queries), p.w_q, as_rows(x.q));
    ha::On<ha::Linear, B>::forward(backend, in(latent), p.w_k, as_rows(x.k));
    ha::On<ha::Linear, B>::forward(backend, in(latent), p.w_v, as_rows(x.v));
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, ha::Sequences const&, Projections<ha::In<T>> raw, Params<ha::In<T>> p,
                       Attend::Inputs<ha::In<T>>, Attend::Inputs<ha::In<T>> d_x, Projections<ha::Out<T>> d_raw, Params<ha::Out<T>> d_p) {
    auto const queries = normed(backend, raw.queries, p.query_norm), latent = normed(backend, raw.latent, p.latent_norm);
    ha::Tensor<T, 2, B> d_queries{backend, queries.shape()}, d_latent{backend, latent.shape()};
    using ha::Into;
    ha::On<ha::Linear, B>::backward(backend, in(queries), p.w_q, as_rows(d_x.q), out(d_queries), d_p.w_q, Into::overwrite);
    ha::On<ha::Linear, B>::backward(backend, in(latent), p.w_k, as_rows(d_x.k), out(d_latent), d_p.w_k, Into::overwrite);
    ha::On<ha::Linear, B>::backward(backend, in(latent), p.w_v, as_rows(d_x.v), out(d_latent), d_p.w_v, Into::add);
    ha::On<ha::RmsNorm, B>::backward(backend, norm, raw.queries, p.query_norm, in(d_queries), d_raw.queries, d_p.query_norm,
                                     Into::overwrite);
    ha::On<ha::RmsNorm, B>::backward(backend, norm, raw.latent, p.latent_norm, in(d_latent), d_raw.latent, d_p.latent_norm,
                                     Into::overwrite);
  }

 private:
  static constexpr ha::RmsNorm::Options norm{ha::NormWeight::plain, 1e-6};
  template <class B, class T> static ha::Tensor<T, 2, B> normed(B& backend, ha::View<T const, 2> x, ha::View<T const, 1> w) {
    ha::Tensor<T, 2, B> y{backend, x.shape};
    ha::On<ha::RmsNorm, B>::forward(backend, norm, x, w, out(y));
    return y;
  }
};

struct Attention : ha::PolicyDefaults {
  static constexpr std::string_view name = "latent";
  using Config = latent::Config;
  using Prepare = latent::Prepare;
  template <class S> using Projections = latent::Projections<S>;
  template <class S> using Inputs = Attend::Inputs<S>;
  template <class S> using Outputs = Attend::Outputs<S>;
  template <class S> using Saved = Attend::Saved<S>;
  template <class S> using Cache = Attend::Cache<S>;

  static Config complete(Config c, ha::Index model_dim, ha::Index num_heads) {
    c.attend = Attend::complete(c.attend, model_dim, num_heads);
    if (c.query_rank == 0) c.query_rank = model_dim / 2;
    if (c.latent_rank == 0) c.latent_rank = model_dim / 4;
    return c;
  }
  static Projections<ha::Shapes> projections(Config const& c, ha::Sequences const& s) {
    return {.queries = {s.tokens(), c.query_rank}, .latent = {s.tokens(), c.latent_rank}};
  }
  static auto inputs(Config const& c, ha::Sequences const& s) { return Attend::inputs(c.attend, s); }
  static auto outputs(Config const& c, ha::Sequences const& s) { return Attend::outputs(c.attend, s); }
  static auto saved(Config const& c, ha::Sequences const& s) { return Attend::saved(c.attend, s); }
  static auto cache(Config const& c, ha::Index batch, ha::Index capacity) { return Attend::cache(c.attend, batch, capacity); }
};

// The same with an indexer (DeepSeek Sparse Attention), whose inputs come from the projections too. The gradient of its loss stops
// before the projections, so this loss trains only parameters of Prepare.
using Select = ha::SparseAttention<ha::SparseOptions{.top_k = 4, .qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 0}>;

struct IndexedConfig {
  Config latent;
  Select::Config select;
  ha::Stage stage = ha::Stage::language_model;

  Select::Config staged() const {
    auto c = select;
    c.stage = stage;
    return c;
  }
};
struct IndexedPrepare : ha::NoStep {
  template <class S> struct Params {
    typename Prepare::Params<S> latent;
    ha::Held<S, 2> index_w_q, index_w_k, index_w_w;   // [HI*DI, RQ], [DI, RC], [HI, RQ]
    HYBRIDATTN_FIELDS(latent, index_w_q, index_w_k, index_w_w)
  };
  static Params<ha::Shapes> params(IndexedConfig const& c) {
    return {.latent = Prepare::params(c.latent),
            .index_w_q = {c.select.index_heads * c.select.index_dim, c.latent.query_rank},
            .index_w_k = {c.select.index_dim, c.latent.latent_rank},
            .index_w_w = {c.select.index_heads, c.latent.query_rank}};
  }
  static Params<ha::Starts> starts(IndexedConfig const& c) {
    auto const uniform = ha::Initial::uniform(-0.5, 0.5);
    return {.latent = Prepare::starts(c.latent), .index_w_q = uniform, .index_w_k = uniform, .index_w_w = uniform};
  }
  template <class B, class T>
  static void forward(B& backend, IndexedConfig const& c, ha::Sequences const& s, Projections<ha::In<T>> raw, Params<ha::In<T>> p,
                      Select::Inputs<ha::Out<T>> x) {
    Prepare::forward(backend, c.latent, s, raw, p.latent, Attend::Inputs<ha::Out<T>>{x.q, x.k, x.v});
    ha::On<ha::Linear, B>::forward(backend, raw.queries, p.index_w_q, as_rows(x.index_q));
    ha::On<ha::Linear, B>::forward(backend, raw.latent, p.index_w_k, x.index_k);
    ha::On<ha::Linear, B>::forward(backend, raw.queries, p.index_w_w, x.index_w);
  }
  template <class B, class T>
  static void backward(B& backend, IndexedConfig const& c, ha::Sequences const& s, Projections<ha::In<T>> raw, Params<ha::In<T>> p,
                       Select::Inputs<ha::In<T>> x, Select::Inputs<ha::In<T>> d_x, Projections<ha::Out<T>> d_raw, Params<ha::Out<T>> d_p) {
    if (!d_raw.queries.empty())
      Prepare::backward(backend, c.latent, s, raw, p.latent, Attend::Inputs<ha::In<T>>{x.q, x.k, x.v},
                        Attend::Inputs<ha::In<T>>{d_x.q, d_x.k, d_x.v}, d_raw, d_p.latent);
    if (d_x.index_q.empty()) return;
    auto const learn = [&](ha::View<T const, 2> from, ha::View<T const, 2> w, ha::View<T const, 2> d_y, ha::View<T, 2> d_w) {
      ha::On<ha::Linear, B>::backward(backend, from, w, d_y, ha::View<T, 2>{}, d_w, ha::Into::overwrite);
    };
    learn(raw.queries, p.index_w_q, as_rows(d_x.index_q), d_p.index_w_q);
    learn(raw.latent, p.index_w_k, d_x.index_k, d_p.index_w_k);
    learn(raw.queries, p.index_w_w, d_x.index_w, d_p.index_w_w);
  }
};
struct Indexed : ha::PolicyDefaults {
  static constexpr std::string_view name = "latent with an indexer";
  using Config = IndexedConfig;
  using Prepare = IndexedPrepare;
  template <class S> using Projections = latent::Projections<S>;
  template <class S> using Inputs = Select::Inputs<S>;
  template <class S> using Outputs = Select::Outputs<S>;
  template <class S> using Saved = Select::Saved<S>;

  static constexpr bool detached(std::string_view tensor) { return tensor.starts_with("index_"); }
  static double auxiliary_weight(Config const& c, ha::Index tokens) { return Select::auxiliary_weight(c.select, tokens); }
  static Config complete(Config c, ha::Index model_dim, ha::Index num_heads) {
    c.latent = Attention::complete(c.latent, model_dim, num_heads);
    c.select = Select::complete(c.select, model_dim, num_heads);
    return c;
  }
  static Projections<ha::Shapes> projections(Config const& c, ha::Sequences const& s) { return Attention::projections(c.latent, s); }
  static auto inputs(Config const& c, ha::Sequences const& s) { return Select::inputs(c.staged(), s); }
  static auto outputs(Config const& c, ha::Sequences const& s) { return Select::outputs(c.staged(), s); }
  static auto saved(Config const& c, ha::Sequences const& s) { return Select::saved(c.staged(), s); }
};

// Places the norms after the branches for all policies of a list except the first.
template <class First, class... Policies, class Config> void norms_after(ha::Types<First, Policies...>, Config& config) {
  ((config.template norm_placement<Policies>() = ha::NormPlacement::after), ...);
}

}  // namespace latent

// The kernels are those of full and of sparse attention, on every backend.
template <hybridattn::Backend B> struct hybridattn::On<latent::Attention, B> {
  template <class... Args> static void forward(B& backend, latent::Config const& c, SequencesOn<B> const& s, Args const&... args) {
    On<latent::Attend, B>::forward(backend, c.attend, s, args...);
  }
  template <class... Args> static void backward(B& backend, latent::Config const& c, SequencesOn<B> const& s, Args const&... args) {
    On<latent::Attend, B>::backward(backend, c.attend, s, args...);
  }
  template <class... Args> static void extend(B& backend, latent::Config const& c, SequencesOn<B> const& s, Args const&... args) {
    On<latent::Attend, B>::extend(backend, c.attend, s, args...);
  }
};

template <hybridattn::Backend B> struct hybridattn::On<latent::Indexed, B> {
  template <class... Args> static void forward(B& backend, latent::IndexedConfig const& c, SequencesOn<B> const& s, Args const&... args) {
    On<latent::Select, B>::forward(backend, c.staged(), s, args...);
  }
  template <class... Args> static void backward(B& backend, latent::IndexedConfig const& c, SequencesOn<B> const& s, Args const&... args) {
    On<latent::Select, B>::backward(backend, c.staged(), s, args...);
  }
};

#endif
