// Says for every configuration that a program may set which numbers are legal, which stand for a default and which are refused. Each
// struct has a table with a row for each member. A new member without a row does not compile.
#include "catch.hpp"
#include "error_of.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/train/checkpoint.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

namespace ha = hybridattn;
using ha::Index;

namespace {

// member_count is the number of members of an aggregate, which is the number of values that it can be initialised with.
struct Anything {
  template <class T> operator T() const;
};
template <class S, class... Members> constexpr std::size_t member_count() {
  if constexpr (requires { S{Members{}..., Anything{}}; }) return member_count<S, Members..., Anything>();
  else return sizeof...(Members);
}

constexpr double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
constexpr Index most = std::numeric_limits<Index>::max(), least = std::numeric_limits<Index>::min();

// A value of a member, and the default that it stands for, if it stands for one.
template <class M> struct Value {
  M value, meaning;
  Value(M v) : value(v), meaning(v) {}
  Value(M v, M means) : value(std::move(v)), meaning(std::move(means)) {}
};
// Sets a member of a config. `shown` is "beta_1 = 1".
template <class S> struct Setting {
  std::string shown, value;
  std::function<void(S&)> set;
  std::function<bool(S const& made)> holds;
};
template <class S> struct Row {
  std::string member;
  std::vector<Setting<S>> legal, defaults, refused;
};

template <class X> std::string text(X x) requires(std::is_arithmetic_v<X>) {
  std::ostringstream out;
  out << x;
  return out.str();
}
template <class M> std::string text(std::vector<M> const& list) { return list.empty() ? "nothing" : text(list.back()); }
template <class M> std::string text(M x) requires(std::is_enum_v<M>) { return text(static_cast<int>(x)); }

// The row of a member that is a number, a word, a switch or a list of numbers.
template <class S, class C, class M>
Row<S> row(char const* name, M C::* member, std::type_identity_t<std::vector<M>> legal,
           std::type_identity_t<std::vector<Value<M>>> defaults = {}, std::type_identity_t<std::vector<M>> refused = {}) {
  Row<S> result{name, {}, {}, {}};
  auto const setting = [&](M value, M meaning) {
    return Setting<S>{std::string(name) + " = " + text(value), text(value), [=](S& s) { s.*member = value; },
                      [=](S const& made) { return made.*member == meaning; }};
  };
  for (M value : legal) result.legal.push_back(setting(value, value));
  for (auto const& [value, meaning] : defaults) result.defaults.push_back(setting(value, meaning));
  for (M value : refused) result.refused.push_back(setting(value, value));
  return result;
}
// The row of a member that is a struct with a table of its own, or is not a number.
template <class S> Row<S> elsewhere(char const* name) { return {name, {}, {}, {}}; }

struct Count {
  std::size_t structs = 0, members = 0, legal = 0, defaults = 0, refused = 0;
};
Count& counted() {
  static Count count;
  return count;
}

// Judges a table. make(config) makes the object of the config, and returns the config with its defaults filled in.
template <class S, std::size_t rows, class Make> void judge(char const* name, S const& plain, Row<S> const (&table)[rows], Make make) {
  static_assert(rows == member_count<S>(), "a member without a row in the table: give it one");
  ++counted().structs;
  auto const made = [&](Setting<S> const& setting) {
    S config = plain;
    setting.set(config);
    return make(config);
  };
  CHECK_NOTHROW(make(plain));
  for (Row<S> const& row : table) {
    ++counted().members;
    for (auto const* settings : {&row.legal, &row.defaults})
      for (Setting<S> const& setting : *settings) {
        INFO(name << ": " << setting.shown);
        CHECK_NOTHROW(made(setting));
        CHECK(setting.holds(made(setting)));
      }
    for (Setting<S> const& setting : row.refused) {
      INFO(name << ": " << setting.shown);
      std::string const sentence = error_of([&] { made(setting); });
      INFO(sentence);
      CHECK(sentence.find(row.member + " " + setting.value) != sentence.npos);
      CHECK((sentence.find("allowed") != sentence.npos));
    }
    counted().legal += row.legal.size();
    counted().defaults += row.defaults.size();
    counted().refused += row.refused.size();
  }
}

std::vector<double> const not_positive{nan, inf, -inf, 0, -0.0, -1, 1e-39, 1e39}, not_above_zero{nan, inf, -inf, -1e-9, -1, 1e39},
    no_number{nan, inf, -inf, 1e39, -1e39}, no_share{nan, inf, -inf, -1e-9, 1.001}, no_decay{nan, inf, -inf, -1e-9, 1, 1.5};
std::vector<Index> const negative{-1, -7, least}, not_one{0, -1, least};
std::vector<bool> const switches{false, true};

using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = 5}>;
using Layers = ha::Stack<ha::GDN, ha::Full, Sparse>;
using Model = ha::LanguageModel<Layers>;

