#include "catch.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/io/text.hpp>
#include <hybridattn/train/data.hpp>

#include <sys/stat.h>

#include <chrono>
#include <csignal>
#include <map>
#include <set>
#include <thread>

namespace ha = hybridattn;
using Catch::Matchers::Contains;
using ha::Index;

namespace {

// Position i holds byte i mod 251, so the bytes of a window show where it was cut.
std::string counting_text(std::size_t bytes) {
  std::string text;
  for (std::size_t i = 0; i < bytes; ++i) text += static_cast<char>(i % 251);
  return text;
}

// First 90 % 'a', then 'b'.
std::string two_part_text(std::size_t bytes) { return std::string(bytes - bytes / 10, 'a') + std::string(bytes / 10, 'b'); }

}  // namespace

TEST_CASE("bytes are tokens, and the last tenth is held out") {
  ha::ByteText const text{std::string("\0\x7f\x80\xff", 4) + counting_text(19)};
  CHECK(std::vector(text.all().begin(), text.all().begin() + 4) == std::vector<std::int32_t>{0, 127, 128, 255});
  CHECK(text.train().size() == 21);
  CHECK(text.validation().size() == 2);
  CHECK(text.train().data() + 21 == text.validation().data());
}

TEST_CASE("a window's targets are its next tokens, and its last position has none") {
  ha::Windows windows{ha::ByteText{counting_text(5000)}, ha::Seed{1}};
  auto const batch = windows.next_batch(3, 16);
  CHECK(batch.tokens.size() == 48);
  for (Index window = 0; window < 3; ++window) {
    auto const tokens = batch.tokens_of(window), targets = batch.targets_of(window);
    for (std::size_t i = 0; i + 1 < 16; ++i) {
      CHECK(targets[i] == tokens[i + 1]);
      CHECK(targets[i] == (tokens[i] + 1) % 251);
    }
    CHECK(targets[15] == ha::no_target);
  }
}

TEST_CASE("no window crosses the split, and training windows reach both ends of their part") {
  ha::Windows windows{ha::ByteText{two_part_text(1000)}, ha::Seed{3}};
  for (int i = 0; i < 300; ++i)
    for (auto token : windows.next_batch(2, 100).tokens) REQUIRE(token == 'a');
  for (auto const& batch : windows.validation_batches(2, 10))
    for (auto token : batch.tokens) REQUIRE(token == 'b');

  ha::Windows counting{ha::ByteText{counting_text(120)}, ha::Seed{3}};   // 108 to train on: starts 0 .. 8
  std::map<std::int32_t, int> starts;
  for (int i = 0; i < 900; ++i) ++starts[counting.next_batch(1, 100).tokens[0]];
  CHECK(starts.size() == 9);
  for (auto const& [start, count] : starts) CHECK((start <= 8 && count > 60 && count < 140));
}

TEST_CASE("batches depend on the seed alone and start again after restart") {
  ha::ByteText const text{counting_text(9000)};
  ha::Windows one{text, ha::Seed{1}}, same{text, ha::Seed{1}}, other{text, ha::Seed{2}};
  auto const first = one.next_batch(2, 64), second = one.next_batch(2, 64);
  CHECK(first.tokens != second.tokens);
  CHECK(same.next_batch(2, 64).tokens == first.tokens);
  CHECK(other.next_batch(2, 64).tokens != first.tokens);
  one.validation_batches(2, 64);   // draws nothing
  CHECK(same.next_batch(2, 64).tokens == second.tokens);
  one.restart();
  CHECK(one.next_batch(2, 64).tokens == first.tokens);
}

TEST_CASE("a source goes on from where another one stood, and refuses to where other batches are") {
  auto const goes_on = [](auto source, auto same, auto const& other) {
    source.next_batch(2, 64);
    auto const state = source.state();
    auto const second = source.next_batch(2, 64), third = source.next_batch(2, 64);
    same.restore(state);
    CHECK(same.next_batch(2, 64).tokens == second.tokens);
    source.restore(state);
    CHECK(source.next_batch(2, 64).tokens == second.tokens);
    CHECK(source.next_batch(2, 64).targets == third.targets);
    CHECK_THROWS_WITH(same.restore(other.state()), Contains(other.description()) && Contains(same.description()));
    CHECK(same.next_batch(2, 64).tokens == third.tokens);   // untouched
  };
  ha::Seed const seed{1};
  ha::ByteText const text{counting_text(9000)};
  goes_on(ha::Windows{text, seed}, ha::Windows{text, seed, "another name"}, ha::Windows{ha::ByteText{counting_text(9010)}, seed});
  goes_on(ha::RecallTask{seed}, ha::RecallTask{seed}, ha::RecallTask{seed, {.pairs = 4}});
  ha::Windows one{text, seed};
  std::string changed = counting_text(9000);
  changed[4321] ^= 1;
  CHECK_THROWS_WITH((ha::Windows{ha::ByteText{changed}, seed}.restore(one.state())), Contains("another content"));
  CHECK_THROWS_WITH((ha::Windows{text, ha::Seed{2}}.restore(one.state())), Contains("the state's is 1") && Contains("source's is 2"));
}

