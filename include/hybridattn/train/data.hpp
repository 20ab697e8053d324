// Sources of tokens for training: the bytes of a text, or a synthetic task. They use the host's memory only.
#ifndef HYBRIDATTN_TRAIN_DATA_HPP
#define HYBRIDATTN_TRAIN_DATA_HPP

#include <hybridattn/core/allowed.hpp>
#include <hybridattn/core/data_state.hpp>
#include <hybridattn/core/memory.hpp>
#include <hybridattn/core/random.hpp>
#include <hybridattn/io/escaped.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

inline constexpr std::int32_t no_target = -100;   // the target of a position that is not counted

// `batch` windows of `seq_len` tokens, one after the other; targets[i] is the token after tokens[i].
struct Batch {
  Index batch = 0, seq_len = 0;
  std::vector<std::int32_t> tokens, targets;   // [batch * seq_len]

  // Throws Error where memory is short.
  void resize(Index windows, Index length) {
    Index const count = size_product(windows, length);
    hybridattn::resize(tokens, count, "a batch's tokens");
    hybridattn::resize(targets, count, "a batch's targets");
    batch = windows;
    seq_len = length;
  }
  std::span<std::int32_t> tokens_of(Index window) { return part(std::span(tokens), window); }
  std::span<std::int32_t> targets_of(Index window) { return part(std::span(targets), window); }
  std::span<std::int32_t const> tokens_of(Index window) const { return part(std::span(tokens), window); }
  std::span<std::int32_t const> targets_of(Index window) const { return part(std::span(targets), window); }

 private:
  template <class T> std::span<T> part(std::span<T> all, Index window) const {
    return all.subspan(static_cast<std::size_t>(window * seq_len), static_cast<std::size_t>(seq_len));
  }
};

inline void check_batch_size(Index batch, Index seq_len) {
  check(batch >= 1, "batch ", batch, " is not allowed; it must be at least 1");
  check(seq_len >= 2, "seq_len ", seq_len, " is not allowed; it must be at least 2, a token and its target");
}
inline void check_validation(Index batch, Index seq_len, Index windows) {
  check_batch_size(batch, seq_len);
  check(windows >= 1, "validation over ", windows, " windows is not allowed; there must be at least 1");
}

// Throws when batches of `from` are not batches of `to`, and names both.
inline void check_same_data(DataState const& from, DataState const& to) {
  if (from.content != to.content)
    fail("the data is not the same: the state is of '", one_line(from.description), "', this source is '", one_line(to.description), "'",
         from.description == to.description ? ", with another content" : "");
  check(from.seed == to.seed, "the data's seed is not the same: the state's is ", from.seed, ", this source's is ", to.seed);
}

// Training batches without end, and the same validation windows each time.
class DataSource {
 public:
  virtual ~DataSource() = default;
  virtual Index vocab_size() const = 0;
  virtual std::string description() const = 0;
  // Writes into the caller's batch. It allocates nothing while the size stays the same.
  virtual void next_batch(Index batch, Index seq_len, Batch& into) = 0;
  // Starts again: the next batch is the first one.
  virtual void restart() = 0;
  // The position among the batches. `restore` continues there, in this process or in another one. It throws Error when the state is of
  // other data or of another seed.
  virtual DataState state() const = 0;
  virtual void restore(DataState const& state) = 0;
  // At most `windows` windows, in batches; the last one may be smaller.
  virtual std::vector<Batch> validation_batches(Index batch, Index seq_len, Index windows = 200) const = 0;

  Batch next_batch(Index batch, Index seq_len) {
    Batch result;
    next_batch(batch, seq_len, result);
    return result;
  }
};

// The bytes of a text as tokens 0 .. 255; the last 10 % are held out.
class ByteText {
 public:
  static constexpr Index vocab_size = 256;

  explicit ByteText(std::string_view text) {
    reserve(tokens_, std::ssize(text), "a text's tokens");
    for (char c : text) {
      tokens_.push_back(static_cast<unsigned char>(c));
      hash_ = (hash_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    }
  }
  // A hash of all bytes (FNV-1a).
  std::uint64_t hash() const { return hash_; }
  std::span<std::int32_t const> all() const { return tokens_; }
  std::span<std::int32_t const> train() const { return all().first(tokens_.size() - tokens_.size() / 10); }
  std::span<std::int32_t const> validation() const { return all().last(tokens_.size() / 10); }

 private:
  std::vector<std::int32_t> tokens_;
  std::uint64_t hash_ = 0xcbf29ce484222325u;
};

// A text's windows. Training windows start anywhere in the training part, uniformly; their last position has no target.
class Windows final : public DataSource {
 public:
  explicit Windows(ByteText text, Seed seed = {}, std::string name = "text")
      : text_(std::move(text)), seed_(seed), name_(std::move(name)) {}