// A policy's config with its defaults filled in, for a model of width 24 with 2 heads.
template <class P> typename P::Config completed(typename P::Config const& c) { return P::complete(c, 24, 2); }
template <class P> std::vector<Value<double>> default_scale(double dim) { return {{0.0, 1 / std::sqrt(dim)}, {-0.0, 1 / std::sqrt(dim)}}; }

Model::Config small() { return {.vocab_size = 19, .model_dim = 24, .num_heads = 2}; }

template <class S> struct Weights {
  ha::Held<S, 1> w;
  HYBRIDATTN_FIELDS(w)
};

void policies() {
  using F = ha::full::Config;
  judge<F>("full::Config", {},
           {row<F>("num_heads", &F::num_heads, {1, 2, 4}, {{0, 2}}, negative),
            row<F>("num_kv_heads", &F::num_kv_heads, {1, 2}, {{0, 2}}, negative),
            row<F>("head_dim", &F::head_dim, {1, 7, 64}, {{0, 12}}, negative),
            row<F>("scale", &F::scale, {1, -1, 1e-30, -3e38}, default_scale<F>(12), no_number),
            row<F>("rope_theta", &F::rope_theta, {1, 0.5, 1e7}, {}, not_positive),
            row<F>("norm_eps", &F::norm_eps, {1e-12, 1}, {}, not_positive)},
           completed<ha::Full>);
  using G = ha::gdn::Config;
  judge<G>(
      "gdn::Config", {},
      {row<G>("num_heads", &G::num_heads, {1, 2}, {{0, 2}}, negative),
       row<G>("num_value_heads", &G::num_value_heads, {2, 6}, {{0, 2}}, negative),
       row<G>("key_dim", &G::key_dim, {1, 7, 64}, {{0, 12}}, negative), row<G>("value_dim", &G::value_dim, {1, 7, 64}, {{0, 12}}, negative),
       row<G>("scale", &G::scale, {1, -1, 1e-30, -3e38}, default_scale<G>(12), no_number),
       row<G>("norm_eps", &G::norm_eps, {1e-12, 1}, {}, not_positive),
       row<G>("gate_start", &G::gate_start, {ha::gdn::GateStart::fla, ha::gdn::GateStart::transformers})},
      completed<ha::GDN>);
  using D = ha::dsa::Config;
  judge<D>(
      "dsa::Config", {},
      {row<D>("num_heads", &D::num_heads, {1, 2, 4}, {{0, 2}}, negative),
       row<D>("num_kv_heads", &D::num_kv_heads, {1, 2}, {{0, 2}}, negative),
       row<D>("head_dim", &D::head_dim, {1, 7, 64}, {{0, 12}}, negative),
       row<D>("scale", &D::scale, {1, -1, 1e-30, -3e38}, default_scale<D>(12), no_number),
       row<D>("index_heads", &D::index_heads, {1, 13}, {}, not_one), row<D>("index_dim", &D::index_dim, {1, 7, 64}, {{0, 12}}, negative),
       row<D>("index_scale", &D::index_scale, {1, -1, 1e-30, -3e38}, default_scale<D>(12), no_number),
       row<D>("rope_theta", &D::rope_theta, {1, 0.5, 1e7}, {}, not_positive),
       row<D>("norm_eps", &D::norm_eps, {1e-12, 1}, {}, not_positive),
       row<D>("index_loss", &D::index_loss, {0, 0.5, 100}, {}, not_above_zero),
       row<D>("stage", &D::stage, {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})},
      completed<Sparse>);
}