TEST_CASE("a jump in a stream of random numbers ends where drawing does") {
  ha::Random drawing{ha::Seed{4}, "stream"}, jumping{ha::Seed{4}, "stream"};
  for (int i = 0; i < 7; ++i) drawing.normal();
  CHECK(drawing.drawn() == 14);
  jumping.jump_to(drawing.drawn());
  CHECK(jumping.bits() == drawing.bits());
  jumping.jump_to(0);
  CHECK(jumping.bits() == (ha::Random{ha::Seed{4}, "stream"}.bits()));
}

TEST_CASE("the same memory takes every batch") {
  ha::Windows text{ha::ByteText{counting_text(9000)}};
  ha::RecallTask recall;
  for (ha::DataSource* source : {static_cast<ha::DataSource*>(&text), static_cast<ha::DataSource*>(&recall)}) {
    ha::Batch batch;
    source->next_batch(2, 64, batch);
    auto const* tokens = batch.tokens.data();
    source->next_batch(2, 64, batch);
    CHECK(batch.tokens.data() == tokens);
  }
}

TEST_CASE("validation windows are evenly spaced and never overlap") {
  for (Index const bytes : {1280, 2000, 60'000, 1'500'000}) {
    ha::Windows windows{ha::ByteText{counting_text(static_cast<std::size_t>(bytes))}};
    auto const batches = windows.validation_batches(2, 128);
    Index const held_out = bytes / 10, expected = std::min<Index>(200, held_out / 128);
    Index count = 0;
    std::vector<std::int32_t> firsts;
    for (auto const& batch : batches) {
      count += batch.batch;
      for (Index i = 0; i < batch.batch; ++i) firsts.push_back(batch.tokens_of(i)[0]);
    }
    CHECK(count == expected);
    CHECK(firsts.front() == (bytes - held_out) % 251);
    if (count > 1) CHECK(firsts.back() == (bytes - 128) % 251);
    // With 200 windows of 128 in 150000 bytes the next one starts 753 or 754 later.
    Index const gap = count > 1 ? (held_out - 128) / (count - 1) : 128;
    CHECK(gap >= 128);
    for (std::size_t i = 0; i + 1 < firsts.size(); ++i) {
      auto const step = (firsts[i + 1] - firsts[i] + 251) % 251;
      CHECK((step == gap % 251 || step == (gap + 1) % 251));
    }
  }
}

TEST_CASE("three windows in batches of two leave a last batch of one") {
  ha::Windows windows{ha::ByteText{counting_text(3000)}};
  auto const batches = windows.validation_batches(2, 100, 3);
  REQUIRE(batches.size() == 2);
  CHECK(batches[0].batch == 2);
  CHECK(batches[1].batch == 1);
  CHECK(batches[1].tokens.size() == 100);
}

TEST_CASE("the name of a text reaches no terminal through an error") {
  ha::Windows named{ha::ByteText{counting_text(250)}, {}, "book\n\x1b[2J\u202e"}, other{ha::ByteText{counting_text(260)}};
  auto const says = [](auto call, char const* words) {
    CHECK_THROWS_WITH(call(), Contains(R"(book\x0a\x1b[2J\u{202e})") && Contains(words) && !Contains("\n") && !Contains("\x1b"));
  };
  says([&] { named.next_batch(2, 128); }, "225 bytes to train on");
  says([&] { named.validation_batches(1, 26); }, "25 bytes to validate on");
  says([&] { named.restore(other.state()); }, "this source is 'book");
  says([&] { other.restore(named.state()); }, "the state is of 'book");
}

TEST_CASE("a text that is too short and sizes that cannot be are refused with their numbers") {
  ha::Windows windows{ha::ByteText{counting_text(250)}};
  CHECK_THROWS_WITH(windows.next_batch(2, 128), Contains("225 bytes to train on") && Contains("one batch of 2 windows of 128"));
  CHECK_THROWS_WITH(windows.validation_batches(1, 26), Contains("25 bytes to validate on") && Contains("one window of 26"));
  CHECK(windows.validation_batches(1, 25).size() == 1);
  ha::RecallTask recall;
  for (ha::DataSource* source : {static_cast<ha::DataSource*>(&windows), static_cast<ha::DataSource*>(&recall)}) {
    CHECK_THROWS_WITH(source->next_batch(1, 1), Contains("seq_len 1 is not allowed; it must be at least 2"));
    CHECK_THROWS_WITH(source->next_batch(1, 0), Contains("seq_len 0 is not allowed"));
    CHECK_THROWS_WITH(source->next_batch(0, 64), Contains("batch 0 is not allowed; it must be at least 1"));
    CHECK_THROWS_WITH(source->next_batch(-1, 64), Contains("batch -1 is not allowed"));
    CHECK_THROWS_WITH(source->validation_batches(0, 64), Contains("batch 0"));
    CHECK_THROWS_WITH(source->validation_batches(1, 1), Contains("seq_len 1"));
    CHECK_THROWS_WITH(source->validation_batches(1, 64, 0), Contains("0 windows"));
  }
  CHECK_THROWS_WITH(recall.next_batch(1, 31), Contains("seq_len 31") && Contains("8 pairs") && Contains("at least 32"));
  CHECK_THROWS_WITH((ha::RecallTask{{}, {.vocab_size = 17}}), Contains("vocab_size 17") && Contains("pairs 8"));
  CHECK_THROWS_WITH((ha::RecallTask{{}, {.pairs = 0}}), Contains("pairs 0 is not allowed"));
}

TEST_CASE("recall asks for each key once, and the target is the value that stood behind it") {
  ha::RecallTask task{ha::Seed{5}};
  std::map<std::size_t, int> places;
  for (int step = 0; step < 50; ++step) {
    auto const batch = task.next_batch(4, 128);
    for (Index window = 0; window < 4; ++window) {
      auto const tokens = batch.tokens_of(window), targets = batch.targets_of(window);
      std::map<std::int32_t, std::int32_t> value_of;
      std::set<std::int32_t> values;
      for (std::size_t i = 0; i < 16; i += 2) {
        REQUIRE((tokens[i] >= 1 && tokens[i] < 128 && tokens[i + 1] >= 128 && tokens[i + 1] < 256));
        value_of[tokens[i]] = tokens[i + 1];
        values.insert(tokens[i + 1]);
      }
      REQUIRE(value_of.size() == 8);
      REQUIRE(values.size() == 8);
      std::set<std::int32_t> asked;
      for (std::size_t i = 0; i < 128; ++i) {
        if (targets[i] == ha::no_target) {
          if (i >= 16) REQUIRE(tokens[i] >= 128);   // only queries are keys
          continue;
        }
        REQUIRE(i >= 16);
        REQUIRE(targets[i] == value_of.at(tokens[i]));
        REQUIRE(asked.insert(tokens[i]).second);
        ++places[i];
      }
      REQUIRE(asked.size() == 8);
    }
  }
  CHECK(places[16] > 150);            // of 200 windows: near places are likely
  CHECK(places.rbegin()->first > 110);   // and far ones happen
}

TEST_CASE("recall's two streams are seeded, and differ") {
  ha::RecallTask one{ha::Seed{1}}, same{ha::Seed{1}}, other{ha::Seed{2}};
  auto const first = one.next_batch(2, 64);
  CHECK(same.next_batch(2, 64).tokens == first.tokens);
  CHECK(other.next_batch(2, 64).tokens != first.tokens);
  auto const validation = one.validation_batches(2, 64);
  CHECK(validation.size() == 100);
  CHECK(validation[0].tokens != first.tokens);
  CHECK(validation[7].targets == same.validation_batches(2, 64)[7].targets);
  one.restart();
  CHECK(one.next_batch(2, 64).tokens == first.tokens);
  CHECK(one.vocab_size() == 256);
}

TEST_CASE("a text is read whole, several one after the other") {
  ScratchFolder const folder;
  auto const one = folder.file("one.txt", std::string("a\0b\r\n", 5)), two = folder.file("two.txt", "c");
  CHECK(ha::read_text(one) == std::string("a\0b\r\n", 5));
  CHECK(ha::read_text(std::vector{two, one, two}) == std::string("ca\0b\r\nc", 7));
}

TEST_CASE("a pipe is read to its end, however it arrives and whatever signals come") {
  ScratchFolder const folder;
  auto const pipe = folder / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  struct sigaction nothing{};   // no SA_RESTART: a wait in the system ends
  nothing.sa_handler = [](int) {};
  ::sigaction(SIGUSR1, &nothing, nullptr);
  std::string text;
  for (int i = 0; i < 30000; ++i) text += std::to_string(i) + " ";
  auto const reader = ::pthread_self();
  std::thread writer([&] {
    ::pthread_kill(reader, SIGUSR1);   // while it opens
    std::ofstream out{pipe, std::ios::binary};
    for (std::size_t from = 0; from < text.size(); from += 40000) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ::pthread_kill(reader, SIGUSR1);   // while it reads
      out << text.substr(from, 40000) << std::flush;
    }
  });
  std::string const read = ha::read_text(pipe);
  writer.join();
  CHECK(read.size() == text.size());
  CHECK((read == text));
}

