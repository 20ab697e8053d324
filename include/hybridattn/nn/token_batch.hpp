// The input of a model: tokens in sequences, on a machine.
#ifndef HYBRIDATTN_NN_TOKEN_BATCH_HPP
#define HYBRIDATTN_NN_TOKEN_BATCH_HPP

#include <hybridattn/tensor/sequences_on.hpp>

#include <algorithm>
#include <span>

namespace hybridattn::inline HYBRIDATTN_ABI {

// The smallest and the largest of a list of tokens or targets, and the first place of each. The host computes them before the
// upload, so a model checks its vocabulary without a download.
struct TokenRange {
  std::int32_t smallest = 0, largest = -1;
  Index place_of_smallest = 0, place_of_largest = 0;

  static TokenRange of(std::span<std::int32_t const> tokens) {
    if (tokens.empty()) return {};
    auto const smallest = std::ranges::min_element(tokens), largest = std::ranges::max_element(tokens);
    return {*smallest, *largest, smallest - tokens.begin(), largest - tokens.begin()};
  }
  void check_tokens(Index vocab_size) const {
    if (smallest < 0) refuse("token", smallest, place_of_smallest, vocab_size, "");
    if (largest >= vocab_size) refuse("token", largest, place_of_largest, vocab_size, "");
  }
  void check_targets(Index vocab_size) const {
    if (largest >= vocab_size) refuse("target", largest, place_of_largest, vocab_size, ", or < 0 for none");
  }

 private:
  [[gnu::cold, noreturn]] static void refuse(char const* what, std::int32_t number, Index place, Index vocab_size, char const* besides) {
    fail(what, " ", number, " at place ", place, " is not in the vocabulary; allowed: 0 .. ", vocab_size - 1, besides);
  }
};

// N tokens, and for each token its target: the token to predict, or a number below 0 for no target. make_batch makes a batch,
// refill fills it anew. The other members are computed on the host before the upload.
template <class B> struct TokenBatch {
  SequencesOn<B> sequences;
  Tensor<std::int32_t, 1, B> tokens, targets;  // [N]
  TokenRange token_range = {}, target_range = {};
  Index counted = 0;                           // tokens that have a target: their losses are scaled by 1 / counted for a mean
};

// Uploads other tokens [N] and targets [N] into the memory of a batch. Throws Error unless there are N > 0 of both.
template <class B>
void refill(B& backend, TokenBatch<B>& batch, std::span<std::int32_t const> tokens, std::span<std::int32_t const> targets) {
  check(std::ssize(tokens) == batch.sequences.tokens() && tokens.size() == targets.size(), "batch: ", tokens.size(), " tokens and ",
        targets.size(), " targets for sequences of ", batch.sequences.tokens(), " tokens");
  check(!tokens.empty(), "batch: it has no tokens; a batch holds at least 1");
  batch.token_range = TokenRange::of(tokens);
  batch.target_range = TokenRange::of(targets);
  batch.counted = std::ranges::count_if(targets, [](std::int32_t target) { return target >= 0; });
  upload(backend, tokens, batch.tokens);
  upload(backend, targets, batch.targets);
}
// Uploads a batch. targets[n] is the token that token n predicts, or a number below 0 for no target. Throws Error as refill does.
template <class B>
TokenBatch<B> make_batch(B& backend, Sequences sequences, std::span<std::int32_t const> tokens, std::span<std::int32_t const> targets) {
  Shape<1> const shape{sequences.tokens()};
  TokenBatch<B> batch{.sequences = {backend, std::move(sequences)}, .tokens = {backend, shape}, .targets = {backend, shape}};
  refill(backend, batch, tokens, targets);
  return batch;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
