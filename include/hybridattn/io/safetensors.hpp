// The safetensors format: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes.
//
//   {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"policy": "gdn"}}
//
// The reader trusts no file. The tensors must cover the data exactly, without overlap or gap, and every size is checked before
// memory is allocated for it. A file may have tensors of an unknown dtype; only reading such a tensor is an error.
#ifndef HYBRIDATTN_IO_SAFETENSORS_HPP
#define HYBRIDATTN_IO_SAFETENSORS_HPP

#include <hybridattn/core/bf16.hpp>
#include <hybridattn/core/memory.hpp>
#include <hybridattn/core/view.hpp>
#include <hybridattn/io/atomic_file.hpp>
#include <hybridattn/io/escaped.hpp>
#include <hybridattn/io/json.hpp>
#include <hybridattn/io/regular_file.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

static_assert(std::endian::native == std::endian::little, "safetensors files are read and written as they lie in memory");

struct TensorInfo {
  std::string dtype;            // its name in the format: F64 F32 BF16 F16 I64 I32 ...
  std::vector<Index> shape;     // [] is one number
  std::size_t begin = 0, end = 0;   // bytes of the data

  // The number of elements. Throws Error where it is too large.
  Index count() const { return detail::product(shape.data(), static_cast<int>(shape.size())); }
};

namespace safetensors {

inline constexpr std::size_t max_header_bytes = 100'000'000;   // the format's own limit
inline constexpr std::string_view metadata_key = "__metadata__";

struct DType {
  std::string_view name;
  std::size_t size;
};
inline constexpr std::array dtypes = {DType{"F64", 8},     DType{"F32", 4}, DType{"F16", 2},  DType{"BF16", 2},    DType{"I64", 8},
                                      DType{"I32", 4},     DType{"I16", 2}, DType{"I8", 1},   DType{"U64", 8},     DType{"U32", 4},
                                      DType{"U16", 2},     DType{"U8", 1},  DType{"BOOL", 1}, DType{"F8_E4M3", 1}, DType{"F8_E5M2", 1},
                                      DType{"F8_E8M0", 1}, DType{"C64", 8}};

template <class T> constexpr std::string_view dtype_of() {
  constexpr bool is_int32 = std::is_same_v<T, std::int32_t>, is_int64 = std::is_same_v<T, std::int64_t>;
  constexpr bool is_double = std::is_same_v<T, double>, is_bf16 = std::is_same_v<T, bf16>;
  static_assert(is_int32 || is_int64 || is_double || is_bf16 || std::is_same_v<T, float>, "double, float, bf16, int64 or int32");
  return is_int32 ? "I32" : is_int64 ? "I64" : is_double ? "F64" : is_bf16 ? "BF16" : "F32";
}

// Bits of IEEE half precision: 1 sign, 5 exponent, 10 fraction.
inline float from_f16(std::uint16_t bits) {
  std::uint32_t const sign = static_cast<std::uint32_t>(bits >> 15) << 31;
  std::uint32_t const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 0) {   // zero and subnormal: fraction * 2^-24
    float const size = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -size : size;
  }
  std::uint32_t const wide = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

// Bytes of an element; nullopt for an unknown dtype.
inline std::optional<std::size_t> size_of(std::string_view dtype) {
  auto const found = std::ranges::find(dtypes, dtype, &DType::name);
  return found == dtypes.end() ? std::nullopt : std::optional(found->size);
}

// A count in the header. Throws Error unless it is an integer in 0 .. 2^63 - 1.
inline Index to_count(nlohmann::json const& value, std::string const& where, char const* what) {
  bool const fits = value.is_number_unsigned() && value.get<std::uint64_t>() <= static_cast<std::uint64_t>(PTRDIFF_MAX);
  check(fits, where, what, " must hold integers from 0 to 2^63 - 1");
  return value.get<Index>();
}

inline nlohmann::json const& member(nlohmann::json const& entry, char const* key, std::string const& where) {
  check(entry.is_object() && entry.contains(key), where, "no '", key, "'");
  return entry[key];
}

// A dtype's name: F32, F8_E4M3, or a name of the future.
inline std::string parse_dtype(nlohmann::json const& value, std::string const& where) {
  auto const is_word = [](std::string_view text) {
    return !text.empty() && text.size() <= 32 && std::ranges::all_of(text, [](char c) {
      return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
    });
  };
  check(value.is_string() && is_word(value.get_ref<std::string const&>()), where, "dtype must be a word of at most 32 letters and digits");
  return value.get<std::string>();
}

inline Index size_product_of(std::vector<Index> const& sizes, std::string const& where) {
  try {
    return detail::product(sizes.data(), static_cast<int>(sizes.size()));
  } catch (Error const& error) {
    fail(where, "shape has more bytes than can be counted: ", error.what());
  }
}

inline TensorInfo parse_tensor(nlohmann::json const& entry, std::string const& where) {
  constexpr std::size_t max_rank = 32;
  TensorInfo info;
  info.dtype = parse_dtype(member(entry, "dtype", where), where);
  auto const size = size_of(info.dtype);
  std::vector<Index> factors{static_cast<Index>(size.value_or(1))};
  auto const& shape = member(entry, "shape", where);
  check(shape.is_array() && shape.size() <= max_rank, where, "shape must be a list of at most ", max_rank, " extents");
  for (auto const& extent : shape) {
    info.shape.push_back(to_count(extent, where, "shape"));
    factors.push_back(info.shape.back());
  }
  Index const bytes = size_product_of(factors, where);
  auto const& offsets = member(entry, "data_offsets", where);
  check(offsets.is_array() && offsets.size() == 2, where, "data_offsets must be a list of two");
  Index const begin = to_count(offsets[0], where, "data_offsets"), end = to_count(offsets[1], where, "data_offsets");
  check(begin <= end, where, "data_offsets [", begin, ", ", end, "] end before they begin");
  check(!size || end - begin == bytes, where, "data_offsets [", begin, ", ", end, "] do not hold the ", bytes, " bytes of dtype and shape");
  info.begin = static_cast<std::size_t>(begin);
  info.end = static_cast<std::size_t>(end);
  return info;
}

// Throws Error unless the tensors follow each other from the first byte of data to the last, without overlap or gap.
inline void check_coverage(std::map<std::string, TensorInfo> const& tensors, std::size_t data_bytes, std::string const& where) {
  std::vector<std::pair<std::string const, TensorInfo> const*> order;
  for (auto const& tensor : tensors) order.push_back(&tensor);
  std::ranges::sort(order, {}, [](auto const* tensor) { return std::pair{tensor->second.begin, tensor->second.end}; });
  std::size_t covered = 0;
  for (auto const* tensor : order) {
    auto const& [name, info] = *tensor;
    check(info.end <= data_bytes, where, "tensor ", escaped(name), " ends at byte ", info.end, " of the data, which has ", data_bytes);
    check(info.begin >= covered, where, "tensor ", escaped(name), " starts at byte ", info.begin, " inside another one");
    check(info.begin == covered, where, "bytes ", covered, " to ", info.begin, " of the data belong to no tensor");
    covered = info.end;
  }
  check(covered == data_bytes, where, "the tensors end at byte ", covered, " of the data, which has ", data_bytes);
}

}  // namespace safetensors