  using DataSource::next_batch;
  Index vocab_size() const override { return ByteText::vocab_size; }
  std::string description() const override {
    auto const train = text_.train().size(), held_out = text_.validation().size();
    return name_ + ": " + std::to_string(train) + " bytes to train on, " + std::to_string(held_out) + " held out";
  }
  void next_batch(Index batch, Index seq_len, Batch& into) override {
    check_batch_size(batch, seq_len);
    auto const tokens = text_.train();
    auto const length = std::ssize(tokens);
    if (length / batch < seq_len)
      fail(one_line(name_), " has ", length, " bytes to train on (its first 90 %), too few for one batch of ", batch, " windows of ",
           seq_len);
    into.resize(batch, seq_len);
    for (Index window = 0; window < batch; ++window) copy(tokens, random_.below(length - seq_len + 1), into, window);
  }
  void restart() override { random_.jump_to(0); }
  DataState state() const override { return {description(), seed_.value, text_.hash(), random_.drawn()}; }
  void restore(DataState const& from) override {
    check_same_data(from, state());
    random_.jump_to(from.drawn);
  }
  // Evenly spaced over the held-out part, never overlapping.
  std::vector<Batch> validation_batches(Index batch, Index seq_len, Index windows = 200) const override {
    check_validation(batch, seq_len, windows);
    auto const tokens = text_.validation();
    auto const length = std::ssize(tokens);
    if (length < seq_len)
      fail(one_line(name_), " has ", length, " bytes to validate on (its last 10 %), too few for one window of ", seq_len);
    Index const count = std::min(windows, length / seq_len);
    check_memory(byte_count(size_product(count, seq_len), 2 * sizeof(std::int32_t)), "validation batches");
    std::vector<Batch> batches;
    for (Index first = 0; first < count; first += batch) {
      auto& into = batches.emplace_back();
      into.resize(std::min(batch, count - first), seq_len);
      for (Index i = 0; i < into.batch; ++i) copy(tokens, start(first + i, count, length - seq_len), into, i);
    }
    return batches;
  }

 private:
  // Window i of `count` between the first one at 0 and the last one at `last`.
  static Index start(Index i, Index count, Index last) {
    if (count == 1) return 0;
    Index const gaps = count - 1;
    return i * (last / gaps) + i * (last % gaps) / gaps;   // i * last / gaps, which a long text's last may overflow
  }
  static void copy(std::span<std::int32_t const> text, Index start, Batch& into, Index window) {
    auto const source = text.subspan(static_cast<std::size_t>(start), static_cast<std::size_t>(into.seq_len));
    auto const targets = into.targets_of(window);
    std::ranges::copy(source, into.tokens_of(window).begin());
    std::ranges::copy(source.subspan(1), targets.begin());
    targets.back() = no_target;
  }

  ByteText text_;
  Seed seed_;
  std::string name_;
  Random random_{seed_, "data"};
};

struct RecallOptions {
  Index vocab_size = 256;   // keys are 1 .. vocab_size/2 - 1, values the upper half
  Index pairs = 8;
};

// Multi-query associative recall (arXiv 2312.04927): key value key value ..., then each key once more, somewhere; there
// the model is to name its value. Only these positions have a target. Short distances are likelier, as in the paper; the
// tokens between are drawn from the values, so that no key stands anywhere else.
class RecallTask final : public DataSource {
 public:
  explicit RecallTask(Seed seed = {}, RecallOptions options = {}) : options_(options), seed_(seed) {
    check_at_least("recall", "pairs", options.pairs, 1);
    check_at_least("recall", "vocab_size", options.vocab_size, 4);
    check(options.vocab_size <= std::numeric_limits<std::int32_t>::max(), "recall: vocab_size ", options.vocab_size,
          " is not allowed; it must be at most ", std::numeric_limits<std::int32_t>::max(), ", since a token is a std::int32_t");
    check(options.pairs <= (options.vocab_size - 2) / 2, "recall: pairs ", options.pairs, " with vocab_size ", options.vocab_size,
          " is not allowed; a vocabulary has 2 tokens for each pair, and 2 more");
  }

