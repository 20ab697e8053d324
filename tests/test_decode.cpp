// Decoding. A model that goes on from a cache computes what it computes from all tokens at once, and generates text token by token.
#include "decoding.hpp"
#include "latent.hpp"

#include <array>

using namespace decoding;
using Catch::Matchers::Contains;

namespace {

using Windowed = ha::FullAttention<ha::FullOptions{.window = 7}>;
using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = 5}>;
using Mixed = ha::Stack<ha::GDN, Windowed, Sparse, ha::Full>;
// Every option that changes decoding has another value than its default, and one policy has inputs that are not projections.
using Bare =
    ha::Stack<latent::Attention, ha::GatedDeltaNet<ha::GdnOptions{.conv_width = 0, .output_gate = false, .negative_eigenvalues = true}>,
              ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 0}>,
              ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::plain, .rotary_percent = 50, .rotary = ha::Rotary::interleaved}>,
              ha::SparseAttention<ha::SparseOptions{.top_k = 9,
                                                    .qk_norm = ha::QkNorm::none,
                                                    .output_gate = false,
                                                    .rotary_percent = 100,
                                                    .index_rotary_percent = 50,
                                                    .index_norm = true}>>;

template <class Stack> typename ha::LanguageModel<Stack>::Config small_config() {
  typename ha::LanguageModel<Stack>::Config config{
      .vocab_size = V,
      .model_dim = 24,
      .num_heads = 2,
      .feed_forward = {.hidden_dim = 20, .num_experts = 4, .top_k = 2, .expert_dim = 12, .shared_dim = 8, .decoder_sparse_step = 2},
      .initialization = {.linear_deviation = 0, .embedding_deviation = 1}};
  if constexpr (std::is_same_v<Stack, Bare>) latent::norms_after(typename Stack::Kinds{}, config);
  return config;
}

template <class Stack, class T> struct Fixture : WithParams<Stack, T> {
  explicit Fixture(int threads = 2) : WithParams<Stack, T>(small_config<Stack>(), threads) {}
};

}  // namespace

// NamesExtend holds for an extend that cannot be called too. So it is an error of the compiler, and decoding does not skip it.
struct WithWrongExtend {
  template <class T> static void extend(T);
};
struct FinalStep final {};
static_assert(!ha::NamesExtend<FinalStep>);
static_assert(ha::NamesExtend<WithWrongExtend> && ha::NamesExtend<ha::GDN::Prepare>);
static_assert(!ha::NamesExtend<ha::NoStep> && !ha::NamesExtend<ha::Full::Prepare> && !ha::NamesExtend<ha::DSA::Prepare>);

TEMPLATE_TEST_CASE("a model that goes on from a cache gives what the whole forward gives, however the prompts are split", "[laws]", Mixed,
                   Bare) {
  auto const tokens = some_tokens(lengths);
  Fixture<TestType, double> f;
  Fixture<TestType, float> g;
  auto const truth = f.whole(tokens);
  double const allowed = 2 * max_difference(g.whole(tokens), truth) + 4 * std::numeric_limits<float>::epsilon() * max_abs(truth);
  auto const check = [&](auto next) {
    CHECK(max_difference(f.decoded(tokens, next), truth) <= 1e-12 * max_abs(truth));
    CHECK(max_difference(g.decoded(tokens, next), truth) <= allowed);
  };
  check(one_by_one);
  check(half_then_one);
  check(in_pieces());
  check(at_once);
}

TEST_CASE("a window's ring holds the last keys at their positions, whatever was written over", "[laws]") {
  auto const tokens = some_tokens({40});
  Fixture<ha::Stack<Windowed>, float> f;
  Fixture<ha::Stack<ha::Full>, float> g;   // has equal parameters and so, in the first layer, equal keys
  auto ring = f.cache(1, 50);
  auto line = g.cache(1, 50);
  f.decoded(tokens, in_pieces(), ring);
  g.decoded(tokens, one_by_one, line);
  auto const keys_of = [](auto const& cache, ha::Cpu& cpu) {
    std::vector<float> keys;
    cache.layers().for_each_layer([&](int, auto const& layer) { keys = download(cpu, layer.keys); }, cache.layers());
    return keys;
  };
  auto const in_ring = keys_of(ring, f.cpu), all = keys_of(line, g.cpu);
  REQUIRE(in_ring.size() == 7 * 24);
  for (Index position = 33; position < 40; ++position)
    CHECK(std::equal(all.begin() + position * 24, all.begin() + (position + 1) * 24, in_ring.begin() + position % 7 * 24));
}

