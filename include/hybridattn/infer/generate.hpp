// Text goes on: the prompts at once, then one token of each sequence a step.
#ifndef HYBRIDATTN_INFER_GENERATE_HPP
#define HYBRIDATTN_INFER_GENERATE_HPP

#include <hybridattn/infer/extend.hpp>
#include <hybridattn/infer/sampling.hpp>

#include <ctime>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct GenerateOptions {
  Index max_new_tokens = 128;                    // of each sequence
  SamplingOptions sampling = {};
  Seed seed = {};                                // sequence i draws what it would draw alone with seed + i
  std::vector<std::int32_t> stop_tokens = {};    // each ends a sequence, and is its last token

  // Throws on numbers that mean nothing.
  void check_numbers() const {
    constexpr Index most = std::numeric_limits<std::int32_t>::max();
    check(0 <= max_new_tokens && max_new_tokens <= most, "generate: max_new_tokens ", max_new_tokens,
          " is not allowed; it must be in 0 .. ", most);
    sampling.check_numbers();
  }
};

// What is new of each sequence, and what it took.
struct Generated {
  TokenLists tokens;
  Index prefill_tokens = 0, decode_tokens = 0;   // that went through the model, in the first call and in the steps after it
  double prefill_seconds = 0, decode_seconds = 0;
};

// Goes on with every sequence to its end.
struct KeepGoing {
  bool operator()(Index, std::int32_t) const { return true; }
};

namespace infer {

// Includes of <chrono> would take a tenth of the time that this library costs the compiler.
class Stopwatch {
 public:
  double seconds() const { return now() - start_; }

 private:
  static double now() {
    std::timespec time = {};
#if defined(__linux__)
    clock_gettime(CLOCK_MONOTONIC, &time);
#else
    std::timespec_get(&time, TIME_UTC);
#endif
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  double start_ = now();
};

// The tokens that each sequence gives to the model next; a sequence without any has ended.
template <class OnToken> class Generation {
 public:
  // No sequence has room for more than `capacity` tokens.
  Generation(TokenLists const& prompts, GenerateOptions const& options, Index capacity, OnToken& on_token)
      : options_(options), on_token_(on_token), next_(prompts), tokens_(prompts.size()) {
    options.check_numbers();
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      reserve(tokens_[i], std::min(options.max_new_tokens, capacity + 1), "max_new_tokens");   // the last one needs no room
      samplers_.emplace_back(options.sampling, Seed{options.seed.value + i});
    }
  }
  TokenLists const& next() const { return next_; }
  TokenLists& tokens() { return tokens_; }
  Index count() const {
    Index sum = 0;
    for (auto const& of_sequence : next_) sum += std::ssize(of_sequence);
    return sum;
  }
  // A row of logits [V] for each sequence that has not ended.
  template <class T> void draw(std::span<T const> logits, std::size_t vocab_size) {
    std::size_t row = 0;
    for (std::size_t i = 0; i < next_.size(); ++i) {
      if (next_[i].empty()) continue;
      std::int32_t const token = samplers_[i](logits.subspan(row++ * vocab_size, vocab_size));
      tokens_[i].push_back(token);
      bool const wanted = on_token_(static_cast<Index>(i), token), stops = std::ranges::count(options_.stop_tokens, token) > 0;
      next_[i].assign(std::size_t{wanted && !stops}, token);
    }
  }

 private:
  GenerateOptions const& options_;
  OnToken& on_token_;
  TokenLists next_, tokens_;
  std::vector<Sampler> samplers_;
};

}  // namespace infer

// Continues the sequences of a cache: prompts[i] is new to sequence i, which rests if it is empty. on_token(sequence, token)
// sees every token as it is drawn, and returns whether that sequence goes on. The last token of each is not yet in the cache.
// Throws on options and logits that make no sense, and where a sequence outgrows the cache.
template <class Stack, class T, class B, class OnToken = KeepGoing>
Generated generate(B& backend, LanguageModel<Stack> const& model, typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params,
                   Cache<Stack, T, B>& cache, TokenLists const& prompts, GenerateOptions const& options = {}, OnToken on_token = {}) {
  infer::Generation<OnToken> generation{prompts, options, cache.capacity(), on_token};
  Generated result;
  std::vector<T> host;
  for (Index step = 0; step < options.max_new_tokens && generation.count() > 0; ++step) {
    infer::Stopwatch const watch;
    Index const count = generation.count();
    auto const logits = extend_to_last(backend, model, params, generation.next(), cache);
    resize(host, logits.shape().count(), "a copy of the logits");
    backend.download(host.data(), in(logits).data, logits.byte_count());
    generation.draw(std::span<T const>(host), static_cast<std::size_t>(logits.shape()[1]));
    (step == 0 ? result.prefill_tokens : result.decode_tokens) += count;
    (step == 0 ? result.prefill_seconds : result.decode_seconds) += watch.seconds();
  }
  result.tokens = std::move(generation.tokens());
  return result;
}

// From the beginning, with a cache of its own that has room for all.
template <class Stack, class B, class Params, class OnToken = KeepGoing>
Generated generate(B& backend, LanguageModel<Stack> const& model, Params const& params, TokenLists const& prompts,
                   GenerateOptions const& options = {}, OnToken on_token = {}) {
  using T = std::remove_const_t<typename decltype(in(params.embedding))::Element>;
  options.check_numbers();
  check(!prompts.empty(), "generate: there are no prompts");
  Index longest = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    check(!prompts[i].empty(), "generate: prompt ", i, " is empty; a model goes on from at least one token");
    longest = std::max(longest, static_cast<Index>(std::ssize(prompts[i])));
  }
  auto cache = make_cache<T>(backend, model, {.batch = std::ssize(prompts), .capacity = longest + options.max_new_tokens});
  return generate(backend, model, params, cache, prompts, options, on_token);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