// A file's names, shapes and metadata. The read functions read tensors from the file when they are called. All throw Error.
class Safetensors {
 public:
  explicit Safetensors(std::filesystem::path const& path) : where_("safetensors file " + one_line(path.string()) + ": ") { open(path); }

  std::map<std::string, TensorInfo> const& tensors() const { return tensors_; }
  std::map<std::string, std::string> const& metadata() const { return metadata_; }
  bool contains(std::string const& name) const { return tensors_.contains(name); }
  TensorInfo const& info(std::string const& name) const {
    auto const found = tensors_.find(name);
    check(found != tensors_.end(), where_, "no tensor ", escaped(name));
    return found->second;
  }
  std::string const& metadata(std::string const& key) const {
    auto const found = metadata_.find(key);
    check(found != metadata_.end(), where_, "no metadata ", escaped(key));
    return found->second;
  }

  // The elements in the file's order, last axis fastest. From F64 F32 F16 BF16 I64 I32, rounded where the result is narrower.
  std::vector<double> read_doubles(std::string const& name) const { return read<double>(name); }
  // The `count` elements from element `first` on.
  std::vector<double> read_doubles(std::string const& name, Index first, Index count) const {
    Index const all = info(name).count();
    check(0 <= first && 0 <= count && first <= all && count <= all - first, where_, "tensor ", escaped(name), ": elements ", first, " to ",
          first, " + ", count, " of ", all);
    return read<double>(name, first, count);
  }
  std::vector<float> read_floats(std::string const& name) const { return read<float>(name); }
  std::vector<bf16> read_bf16s(std::string const& name) const { return read<bf16>(name); }
  // From I64 and I32 only.
  std::vector<std::int64_t> read_int64s(std::string const& name) const { return read<std::int64_t>(name); }
  // The tensor's bytes in the file, of any dtype.
  std::vector<char> read_bytes(std::string const& name) const {
    auto const& tensor = info(name);
    return stored<char>(tensor, 0, static_cast<Index>(tensor.end - tensor.begin));
  }