void layers() {
  using C = Model::Config;
  judge<C>("LanguageModel::Config", small(),
           {row<C>("vocab_size", &C::vocab_size, {1, 2, 50000}, {}, not_one), row<C>("model_dim", &C::model_dim, {2, 26}, {}, not_one),
            row<C>("num_heads", &C::num_heads, {1, 12}, {}, not_one), elsewhere<C>("feed_forward"), elsewhere<C>("norm"),
            row<C>("tie_embedding", &C::tie_embedding, switches), elsewhere<C>("initialization"), elsewhere<C>("layers")},
           [](C const& c) { return Model{c}.config(); });

  using S = Layers::Config;
  judge<S>("Stack::Config", S{}, {elsewhere<S>("block"), elsewhere<S>("layers")}, [](S const& c) { return Layers::completed(c, 2); });
  using B = ha::BlockConfig;
  judge<B>("BlockConfig", B{},
           {row<B>("model_dim", &B::model_dim, {2, 24}, {}, not_one), elsewhere<B>("norm"), elsewhere<B>("feed_forward"),
            elsewhere<B>("initialization"),
            row<B>("stage", &B::stage, {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})},
           [](B const& c) { return Layers::completed({c, {}}, 2).block; });
  // The layers' stage is the block's.
  B staged;
  staged.stage = ha::Stage::sparse;
  CHECK(Layers::completed({staged, {}}, 2).layers.get<Sparse>().policy.stage == ha::Stage::sparse);
  auto alone = small();
  alone.policy<Sparse>().stage = ha::Stage::sparse;
  CHECK_THROWS_WITH(
      Model{alone},
      Catch::Matchers::Contains("DSA: the stage in its config is sparse, the stage of the model is language_model; keep the default"));
  using N = ha::RmsNorm::Options;
  judge<N>("RmsNorm::Options", {},
           {row<N>("weight", &N::weight, {ha::NormWeight::plain, ha::NormWeight::zero_centred}),
            row<N>("norm.eps", &N::eps, {1e-12, 1}, {}, not_positive)},
           [](N const& c) {
             auto config = small();
             config.norm = c;
             return Model{config}.stack_config().block.norm;
           });
  using I = ha::Initialization;
  judge<I>("Initialization", {},
           {row<I>("linear_deviation", &I::linear_deviation, {0, 1e-3, 1}, {}, not_above_zero),
            row<I>("embedding_deviation", &I::embedding_deviation, {0, 1e-3, 1}, {}, not_above_zero)},
           [](I const& c) {
             auto config = small();
             config.initialization = c;
             return Model{config}.stack_config().block.initialization;
           });
  using F = ha::FeedForwardConfig;
  F const mixture{.hidden_dim = 20, .num_experts = 4};
  judge<F>(
      "FeedForwardConfig", mixture,
      {row<F>("hidden_dim", &F::hidden_dim, {1, 7}, {{0, 96}}, negative), row<F>("gated", &F::gated, switches),
       row<F>("num_experts", &F::num_experts, {0, 2, 64}, {}, negative), row<F>("top_k", &F::top_k, {1, 4}, {}, {0, 5, -1, least, most}),
       row<F>("expert_dim", &F::expert_dim, {1, 7}, {{0, 20}}, negative), row<F>("shared_dim", &F::shared_dim, {-1, 0, 7}, {}, {-2, least}),
       row<F>("renormalise", &F::renormalise, switches), row<F>("decoder_sparse_step", &F::decoder_sparse_step, {1, 2, 1000}, {}, not_one),
       row<F>("mlp_only_layers: layer", &F::mlp_only_layers, {{}, {0, 2}, {99}}, {}, {{-1}, {0, 2, -5}}),
       row<F>("balance_coefficient", &F::balance_coefficient, {0, 1e-3, 10}, {}, not_above_zero),
       row<F>("balance", &F::balance, {ha::Balance::per_layer, ha::Balance::pooled})},
      [](F const& c) {
        auto config = small();
        config.feed_forward = c;
        return Model{config}.stack_config().block.feed_forward;
      });
}