TEST_CASE("what a sequence decodes depends on no neighbour and on no number of threads, bitwise", "[laws]") {
  auto const tokens = some_tokens(lengths);
  Fixture<Mixed, float> f{1}, g{3};
  auto const batch = f.decoded(tokens, half_then_one);
  CHECK(same_bits(batch, g.decoded(tokens, half_then_one)));
  for (std::size_t i = 0; i < tokens.size(); ++i) CHECK(same_bits(Rows<float>{batch[i]}, f.decoded({tokens[i]}, half_then_one)));
}

TEST_CASE("the logits of the last tokens are those of all tokens there, one row for each sequence that has new ones") {
  Fixture<Mixed, float> f;
  auto const tokens = some_tokens({4, 0, 1, 9});
  auto a = f.cache(4, 10), b = f.cache(4, 10);
  auto const all = f.split(download(f.cpu, extend(f.cpu, f.model, f.params, tokens, a)), tokens);
  auto const last = f.split(download(f.cpu, extend_to_last(f.cpu, f.model, f.params, tokens, b)), some_tokens({1, 0, 1, 1}));
  for (std::size_t i : {0u, 2u, 3u}) CHECK(same_bits(Rows<float>{{all[i].end() - V, all[i].end()}}, Rows<float>{last[i]}));
}

TEST_CASE("no new tokens have logits [0, V] and leave the cache as it was") {
  Fixture<Mixed, float> f;
  auto cache = f.cache(2, 10);
  extend(f.cpu, f.model, f.params, some_tokens({3, 1}), cache);
  auto const all = extend(f.cpu, f.model, f.params, TokenLists(2), cache);
  auto const last = extend_to_last(f.cpu, f.model, f.params, TokenLists(2), cache);
  CHECK((all.shape() == ha::Shape<2>{0, V} && download(f.cpu, all).empty()));
  CHECK((last.shape() == ha::Shape<2>{0, V} && download(f.cpu, last).empty()));
  CHECK((cache.lengths()[0] == 3 && cache.lengths()[1] == 1));
}

TEST_CASE("a sequence that is forgotten begins anew, among others that go on") {
  Fixture<Mixed, float> f;
  auto const first = some_tokens({12, 17}, 1), second = some_tokens({8, 5}, 2), both = TokenLists{second[0], first[1]};
  auto cache = f.cache(2, 40);
  f.decoded(first, half_then_one, cache);
  cache.forget(0);
  CHECK(cache.lengths()[0] == 0);
  auto const again = f.decoded({second[0], second[1]}, one_by_one, cache);
  CHECK(same_bits(Rows<float>{again[0]}, f.decoded({second[0]}, one_by_one)));
  cache.forget();
  CHECK(same_bits(f.decoded(both, half_then_one, cache), f.decoded(both, half_then_one)));
}

TEST_CASE("what does not fit is refused before the cache is touched, with both numbers") {
  Fixture<Mixed, float> f;
  auto const tokens = some_tokens({6, 8}), more = some_tokens({2, 2}, 2);
  auto cache = f.cache(2, 10), untouched = f.cache(2, 10);
  f.decoded(tokens, half_then_one, cache);
  f.decoded(tokens, half_then_one, untouched);
  auto const go_on = [&](TokenLists const& lists) { extend(f.cpu, f.model, f.params, lists, cache); };
  CHECK_THROWS_WITH(go_on(some_tokens({1, 3})), Contains("sequence 1") && Contains("8 + 3") && Contains("capacity is 10"));
  CHECK_THROWS_WITH(go_on({{1}, {2, 19}}), Contains("token 19") && Contains("0 .. 18"));
  CHECK_THROWS_WITH(go_on(some_tokens({1})), Contains("1 sequences") && Contains("made for 2"));
  CHECK(same_bits(f.decoded(more, one_by_one, cache), f.decoded(more, one_by_one, untouched)));

  auto config = small_config<Mixed>();
  config.policy<Sparse>().index_dim = 8;
  ha::LanguageModel<Mixed> const other{config};
  auto const other_params = other.initialize<float>(f.cpu, ha::Seed{1});
  CHECK_THROWS_WITH(extend(f.cpu, other, other_params, more, cache), Contains("other sizes") && Contains("2.index_keys"));
  CHECK_THROWS_WITH(f.cache(0, 10), Contains("batch 0 is not allowed"));
  CHECK_THROWS_WITH(f.cache(1, 0), Contains("capacity 0"));
}

