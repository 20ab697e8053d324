// Command lines: each wrong word is one sentence. Nothing is done here, so any command line can be tried.
#ifndef HYBRIDATTN_EXAMPLES_OPTIONS_HPP
#define HYBRIDATTN_EXAMPLES_OPTIONS_HPP

#include "machine.hpp"

#include <CLI/CLI.hpp>

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>

namespace program {

inline constexpr std::int64_t largest_size = std::numeric_limits<std::int32_t>::max();   // of what is multiplied with others

// A word of the command line as it is shown.
inline std::string shown(std::string const& word) { return word.empty() || word.find(' ') != word.npos ? "'" + word + "'" : word; }

// A whole number, all of the word: no 1e3, no 0x10, nothing before or behind it.
template <std::integral T> T to_number(std::string const& name, std::string const& word, T least, T most) {
  T value{};
  auto const [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  bool const whole = error == std::errc{} && end == word.data() + word.size();
  if (whole && value >= least && value <= most) return value;
  bool const bounded = most != std::numeric_limits<T>::max() || error == std::errc::result_out_of_range;
  ha::fail(name, " ", shown(word), " is not allowed; it must be a whole number of at least ", least,
           bounded ? " and at most " + std::to_string(most) : "");
}
// A decimal number that is finite.
inline double to_real(std::string const& name, std::string const& word) {
  double value = 0;
  auto const [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  ha::check(error == std::errc{} && end == word.data() + word.size() && std::isfinite(value), name, " ", shown(word),
            " is not allowed; it must be a finite number such as 0.001 or 1e-3");
  return value;
}
inline std::string real_text(double value) { return formatted("%.9g", value); }

// The options of one program.
class Options {
 public:
  Options(std::string const& name, std::string const& description) : app_(description, name) {
    app_.set_version_flag("--version", name + " (hybridattn) " HYBRIDATTN_VERSION);
  }

  template <std::integral T> void number(std::string const& name, T& value, std::string const& help, T least, T most) {
    app_.add_option_function<std::string>(
            name, [&value, name, least, most](std::string const& word) { value = to_number<T>(name, word, least, most); }, help)
        ->default_str(std::to_string(value))
        ->type_name("N");
  }
  // Sizes and counts.
  void size(std::string const& name, ha::Index& value, std::string const& help, ha::Index least = 1, ha::Index most = largest_size) {
    number<ha::Index>(name, value, help, least, most);
  }
  void seed(std::uint64_t& value) {
    number<std::uint64_t>("--seed", value, "of all random numbers", 0, std::numeric_limits<std::uint64_t>::max());
  }
  // More threads than the machine can start end a program without a word.
  void threads(int& value) { number<int>("--threads", value, "0: all cores", 0, ha::Cpu::thread_limit()); }
  // Where the work is done. A program has one backend, and a command that names another one is told how to get it.
  void backend() {
    app_.add_option_function<std::string>(
            "--backend", [name = app_.get_name()](std::string const& word) { check_backend(word, name); },
            "what computes: cpu, emulator or cuda; a program is compiled for one of them")
        ->default_str(std::string(program::backend))
        ->type_name("NAME");
  }
  // The scalar of a model's tensors.
  void dtype(std::string& value, std::string const& help = "scalar of weights and activations, float or bf16; bf16 has masters in float") {
    app_.add_option_function<std::string>(
            "--dtype",
            [&value](std::string const& word) {
              ha::check(word == "float" || word == "bf16", "--dtype ", shown(word), " is not allowed; it must be float or bf16");
              value = word;
            },
            help)
        ->default_str(value)
        ->type_name("NAME");
  }
  // At least 0, or above it.
  void real(std::string const& name, double& value, std::string const& help, bool positive = false) {
    app_.add_option_function<std::string>(
            name,
            [&value, name, positive](std::string const& word) {
              value = to_real(name, word);
              ha::check(positive ? value > 0 : value >= 0, name, " ", shown(word), " is not allowed; it must be ",
                        positive ? "above 0" : "at least 0");
            },
            help)
        ->default_str(real_text(value))
        ->type_name("X");
  }
  // A file or a folder that is written.
  void out(std::filesystem::path& value, std::string const& help) {
    app_.add_option_function<std::string>(
            "--out",
            [&value](std::string const& word) {
              ha::check(!word.empty(), "--out '' is not allowed; it must be the name of a file or folder");
              value = word;
            },
            help)
        ->default_str(value.string())
        ->type_name("PATH");
  }
  // Anything else, by CLI11's own means.
  CLI::App& app() { return app_; }

  // Throws Answer, or ha::Error with one sentence.
  void parse(int argc, char const* const* argv) {
    try {
      app_.parse(argc, argv);
    } catch (CLI::CallForVersion const& version) {
      throw Answer{std::string(version.what()) + "\n"};
    } catch (CLI::CallForHelp const&) {
      throw Answer{app_.help()};
    } catch (CLI::CallForAllHelp const&) {
      throw Answer{app_.help()};
    } catch (CLI::ArgumentMismatch const& error) {   // "At Most 1 required but received 2"
      std::string const sentence = error.what();
      ha::fail(sentence.find("At Most 1") == sentence.npos ? sentence : sentence.substr(0, sentence.find(':')) + " may be given only once");
    } catch (CLI::Error const& error) {
      ha::fail(error.what());
    }
  }

 private:
  CLI::App app_;
};

}  // namespace program
#endif
