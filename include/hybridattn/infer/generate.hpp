// Continues texts: first all tokens of the prompts in one step, then one token of each sequence a step.
#ifndef HYBRIDATTN_INFER_GENERATE_HPP
#define HYBRIDATTN_INFER_GENERATE_HPP

#include <hybridattn/infer/extend.hpp>
#include <hybridattn/infer/sampling.hpp>

#include <ctime>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct GenerateOptions {
  Index max_new_tokens = 128;                    // of each sequence
  SamplingOptions sampling = {};
  Seed seed = {};                                // sequence i draws the tokens that it draws alone with seed + i
  std::vector<std::int32_t> stop_tokens = {};    // such a token ends its sequence, as its last token

  // Throws Error on numbers that are not allowed.
  void check_numbers() const {
    constexpr Index most = std::numeric_limits<std::int32_t>::max();
    check(0 <= max_new_tokens && max_new_tokens <= most, "generate: max_new_tokens ", max_new_tokens,
          " is not allowed; it must be in 0 .. ", most);
    sampling.check_numbers();
  }
};

// The new tokens of each sequence, and the time for them.
struct Generated {
  TokenLists tokens;
  Index prefill_tokens = 0, decode_tokens = 0;   // tokens that the model computed in the first step, and in the later steps
  double prefill_seconds = 0, decode_seconds = 0;
};

// The default on_token: no sequence ends early.
struct KeepGoing {
  bool operator()(Index, std::int32_t) const { return true; }
};

namespace infer {

// Without <chrono>, whose include would take a tenth of this library's compile time.
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

// The state of a generation: next() are each sequence's tokens for the model's next step. A sequence without such tokens has ended.
template <class OnToken> class Generation {
 public:
  // `capacity` is the number of tokens that a sequence has room for in the cache.
  Generation(TokenLists const& prompts, GenerateOptions const& options, Index capacity, OnToken& on_token)
      : options_(options), on_token_(on_token), next_(prompts), tokens_(prompts.size()) {
    options.check_numbers();
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      reserve(tokens_[i], std::min(options.max_new_tokens, capacity + 1), "max_new_tokens");   // the last token is not in the cache
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
  // Draws a token for each sequence that has not ended. logits has a row [V] for each of these sequences.
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

// Continues the sequences of a cache by prompts[i] and new tokens. A sequence with an empty prompt is not continued. generate calls
// on_token(sequence, token) for every drawn token; the sequence ends where on_token returns false. The last token of a sequence is
// not yet in the cache. Throws Error on options and logits that are not allowed, and where a sequence exceeds the cache's capacity.
template <class Stack, class T, class B, class OnToken = KeepGoing>
Generated generate(B& backend, LanguageModel<Stack> const& model, typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params,
                   Cache<Stack, T, B>& cache, TokenLists const& prompts, GenerateOptions const& options = {}, OnToken on_token = {}) {
  infer::Generation<OnToken> generation{prompts, options, cache.capacity(), on_token};
  Generated result;
  std::vector<wide_t<T>> host;
  for (Index step = 0; step < options.max_new_tokens && generation.count() > 0; ++step) {
    infer::Stopwatch const watch;
    Index const count = generation.count();
    auto const logits = extend_to_last(backend, model, params, generation.next(), cache);
    resize(host, logits.shape().count(), "a copy of the logits");
    backend.download(host.data(), in(logits).data, logits.byte_count());
    generation.draw(std::span<wide_t<T> const>(host), static_cast<std::size_t>(logits.shape()[1]));
    (step == 0 ? result.prefill_tokens : result.decode_tokens) += count;
    (step == 0 ? result.prefill_seconds : result.decode_seconds) += watch.seconds();
  }
  result.tokens = std::move(generation.tokens());
  return result;
}

// The same for new sequences, with a cache of its own that is large enough. Throws Error also for an empty prompt.
template <class Stack, class B, class Params, class OnToken = KeepGoing>
Generated generate(B& backend, LanguageModel<Stack> const& model, Params const& params, TokenLists const& prompts,
                   GenerateOptions const& options = {}, OnToken on_token = {}) {
  using T = std::remove_const_t<typename decltype(in(params.embedding))::Element>;
  options.check_numbers();
  check(!prompts.empty(), "generate: there are no prompts");
  Index longest = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    check(!prompts[i].empty(), "generate: prompt ", i, " is empty; a prompt has at least one token");
    longest = std::max(longest, static_cast<Index>(std::ssize(prompts[i])));
  }
  auto cache = make_cache<T>(backend, model, {.batch = std::ssize(prompts), .capacity = longest + options.max_new_tokens});
  return generate(backend, model, params, cache, prompts, options, on_token);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