void training() {
  ha::Cpu cpu{1};
  Weights<ha::Owned<float, ha::Cpu>> const weights;
  using A = ha::AdamWOptions;
  judge<A>(
      "AdamWOptions", {},
      {row<A>("learning_rate", &A::learning_rate, {0, 1e-3, 100}, {}, not_above_zero),
       row<A>("beta_1", &A::beta_1, {0, 0.5, 0.9999999}, {}, no_decay), row<A>("beta_2", &A::beta_2, {0, 0.5, 0.9999999}, {}, no_decay),
       row<A>("epsilon", &A::epsilon, {1e-30, 1e-8, 1}, {}, not_positive),
       row<A>("weight_decay", &A::weight_decay, {0, 0.1, 1}, {}, not_above_zero),
       row<A>("max_norm", &A::max_norm, {0, 1e-3, 1e30}, {}, not_above_zero), row<A>("bias_correction", &A::bias_correction, switches),
       elsewhere<A>("decays")},
      [&](A const& o) { return ha::AdamW{cpu, weights, o}.options(); });

  using S = ha::Schedule;
  judge<S>(
      "Schedule", {.warmup_steps = 3, .total_steps = 9},
      {row<S>("warmup_steps", &S::warmup_steps, {0, 9, 10, most}, {}, negative),
       row<S>("total_steps", &S::total_steps, {0, 1, 3, most}, {}, negative), row<S>("min_rate", &S::min_rate, {0, 0.5, 1}, {}, no_share)},
      [](S const& s) {
        for (Index step : {Index{0}, Index{1}, Index{100}, most}) {
          double const rate = s(step);
          CHECK((0 <= rate && rate <= 1));
        }
        return s;
      });
  CHECK_THROWS_AS(S{}(-1), ha::Error);

  using O = ha::StepOptions;
  using Small = ha::LanguageModel<ha::Stack<ha::GDN>>;
  Small const model{{.vocab_size = 3, .model_dim = 4, .num_heads = 1}};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params};
  std::vector<std::int32_t> const tokens{0, 1}, targets{1, 2};
  auto const batch = make_batch(cpu, ha::Sequences::equal(1, 2), tokens, targets);
  judge<O>("StepOptions", {},
           {row<O>("rate", &O::rate, {0, 1, 2}, {}, not_above_zero),
            row<O>("stage", &O::stage, {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})},
           [&](O const& o) {
             train_step(cpu, model, params, optimizer, batch, o);
             return o;
           });

  using R = ha::RecallOptions;
  judge<R>("RecallOptions", {},
           {row<R>("vocab_size", &R::vocab_size, {18, 256, 0x7fffffff}, {}, {17, 0, -1, least, Index{1} << 31, most}),
            row<R>("pairs", &R::pairs, {1, 127}, {}, {128, 0, -1, least, most})},
           [](R const& o) {
             ha::RecallTask const task{ha::Seed{1}, o};
             CHECK(task.vocab_size() == o.vocab_size);
             return o;
           });
  using L = ha::LoadOptions;
  judge<L>("LoadOptions", {}, {row<L>("other_optimizer_options", &L::other_optimizer_options, switches)}, [](L const& o) { return o; });
}

