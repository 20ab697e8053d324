// The command lines of the programs, and the patterns that they name. An input has a word in each line; the
// first one is the program.
#include "fuzz.hpp"

#include "../../examples/generate_options.hpp"
#include "../../examples/models.hpp"
#include "../../examples/sweep/options.hpp"
#include "../../examples/sweep/patterns.hpp"
#include "../../examples/train_options.hpp"

// What patterns.cpp says, without the models.
std::vector<sweep::CompiledPattern> sweep::patterns_in_float() {
  return {{"LFFL", nullptr, nullptr}, {"LDDL", nullptr, nullptr}, {"LLLL", nullptr, nullptr}};
}

namespace {

using namespace fuzz;

// A program escapes the words in its errors where it shows them.
void check_shown(std::string_view sentence) {
  std::string const line = program::one_line(sentence);
  demand(!line.empty() && line.find('\n') == line.npos, "an error is not one line: ", line);
}
// Settings, or a sentence, or a text that was asked for.
template <class Parse, class Check> void try_command(Parse parse, std::vector<std::string> const& words, Check check) {
  std::vector<char const*> argv{"program"};
  for (auto const& word : words) argv.push_back(word.c_str());
  argv.push_back(nullptr);
  try {
    accepts([&] { check(parse(static_cast<int>(argv.size()) - 1, argv.data())); }, check_shown);
  } catch (program::Answer const& answer) {
    demand(!answer.text.empty(), "an answer without a text");
  }
}
void demand_size(Index size, Index least = 1) {
  demand(size >= least && size <= program::largest_size, "the size ", size, " is accepted; the least is ", least);
}

void check_sweep(sweep::Settings const& s) {
  for (Index const size : {s.steps, s.batch, s.validation}) demand_size(size);
  demand_size(s.seq_len, 2);
  demand(s.threads >= 0 && s.checkpoint_every >= 0 && !s.out.empty() && s.backend == program::backend,
         "settings of sweep that nobody can want are accepted");
}
void check_train(train::Settings const& s) {
  for (Index const size : {s.batch, s.model_dim, s.num_heads}) demand_size(size);
  demand_size(s.seq_len, 2);
  demand(s.steps >= 1 && s.save_every >= 1 && s.threads >= 0 && s.learning_rate > 0 && !s.out.empty(),
         "settings of train that nobody can want are accepted");
}
void check_generate(generate::Settings const& s) {
  demand(s.max_new_tokens >= 0 && s.threads >= 0, "settings of generate that nobody can want are accepted");
  demand(s.prompt.empty() != s.tokens.empty(), "one of prompt and tokens must be there");
  for (std::int32_t const token : s.tokens) demand(token >= 0, "token ", token, " is accepted");
}

// Letters that are known, or a sentence that names them.
void check_patterns(std::string const& list) {
  std::vector<sweep::CompiledPattern> chosen;
  bool const known = accepts([&] { chosen = sweep::chosen_patterns(list, "float"); }, check_shown);
  auto const commas = std::ranges::count(list, ',');
  demand(!known || std::ssize(chosen) == commas + 1, chosen.size(), " patterns out of ", list);
  std::string letters;
  for (char letter : list)
    if (letter != ' ') letters += letter == 'G' ? 'L' : letter == '*' ? 'F' : letter;
  std::string joined;
  for (auto const& pattern : chosen) joined += (joined.empty() ? "" : ",") + std::string(pattern.letters);
  demand(!known || joined == letters, "the patterns ", joined, " out of ", list);
  bool const found = accepts([&] { models::with_pattern(models::Trained{}, list, [](auto) { return true; }); }, check_shown);
  demand(!found || list == "LFFL" || list == "LLLF" || list == "LDDL" || list == "FFFF", "another pattern is found for ", list);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  std::string const text = text_of(data, size);
  std::vector<std::string> words;
  for (std::string_view input = text; !input.empty() && words.size() < 40;) {
    auto const end = std::min(input.find('\n'), input.size());
    words.emplace_back(input.substr(0, end));
    input.remove_prefix(std::min(end + 1, input.size()));
  }
  for (auto const& word : words) check_patterns(word);
  if (words.empty()) return 0;
  std::string const program = words.front();
  words.erase(words.begin());
  if (program == "sweep") try_command(sweep::parse, words, check_sweep);
  else if (program == "train") try_command(train::parse, words, check_train);
  else try_command(generate::parse, words, check_generate);
  return 0;
}
