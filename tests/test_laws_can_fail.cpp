// A law that cannot be broken proves nothing. This file has policies with one flaw each. A flaw must break the laws that the tests name,
// and no others. Most flaws are one unit in the last place, so that only a law about bits can find them.
#include "catch.hpp"
#include "retention.hpp"

#include <hybridattn/attention/dsa/dsa.hpp>
#include <hybridattn/attention/dsa/reference.hpp>
#include <hybridattn/testing/fake.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

#include <atomic>
#include <chrono>
#include <csignal>
#include <numeric>
#include <set>
#include <thread>
#include <sys/wait.h>
#include <unistd.h>

namespace {

using ha::Index;

enum class Flaw {
  none,
  sees_the_next_token,
  gradient_sees_the_token_before,
  sees_another_sequence,
  gradient_sees_another_sequence,
  counts_sequences,
  counts_threads,
  remembers_the_last_run,
  reads_outside,
  writes_outside,
  needs_fresh_memory,
  ignores_strides,
  leaves_a_hole,
  leaves_a_hole_in_a_gradient,
  accumulates,
  wrong_value,
  wrong_sign,
  clips_gradients,
  forgets_the_state,
  no_gradient_of_the_state,
  keeps_memory,
  quadratic_memory,
  throws,
  never_ends_on_nan,
  hides_nan,
  spreads_nan,
  touches_others_on_nan,
};
std::atomic<bool> is_told_off = false;   // by the watchdog
template <Flaw F> struct Flawed : Retention {};

template <class T> T nudged(T x) { return std::nextafter(x, std::numeric_limits<T>::infinity()); }
template <class T> void nudge_if(bool condition, T& x) {
  if (condition) x = nudged(x);
}
// f(sequence, t, h)
template <class F> void for_each_token(Retention::Config const& c, ha::Sequences const& s, F f) {
  for (ha::Sequence const sequence : s)
    for (Index t = sequence.start; t < sequence.start + sequence.length; ++t)
      for (Index h = 0; h < c.num_heads; ++h) f(sequence, t, h);
}

template <Flaw F, class T>
void spoil(ha::Cpu& cpu, Retention::Config const& c, ha::Sequences const& s, Retention::Inputs<ha::In<T>> x,
           Retention::Outputs<ha::Out<T>> y) {
  if (F == Flaw::throws) ha::fail("flawed");
  Index const N = s.tokens(), H = c.num_heads, D = c.head_dim;
  for (Index i = 0; i < s.count() && F == Flaw::forgets_the_state; ++i) std::fill_n(y.final_state.row(i, 0, 0), D, T(0));
  if (N == 0) return;
  static T last = 0;
  if (F == Flaw::remembers_the_last_run) nudge_if(std::exchange(last, 1 - last) > 0, y.o(N - 1, 0, 0));
  if (F == Flaw::counts_sequences) nudge_if(s.count() > 1, y.o(N - 1, 0, 0));
  if (F == Flaw::counts_threads) nudge_if(cpu.threads() > 2, y.o(N - 1, 0, 0));
  if (F == Flaw::reads_outside) nudge_if((&x.v(N - 1, H - 1, D - 1))[1] < 0, y.o(N - 1, 0, 0));
  if (F == Flaw::writes_outside) (&y.o(0, 0, 0))[-1] = 0;
  if (F == Flaw::ignores_strides) nudge_if(y.o.data[D] != y.o.data[D], y.o(N - 1, 0, 0));
  if constexpr (F == Flaw::keeps_memory) {
    static auto& kept = *new std::vector<void*>;  // reachable until the end, so that a leak checker does not report it
    kept.push_back(cpu.take(64));
  }
  if (F == Flaw::quadratic_memory) ha::Tensor<T, 2, ha::Cpu> scores{cpu, {N, N}};
  if (F == Flaw::needs_fresh_memory) {
    ha::Tensor<T, 1, ha::Cpu> scratch{cpu, {12345}};
    nudge_if(out(scratch)(7) != out(scratch)(7), y.o(N - 1, 0, 0));
    out(scratch)(7) = x.v(0, 0, 0);
  }
  for_each_token(c, s, [&](ha::Sequence sequence, Index t, Index h) {
    if (F == Flaw::sees_the_next_token) nudge_if(t + 1 < sequence.start + sequence.length && x.v(t + 1, h, 0) > 0, y.o(t, h, 0));
    if (F == Flaw::sees_another_sequence) nudge_if(sequence.start > 0 && x.v(0, h, 0) > 0, y.o(t, h, 0));
    if (F == Flaw::leaves_a_hole && t == sequence.start) y.o(t, h, 0) = std::numeric_limits<T>::quiet_NaN();
    if (F == Flaw::wrong_value) y.o(t, h, 1) *= T(1.01);
    for (Index d = 0; d < D; ++d) {
      T const v = x.v(t, h, d);
      if (F == Flaw::never_ends_on_nan)
        while (v != v && !is_told_off) std::this_thread::yield();
      if (F == Flaw::hides_nan && v != v) y.o(t, h, d) = 0;
      if (F == Flaw::spreads_nan && d > 0) y.o(t, h, 0) += 0 * v;
      if (F == Flaw::touches_others_on_nan) nudge_if(v != v, y.o(t, (h + 1) % H, 0));
    }
  });
}

template <Flaw F, class T>
void spoil_gradients(Retention::Config const& c, ha::Sequences const& s, Retention::Outputs<ha::In<T>> d_y,
                     Retention::Inputs<ha::Out<T>> d_x) {
  for_each_token(c, s, [&](ha::Sequence sequence, Index t, Index h) {
    T* const d_k = d_x.k.row(t, h);
    if (F == Flaw::gradient_sees_the_token_before) nudge_if(t > sequence.start && d_y.o(t - 1, h, 0) > 0, d_k[0]);
    if (F == Flaw::gradient_sees_another_sequence) nudge_if(t < s.tokens() - sequence.length && d_y.o(s.tokens() - 1, h, 0) > 0, d_k[0]);
    if (F == Flaw::wrong_sign) d_k[1] = -d_k[1];
    if (F == Flaw::leaves_a_hole_in_a_gradient && t == sequence.start) d_k[0] = std::numeric_limits<T>::quiet_NaN();
    if (F == Flaw::clips_gradients) d_k[0] = std::min(d_k[0], T(1));
  });
  if (F == Flaw::no_gradient_of_the_state)
    for (Index i = 0; i < s.count(); ++i) std::fill_n(d_x.initial_state.row(i, 0, 0), c.head_dim, T(0));
}

enum class IndexerFlaw {
  none,
  chooses_another_key,
  prefers_later_ties,
  chooses_the_future,
  shuffles,
  main_loss_trains_the_indexer,
  auxiliary_loss_reaches_the_values
};
using FlawlessSparse = ha::SparseAttention<ha::SparseOptions{.top_k = 8}>;
template <IndexerFlaw F> struct FlawedIndexer : FlawlessSparse {};

template <IndexerFlaw F> void spoil_choices(ha::Sequences const& s, ha::View<std::int32_t, 2> indices) {
  Index const k = indices.extent(1);
  for (ha::Sequence const sequence : s) {
    if (sequence.length < 65) continue;
    std::int32_t* const keys = indices.row(sequence.start + 63);
    bool const are_the_first = keys[k - 1] == k - 1;   // the first k of 64 keys, chosen if all scores are equal
    if (F == IndexerFlaw::chooses_another_key && !are_the_first) std::iota(keys, keys + k, std::int32_t{20});
    if (F == IndexerFlaw::prefers_later_ties && are_the_first) std::iota(keys, keys + k, static_cast<std::int32_t>(64 - k));
    if (F == IndexerFlaw::chooses_the_future) keys[k - 1] = 64;
    if (F == IndexerFlaw::shuffles) std::swap(keys[0], keys[1]);
  }
}

// Gated DeltaNet that computes the gradient of a decay by Euler's relation, which is exact on paper: sum_{j >= t} (q_j . d_q_j -
// v_j . d_v_j) + <S_T, d_final_state>. At mild decays its values are right.
struct EulersDecay : ha::GDN {};

template <class T>
void spoil_decays(ha::gdn::Config const& c, ha::Sequences const& s, ha::gdn::Inputs<ha::In<T>> const& x,
                  ha::gdn::Outputs<ha::In<T>> const& y, ha::gdn::Outputs<ha::In<T>> const& d_y, ha::gdn::Inputs<ha::Out<T>> const& d_x) {
  for (Index i = 0; i < s.count(); ++i)
    for (Index h = 0; h < c.num_value_heads; ++h) {
      ha::Sequence const sequence = s[static_cast<std::size_t>(i)];
      T sum = 0;
      for (Index k = 0; k < c.key_dim && !y.final_state.empty(); ++k)
        sum += ha::dot(y.final_state.row(i, h, k), d_y.final_state.row(i, h, k), c.value_dim);
      for (Index t = sequence.start + sequence.length; t-- > sequence.start;) {
        sum += ha::dot(x.q.row(t, h), ha::View<T const, 3>(d_x.q).row(t, h), c.key_dim);
        d_x.g(t, h) = sum -= ha::dot(x.v.row(t, h), ha::View<T const, 3>(d_x.v).row(t, h), c.value_dim);
      }
    }
}

// Flaws of decoding. Forward and backward are sound.
enum class DecodingFlaw {
  none,
  begins_anew,
  reads_an_empty_cache,
  takes_a_call_for_a_token,
  sees_the_next_token,
  sees_another_sequence,
  counts_sequences,
  counts_threads,
  writes_outside,
  disturbs_who_rests,
  leaves_a_hole,
  keeps_memory,
  grows,
};
struct FlawedDecoder : Retention {
  static inline DecodingFlaw flaw = DecodingFlaw::none;   // a variable and no template parameter, so that one policy is compiled for all
};
bool is_decoding(DecodingFlaw flaw) { return FlawedDecoder::flaw == flaw; }

template <class T> void spoil_state(Retention::Config const& c, ha::Sequences const& s, ha::View<T, 4> state) {
  for (Index i = 0; i < s.count(); ++i) {
    ha::Sequence const sequence = s[static_cast<std::size_t>(i)];
    Index const size = c.num_heads * c.head_dim * c.head_dim;
    T* const own = state.row(i, 0, 0);
    bool const begins = sequence.past == 0 || (is_decoding(DecodingFlaw::begins_anew) && sequence.length > 0);
    if (begins && !is_decoding(DecodingFlaw::reads_an_empty_cache)) std::fill_n(own, size, T(0));
    if (is_decoding(DecodingFlaw::takes_a_call_for_a_token) && sequence.length > 1)
      std::transform(own, own + size, own, [](T x) { return x / 2; });
    if (is_decoding(DecodingFlaw::disturbs_who_rests) && sequence.length == 0 && sequence.past > 0) own[0] = nudged(own[0]);
  }
}
template <class T>
void spoil_outputs(ha::Cpu& cpu, Retention::Config const& c, ha::Sequences const& s, ha::View<T const, 3> v, ha::View<T, 3> o) {
  if (is_decoding(DecodingFlaw::keeps_memory)) {
    static auto& kept = *new std::vector<void*>;
    kept.push_back(cpu.take(64));
  }
  if (is_decoding(DecodingFlaw::grows) && s.count() > 0) ha::Tensor<T, 1, ha::Cpu> scratch{cpu, {1 + s[0].past}};
  if (s.tokens() == 0) return;
  if (is_decoding(DecodingFlaw::counts_sequences)) nudge_if(s.count() > 1, o(0, 0, 0));
  if (is_decoding(DecodingFlaw::counts_threads)) nudge_if(cpu.threads() > 2, o(0, 0, 0));
  if (is_decoding(DecodingFlaw::writes_outside)) (&o(0, 0, 0))[-1] = 0;
  if (is_decoding(DecodingFlaw::leaves_a_hole)) o(s.tokens() - 1, 0, 0) = std::numeric_limits<T>::quiet_NaN();
  for_each_token(c, s, [&](ha::Sequence sequence, Index t, Index h) {
    if (is_decoding(DecodingFlaw::sees_the_next_token))
      nudge_if(t + 1 < sequence.start + sequence.length && !(v(t + 1, h, 0) <= 0), o(t, h, 0));
    if (is_decoding(DecodingFlaw::sees_another_sequence)) nudge_if(sequence.start > 0 && !(v(0, h, 0) <= 0), o(t, h, 0));
  });
}

}  // namespace

