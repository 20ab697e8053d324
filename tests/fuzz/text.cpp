// A page becomes text, a text becomes tokens and windows. An input is a page; its last bytes are sizes, too.
#include "fuzz.hpp"

#include <hybridattn/io/text.hpp>
#include <hybridattn/train/data.hpp>
#include <hybridattn/train/schedule.hpp>

#include <cmath>
#include <memory>

namespace {

using namespace fuzz;

// Shortest forms only, and no surrogates.
bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    auto const byte = [&](std::size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
    unsigned const first = byte(i), second = byte(i + 1);
    std::size_t const length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    if ((first >= 0x80 && first < 0xc2) || first > 0xf4) return false;
    for (std::size_t j = 1; j < length; ++j)
      if ((byte(i + j) & 0xc0) != 0x80) return false;
    if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f)) return false;
    if ((first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f)) return false;
    i += length;
  }
  return true;
}
// What a page without any markup is.
std::string words_of(std::string_view page) {
  std::string text;
  bool gap = false;
  for (char letter : page) {
    bool const space = ha::html::is_space(letter);
    if (!space && gap && !text.empty()) text += ' ';
    if (!space) text += letter;
    gap = space || (gap && text.empty());
  }
  return text.empty() ? text : text + '\n';
}

void check_page(std::string const& page) {
  std::string const text = ha::html_to_text(page);
  demand(text.size() <= page.size() + 1, "the text has ", text.size(), " bytes, the page ", page.size());
  demand(text.empty() || (text.back() == '\n' && !ha::html::is_space(text.front())), "white space stands around a text");
  demand(text.find("\n\n\n") == text.npos && text.find("  ") == text.npos, "white space is not single");
  if (is_utf8(page)) demand(is_utf8(text), "the text is not UTF-8, though the page is");
  if (page.find_first_of("<&") == page.npos) demand(text == words_of(page), "plain words became other ones");
}
void check_file(std::string const& page) {
  auto const path = folder().file("page.html", page);
  std::string text;
  bool const read = accepts([&] { text = ha::read_text(path); });
  demand(read == !page.empty() && text == page, "a file of ", page.size(), " bytes is read as ", text.size());
}

bool are_equal(ha::Batch const& a, ha::Batch const& b) { return a.batch == b.batch && a.tokens == b.tokens && a.targets == b.targets; }
void check_windows(ha::Batch const& batch, bool consecutive, Index vocab_size) {
  demand(batch.batch * batch.seq_len == std::ssize(batch.tokens) && batch.tokens.size() == batch.targets.size(), "a batch has other sizes");
  for (std::size_t i = 0; i < batch.tokens.size(); ++i) {
    bool const last = (static_cast<Index>(i) + 1) % batch.seq_len == 0;
    demand(batch.tokens[i] >= 0 && batch.tokens[i] < vocab_size && batch.targets[i] < vocab_size, "a token outside the vocabulary");
    if (consecutive) demand(batch.targets[i] == (last ? ha::no_target : batch.tokens[i + 1]), "a target is not the next token");
  }
}
// Batches of any sizes, the same ones again after restore, and validation.
void check_source(ha::DataSource& source, bool consecutive, Index batch, Index seq_len, Index windows) {
  ha::Batch first, again;
  source.next_batch(batch, seq_len, first);
  auto const state = source.state();
  source.next_batch(batch, seq_len, first);
  check_windows(first, consecutive, source.vocab_size());
  source.restart();
  source.restore(state);
  source.next_batch(batch, seq_len, again);
  demand(are_equal(first, again), "other batches come after restore");
  Index count = 0;
  for (auto const& part : source.validation_batches(batch, seq_len, windows)) {
    check_windows(part, consecutive, source.vocab_size());
    count += part.batch;
  }
  demand(count >= 1 && count <= windows, count, " windows of validation; asked for were ", windows);
}

// Small more often than not.
Index some_size(FuzzedDataProvider& data) {
  return data.ConsumeBool() ? data.ConsumeIntegralInRange<Index>(-1, 40)
                            : data.ConsumeIntegral<Index>() >> data.ConsumeIntegralInRange<int>(0, 63);
}
// Legal, but it takes long. Even larger ones must be refused, or find no memory.
bool is_slow(Index size) { return size > 40 && size < Index{1} << 40; }

void check_schedule(FuzzedDataProvider& data) {
  ha::Schedule const schedule{some_size(data), some_size(data), data.ConsumeProbability<double>()};
  Index const step = std::max<Index>(some_size(data), 0);
  accepts([&] {
    double const rate = schedule(step);
    demand(rate >= 0 && rate <= 1, "a schedule's rate is ", rate, " at step ", step);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* bytes, std::size_t size) {
  FuzzedDataProvider data{bytes, size};
  check_schedule(data);
  Index const batch = some_size(data), seq_len = some_size(data), pairs = some_size(data);
  Index const windows = data.ConsumeIntegralInRange<Index>(-1, 30);
  ha::Seed const seed{data.ConsumeIntegral<std::uint64_t>()};
  Index const vocab_size = data.ConsumeBool() ? 256 : some_size(data);
  auto const rest = data.ConsumeRemainingBytes<std::uint8_t>();
  std::string const page = text_of(rest.data(), rest.size());
  check_page(page);
  check_file(page);
  accepts([&] {
    ha::Windows source{ha::ByteText(page), seed, "page"};
    check_source(source, true, batch, seq_len, windows);
  });
  if (is_slow(batch) || is_slow(seq_len) || is_slow(pairs)) return 0;
  accepts([&] {
    ha::RecallTask source{seed, {.vocab_size = vocab_size, .pairs = pairs}};
    check_source(source, false, batch, seq_len, windows);
  });
  return 0;
}