 private:
  void open(std::filesystem::path const& path) {
    file_ = open_regular_file(path, where_);
    auto const size = size_of_file(file_, where_);
    check(size > 0, where_, "it is empty");
    check_beginning(size);
    check(size >= 8, where_, "only ", size, " bytes, too short for the header's length");
    std::uint64_t length = 0;
    read_at(0, &length, sizeof length);
    check(length <= safetensors::max_header_bytes, where_, "a header of ", length, " bytes; at most ", safetensors::max_header_bytes,
          " are allowed");
    check(length <= size - 8, where_, "a header of ", length, " bytes, but only ", size - 8, " follow");
    std::string text;
    within_memory(length, "the header", [&] { text.resize(length); }, where_);
    read_at(8, text.data(), text.size());
    data_start_ = 8 + static_cast<std::size_t>(length);
    parse(text);
    safetensors::check_coverage(tensors_, size - data_start_, where_);
  }
  // Throws Error, which names the format, for a file of another format. In a safetensors file the header's length ends with zero bytes,
  // and '{' follows.
  void check_beginning(std::size_t size) const {
    std::string head(std::min<std::size_t>(size, 512), '\0');
    read_at(0, head.data(), head.size());
    if (head.size() > 8 && head.substr(4, 5) == std::string_view("\0\0\0\0{", 5)) return;
    if (auto const kind = kind_of_file_or_text(head); !kind.empty()) fail(where_, "it is no safetensors file, but ", kind);
  }
  void parse(std::string const& header) {
    std::string const where = where_ + "the header: ";
    check(header.starts_with('{'), where, "not a JSON object");
    for_each_json_member(header, where, [&](std::string const& name, nlohmann::json&& entry) {
      if (name == safetensors::metadata_key) parse_metadata(entry);
      else tensors_[name] = safetensors::parse_tensor(entry, where_ + "tensor " + escaped(name) + ": ");
    });
  }
  void parse_metadata(nlohmann::json const& entries) {
    check(entries.is_object(), where_, "__metadata__ must map text to text");
    for (auto const& [key, value] : entries.items()) {
      check(value.is_string(), where_, "__metadata__ ", escaped(key), " is not text");
      metadata_[key] = value.get<std::string>();
    }
  }

  void read_at(std::size_t offset, void* into, std::size_t count) const {
    check(read_some(file_, offset, static_cast<char*>(into), count, where_) == count, where_, "it became shorter while being read");
  }
  // Throws Error where memory is short: a sparse file may claim any size.
  template <class T> std::vector<T> make(Index count) const {
    std::vector<T> elements;
    resize(elements, count, "a tensor", where_);
    return elements;
  }
  template <class Stored> std::vector<Stored> stored(TensorInfo const& info, Index first, Index count) const {
    auto elements = make<Stored>(count);
    read_at(data_start_ + info.begin + static_cast<std::size_t>(first) * sizeof(Stored), elements.data(), elements.size() * sizeof(Stored));
    return elements;
  }
  template <class T> std::vector<T> read(std::string const& name) const { return read<T>(name, 0, info(name).count()); }
  template <class T> std::vector<T> read(std::string const& name, Index first, Index count) const {
    auto const& tensor = info(name);
    auto const converted = [&]<class Stored>(Stored, auto convert) {
      auto const elements = stored<Stored>(tensor, first, count);
      auto result = make<T>(count);
      std::ranges::transform(elements, result.begin(), [&](Stored element) { return static_cast<T>(convert(element)); });
      return result;
    };
    auto const same = [](auto element) { return element; };
    if (tensor.dtype == safetensors::dtype_of<T>()) return stored<T>(tensor, first, count);
    if (tensor.dtype == "I64") return converted(std::int64_t{}, same);
    if (tensor.dtype == "I32") return converted(std::int32_t{}, same);
    if constexpr (std::is_floating_point_v<wide_t<T>>) {
      if (tensor.dtype == "F64") return converted(double{}, same);
      if (tensor.dtype == "F32") return converted(float{}, same);
      if (tensor.dtype == "F16") return converted(std::uint16_t{}, safetensors::from_f16);
      if (tensor.dtype == "BF16") return converted(bf16{}, same);
    }
    fail(where_, "tensor ", escaped(name), " of dtype ", tensor.dtype, " cannot be read as ", safetensors::dtype_of<T>());
  }

