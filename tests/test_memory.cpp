// Which sizes, threads and memory a caller may ask for. If something does not fit, an Error says what.
#include "catch.hpp"
#include "error_of.hpp"
#include "in_child.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/infer/generate.hpp>

#include <map>
#include <sys/resource.h>

namespace ha = hybridattn;
using ha::Index;

namespace {

using Small = ha::LanguageModel<ha::Stack<ha::GDN, ha::Full>>;
constexpr Index far = std::numeric_limits<Index>::max();

// A machine with a known amount of memory.
struct System {
  std::size_t room = std::numeric_limits<std::size_t>::max();
  std::map<void*, std::size_t> blocks = {};
  std::size_t held = 0, next = 64, released = 0;

  auto allocate() {
    return [this](std::size_t bytes) -> void* {
      if (bytes > room - held) return nullptr;
      void* const block = reinterpret_cast<void*>(next);
      next += bytes;
      held += bytes;
      blocks[block] = bytes;
      return block;
    };
  }
  auto release() {
    return [this](void* block, std::size_t bytes) {
      ++released;
      CHECK(blocks.at(block) == bytes);
      held -= bytes;
      blocks.erase(block);
    };
  }
};
// Blocks of a pool on such a machine.
struct User {
  System system;
  ha::Pool pool;

  void* take(std::size_t bytes) { return pool.take(bytes, system.allocate(), system.release(), system.room); }
  void use(std::size_t bytes) { pool.give(take(bytes), bytes); }
  void trim() { pool.trim(system.release()); }
};

// Takes and gives blocks as a training step does. Each layer keeps some blocks until backward and works with others meanwhile. Then there
// is one small block for each parameter.
void step(User& user, int layers, std::size_t unit, int parameters) {
  std::vector<std::pair<void*, std::size_t>> kept;
  auto const keep = [&](std::size_t bytes) { kept.emplace_back(user.take(bytes), bytes); };
  for (int layer = 0; layer < layers; ++layer) {
    for (std::size_t part = 1; part <= 8; ++part) keep(unit * part);
    for (int work = 0; work < 20; ++work) user.use(unit * (work % 2 == 0 ? 40 : 41));
  }
  user.use(unit * 300);
  while (!kept.empty()) {
    for (int work = 0; work < 5; ++work) user.use(unit * (work % 2 == 0 ? 40 : 90));
    user.pool.give(kept.back().first, kept.back().second);
    kept.pop_back();
  }
  for (int i = 0; i < parameters; ++i) user.use(static_cast<std::size_t>(8 * (1 + i % 100)));
}

template <class Model> void train(ha::Cpu& cpu, Model const& model, auto& params, auto& optimizer, Index length) {
  std::vector<std::int32_t> const tokens(static_cast<std::size_t>(length), 7), targets(static_cast<std::size_t>(length), 9);
  train_step(cpu, model, params, optimizer, make_batch(cpu, ha::Sequences::equal(1, length), tokens, targets));
}

}  // namespace

TEST_CASE("a block has its size or up to an eighth more, and sizes are numbered without a gap") {
  std::size_t last = 0;
  for (std::size_t bytes = 1; bytes <= 100'000; ++bytes) {
    ha::BlockSize const size{bytes};
    REQUIRE(size.bytes >= bytes);
    REQUIRE(size.bytes % 64 == 0);
    REQUIRE((bytes <= 512 ? size.bytes < bytes + 64 : 8 * (size.bytes - bytes) < bytes));
    REQUIRE((size.number == last || size.number == last + 1));
    REQUIRE(ha::BlockSize{size.bytes}.number == size.number);
    last = size.number;
  }
  CHECK(ha::BlockSize{0}.bytes == 64);
  CHECK(ha::BlockSize{ha::BlockSize::largest}.bytes == ha::BlockSize::largest);
  CHECK(ha::BlockSize{ha::BlockSize::largest}.number == ha::BlockSize::classes - 1);
}

