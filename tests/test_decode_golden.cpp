// Released models decode as the published implementation does.
#include "released_decoding.hpp"

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;

namespace {

// Calls f<Model>() for the folder's model, if this test compiles it.
template <int rotary_percent, ha::Text... patterns, class F> bool try_patterns(hf::Settings const& s, F& f) {
  auto const is = [&]<std::size_t size>(ha::Text<size> text) { return s.pattern == std::string(text.letters); };
  return rotary_percent_of(s) == rotary_percent &&
         ((is(patterns) && (f.template operator()<ModelOf<rotary_percent, patterns>>(), true)) || ...);
}

}  // namespace

TEST_CASE("released models decode token by token what the published implementation does, from the same cache", "[golden]") {
  int found = 0;
  for (auto const& entry : fs::directory_iterator(golden::folder().parent_path() / "models")) {
    auto const name = entry.path().filename().string();
    if (!(name.starts_with("qwen3_next") || name.starts_with("qwen3_5")) || !fs::exists(entry.path() / "decode.safetensors")) continue;
    ++found;
    auto const s = hf::read_settings(entry.path());
    auto f = [&]<class Model>() { released::check_decoding<Model, ha::Cpu>(entry.path()); };
    bool const compiled = try_patterns<25, "LFFL", "LF", "LLLF">(s, f) || try_patterns<50, "LFFL", "LF", "LLLF">(s, f) ||
                          try_patterns<100, "LFFL", "LF", "LLLF">(s, f);
    INFO(name << " has pattern " << s.pattern << " and turns " << rotary_percent_of(s) << " % of a head, which this test does not compile");
    CHECK(compiled);
  }
  CHECK((found > 0 || golden::elsewhere()));
}
