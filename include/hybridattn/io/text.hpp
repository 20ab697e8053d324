// Reads texts from files, and the text of an HTML page.
#ifndef HYBRIDATTN_IO_TEXT_HPP
#define HYBRIDATTN_IO_TEXT_HPP

#include <hybridattn/core/memory.hpp>
#include <hybridattn/io/atomic_file.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <new>
#include <string>
#include <string_view>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

// The largest number of bytes of a text: as tokens each byte takes four bytes.
inline std::uint64_t longest_text() { return machine_memory() / 4; }

// All bytes of a file, or of a pipe up to its end. Throws Error where reading fails, and on empty or too long texts.
inline std::string read_text(std::filesystem::path const& path) {
  FileDescriptor const file{uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY); })};
  bool const missing = !file && (errno == ENOENT || errno == ENOTDIR);
  check(static_cast<bool>(file), "cannot read ", path, ": ",
        missing           ? "there is no such file"
        : errno == EACCES ? "no permission"
                          : std::strerror(errno));
  struct stat status;
  check(::fstat(file.number(), &status) == 0, "cannot read ", path, ": ", std::strerror(errno));
  check(!S_ISDIR(status.st_mode), "cannot read ", path, ": it is a folder; name the files in it");
  auto const check_length = [&](std::uint64_t length) {
    check(length <= longest_text(), "cannot use ", path, ": it has more than ", longest_text(),
          " bytes; as tokens they would not fit into this machine's memory");
  };
  std::string text;
  try {
    if (S_ISREG(status.st_mode)) {
      check_length(static_cast<std::uint64_t>(status.st_size));
      text.reserve(static_cast<std::size_t>(status.st_size));
    }
    std::vector<char> part(std::size_t{1} << 16);
    while (true) {
      auto const got = uninterrupted([&] { return ::read(file.number(), part.data(), part.size()); });
      check(got >= 0, "cannot read ", path, ": ", std::strerror(errno));
      if (got == 0) break;
      text.append(part.data(), static_cast<std::size_t>(got));
      check_length(text.size());
    }
  } catch (std::bad_alloc const&) {
    fail("cannot use ", path, ": there is no memory for more than ", text.size(), " bytes of it");
  }
  check(!text.empty(), "cannot use ", path, ": it is empty");
  return text;
}
// The bytes of several files, one after the other.
inline std::string read_text(std::vector<std::filesystem::path> const& paths) {
  check(!paths.empty(), "cannot read a text: no file is named");
  std::string text;
  for (auto const& path : paths) {
    std::string const next = read_text(path);
    within_memory(text.size() + next.size(), "texts", [&] { text += next; });
  }
  return text;
}