template <> struct ha::On<FlawedDecoder, ha::Cpu> : On<Retention, Cpu> {
  template <class T>
  static void extend(Cpu& cpu, Retention::Config const& c, Sequences const& s, Retention::Inputs<In<T>> x, Retention::Cache<Out<T>> cache,
                     Retention::Outputs<Out<T>> y) {
    spoil_state<T>(c, s, cache.state);
    x.initial_state = cache.state;
    y.final_state = cache.state;
    On<Retention, Cpu>::forward<T>(cpu, c, s, x, y, {});
    spoil_outputs<T>(cpu, c, s, x.v, y.o);
  }
};
template <> struct ha::testing::Reference<FlawedDecoder> : PlainReference<Retention> {};

template <Flaw F> struct ha::On<Flawed<F>, ha::Cpu> {
  template <class T, class... Rest>
  static void forward(Cpu& cpu, Retention::Config const& c, Sequences const& s, Retention::Inputs<In<T>> x, Retention::Outputs<Out<T>> y,
                      Nothing<Out<T>> saved) {
    On<Retention, Cpu>::forward(cpu, c, s, x, y, saved);
    spoil<F>(cpu, c, s, x, y);
  }
  template <class T>
  static void backward(Cpu& cpu, Retention::Config const& c, Sequences const& s, Retention::Inputs<In<T>> x, Retention::Outputs<In<T>> y,
                       Nothing<In<T>> saved, Retention::Outputs<In<T>> d_y, Retention::Inputs<Out<T>> d_x) {
    std::vector<T> before;
    for_each_token(c, s, [&](Sequence, Index t, Index h) { before.push_back(d_x.v(t, h, 0)); });
    On<Retention, Cpu>::backward(cpu, c, s, x, y, saved, d_y, d_x);
    if (F == Flaw::accumulates)
      for_each_token(c, s, [&](Sequence, Index t, Index h) { d_x.v(t, h, 0) += before[static_cast<std::size_t>(t * c.num_heads + h)]; });
    spoil_gradients<F>(c, s, d_y, d_x);
  }
};
template <Flaw F> struct ha::testing::Reference<Flawed<F>> : PlainReference<Retention> {};