TEST_CASE("equal steps allocate nothing after the first, and release nothing, however many takes they have") {
  int const layers = GENERATE(1, 3, 48, 200), parameters = GENERATE(0, 30, 3000);
  User user;
  for (int i = 0; i < 3 * parameters; ++i) user.take(8);   // parameters and moments
  step(user, layers, 1000, parameters);
  auto const allocations = user.pool.allocations();
  for (int i = 0; i < 20; ++i) step(user, layers, 1000, parameters);
  CHECK(user.pool.allocations() == allocations);
  CHECK(user.system.released == 0);
}

TEST_CASE("steps that use a hundred sizes, one after the other, allocate each of them once") {
  User user;
  auto const one_step = [&] {
    for (std::size_t size = 0, bytes = 1'000'000; size < 100; ++size, bytes = bytes * 11 / 10) user.use(bytes);
  };
  one_step();
  auto const allocations = user.pool.allocations();
  for (int i = 0; i < 20; ++i) one_step();
  CHECK(user.pool.allocations() == allocations);
}

TEST_CASE("takes of two sizes in turn, more than 1.5 times what is in use at once, allocate two blocks") {
  User user;
  for (int i = 0; i < 100'000; ++i) user.use(i % 2 == 0 ? 10'000'000 : 9'000'000);
  CHECK(user.pool.allocations() == 2);
}

TEST_CASE("blocks that nobody uses go back to the system") {
  SECTION("behind other sizes") {
    User user;
    step(user, 10, 100'000, 10);
    auto const large = user.pool.held();
    for (std::size_t unit = 1000; unit < 1300; unit += 10) step(user, 10, unit, 10);
    CHECK(user.pool.held() < large / 10);
  }
  SECTION("while all takes are served") {
    User user;
    step(user, 10, 100'000, 10);
    auto const large = user.pool.held();
    step(user, 2, 1000, 10);
    for (int i = 0; i < 2000 && user.pool.held() > large / 10; ++i) step(user, 2, 1000, 10);
    CHECK(user.pool.held() < large / 10);
  }
  SECTION("after one large block, within two hundred takes") {
    User user;
    user.use(1'000'000'000);
    for (int i = 0; i < 202; ++i) user.use(1000);
    CHECK(user.pool.held() < 2000);
  }
  SECTION("by trim, whose blocks in use stay") {
    User user;
    step(user, 10, 1000, 10);
    void* const mine = user.take(5000);
    user.trim();
    CHECK(user.pool.held() == ha::BlockSize{5000}.bytes);
    CHECK(user.system.held == user.pool.held());
    user.pool.give(mine, 5000);
    user.trim();
    CHECK(user.pool.held() == 0);
    CHECK(user.system.blocks.empty());
    CHECK(user.pool.in_use() == 0);
  }
}

TEST_CASE("steps of random sizes hold a few times what is in use") {
  User user;
  ha::Random random{ha::Seed{1}};
  std::size_t most = 0;
  for (int i = 0; i < 1000; ++i) {
    step(user, 4, 100 + static_cast<std::size_t>(random.below(10'000)), 10);
    if (i >= 20) most = std::max(most, user.pool.held());
  }
  CHECK(most < 10 * user.pool.peak());
  CHECK(user.system.held == user.pool.held());
}

TEST_CASE("a pool counts in use what was asked for") {
  User user;
  void *const a = user.take(1), *const b = user.take(1001);
  CHECK(user.pool.in_use() == 1002);
  user.pool.give(a, 1);
  CHECK(user.pool.in_use() == 1001);
  CHECK(user.pool.peak() == 1002);
  user.pool.reset_peak();
  CHECK(user.pool.peak() == 1001);
  CHECK(user.pool.held() == 64 + 1024);
  user.pool.give(b, 1001);
}

TEST_CASE("memory that is short: what waits goes back first, then the error says how much was asked") {
  User user;
  user.system.room = 10'000;
  void* const kept = user.take(1000);
  user.use(4000);
  user.use(3000);   // the pool now holds 1024 + 4096 + 3072
  user.use(8000);   // fits only after the pool has returned the free blocks
  CHECK(user.pool.held() == 1024 + 8192);
  for (int i = 0; i < 2; ++i)
    CHECK(error_of([&] { user.take(9000); }) ==
          "out of memory: 9000 bytes did not fit beside 1000 bytes in use, 1024 held; the limit is 10000");
  CHECK(user.pool.in_use() == 1000);
  CHECK(user.pool.held() == 1024);
  user.pool.give(kept, 1000);
  user.use(9000);
  CHECK(says(error_of([&] { user.take(std::numeric_limits<std::size_t>::max()); }), {"out of memory: 18446744073709551615 bytes"}));
}

TEST_CASE("training with random lengths holds a few times what is in use, and decoding gives it back") {
  ha::Cpu cpu{1};
  Small const model{{.vocab_size = 64, .model_dim = 16, .num_heads = 2}};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params};
  ha::Random random{ha::Seed{2}, "lengths"};
  std::size_t most = 0;
  for (int i = 0; i < 150; ++i) {
    train(cpu, model, params, optimizer, 1 + random.below(256));
    most = std::max(most, cpu.pool().held());
  }
  CHECK(cpu.pool().peak() > 1'000'000);
  CHECK(most < 4 * cpu.pool().peak());
  cpu.trim();
  CHECK(cpu.pool().held() < cpu.pool().in_use() * 9 / 8 + 64 * 200);
  train(cpu, model, params, optimizer, 100);
  auto const allocations = cpu.pool().allocations();
  for (int i = 0; i < 5; ++i) train(cpu, model, params, optimizer, 100);
  CHECK(cpu.pool().allocations() == allocations);
}

TEST_CASE("products and sums of sizes are exact, or an error that names them") {
  CHECK(ha::size_product(3, 0, 5) == 0);
  CHECK(ha::size_product(far, 1) == far);
  CHECK(ha::size_sum(far - 1, 1) == far);
  CHECK(ha::ceil_div(far, 2) == far / 2 + 1);
  CHECK(ha::ceil_div(far, far) == 1);
  CHECK(ha::ceil_div(0, 7) == 0);
  Index const large = Index{1} << 62;
  CHECK(says(error_of([&] { ha::size_product(large, 8); }), {"[4611686018427387904, 8]", "their product is too large"}));
  CHECK(says(error_of([&] { ha::Shape<3>{0, large, 8}.count(); }), {"[0, 4611686018427387904, 8]"}));
  CHECK(says(error_of([&] { ha::Shape<3>{large, 8, 0}.count(); }), {"[4611686018427387904, 8, 0]"}));
  CHECK(says(error_of([&] { ha::Shape<2>{-3, 8}.count(); }), {"[-3, 8]", "below 0"}));
  CHECK(says(error_of([&] { ha::Shape<2>{-1, -1}.count(); }), {"[-1, -1]", "below 0"}));
  CHECK(says(error_of([&] { ha::Shape<1>{std::uint64_t{1} << 63}.count(); }), {"below 0"}));
  CHECK(says(error_of([&] { ha::size_sum(far, 1); }), {"9223372036854775807 and 1"}));
  CHECK(says(error_of([&] { ha::byte_count(large, 2); }), {"4611686018427387904 elements of 2 bytes"}));
  CHECK(says(error_of([&] { ha::byte_count(-1, 4); }), {"-1 elements"}));
}

TEST_CASE("a tensor or scratch that cannot be is refused: sizes that wrap, sizes below 0, more than the machine has") {
  ha::Cpu cpu{1};
  using Matrix = ha::Tensor<float, 2, ha::Cpu>;
  Index const large = Index{1} << 62;
  CHECK(says(error_of([&] { Matrix{cpu, {large, 8}}; }), {"[4611686018427387904, 8]"}));
  CHECK(says(error_of([&] { Matrix{cpu, {large, 1}}; }), {"4611686018427387904 elements of 4 bytes"}));
  CHECK(says(error_of([&] { Matrix{cpu, {-3, 8}}; }), {"[-3, 8]"}));
  CHECK(error_of([&] { Matrix{cpu, {Index{1} << 40, 8}}; }) ==
        "out of memory: 35184372088832 bytes did not fit beside 0 bytes in use, 0 held; the limit is " +
            std::to_string(ha::machine_memory()));
  CHECK(says(error_of([&] { ha::cpu::Scratch<double>{cpu, Index{1} << 61}; }), {"2305843009213693952 elements of 8 bytes"}));
  CHECK(says(error_of([&] { ha::cpu::Scratch<double>{cpu, -1}; }), {"-1 elements"}));
  CHECK(says(error_of([&] { ha::cpu::Scratch<double>{cpu, Index{1} << 50}; }), {"9007199254740992 bytes did not fit"}));
  CHECK(says(error_of([&] { cpu.take(ha::machine_memory() + 1); }), {"did not fit"}));
  Matrix const fits{cpu, {3, 5}};
  CHECK(cpu.pool().in_use() == 60);
}

TEST_CASE("a limit of the process shows as an error too") {
  int const code = in_child([] {
    rlimit const limit{Index{1} << 30, Index{1} << 30};
    setrlimit(RLIMIT_AS, &limit);
    ha::Cpu cpu{1};
    std::string const tensor = error_of([&] { ha::Tensor<float, 1, ha::Cpu>{cpu, {Index{1} << 29}}; });
    std::string const list = error_of([&] { ha::Batch{}.resize(1, Index{1} << 29); });
    bool const right =
        says(tensor, {"out of memory: 2147483648 bytes did not fit"}) && says(list, {"2147483648 bytes for a batch's tokens"});
    return right ? 0 : 1;
  });
  CHECK(code == 0);
}

TEST_CASE("a model whose sizes wrap is refused") {
  using Mixture = ha::LanguageModel<ha::Stack<ha::Full>>;
  Index const large = Index{1} << 61;
  auto const refused = [](auto config, std::initializer_list<char const*> parts) {
    std::string const error = error_of([&] { ha::LanguageModel<ha::Stack<ha::GDN, ha::Full>>{config}; });
    INFO(error);
    CHECK(says(error, parts));
  };
  auto const full = [](ha::full::Config c) {
    Small::Config config{.vocab_size = 64, .model_dim = 8, .num_heads = 2};
    config.policy<ha::Full>() = c;
    return config;
  };
  auto const gdn = [](ha::gdn::Config c) {
    Small::Config config{.vocab_size = 64, .model_dim = 8, .num_heads = 2};
    config.policy<ha::GDN>() = c;
    return config;
  };
  refused(Small::Config{.vocab_size = Index{1} << 62, .model_dim = 8, .num_heads = 2}, {"vocab_size 4611686018427387904"});
  refused(Small::Config{.vocab_size = Index{1} << 31, .model_dim = 8, .num_heads = 2}, {"vocab_size 2147483648", "2147483647"});
  refused(Small::Config{.vocab_size = 64, .model_dim = large, .num_heads = 2}, {"2305843009213693952"});
  refused(Small::Config{.vocab_size = 64, .model_dim = Index{1} << 40, .num_heads = 2}, {"1099511627776"});
  refused(full({.num_heads = large, .num_kv_heads = 1, .head_dim = 8}), {"2305843009213693952, 8"});
  refused(full({.num_heads = large, .num_kv_heads = large, .head_dim = 4}), {"2305843009213693952, 4"});
  refused(full({.num_heads = 2, .num_kv_heads = 1, .head_dim = large}), {"blocks.1.attention.w.q: ", "[4611686018427387904, 8]"});
  refused(full({.num_heads = 2, .num_kv_heads = 1, .head_dim = -8}), {"-8"});
  refused(gdn({.num_heads = large, .num_value_heads = large, .key_dim = 8, .value_dim = 8}), {"2305843009213693952, 8"});
  refused(gdn({.num_heads = 2, .num_value_heads = 2, .key_dim = 8, .value_dim = large}),
          {"blocks.0.attention.w.v: ", "[4611686018427387904, 8]"});
  refused(gdn({.num_heads = 2, .num_value_heads = 2, .key_dim = -8, .value_dim = 8}), {"-8"});
  auto const mixture = [](ha::FeedForwardConfig c) {
    return error_of([&] { Mixture{{.vocab_size = 64, .model_dim = 8, .num_heads = 2, .feed_forward = c}}; });
  };
  CHECK(says(mixture({.hidden_dim = large}), {"2305843009213693952, 8"}));
  CHECK(says(mixture({.num_experts = large, .top_k = 1}), {"2305843009213693952"}));
  CHECK(says(mixture({.num_experts = Index{1} << 30, .top_k = 1, .expert_dim = Index{1} << 30}), {"1073741824, 1073741824, 8"}));
  CHECK(says(mixture({.num_experts = 4, .top_k = 1, .shared_dim = large}), {"2305843009213693952, 8"}));
  CHECK(says(mixture({.num_experts = 1 << 20, .top_k = 1 << 20, .expert_dim = 1}), {no_error}));
}

TEST_CASE("numbers of parameters and bytes are exact near the limit") {
  using Model = ha::LanguageModel<ha::Stack<ha::Full>>;
  auto const model = [](Index hidden) {
    return Model{{.vocab_size = 1, .model_dim = 1, .num_heads = 1, .feed_forward = {.hidden_dim = hidden}}};
  };
  Index const hidden = Index{1} << 58, others = model(1).parameter_count() - 3;
  CHECK(model(hidden).parameter_count() == 3 * hidden + others);
  CHECK(ha::bytes<double>(model(hidden).params()) == 8 * static_cast<std::size_t>(3 * hidden + others));
  CHECK(says(error_of([&] { model(Index{1} << 59); }), {"elements of 8 bytes", "their bytes at most 9223372036854775807"}));
}

TEST_CASE("sequences beyond an int32 are refused before a table of them is made") {
  Index const large = Index{1} << 40;
  auto const list = [](Index n) { return std::vector<Index>{n}; };
  CHECK(says(error_of([&] { ha::Sequences::equal(large, large); }), {"[1099511627776, 1099511627776]"}));
  CHECK(says(error_of([&] { ha::Sequences::equal(large, 0); }), {"1099511627776 sequences", "2147483647"}));
  CHECK(says(error_of([&] { ha::Sequences::equal(1 << 20, 1 << 11); }), {"1048576 sequences of 2147483648 tokens"}));
  CHECK(says(error_of([&] { ha::Sequences::equal(1, -1); }), {"-1 tokens"}));
  CHECK(says(error_of([&] { ha::Sequences::packed(std::vector<Index>{0, large}); }), {"1 sequences of 1099511627776 tokens"}));
  CHECK(says(error_of([&] { ha::Sequences::packed(std::vector<Index>{0, large, 5}); }), {"5 follows 1099511627776"}));
  CHECK(says(error_of([&] { ha::Sequences::continuing(list(ha::largest_int32), list(1)); }), {"1 tokens after 2147483647"}));
  CHECK(says(error_of([&] { ha::Sequences::continuing(list(far), list(far)); }), {"9223372036854775807 and 9223372036854775807"}));
  CHECK(says(error_of([&] { ha::Sequences::continuing(list(-1), list(1)); }), {"1 tokens after -1"}));
  CHECK(ha::Sequences::continuing(list(ha::largest_int32 - 2), list(2)).positions()(1) == ha::largest_int32 - 1);
  CHECK(ha::Sequences::equal(0, far).tokens() == 0);
}

TEST_CASE("batches and texts that do not fit are refused") {
  ha::RecallTask task{ha::Seed{1}, {.vocab_size = 64, .pairs = 2}};
  Index const large = Index{1} << 33;
  CHECK(says(error_of([&] { task.next_batch(large, large); }), {"[8589934592, 8589934592]"}));
  CHECK(says(error_of([&] { task.next_batch(large, 1024); }), {"35184372088832 bytes for a batch's tokens"}));
  CHECK(says(error_of([&] { task.next_batch(1, far); }), {"9223372036854775807 elements"}));
  CHECK(says(error_of([&] { task.validation_batches(1, 1024, large); }), {"70368744177664 bytes for validation batches"}));
  CHECK(says(error_of([&] { task.validation_batches(far, 8, far); }), {"[9223372036854775807, 8]"}));
  CHECK(says(error_of([&] { ha::RecallTask(ha::Seed{1}, {.vocab_size = 64, .pairs = far / 2}); }), {"vocab_size 64"}));
  CHECK(says(error_of([&] { ha::RecallTask(ha::Seed{1}, {.vocab_size = large, .pairs = 2}); }), {"vocab_size 8589934592"}));
  ha::Windows text{ha::ByteText{std::string(1000, 'a')}};
  CHECK(says(error_of([&] { text.next_batch(far, far); }), {"too few"}));
  CHECK(text.validation_batches(far, 10, far).size() == 1);
}

TEST_CASE("more tokens than memory are refused before work") {
  ha::Cpu cpu{1};
  Small const model{{.vocab_size = 16, .model_dim = 8, .num_heads = 2}};
  auto const params = model.initialize<float>(cpu, ha::Seed{1});
  int drawn = 0;
  auto const after = [&](Index tokens, Index prompts = 1) {
    return error_of([&] {
      ha::TokenLists const lists(static_cast<std::size_t>(prompts), std::vector<std::int32_t>{1});
      generate(cpu, model, params, lists, {.max_new_tokens = tokens}, [&](Index, std::int32_t) { return ++drawn < 3; });
    });
  };
  CHECK(says(after(1'000'000'000'000), {"max_new_tokens 1000000000000 is not allowed", "2147483647"}));
  CHECK(says(after(far), {"max_new_tokens 9223372036854775807 is not allowed"}));
  CHECK(says(after(ha::largest_int32), {"capacity 2147483648 is not allowed", "2147483647"}));
  CHECK(says(after(2'000'000'000, 200), {"cache: capacity 2000000001 for 200 sequences", "out of memory", "did not fit"}));
  CHECK(drawn == 0);
  CHECK(after(3) == no_error);
  auto const cache = [&](Index batch, Index capacity) { return error_of([&] { ha::make_cache<float>(cpu, model, {batch, capacity}); }); };
  CHECK(says(cache(1, far), {"capacity 9223372036854775807"}));
  CHECK(says(cache(far, 1), {"batch 9223372036854775807"}));
  CHECK(says(cache(ha::largest_int32, ha::largest_int32), {"[2147483647, 2147483647, 2, 4]"}));
  CHECK(says(cache(1 << 16, 1 << 20), {"capacity 1048576 for 65536 sequences", "4398", "did not fit"}));
  CHECK(says(cache(1, -1), {"capacity -1"}));
}

TEST_CASE("memory is taken before a loop: inside it is an error on any number of threads") {
  for (int threads : {1, 2}) {
    ha::Cpu cpu{threads};
    auto const take = [&](Index, int) { ha::Tensor<float, 1, ha::Cpu>{cpu, {100}}; };
    CHECK(says(error_of([&] { ha::parallel_for(cpu, 4, take); }), {"400 bytes are taken inside parallel_for"}));
    auto const nested = [&](Index, int) { ha::parallel_for(cpu, 2, [](Index, int) {}), take(0, 0); };
    CHECK(says(error_of([&] { ha::parallel_for(cpu, 4, nested); }), {"inside parallel_for"}));
    take(0, 0);
    CHECK(cpu.pool().in_use() == 0);
  }
}