namespace {
template <class P> void check_that_overflow_is_refused() {
  ha::Cpu cpu;
  auto const c = P::complete({}, 16, 2);
  auto cache = ha::allocate<float>(cpu, P::cache(c, 1, 3));
  auto const s = ha::Sequences::continuing(std::array<Index, 1>{2}, std::array<Index, 1>{2});
  auto const x = ha::allocate<float>(cpu, P::inputs(c, s));
  auto y = ha::allocate<float>(cpu, P::outputs(c, s));
  CHECK_THROWS_WITH((ha::On<P, ha::Cpu>::extend(cpu, c, s, in(x), out(cache), out(y))), Contains("2 + 2") && Contains("capacity is 3"));
}
}  // namespace

TEST_CASE("a policy refuses what its own cache cannot hold") {
  check_that_overflow_is_refused<ha::Full>();
  check_that_overflow_is_refused<Windowed>();   // the ring is smaller than the window here
  check_that_overflow_is_refused<Sparse>();
}

TEMPLATE_TEST_CASE("a cache takes the bytes announced, and no step but the first allocates", "[laws]", Mixed, Bare) {
  Fixture<TestType, float> f;
  auto const announced = ha::bytes<float>(cache_shapes(f.model, {.batch = 2, .capacity = 40}));
  auto const before = f.cpu.pool().in_use();
  auto cache = f.cache(2, 40);
  CHECK(f.cpu.pool().in_use() - before == announced);
  extend(f.cpu, f.model, f.params, some_tokens({5, 9}), cache);
  TokenLists next = some_tokens({1, 1});
  extend(f.cpu, f.model, f.params, next, cache);
  auto const allocations = f.cpu.pool().allocations(), kept = f.cpu.pool().in_use();
  for (int step = 0; step < 20; ++step) {
    next[0][0] = next[1][0] = static_cast<std::int32_t>(step % V);   // tokens of other experts
    extend(f.cpu, f.model, f.params, next, cache);
  }
  CHECK(f.cpu.pool().allocations() == allocations);
  CHECK(f.cpu.pool().in_use() == kept);
}

TEST_CASE("a windowed layer's cache does not grow with the capacity, nor does that of Gated DeltaNet") {
  auto const bytes = [](auto stack, Index capacity) {
    return ha::bytes<float>(
        cache_shapes(ha::LanguageModel<decltype(stack)>{small_config<decltype(stack)>()}, {.batch = 1, .capacity = capacity}));
  };
  CHECK(bytes(ha::Stack<Windowed>{}, 100) == bytes(ha::Stack<Windowed>{}, 1000));
  CHECK(bytes(ha::Stack<ha::GDN>{}, 100) == bytes(ha::Stack<ha::GDN>{}, 1000));
  CHECK(bytes(ha::Stack<ha::Full>{}, 1000) == 1000 * 2 * 24 * sizeof(float));
  CHECK(bytes(ha::Stack<Sparse>{}, 1000) == 1000 * (2 * 24 + 12) * sizeof(float));
}

TEST_CASE("without temperature every token is the likeliest one after all before it") {
  Fixture<Mixed, double> f;
  auto prompts = some_tokens({3, 11});
  auto const result = generate(f.cpu, f.model, f.params, prompts, {.max_new_tokens = 12, .sampling = {.temperature = 0}});
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    REQUIRE(result.tokens[i].size() == 12);
    auto text = prompts[i];
    text.insert(text.end(), result.tokens[i].begin(), result.tokens[i].end());
    auto const logits = f.whole({text})[0];
    for (std::size_t t = prompts[i].size(); t < text.size(); ++t) {
      auto const row = logits.begin() + static_cast<Index>(t - 1) * V;
      CHECK(text[t] == std::max_element(row, row + V) - row);
    }
  }
}

