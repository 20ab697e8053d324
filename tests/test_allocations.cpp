// A training step or a decoding step after the first one allocates no memory. operator new counts, so all containers are included.
#include "catch.hpp"

#include <hybridattn/hybridattn.hpp>

#include <atomic>
#include <cstdlib>
#include <new>

namespace ha = hybridattn;

namespace {

std::atomic<long> allocations = 0;

void* counted_allocation(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  if (void* block = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)) return block;
  throw std::bad_alloc();
}

[[gnu::noinline]] void release(void* block) { std::free(block); }

}  // namespace

void* operator new(std::size_t bytes) { return counted_allocation(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return counted_allocation(bytes, static_cast<std::size_t>(alignment)); }
void operator delete(void* block) noexcept { release(block); }
void operator delete(void* block, std::size_t) noexcept { release(block); }
void operator delete(void* block, std::align_val_t) noexcept { release(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { release(block); }

TEST_CASE("a training step after the first allocates nothing", "[laws]") {
  using Stack = ha::Stack<ha::GDN, ha::Full, ha::SparseAttention<ha::SparseOptions{.top_k = 5}>>;
  ha::Cpu cpu{2};
  ha::LanguageModel<Stack> const model{
      {.vocab_size = 256, .model_dim = 64, .num_heads = 2, .feed_forward = {.num_experts = 4, .shared_dim = 0, .decoder_sparse_step = 2}}};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params};
  ha::RecallTask task{ha::Seed{1}};
  auto batch = make_batch(cpu, task.next_batch(2, 64));
  train_step(cpu, model, params, optimizer, batch);
  ha::Batch next;
  task.next_batch(2, 64, next);
  for (int step = 0; step < 3; ++step) {
    task.next_batch(2, 64, next);   // other tokens, so that each expert gets another number of tokens
    refill(cpu, batch, next.tokens, next.targets);
    long const before = allocations;
    auto const result = train_step(cpu, model, params, optimizer, batch);
    long const after = allocations;
    CHECK(result.loss.count > 0);
    CHECK(after - before == 0);
  }
}

TEST_CASE("a decoding step after the first allocates nothing", "[laws]") {
  using Stack = ha::Stack<ha::GDN, ha::FullAttention<ha::FullOptions{.window = 9}>, ha::SparseAttention<ha::SparseOptions{.top_k = 5}>>;
  ha::Cpu cpu{2};
  ha::LanguageModel<Stack> const model{{.vocab_size = 256, .model_dim = 64, .num_heads = 2, .feed_forward = {.num_experts = 4}}};
  auto const params = model.initialize<float>(cpu, ha::Seed{1});
  auto cache = ha::make_cache<float>(cpu, model, {.batch = 2, .capacity = 40});
  extend_to_last(cpu, model, params, {{1, 2, 3}, {4}}, cache);
  ha::TokenLists next{{5}, {6}};
  extend_to_last(cpu, model, params, next, cache);
  for (int step = 0; step < 20; ++step) {
    next[0][0] = next[1][0] = step;
    long const before = allocations;
    auto const logits = extend_to_last(cpu, model, params, next, cache);
    CHECK(allocations - before == 0);
    CHECK(logits.shape()[0] == 2);
  }
}