void generating() {
  using S = ha::SamplingOptions;
  std::vector<float> const logits{1, 2, 3, 2};
  judge<S>("SamplingOptions", {},
           {row<S>("temperature", &S::temperature, {0, 1e-300, 1, 1e300}, {}, {nan, inf, -inf, -1e-9, -1}),
            row<S>("top_k", &S::top_k, {0, 1, 99, most}, {}, negative),
            row<S>("top_p", &S::top_p, {1e-300, 0.5, 1}, {}, {nan, inf, -inf, 0, -0.0, -1e-9, 1.001})},
           [&](S const& o) {
             for (int draw = 0; draw < 10; ++draw) {
               std::int32_t const token = ha::Sampler{o, ha::Seed{1}}(std::span(logits));
               CHECK((0 <= token && token < 4));
             }
             return o;
           });

  ha::Cpu cpu{1};
  using Small = ha::LanguageModel<ha::Stack<ha::GDN>>;
  Small const model{{.vocab_size = 3, .model_dim = 4, .num_heads = 1}};
  auto const params = model.initialize<float>(cpu, ha::Seed{1});
  auto const run = [&](ha::GenerateOptions const& o) {
    auto const generated = generate(cpu, model, params, {{0, 1}}, o);
    CHECK(std::ssize(generated.tokens.at(0)) <= o.max_new_tokens);
    return o;
  };
  using G = ha::GenerateOptions;
  judge<G>("GenerateOptions", {.max_new_tokens = 3},
           {row<G>("max_new_tokens", &G::max_new_tokens, {0, 1, 9}, {}, {-1, least, Index{1} << 31, most}), elsewhere<G>("sampling"),
            elsewhere<G>("seed"), row<G>("stop_tokens", &G::stop_tokens, {{}, {0, 1, 2}, {-1, 300}})},
           run);
  // generate refuses numbers of a sampler before it reads a prompt.
  CHECK_THROWS_WITH(run({.max_new_tokens = 0, .sampling = {.top_p = 0}}), Catch::Matchers::Contains("top_p 0 is not allowed"));
  // generate makes as many tokens as the cache has room for, even if more were asked for.
  auto cache = ha::make_cache<float>(cpu, model, {.batch = 1, .capacity = 4});
  CHECK_THROWS_WITH(generate(cpu, model, params, cache, {{0, 1}}, {.max_new_tokens = 0x7fffffff}),
                    Catch::Matchers::Contains("its capacity is 4"));

  using C = ha::CacheSize;
  judge<C>("CacheSize", {.batch = 1, .capacity = 8},
           {row<C>("batch", &C::batch, {1, 9}, {}, not_one),
            row<C>("capacity", &C::capacity, {1, 9, 0x7fffffff}, {}, {0, -1, least, Index{1} << 31, most})},
           [&](C const& size) {
             ha::cache_shapes(model, size);
             return size;
           });
}

void operations() {
  ha::Cpu cpu{1};
  using R = ha::Rope::Options;
  using Op = ha::On<ha::Rope, ha::Cpu>;
  std::vector<float> x(2 * 8), y(2 * 8);
  judge<R>("Rope::Options", {.rotary_dim = 4},
           {row<R>("rotary_dim", &R::rotary_dim, {0, 2, 8}, {}, {1, 7, 9, 10, -1, -2, least, most}),
            row<R>("theta", &R::theta, {1, 0.5, 1e7}, {}, not_positive), row<R>("interleaved", &R::interleaved, switches)},
           [&](R const& o) {
             std::vector<float> angles(2 * 8, std::nanf(""));
             Index const half = std::clamp<Index>(o.rotary_dim, 0, 8) / 2;
             ha::View<float, 3> const table{angles.data(), {2, 2, half}};
             std::fill(y.begin(), y.end(), std::nanf(""));
             ha::On<ha::RopeAngles, ha::Cpu>::forward(cpu, o, ha::View<std::int32_t const, 1>{}, table);
             Op::forward(cpu, o, ha::View<float const, 3>(table), {}, ha::View<float const, 3>{x.data(), {2, 1, 8}},
                         ha::View<float, 3>{y.data(), {2, 1, 8}});
             CHECK(y == x);   // x is zero, so all of y was written with zeros
             return o;
           });
  using M = ha::Route::Options;
  judge<M>("Route::Options", {}, {row<M>("renormalise", &M::renormalise, switches)}, [](M const& o) { return o; });
}

// The compiler judges options in types. tests/mistakes.sh has a row for each option that can be wrong.
static_assert(member_count<ha::FullOptions>() == 5, "a new option: give it its rows in mistakes.sh, if it can be wrong");
static_assert(member_count<ha::GdnOptions>() == 3, "a new option: give it its rows in mistakes.sh, if it can be wrong");
static_assert(member_count<ha::SparseOptions>() == 8, "a new option: give it its rows in mistakes.sh, if it can be wrong");

}  // namespace

TEST_CASE("every number of a configuration is legal, stands for a default, or is refused by name") {
  policies();
  layers();
  training();
  generating();
  operations();
  Count const& all = counted();
  std::printf("%zu structs, %zu members: %zu legal values, %zu that mean a default, %zu refused\n", all.structs, all.members, all.legal,
              all.defaults, all.refused);
}