namespace html {

inline bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f'; }
inline bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline std::string lower(std::string_view word) {
  std::string result{word};
  for (char& c : result) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
  return result;
}

// Appends a code point as UTF-8. 0, surrogates and too large numbers become the replacement character.
inline void append_utf8(std::string& text, std::uint32_t point) {
  if (point == 0 || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) point = 0xfffd;
  auto const byte = [&](std::uint32_t value) { text += static_cast<char>(value); };
  auto const tail = [&](int shift) { byte(0x80 | (point >> shift & 0x3f)); };
  if (point < 0x80) return byte(point);
  if (point < 0x800) return byte(0xc0 | point >> 6), tail(0);
  if (point < 0x10000) return byte(0xe0 | point >> 12), tail(6), tail(0);
  byte(0xf0 | point >> 18), tail(12), tail(6), tail(0);
}

// Code points 160 to 255, in order.
inline constexpr std::array<std::string_view, 96> latin1 = {
    "nbsp",   "iexcl",  "cent",   "pound",  "curren", "yen",    "brvbar", "sect",   "uml",    "copy",   "ordf",   "laquo",
    "not",    "shy",    "reg",    "macr",   "deg",    "plusmn", "sup2",   "sup3",   "acute",  "micro",  "para",   "middot",
    "cedil",  "sup1",   "ordm",   "raquo",  "frac14", "frac12", "frac34", "iquest", "Agrave", "Aacute", "Acirc",  "Atilde",
    "Auml",   "Aring",  "AElig",  "Ccedil", "Egrave", "Eacute", "Ecirc",  "Euml",   "Igrave", "Iacute", "Icirc",  "Iuml",
    "ETH",    "Ntilde", "Ograve", "Oacute", "Ocirc",  "Otilde", "Ouml",   "times",  "Oslash", "Ugrave", "Uacute", "Ucirc",
    "Uuml",   "Yacute", "THORN",  "szlig",  "agrave", "aacute", "acirc",  "atilde", "auml",   "aring",  "aelig",  "ccedil",
    "egrave", "eacute", "ecirc",  "euml",   "igrave", "iacute", "icirc",  "iuml",   "eth",    "ntilde", "ograve", "oacute",
    "ocirc",  "otilde", "ouml",   "divide", "oslash", "ugrave", "uacute", "ucirc",  "uuml",   "yacute", "thorn",  "yuml"};

struct Named {
  std::string_view name;
  std::uint32_t point;
};
inline constexpr std::array punctuation = {
    Named{"amp", '&'},       Named{"lt", '<'},       Named{"gt", '>'},        Named{"quot", '"'},      Named{"apos", '\''},
    Named{"ndash", 0x2013},  Named{"mdash", 0x2014}, Named{"lsquo", 0x2018},  Named{"rsquo", 0x2019},  Named{"sbquo", 0x201a},
    Named{"ldquo", 0x201c},  Named{"rdquo", 0x201d}, Named{"bdquo", 0x201e},  Named{"dagger", 0x2020}, Named{"bull", 0x2022},
    Named{"hellip", 0x2026}, Named{"prime", 0x2032}, Named{"lsaquo", 0x2039}, Named{"rsaquo", 0x203a}, Named{"euro", 0x20ac},
    Named{"trade", 0x2122},  Named{"larr", 0x2190},  Named{"rarr", 0x2192},   Named{"minus", 0x2212},  Named{"OElig", 0x152},
    Named{"oelig", 0x153},   Named{"Scaron", 0x160}, Named{"scaron", 0x161},  Named{"ensp", 0x2002},   Named{"emsp", 0x2003},
    Named{"thinsp", 0x2009}};

// The code point of `name` in &name; -1 for an unknown name.
inline std::int64_t code_point(std::string_view name) {
  if (name.starts_with('#')) {
    bool const hex = name.size() > 1 && (name[1] == 'x' || name[1] == 'X');
    auto const digits = name.substr(hex ? 2 : 1);
    std::int64_t point = 0;
    for (char c : digits) {
      int const digit = is_digit(c) ? c - '0' : hex && is_letter(c) && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
      if (digit < 0) return -1;
      point = std::min<std::int64_t>(point * (hex ? 16 : 10) + digit, 0x110000);
    }
    return digits.empty() ? -1 : point;
  }
  if (auto const found = std::ranges::find(punctuation, name, &Named::name); found != punctuation.end()) return found->point;
  if (auto const found = std::ranges::find(latin1, name); found != latin1.end()) return 160 + (found - latin1.begin());
  return -1;
}

// The gap that a tag makes between the text before it and the text after it.
enum class Gap { none, space, line, paragraph };

inline Gap gap_of(std::string_view tag) {
  static constexpr std::array<std::string_view, 9> lines = {"br", "dd", "dt", "hr", "li", "option", "tr", "caption", "legend"};
  static constexpr std::array<std::string_view, 27> paragraphs = {
      "address", "article", "aside", "blockquote", "body", "center", "div", "dl", "fieldset", "figure", "footer",  "form",  "h1", "h2",
      "h3",      "h4",      "h5",    "h6",         "head", "header", "nav", "ol", "p",        "pre",    "section", "table", "ul"};
  if (std::ranges::find(paragraphs, tag) != paragraphs.end()) return Gap::paragraph;
  if (std::ranges::find(lines, tag) != lines.end()) return Gap::line;
  return tag == "td" || tag == "th" ? Gap::space : Gap::none;
}

class Reader {
 public:
  explicit Reader(std::string_view page) : page_(page) {}

