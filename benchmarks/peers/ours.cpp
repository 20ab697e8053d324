// Times a kernel of the library, or its step of training, for scripts/peers:
//   peers_ours case=full pass=forward tokens=1024 heads=1 dim=128 repetitions=5 threads=1 values=FILE
// case is full, gdn, dsa or train. For train, dim is the size of the vocabulary, heads the number of sequences, and pass is step.
// theirs.py takes the same words and computes the same numbers with PyTorch. Both print one line of JSON with the seconds of each sample,
// and write what they computed to FILE, as floats.
#include "../../examples/study_models.hpp"
#include "../peak.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace ha = hybridattn;
using ha::Index;

namespace {

// The options of the study's layers do not concern the kernels, so all cases share the types of one model.
using GDN = study::Linear1;
using Full = study::Full1;
using DSA = study::Sparse1Of<256>;
using Model = ha::LanguageModel<ha::Pattern<"LFFL", study::Study1>>;

// The words of the command line, name=value each.
class Words {
 public:
  Words(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      std::string const word = argv[i];
      auto const equals = word.find('=');
      ha::check(equals != word.npos, "'", word, "' is not allowed; words are name=value");
      words_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }
  std::string const& text(std::string const& name) const {
    auto const found = words_.find(name);
    ha::check(found != words_.end(), "the word ", name, "=... is missing");
    return found->second;
  }
  Index number(std::string const& name) const {
    std::string const& word = text(name);
    Index value = 0;
    auto const [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    ha::check(error == std::errc{} && end == word.data() + word.size() && value >= 1, name, "=", word,
              " is not allowed; it must be a whole number of at least 1");
    return value;
  }

 private:
  std::map<std::string, std::string> words_;
};

// Pseudo-random numbers that depend on a tensor's name and on the place in the tensor, with the same bits in theirs.py.
class Numbers {
 public:
  explicit Numbers(std::string const& name) {
    for (char const c : name) seed_ = (seed_ ^ static_cast<unsigned char>(c)) * 16777619u;
  }
  // From 0 to below 1, a multiple of 2^-24.
  float uniform(Index place) const {
    std::uint32_t h = static_cast<std::uint32_t>(place) * 0x9e3779b1u + seed_;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return static_cast<float>((h ^ (h >> 16)) >> 8) * 0x1p-24f;
  }
  // From -width to width.
  float around_zero(Index place, float width) const { return (2 * uniform(place) - 1) * width; }