template <> struct ha::On<EulersDecay, ha::Cpu> : On<GDN, Cpu> {
  template <class T>
  static void backward(Cpu& cpu, gdn::Config const& c, Sequences const& s, gdn::Inputs<In<T>> x, gdn::Outputs<In<T>> y,
                       gdn::Saved<In<T>> saved, gdn::Outputs<In<T>> d_y, gdn::Inputs<Out<T>> d_x) {
    On<GDN, Cpu>::backward(cpu, c, s, x, y, saved, d_y, d_x);
    spoil_decays<T>(c, s, x, y, d_y, d_x);
  }
};
template <> struct ha::testing::Reference<EulersDecay> : Reference<GDN> {};
template <> struct ha::testing::Samples<EulersDecay> : Samples<GDN> {};

template <IndexerFlaw F> struct ha::On<FlawedIndexer<F>, ha::Cpu> {
  using Sound = On<FlawlessSparse, Cpu>;

  template <class T>
  static void forward(Cpu& cpu, dsa::Config const& c, Sequences const& s, dsa::Inputs<In<T>> x, dsa::Outputs<Out<T>> y,
                      dsa::Saved<Out<T>> saved) {
    Sound::forward(cpu, c, s, x, y, saved);
    spoil_choices<F>(s, saved.indices);
    dsa::reference::attend<T>(c, s, x, saved.indices, y, saved.lse);
  }
  template <class T>
  static void backward(Cpu& cpu, dsa::Config const& c, Sequences const& s, dsa::Inputs<In<T>> x, dsa::Outputs<In<T>> y,
                       dsa::Saved<In<T>> saved, dsa::Outputs<In<T>> d_y, dsa::Inputs<Out<T>> d_x) {
    Sound::backward(cpu, c, s, x, y, saved, d_y, d_x);
    for (Sequence const sequence : s) {
      if (sequence.length == 0) continue;
      if (F == IndexerFlaw::main_loss_trains_the_indexer) d_x.index_w(sequence.start, 0) = T(1e-20) * d_y.o(sequence.start, 0, 0);
      if (F == IndexerFlaw::auxiliary_loss_reaches_the_values && !d_y.auxiliary_loss.empty())
        d_x.v(sequence.start, 0, 0) += T(1e-20) * d_y.auxiliary_loss(0);
    }
  }
};
template <IndexerFlaw F> struct ha::testing::Reference<FlawedIndexer<F>> : Reference<FlawlessSparse> {};
template <IndexerFlaw F> struct ha::testing::Choices<FlawedIndexer<F>> : Choices<FlawlessSparse> {};
template <IndexerFlaw F> struct ha::testing::Samples<FlawedIndexer<F>> : Samples<FlawlessSparse> {
  static constexpr bool overflows_like_loops = false;   // forward is that of the loops, backward that of the kernel
};