  std::string where_;   // the beginning of an error's sentence
  FileDescriptor file_;
  std::size_t data_start_ = 0;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Collects tensors, then writes them at once. It does not copy elements: they must stay in place until `write` returns.
class SafetensorsWriter {
 public:
  template <class T> void add(std::string const& name, std::vector<Index> shape, std::span<T const> elements) {
    TensorInfo info{std::string(safetensors::dtype_of<T>()), std::move(shape)};
    check(info.count() == static_cast<Index>(elements.size()), "safetensors: ", elements.size(), " elements for ", escaped(name),
          ", whose shape has ", info.count());
    auto const bytes = std::as_bytes(elements);
    insert(name, {std::move(info), {reinterpret_cast<char const*>(bytes.data()), bytes.size()}});
  }
  // Adds a tensor in another machine's memory, with dtype and shape of `info`. `write` gets its bytes by to_host.
  void add_elsewhere(std::string const& name, TensorInfo info, std::string_view bytes) { insert(name, {std::move(info), bytes, true}); }
  template <class T> void add(std::string const& name, std::vector<Index> shape, std::vector<T> const& elements) {
    add(name, std::move(shape), std::span<T const>(elements));
  }
  template <class T> void add(std::string const& name, std::vector<Index> shape, std::vector<T> const&& temporary) = delete;

  void add_metadata(std::string const& key, std::string value) { metadata_[key] = std::move(value); }

  void write(std::filesystem::path const& path) {
    write(path, [](std::string_view bytes) { return bytes; });
  }
  // to_host(bytes) returns the bytes of a tensor from add_elsewhere on the host. It is called for one tensor at a time.
  template <class ToHost> void write(std::filesystem::path const& path, ToHost to_host) {
    auto const order = lay_out();
    std::string const header = header_text();
    AtomicFile file{path};
    auto const length = std::bit_cast<std::array<char, 8>>(static_cast<std::uint64_t>(header.size()));
    file.write({length.data(), length.size()});
    file.write(header);
    for (auto const* entry : order) file.write(entry->elsewhere ? to_host(entry->bytes) : entry->bytes);
    file.commit();
  }

 private:
  struct Entry {
    TensorInfo info;
    std::string_view bytes;
    bool elsewhere = false;
  };
  void insert(std::string const& name, Entry entry) {
    check(name != safetensors::metadata_key && !entries_.contains(name), "safetensors: the name ", escaped(name), " is taken");
    check(safetensors::size_of(entry.info.dtype).has_value(), "safetensors: ", escaped(name), " is of the unknown dtype ",
          escaped(entry.info.dtype));
    entries_[name] = std::move(entry);
  }
  // Tensors with wide elements first, so that every tensor is aligned to its elements.
  std::vector<Entry const*> lay_out() {
    std::vector<Entry const*> order;
    std::size_t offset = 0;
    for (std::size_t const size : {8u, 4u, 2u, 1u})
      for (auto& [name, entry] : entries_) {
        if (safetensors::size_of(entry.info.dtype) != size) continue;
        entry.info.begin = offset;
        entry.info.end = offset += entry.bytes.size();
        order.push_back(&entry);
      }
    return order;
  }
  // Padded with spaces, so that the data starts at a multiple of 8.
  std::string header_text() const {
    nlohmann::json header = nlohmann::json::object();
    for (auto const& [name, entry] : entries_)
      header[name] = {{"dtype", entry.info.dtype}, {"shape", entry.info.shape}, {"data_offsets", {entry.info.begin, entry.info.end}}};
    if (!metadata_.empty()) header[std::string(safetensors::metadata_key)] = metadata_;
    try {
      std::string text = header.dump();
      text.resize((text.size() + 7) / 8 * 8, ' ');
      return text;
    } catch (nlohmann::json::type_error const&) {
      fail("safetensors: a name or metadata is not UTF-8");
    }
  }

  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