 private:
  std::uint32_t seed_ = 2166136261u;
};
float const unit_width = std::sqrt(3.0f);  // of a uniform distribution with deviation 1

float root(Index n) { return static_cast<float>(1 / std::sqrt(static_cast<double>(n))); }

// Element `place` of a kernel's input. Queries and keys of GDN have length 1. All scores of DSA's indexer are exact in float and no two of
// a query are equal, so that every implementation chooses the same keys: whole numbers, and a fraction that numbers the keys.
float input(std::string const& policy, std::string_view name, Numbers const& numbers, Index place, Index width) {
  float const u = numbers.uniform(place);
  Index const row = place / width, column = place % width;
  if (policy == "gdn" && (name == "q" || name == "k")) return u < 0.5f ? root(width) : -root(width);
  if (name == "g") return -0.1f * u;
  if (name == "beta") return u;
  if (name == "index_w") return column == 0 || u < 0.5f ? 1.0f : -1.0f;
  if (name == "index_k") return column == 0 ? static_cast<float>(row) * 0x1p-12f : std::floor(2 * u);
  if (name == "index_q") {
    bool const first = row % 4 == 0;
    if (column == 0) return first ? 1.0f : 0.0f;
    return first ? std::floor(2 * u) : std::floor(3 * u) - 1;
  }
  return numbers.around_zero(place, unit_width);
}
// First value of a parameter of the model: PyTorch's defaults, but uniform where those are normal.
template <int Rank> float parameter(std::string const& path, std::string_view name, ha::Shape<Rank> shape, Numbers const& numbers,
                                    Index i) {
  if (path == "embedding") return numbers.around_zero(i, unit_width);
  if (Rank > 1) return numbers.around_zero(i, root(shape[Rank - 1]));
  if (name == "a_log") return 2.7f * numbers.uniform(i);
  return name == "dt_bias" || name == "q_norm" || name == "k_norm" || path.ends_with("finish.norm") ? 1.0f : 0.0f;
}

// Uploads value(path, name, shape, numbers, place) to each tensor of a group.
template <class Group, class F> void fill(ha::Cpu& cpu, Group& group, std::string const& prefix, F value) {
  ha::zip(
      [&]<class T, int Rank>(ha::Path const& path, ha::Tensor<T, Rank, ha::Cpu>& tensor) {
        if constexpr (std::is_same_v<T, float>) {
          std::string const place = path.str();
          Numbers const numbers{prefix + place};
          std::vector<float> values(static_cast<std::size_t>(tensor.shape().count()));
          for (std::size_t i = 0; i < values.size(); ++i)
            values[i] = value(place, path.name, tensor.shape(), numbers, static_cast<Index>(i));
          ha::upload(cpu, values, tensor);
        }
      },
      group);
}
template <class Group> void fill_inputs(ha::Cpu& cpu, Group& group, std::string const& policy, std::string const& prefix = "") {
  fill(cpu, group, prefix,
       [&]<int Rank>(std::string const&, std::string_view name, ha::Shape<Rank> shape, Numbers const& numbers, Index i) {
         return input(policy, name, numbers, i, shape[Rank - 1]);
       });
}

// Seconds. With one thread they are those that the process was computing, so that other programs on the same core do not count.
double now(Index threads) {
  std::timespec time{};
  ::clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}
// Seconds of each of some calls, after at least two calls and a tenth of a second.
template <class F> std::vector<double> sample(Words const& words, F f) {
  Index const threads = words.number("threads"), repetitions = words.number("repetitions");
  double const warm_up = now(threads);
  for (int calls = 0; calls < 2 || now(threads) - warm_up < 0.1; ++calls) f();
  std::vector<double> seconds;
  for (Index i = 0; i < repetitions; ++i) {
    double const start = now(threads);
    f();
    seconds.push_back(now(threads) - start);
  }
  return seconds;
}

struct Result {
  std::vector<double> seconds, losses = {};
  std::vector<float> values = {};  // what was computed
};

// Appends all floats of a group.
template <class Group> void append(ha::Cpu& cpu, Group const& group, std::vector<float>& values) {
  ha::zip(
      [&]<class T, int Rank>(ha::Path const&, ha::Tensor<T, Rank, ha::Cpu> const& tensor) {
        if constexpr (std::is_same_v<T, float>) {
          auto const more = ha::download(cpu, tensor);
          values.insert(values.end(), more.begin(), more.end());
        }
      },
      group);
}

template <class Policy> Result time_kernel(Words const& words, typename Policy::Config config) {
  ha::Cpu cpu{static_cast<int>(words.number("threads"))};
  auto const sequences = ha::Sequences::equal(1, words.number("tokens"));
  config = Policy::complete(config, words.number("heads") * words.number("dim"), words.number("heads"));
  auto x = ha::allocate<float>(cpu, Policy::inputs(config, sequences)), d_x = ha::allocate<float>(cpu, Policy::inputs(config, sequences));
  auto y = ha::allocate<float>(cpu, Policy::outputs(config, sequences)), d_y = ha::allocate<float>(cpu, Policy::outputs(config, sequences));
  auto saved = ha::allocate<float>(cpu, Policy::saved(config, sequences));
  fill_inputs(cpu, x, words.text("case"));
  fill_inputs(cpu, d_y, words.text("case"), "d_");
  auto const forward = [&] { ha::On<Policy, ha::Cpu>::forward(cpu, config, sequences, in(x), out(y), out(saved)); };
  auto const backward = [&] { ha::On<Policy, ha::Cpu>::backward(cpu, config, sequences, in(x), in(y), in(saved), in(d_y), out(d_x)); };
  Result result;
  if (words.text("pass") == "forward") {
    result.seconds = sample(words, forward);
    append(cpu, y, result.values);
  } else {
    forward();
    result.seconds = sample(words, backward);
    for (auto const* gradient : {&d_x.q, &d_x.k, &d_x.v}) {
      auto const more = ha::download(cpu, *gradient);
      result.values.insert(result.values.end(), more.begin(), more.end());
    }
  }
  return result;
}

// Study 1's model on one batch, again and again.
Result time_training(Words const& words) {
  ha::Cpu cpu{static_cast<int>(words.number("threads"))};
  Index const vocab = words.number("dim"), count = words.number("heads"), length = words.number("tokens");
  Model const model{study::study1_config<Model::Stack>(vocab)};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  fill(cpu, params, "",
       []<int Rank>(std::string const& path, std::string_view name, ha::Shape<Rank> shape, Numbers const& numbers, Index i) {
         return parameter(path, name, shape, numbers, i);
       });
  ha::AdamW optimizer{cpu, params, {.learning_rate = 3e-4}};
  Numbers const numbers{"tokens"};
  std::vector<std::int32_t> tokens, targets;
  auto const token = [&](Index i) { return static_cast<std::int32_t>(numbers.uniform(i) * static_cast<float>(vocab)); };
  for (Index i = 0; i < count * length; ++i) {
    tokens.push_back(token(i));
    targets.push_back(token(i + 1));
  }
  auto const batch = make_batch(cpu, ha::Sequences::equal(count, length), tokens, targets);
  Result result;
  result.seconds = sample(words, [&] {
    auto const step = train_step(cpu, model, params, optimizer, batch);
    result.losses.push_back(step.loss.mean());
    result.values.push_back(static_cast<float>(step.loss.mean()));
    result.values.push_back(static_cast<float>(step.gradient_norm));
  });
  return result;
}

Result run(Words const& words) {
  std::string const& name = words.text("case");
  if (name == "full") return time_kernel<Full>(words, {});
  if (name == "gdn") return time_kernel<GDN>(words, {});
  if (name == "dsa") return time_kernel<DSA>(words, {.index_scale = 1});
  if (name == "train") return time_training(words);
  ha::fail("case=", name, " is not allowed; it must be full, gdn, dsa or train");
}

std::string list(std::vector<double> const& numbers) {
  std::string text;
  for (double const x : numbers) {
    char number[32];
    std::snprintf(number, sizeof number, "%s%.9g", text.empty() ? "" : ", ", x);
    text += number;
  }
  return "[" + text + "]";
}

}  // namespace

int main(int argc, char** argv) try {
  Words const words{argc, argv};
  double const peak = bench::peak();
  auto const result = run(words);
  std::ofstream file{words.text("values"), std::ios::binary};
  file.write(reinterpret_cast<char const*>(result.values.data()), static_cast<std::streamsize>(result.values.size() * sizeof(float)));
  ha::check(file.flush().good(), "cannot write ", words.text("values"));
  std::printf("{\"seconds\": %s, \"losses\": %s, \"peak\": %.6g, \"compiler\": \"%s %s\", \"flags\": \"%s\"}\n",
              list(result.seconds).c_str(), list(result.losses).c_str(), peak,
#ifdef __clang__
              "clang", __clang_version__,
#else
              "g++", __VERSION__,
#endif
              HYBRIDATTN_PEERS_FLAGS);
  ha::check(std::fflush(stdout) == 0, "cannot write to stdout");
} catch (ha::Error const& error) {
  std::fprintf(stderr, "peers_ours: %s\n", error.what());
  return 2;
}