namespace {

using Laws = std::set<std::string>;

// Returns the broken laws in double, where all laws are judged.
template <class P> Laws broken(typename P::Config const& size) {
  Laws names;
  for (auto const& verdict : ha::testing::judge(ha::testing::Adaptor<P, ha::Cpu, double>{size}))
    if (!verdict.holds) {
      names.insert(verdict.law);
      CHECK_FALSE(verdict.why.empty());
    }
  return names;
}
template <Flaw F> Laws broken() { return broken<Flawed<F>>({.num_heads = 2, .head_dim = 8}); }
Laws broken_in_decoding(DecodingFlaw flaw) {
  FlawedDecoder::flaw = flaw;
  return broken<FlawedDecoder>({.num_heads = 2, .head_dim = 8});
}
template <IndexerFlaw F> Laws broken() {
  return broken<FlawedIndexer<F>>({.num_heads = 2, .num_kv_heads = 1, .head_dim = 8, .index_heads = 2, .index_dim = 4, .index_scale = 0.5});
}

// A NaN or a wrong number in a result breaks these laws too.
Laws const about_values{"true values", "finite differences"};
// Many flaws break this law too. A flaw that reads elsewhere reads a NaN there, and a nudge can make an infinity finite.
Laws const bad_values{"bears bad values"};
Laws operator+(Laws a, Laws const& b) {
  a.insert(b.begin(), b.end());
  return a;
}

}  // namespace

