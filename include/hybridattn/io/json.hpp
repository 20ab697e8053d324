// JSON of untrusted files. Parsing takes bounded memory and stack, and every error names its line and column.
#ifndef HYBRIDATTN_IO_JSON_HPP
#define HYBRIDATTN_IO_JSON_HPP

#include <hybridattn/core/memory.hpp>
#include <hybridattn/io/escaped.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <functional>
#include <iterator>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace strict_json {

using Json = nlohmann::json;

// Real files stay far below both limits. A value takes some 50 bytes besides its text.
inline constexpr std::size_t max_depth = 64, max_values = 1'000'000;

enum class Bound { whole, members };   // max_values limits the whole object, or each of its members

// An iterator that the parser reads through. It stores the furthest place that the parser has read.
struct Characters {
  using iterator_category = std::forward_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = char const*;
  using reference = char const&;

  char const* here = nullptr;
  char const** furthest = nullptr;

  reference operator*() const { return *here; }
  Characters& operator++() {
    *furthest = ++here;
    return *this;
  }
  Characters operator++(int) {
    auto before = *this;
    ++*this;
    return before;
  }
  friend bool operator==(Characters const& a, Characters const& b) { return a.here == b.here; }
};

// Calls take with the members of the outermost object, one at a time. Throws Error on text that is not JSON, on a key that an object
// has twice (readers differ in which of the two they use), and on more depth or values than any real file has.
class Reader final : public nlohmann::json_sax<Json> {
 public:
  using Take = std::function<void(std::string const& key, Json&& value)>;

  Reader(std::string_view text, std::string const& where, Bound bound, Take take)
      : text_(text), where_(where), bound_(bound), take_(std::move(take)) {}

  void read() {
    constexpr std::string_view mark = "\xef\xbb\xbf";
    if (text_.starts_with(mark)) fail_at(0, "it begins with a byte order mark");
    if (auto const nul = text_.find('\0'); nul != text_.npos) fail_at(nul, "a NUL byte");
    auto const start = text_.find_first_not_of(" \t\r\n");
    if (start == text_.npos || text_[start] != '{') fail_at(start == text_.npos ? text_.size() : start, "not a JSON object");
    furthest_ = text_.data();
    // Json::sax_parse would do the same, but also compile its readers of five binary formats: seconds for each including file.
    auto characters =
        nlohmann::detail::input_adapter(Characters{text_.data(), &furthest_}, Characters{text_.data() + text_.size(), &furthest_});
    nlohmann::detail::parser<Json, decltype(characters)>(std::move(characters)).sax_parse(this);
  }

  bool null() override { return add(Json{}); }
  bool boolean(bool value) override { return add(Json(value)); }
  bool number_integer(Json::number_integer_t value) override { return add(Json(value)); }
  bool number_unsigned(Json::number_unsigned_t value) override { return add(Json(value)); }
  bool number_float(Json::number_float_t value, Json::string_t const&) override { return add(Json(value)); }
  bool string(Json::string_t& value) override { return add(Json(std::move(value))); }
  bool binary(Json::binary_t&) override { fail_here("binary data"); }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool key(Json::string_t& value) override {
    bool const is_new = open_.empty() ? keys_.insert(value).second : !open_.back()->contains(value);
    if (!is_new) fail_here("the key ", escaped(value), " occurs twice in one object");
    (open_.empty() ? member_key_ : key_) = std::move(value);
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t read, std::string const&, Json::exception const& error) override {
    constexpr int number_overflow = 406;
    if (error.id == number_overflow) fail_here("a number that is too large");
    fail_at(read - 1, "not JSON: ", what_is_wrong(read - 1));
  }

 private:
  template <class... Parts> [[noreturn]] void fail_at(std::size_t place, Parts const&... parts) const {
    auto const before = text_.substr(0, place);
    auto const line = std::ranges::count(before, '\n') + 1;
    auto const column = place - (before.find_last_of('\n') + 1) + 1;   // npos + 1 is 0
    fail(where_, "line ", line, ", column ", column, ": ", parts...);
  }
  // Fails at the last character that the parser has read.
  template <class... Parts> [[noreturn]] void fail_here(Parts const&... parts) const {
    fail_at(static_cast<std::size_t>(std::max<std::ptrdiff_t>(furthest_ - text_.data(), 1)) - 1, parts...);
  }

  std::string what_is_wrong(std::size_t place) const {
    if (place >= text_.size()) return "it ends too early";
    char const found = text_[place];
    auto const before = text_.substr(0, place).find_last_not_of(" \t\r\n");
    if (found == '/' || found == '#') return "comments are not allowed";
    if ((found == '}' || found == ']') && before != text_.npos && text_[before] == ',') return "a comma before " + escaped({&found, 1});
    if (found == 'N' || found == 'I') return "NaN and Infinity are not allowed";
    return "unexpected " + escaped({&found, 1});
  }

  bool add(Json value) {
    place_value(std::move(value));
    if (open_.empty()) hand_out();
    return true;
  }
  bool open(Json value) {
    if (!started_) return started_ = true;   // the outermost object
    if (open_.size() + 2 > max_depth) fail_here("nested deeper than ", max_depth, " levels");
    open_.push_back(&place_value(std::move(value)));
    return true;
  }
  bool close() {
    if (open_.empty()) return true;
    open_.pop_back();
    if (open_.empty()) hand_out();
    return true;
  }
  Json& place_value(Json value) {
    if (++values_ > max_values) fail_here("more than ", max_values, " values");
    if (open_.empty()) return member_ = std::move(value);
    Json& parent = *open_.back();
    if (!parent.is_array()) return parent[key_] = std::move(value);
    parent.push_back(std::move(value));
    return parent.back();
  }
  void hand_out() {
    take_(member_key_, std::move(member_));
    member_ = Json{};
    if (bound_ == Bound::members) values_ = 0;
  }

  std::string_view text_;
  std::string const& where_;
  Bound bound_;
  Take take_;
  char const* furthest_ = nullptr;
  bool started_ = false;
  std::size_t values_ = 0;
  std::set<std::string> keys_;   // of the outermost object
  std::string member_key_, key_;
  Json member_;
  std::vector<Json*> open_;   // inside the member
};

}  // namespace strict_json

// Calls take(key, value) for the members of the object in a text, in order, and keeps no member. Throws Error as Reader does; the
// error's sentence begins with `where`.
inline void for_each_json_member(std::string_view text, std::string const& where, strict_json::Reader::Take const& take) {
  within_memory(text.size(), "the JSON", [&] { strict_json::Reader(text, where, strict_json::Bound::members, take).read(); }, where);
}
// The JSON object in a text. Throws Error as Reader does.
inline nlohmann::json parse_json(std::string_view text, std::string const& where) {
  auto object = nlohmann::json::object();
  auto const keep = [&](std::string const& key, nlohmann::json&& value) { object[key] = std::move(value); };
  within_memory(text.size(), "the JSON", [&] { strict_json::Reader(text, where, strict_json::Bound::whole, keep).read(); }, where);
  return object;
}
}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