TEST_CASE("a sequence draws the same tokens in a batch as alone with its own seed") {
  Fixture<Mixed, float> f;
  auto const prompts = some_tokens({3, 11, 1});
  auto const batch = generate(f.cpu, f.model, f.params, prompts, {.max_new_tokens = 10, .seed = ha::Seed{5}});
  for (std::size_t i = 0; i < prompts.size(); ++i)
    CHECK(generate(f.cpu, f.model, f.params, {prompts[i]}, {.max_new_tokens = 10, .seed = ha::Seed{5 + i}}).tokens[0] == batch.tokens[i]);
  CHECK(generate(f.cpu, f.model, f.params, prompts, {.max_new_tokens = 10, .seed = ha::Seed{6}}).tokens != batch.tokens);
}

TEST_CASE("a stop token ends its sequence and stands at the end; the others go on") {
  Fixture<Mixed, float> f;
  auto const prompts = some_tokens({3, 11});
  ha::GenerateOptions options{.max_new_tokens = 10, .seed = ha::Seed{5}};
  auto const free = generate(f.cpu, f.model, f.params, prompts, options).tokens;
  options.stop_tokens = {-1, free[0][4]};
  auto const stopped = generate(f.cpu, f.model, f.params, prompts, options);
  for (std::size_t i : {0u, 1u}) {
    auto const place = std::find(free[i].begin(), free[i].end(), free[0][4]);
    auto const end = place == free[i].end() ? place : place + 1;
    CHECK(stopped.tokens[i] == std::vector<std::int32_t>(free[i].begin(), end));
  }
  CHECK(stopped.tokens[0].size() <= 5);
}

TEST_CASE("every token is handed over as it comes, and a sequence that is told to stop does") {
  Fixture<Mixed, float> f;
  auto const prompts = some_tokens({3, 11});
  TokenLists seen(2);
  std::vector<Index> order;
  auto const on_token = [&](Index i, std::int32_t token) {
    seen[static_cast<std::size_t>(i)].push_back(token);
    order.push_back(i);
    return i == 1 || order.size() < 5;
  };
  auto const result = generate(f.cpu, f.model, f.params, prompts, {.max_new_tokens = 5}, on_token);
  CHECK(order == std::vector<Index>{0, 1, 0, 1, 0, 1, 1, 1});
  CHECK(seen == result.tokens);
  CHECK(result.prefill_tokens == 14);
  CHECK(result.decode_tokens == 2 + 2 + 1 + 1);
  CHECK(result.prefill_seconds > 0);
  CHECK(result.decode_seconds > 0);
}

TEST_CASE("a conversation goes on in its cache") {
  Fixture<Mixed, float> f;
  auto const first = some_tokens({6}, 1)[0], second = some_tokens({4}, 2)[0];
  ha::GenerateOptions const options{.max_new_tokens = 3, .sampling = {.temperature = 0}};
  auto cache = f.cache(1, 40);
  auto const answer = generate(f.cpu, f.model, f.params, cache, {first}, options).tokens[0];
  CHECK(cache.lengths()[0] == 6 + 2);
  std::vector<std::int32_t> next{answer.back()}, all = first;
  next.insert(next.end(), second.begin(), second.end());
  all.insert(all.end(), answer.begin(), answer.end());
  all.insert(all.end(), second.begin(), second.end());
  CHECK(generate(f.cpu, f.model, f.params, cache, {next}, options).tokens == generate(f.cpu, f.model, f.params, {all}, options).tokens);
}

TEST_CASE("generating refuses what makes no sense, and makes nothing of nothing") {
  Fixture<Mixed, float> f;
  auto const go = [&](TokenLists const& prompts, ha::GenerateOptions const& options) {
    return generate(f.cpu, f.model, f.params, prompts, options);
  };
  CHECK_THROWS_WITH(go({}, {}), Contains("no prompts"));
  CHECK_THROWS_WITH(go({{1}, {}}, {}), Contains("prompt 1 is empty"));
  CHECK_THROWS_WITH(go({{1}}, {.max_new_tokens = -1}), Contains("max_new_tokens -1"));
  CHECK_THROWS_WITH(go({{1}}, {.sampling = {.temperature = -2}}), Contains("temperature -2"));
  CHECK(go({{1}, {2}}, {.max_new_tokens = 0}).tokens == TokenLists(2));
}