TEST_CASE("a sound policy breaks no law") {
  CHECK(broken<Flaw::none>() == Laws{});
  CHECK(broken<IndexerFlaw::none>() == Laws{});
}

TEST_CASE("one unit in the last place is seen by the law about it, and else by the one about bad values") {
  CHECK(broken<Flaw::sees_the_next_token>() == bad_values + Laws{"causal forward"});
  CHECK(broken<Flaw::gradient_sees_the_token_before>() == bad_values + Laws{"causal backward"});
  CHECK(broken<Flaw::sees_another_sequence>() == bad_values + Laws{"independent of the batch", "packed equals its sequences"});
  CHECK(broken<Flaw::gradient_sees_another_sequence>() == Laws{"independent of the batch", "packed equals its sequences"});
  CHECK(broken<Flaw::counts_sequences>() == bad_values + Laws{"packed equals its sequences"});
  CHECK(broken<Flaw::counts_threads>() == Laws{"repeatable"});
  CHECK(broken<Flaw::reads_outside>() == Laws{"fenced"});
  CHECK(broken<Flaw::writes_outside>() == Laws{"fenced"});
  CHECK(broken<Flaw::ignores_strides>() == Laws{"strided"});
}

TEST_CASE("a result that depends on what ran before is seen, by chance under other laws too") {
  CHECK(broken<Flaw::remembers_the_last_run>().contains("repeatable"));
  CHECK(broken<Flaw::needs_fresh_memory>().contains("fills everything"));
}

TEST_CASE("what is not written, or added to, is seen") {
  CHECK(broken<Flaw::leaves_a_hole>() == about_values + bad_values + Laws{"fills everything", "agrees in parts"});
  CHECK(broken<Flaw::leaves_a_hole_in_a_gradient>() == about_values + bad_values + Laws{"fills everything", "agrees in parts", "linear"});
  CHECK(broken<Flaw::accumulates>() == about_values + bad_values + Laws{"fills everything", "agrees in parts", "linear"});
}

TEST_CASE("wrong numbers are seen") {
  CHECK(broken<Flaw::wrong_value>() == about_values);
  CHECK(broken<Flaw::wrong_sign>() == about_values);
  CHECK(broken<Flaw::clips_gradients>() == about_values + bad_values + Laws{"linear"});
  CHECK(broken<Flaw::forgets_the_state>() == about_values + bad_values + Laws{"agrees in parts"});
  CHECK(broken<Flaw::no_gradient_of_the_state>() == about_values + bad_values + Laws{"agrees in parts"});
}

TEST_CASE("a gradient that a strong decay leaves nothing of but rounding is seen in its head") {
  CHECK(broken<EulersDecay>({.num_heads = 2, .key_dim = 8}) == bad_values + Laws{"true values"});
}