  using DataSource::next_batch;
  Index vocab_size() const override { return options_.vocab_size; }
  std::string description() const override {
    return "synthetic recall of " + std::to_string(options_.pairs) + " pairs, vocabulary " + std::to_string(options_.vocab_size);
  }
  void next_batch(Index batch, Index seq_len, Batch& into) override { fill(train_, batch, seq_len, into); }
  void restart() override { train_.random.jump_to(0); }
  DataState state() const override {
    auto const options = mix(static_cast<std::uint64_t>(options_.vocab_size)) + static_cast<std::uint64_t>(options_.pairs);
    return {description(), seed_.value, mix(options), train_.random.drawn()};
  }
  void restore(DataState const& from) override {
    check_same_data(from, state());
    train_.random.jump_to(from.drawn);
  }
  std::vector<Batch> validation_batches(Index batch, Index seq_len, Index windows = 200) const override {
    check_validation(batch, seq_len, windows);
    check_memory(byte_count(size_product(windows, seq_len), 2 * sizeof(std::int32_t)), "validation batches");
    Stream stream{Random{seed_, "data.validation"}};
    std::vector<Batch> batches;
    for (Index left = windows; left > 0; left -= batch) fill(stream, std::min(batch, left), seq_len, batches.emplace_back());
    return batches;
  }

 private:
  struct QueryPlace {
    double order = 0;
    std::size_t number = 0;
  };
  // Random numbers, and memory for the parts of a window.
  struct Stream {
    Random random;
    std::vector<std::int32_t> keys = {}, values = {};   // [pairs]
    std::vector<QueryPlace> slots = {};                       // where queries can stand: every second position behind the pairs
  };

  void fill(Stream& stream, Index batch, Index seq_len, Batch& into) const {
    check_batch_size(batch, seq_len);
    check(seq_len >= 4 * options_.pairs, "seq_len ", seq_len, " is too short to ask for ", options_.pairs, " pairs; it must be at least ",
          4 * options_.pairs);
    into.resize(batch, seq_len);
    hybridattn::resize(stream.slots, (seq_len - 2 * options_.pairs) / 2, "the places of queries");
    Index const half = options_.vocab_size / 2;
    for (Index window = 0; window < batch; ++window) {
      draw_distinct(stream.random, 1, half, stream.keys);
      draw_distinct(stream.random, half, options_.vocab_size, stream.values);
      draw_slots(stream);
      write(stream, into.tokens_of(window), into.targets_of(window));
    }
  }
  // `pairs` different tokens from low .. high - 1.
  void draw_distinct(Random& random, Index low, Index high, std::vector<std::int32_t>& drawn) const {
    drawn.clear();
    while (std::ssize(drawn) < options_.pairs) {
      auto const token = static_cast<std::int32_t>(low + random.below(high - low));
      if (std::ranges::find(drawn, token) == drawn.end()) drawn.push_back(token);
    }
  }
  // The first `pairs` slots become those of the queries: drawn without replacement with weights i^-0.99, i = 1, 2, ...
  // (the paper's power law), which is taking the smallest of exponential variables with these rates.
  void draw_slots(Stream& stream) const {
    for (std::size_t i = 0; i < stream.slots.size(); ++i)
      stream.slots[i] = {-std::log(1.0 - stream.random.uniform()) * std::pow(static_cast<double>(i + 1), 0.99), i};
    std::ranges::partial_sort(stream.slots, stream.slots.begin() + options_.pairs, {}, &QueryPlace::order);
  }
  void write(Stream& stream, std::span<std::int32_t> tokens, std::span<std::int32_t> targets) const {
    Index const half = options_.vocab_size / 2;
    for (auto& token : tokens) token = static_cast<std::int32_t>(half + stream.random.below(options_.vocab_size - half));
    std::ranges::fill(targets, no_target);
    std::size_t const pairs = stream.keys.size();
    for (std::size_t pair = 0; pair < pairs; ++pair) {
      std::size_t const query = 2 * (pairs + stream.slots[pair].number);
      tokens[2 * pair] = tokens[query] = stream.keys[pair];
      tokens[2 * pair + 1] = targets[query] = stream.values[pair];
    }
  }

  RecallOptions options_;
  Seed seed_;
  Stream train_{Random{seed_, "data"}};
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
