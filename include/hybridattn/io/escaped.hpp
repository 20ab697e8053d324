// Text of untrusted files, escaped for error messages.
#ifndef HYBRIDATTN_IO_ESCAPED_HPP
#define HYBRIDATTN_IO_ESCAPED_HPP

#include <hybridattn/core/config.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace utf8 {

struct Character {
  std::size_t bytes = 0;   // 0: the text does not start with a character
  std::uint32_t point = 0;
};

// The first character of a text that is not empty. Overlong forms and surrogates are not characters.
inline Character first_character(std::string_view text) {
  auto const byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  std::uint32_t const lead = byte(0);
  if (lead < 0x80) return {1, lead};
  std::size_t const bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  static constexpr std::uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
  if (lead < 0xc2 || lead > 0xf4 || text.size() < bytes) return {};
  std::uint32_t point = lead & (0x7fu >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return {};
    point = point << 6 | (byte(i) & 0x3fu);
  }
  bool const exists = point >= smallest[bytes] && point <= 0x10ffff && (point < 0xd800 || point > 0xdfff);
  return exists ? Character{bytes, point} : Character{};
}

// Whether a terminal shows the character as a letter. False for control characters, text directions and invisible marks.
inline bool is_plain(std::uint32_t point) {
  struct Range {
    std::uint32_t first, last;
  };
  static constexpr Range hidden[] = {{0, 0x1f},        {0x7f, 0x9f},     {0xad, 0xad},       {0x61c, 0x61c},
                                     {0x180e, 0x180e}, {0x200b, 0x200f}, {0x2028, 0x202e},   {0x2060, 0x206f},
                                     {0xfeff, 0xfeff}, {0xfff9, 0xfffb}, {0xe0000, 0xe0fff}, {0xf0000, 0x10ffff}};
  return std::ranges::none_of(hidden, [&](Range range) { return range.first <= point && point <= range.last; });
}

inline void append_hex(std::string& text, std::uint32_t number, int digits) {
  while (digits < 6 && number >> (4 * digits) != 0) ++digits;
  while (digits-- > 0) text += "0123456789abcdef"[number >> (4 * digits) & 15];
}

}  // namespace utf8

// A text on one line, cut after at most `longest` bytes. Other characters than plain ones are written \x1b, \u{202e}.
inline std::string one_line(std::string_view text, std::size_t longest = 4096) {
  std::string line;
  while (!text.empty()) {
    auto const [bytes, point] = utf8::first_character(text);
    std::string next{text.substr(0, std::max<std::size_t>(bytes, 1))};
    if (bytes == 0 || point < 0x20 || point == 0x7f) {
      std::uint32_t const byte = static_cast<unsigned char>(text[0]);
      next = "\\x";
      utf8::append_hex(next, byte, 2);
    } else if (!utf8::is_plain(point)) {
      next = "\\u{";
      utf8::append_hex(next, point, 2);
      next += '}';
    } else if (point == '\\') {
      next = "\\\\";
    }
    if (line.size() + next.size() > longest) return line + "...";
    line += next;
    text.remove_prefix(std::max<std::size_t>(bytes, 1));
  }
  return line;
}

// A name on one line, in quotes.
inline std::string escaped(std::string_view name) { return "'" + one_line(name, 80) + "'"; }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