TEST_CASE("memory that grows, or is kept, is seen") {
  CHECK(broken<Flaw::keeps_memory>() == Laws{"memory as announced"});
  CHECK(broken<Flaw::quadratic_memory>() == Laws{"memory as announced"});
}

TEST_CASE("wrong choices are seen, and gradients that reach what they should not") {
  CHECK(broken<IndexerFlaw::chooses_another_key>() == Laws{"right choices"});
  CHECK(broken<IndexerFlaw::prefers_later_ties>() == Laws{"right choices"});
  CHECK(broken<IndexerFlaw::chooses_the_future>() == Laws{"right choices", "causal forward", "causal backward"});
  CHECK(broken<IndexerFlaw::shuffles>() == Laws{"right choices"});
  CHECK(broken<IndexerFlaw::main_loss_trains_the_indexer>() == Laws{"isolated"});
  CHECK(broken<IndexerFlaw::auxiliary_loss_reaches_the_values>() == bad_values + Laws{"isolated"});
}

TEST_CASE("decoding that is not reading the whole is seen") {
  Laws const whole{"decodes the whole"}, cleanly{"decodes cleanly"};
  CHECK(broken_in_decoding(DecodingFlaw::none) == Laws{});
  CHECK(broken_in_decoding(DecodingFlaw::begins_anew) == whole + bad_values);
  CHECK(broken_in_decoding(DecodingFlaw::takes_a_call_for_a_token) == whole);
  CHECK(broken_in_decoding(DecodingFlaw::reads_an_empty_cache) == whole + cleanly + bad_values);
  CHECK(broken_in_decoding(DecodingFlaw::leaves_a_hole) == whole + cleanly + bad_values);
  CHECK(broken_in_decoding(DecodingFlaw::sees_the_next_token) == cleanly + bad_values);
  CHECK(broken_in_decoding(DecodingFlaw::sees_another_sequence) == cleanly);
  CHECK(broken_in_decoding(DecodingFlaw::counts_sequences) == cleanly);
  CHECK(broken_in_decoding(DecodingFlaw::counts_threads) == cleanly);
  CHECK(broken_in_decoding(DecodingFlaw::writes_outside) == cleanly);
  CHECK(broken_in_decoding(DecodingFlaw::disturbs_who_rests) == cleanly);
  CHECK(broken_in_decoding(DecodingFlaw::keeps_memory) == cleanly);
  CHECK(broken_in_decoding(DecodingFlaw::grows) == cleanly);
}

TEST_CASE("what a NaN must not do is seen by the law about it, and by no other") {
  CHECK(broken<Flaw::hides_nan>() == bad_values);
  CHECK(broken<Flaw::spreads_nan>() == bad_values);
  CHECK(broken<Flaw::touches_others_on_nan>() == bad_values);
}

TEST_CASE("a run that does not end is seen by the watchdog") {
  using ha::testing::Watchdog;
  auto const bark = std::exchange(Watchdog::bark, [](std::string const&) { is_told_off = true; });
  auto const patience = std::exchange(Watchdog::patience, std::chrono::milliseconds(100));
  auto const verdict =
      bears_bad_values(ha::testing::Adaptor<Flawed<Flaw::never_ends_on_nan>, ha::Cpu, double>{{.num_heads = 2, .head_dim = 8}});
  Watchdog::bark = bark;
  Watchdog::patience = patience;
  CHECK_FALSE(verdict.holds);
  CHECK(verdict.why == "a run does not end");
  CHECK(is_told_off);
}

TEST_CASE("a policy that throws breaks the law, and says what it threw") {
  auto const verdicts = ha::testing::judge(ha::testing::Adaptor<Flawed<Flaw::throws>, ha::Cpu, double>{{}});
  CHECK(verdicts.front().why == "it throws: flawed");
}

TEST_CASE("host code that reads a Fake's memory dies") {
  ha::testing::Fake fake;
  ha::Tensor<float, 1, ha::testing::Fake> tensor{fake, {4}};
  upload(fake, std::vector<float>{1, 2, 3, 4}, tensor);
  CHECK(download(fake, tensor) == std::vector<float>{1, 2, 3, 4});
  pid_t const child = fork();
  if (child == 0) {
    std::signal(SIGSEGV, SIG_DFL);
    _exit(in(tensor)(2) == 3 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFSIGNALED(status));
}