TEST_CASE("a text that cannot be used is named") {
  ScratchFolder const folder;
  CHECK_THROWS_WITH(ha::read_text(folder / "missing.txt"), Contains("missing.txt") && Contains("no such file"));
  CHECK_THROWS_WITH(ha::read_text(folder.file("empty.txt", "")), Contains("empty.txt") && Contains("is empty"));
  CHECK_THROWS_WITH(ha::read_text(folder.path()), Contains("it is a folder"));
  CHECK_THROWS_WITH(ha::read_text(folder.file("file", "a") / "below"), Contains("no such file"));
  std::filesystem::create_symlink("loop", folder / "loop");
  CHECK_THROWS_WITH(ha::read_text(folder / "loop"), Contains("symbolic links"));
  folder.file("sparse", "a");
  std::filesystem::resize_file(folder / "sparse", std::uintmax_t{1} << 42);
  CHECK_THROWS_WITH(ha::read_text(folder / "sparse"), Contains("it has more than") && Contains("memory"));
  CHECK_THROWS_WITH(ha::read_text(std::vector<std::filesystem::path>{}), Contains("no file is named"));
}

TEST_CASE("a page's text has no markup, and its blocks are paragraphs") {
  CHECK(ha::html_to_text("<p>one  \n two<p>three</p>") == "one two\n\nthree\n");
  CHECK(ha::html_to_text("<html><head><title>T</title></head><body>a<br/>b</body></html>") == "a\nb\n");
  CHECK(ha::html_to_text("a <b>bo</b>ld <i>x</i>.") == "a bold x.\n");
  CHECK(ha::html_to_text("<ul><li>a</li><li>b</li></ul>c") == "a\nb\n\nc\n");
  CHECK(ha::html_to_text("<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>") == "1 2\n3\n");
  CHECK(ha::html_to_text("a<!-- <p> -->b<!DOCTYPE html>c<?xml ?>d") == "abcd\n");
  CHECK(ha::html_to_text("a<script>if (1 < 2) \"</p>\";</SCRIPT>b<style>p {}</style>c") == "abc\n");
  CHECK(ha::html_to_text("<a href=\"x>y\" title='it>'>link</a>") == "link\n");
  CHECK(ha::html_to_text("<a href=\"never closed>text</a> more") == "text more\n");
  CHECK(ha::html_to_text("1 < 2, 3 <4, <") == "1 < 2, 3 <4, <\n");
  CHECK(ha::html_to_text("<p>cut <b") == "cut\n");
  CHECK(ha::html_to_text("  <p> </p> ").empty());
  CHECK(ha::html_to_text("<script>never closed").empty());
}

TEST_CASE("entities become UTF-8, and what is none stays") {
  CHECK(ha::html_to_text("&lt;p&gt; &amp;amp; &quot;x&quot; &apos;") == "<p> &amp; \"x\" '\n");
  CHECK(ha::html_to_text("&eacute;&Eacute;&yuml;&nbsp;&copy;&mdash;&rsquo;&euro;") == "éÉÿ\u00a0©—’€\n");
  CHECK(ha::html_to_text("&#65;&#x42;&#X1F600;&#8217;") == "AB😀’\n");
  CHECK(ha::html_to_text("&#0;&#xD800;&#99999999999;") == "\ufffd\ufffd\ufffd\n");
  CHECK(ha::html_to_text("&#32; a &#32; b&#10;&#x9;c &#32;") == "a b c\n");
  CHECK(ha::html_to_text("AT&T & &unknown; &#; &#x; &#12a; &amp") == "AT&T & &unknown; &#; &#x; &#12a; &amp\n");
}