  std::string text() {
    while (at_ < page_.size()) {
      if (page_[at_] == '<' && markup()) continue;
      if (page_[at_] == '&' && entity()) continue;
      if (is_space(page_[at_])) widen(Gap::space);
      else put(page_.substr(at_, 1));
      ++at_;
    }
    if (!text_.empty()) text_ += '\n';
    return std::move(text_);
  }

 private:
  void widen(Gap gap) { gap_ = std::max(gap_, gap); }
  // Writes the gap only before visible text, so that the text ends without one.
  void put(std::string_view visible) {
    static constexpr std::string_view gaps[] = {"", " ", "\n", "\n\n"};
    if (!text_.empty()) text_ += gaps[static_cast<int>(gap_)];
    gap_ = Gap::none;
    text_ += visible;
  }

  // entity() and markup() skip the entity or tag at at_ and return true. Otherwise they return false: at at_ is text.
  bool entity() {
    auto const end = page_.substr(0, at_ + 32).find(';', at_);   // no entity is longer
    if (end == page_.npos) return false;
    auto const point = code_point(page_.substr(at_ + 1, end - at_ - 1));
    if (point < 0) return false;
    std::string letter;
    append_utf8(letter, static_cast<std::uint32_t>(point));
    if (is_space(letter.front())) widen(Gap::space);
    else put(letter);
    at_ = end + 1;
    return true;
  }
  bool markup() {
    auto const rest = page_.substr(at_);
    if (rest.starts_with("<!--")) return skip_past("-->", 4);
    if (rest.starts_with("<!") || rest.starts_with("<?")) return skip_past(">", 2);
    bool const closing = rest.starts_with("</");
    auto const start = at_ + (closing ? 2 : 1);
    if (start >= page_.size() || !is_letter(page_[start])) return false;
    auto end = start;
    while (end < page_.size() && (is_letter(page_[end]) || is_digit(page_[end]))) ++end;
    auto const tag = lower(page_.substr(start, end - start));
    at_ = end_of_tag(end);
    widen(gap_of(tag));
    if (!closing && (tag == "script" || tag == "style" || tag == "title")) skip_element(tag);
    return true;
  }
  bool skip_past(std::string_view mark, std::size_t from) {
    auto const found = page_.find(mark, at_ + from);
    at_ = found == page_.npos ? page_.size() : found + mark.size();
    return true;
  }
  // The place after the first '>' outside quoted attributes, or after the first '>' when a quote is never closed.
  std::size_t end_of_tag(std::size_t from) const {
    char quote = 0;
    for (auto i = from; i < page_.size(); ++i) {
      char const c = page_[i];
      if (quote == 0 && c == '>') return i + 1;
      if (quote == 0 && (c == '"' || c == '\'')) quote = c;
      else if (c == quote) quote = 0;
    }
    auto const first = page_.find('>', from);
    return first == page_.npos ? page_.size() : first + 1;
  }
  // Skips the contents of an element that is not text, up to its own end tag.
  void skip_element(std::string const& tag) {
    for (; at_ < page_.size(); ++at_)
      if (page_[at_] == '<' && lower(page_.substr(at_, tag.size() + 2)) == "</" + tag) return;
  }

  std::string_view page_;
  std::size_t at_ = 0;
  std::string text_;
  Gap gap_ = Gap::none;
};

}  // namespace html

// The visible text of a page, without tags, comments, scripts, styles and the title. Entities become UTF-8, white space becomes
// a single space, and blocks become paragraphs with an empty line between them.
inline std::string html_to_text(std::string_view page) { return html::Reader{page}.text(); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
