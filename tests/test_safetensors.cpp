#include "catch.hpp"
#include "error_of.hpp"
#include "peak_memory.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/io/safetensors.hpp>

#include <sys/stat.h>

#include <limits>

namespace ha = hybridattn;
using Catch::Matchers::Contains;
using ha::Index;

namespace {

std::string with_length(std::string_view header, std::string_view data, std::uint64_t length) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes.append(header).append(data);
}
std::string with_length(std::string_view header, std::string_view data) { return with_length(header, data, header.size()); }

// Returns the error of opening a file with these bytes.
std::string refusal(std::string_view bytes) {
  ScratchFolder const folder;
  return error_of([&] { ha::Safetensors{folder.file("bad.safetensors", bytes)}; });
}
// A file of one tensor 'w', given by the rest of its entry behind "dtype":, and 8 bytes of data.
std::string one_tensor(std::string_view entry) { return with_length(R"({"w":{"dtype":)" + std::string(entry) + "}}", "12345678"); }

// Bytes of a file, and what the error must say.
struct Refused {
  std::string bytes, reason;
};
void check_each(std::vector<Refused> const& files) {
  for (auto const& [bytes, reason] : files) {
    INFO(bytes.substr(0, 200));
    auto const error = refusal(bytes);
    CHECK_THAT(error, Contains(reason) && !Contains("\n"));
  }
}

}  // namespace

TEST_CASE("every golden file opens, and its tensors read as their dtype says") {
  int files = 0;
  for (auto const& entry : std::filesystem::recursive_directory_iterator(HYBRIDATTN_GOLDEN_DIR)) {
    if (entry.path().extension() != ".safetensors") continue;
    ++files;
    INFO(entry.path());
    ha::Safetensors const file{entry.path()};
    CHECK(!file.tensors().empty());
    for (auto const& [name, info] : file.tensors()) {
      INFO(name);
      CHECK(std::ssize(file.read_doubles(name)) == info.count());
      if (info.dtype == "I64") CHECK(std::ssize(file.read_int64s(name)) == info.count());
      else CHECK_THROWS_WITH(file.read_int64s(name), Contains("cannot be read as I64"));
    }
  }
  CHECK(files >= 90);
}

TEST_CASE("a golden file gives its options, shapes and values") {
  ha::Safetensors const file{std::string(HYBRIDATTN_GOLDEN_DIR) + "/policies/full_packed.safetensors"};
  CHECK(file.metadata("policy") == "full");
  CHECK(file.metadata("case") == "full_packed");
  CHECK(file.read_int64s("cu_seqlens") == std::vector<std::int64_t>{0, 1, 34, 66});
  CHECK(file.info("q").shape == std::vector<Index>{1, 66, 2, 8});
  CHECK(file.info("q").dtype == "F64");
  // All inputs are exact in float.
  auto const wide = file.read_doubles("q");
  auto const narrow = file.read_floats("q");
  CHECK(std::vector<double>(narrow.begin(), narrow.end()) == wide);
  CHECK_THROWS_WITH(file.read_doubles("nothing"), Contains("no tensor 'nothing'"));
  CHECK_THROWS_WITH(file.metadata("nothing"), Contains("no metadata 'nothing'"));
}

TEST_CASE("what is written is read back, bit for bit") {
  ScratchFolder const folder;
  std::vector<double> const f64 = {0.1, -0.0, std::numeric_limits<double>::infinity(), 1e-310};
  std::vector<float> const f32 = {0.1f, 3e38f, 1e-45f}, nothing = {};
  std::vector<std::int64_t> const i64 = {std::numeric_limits<std::int64_t>::min(), -1, 5};
  std::vector<std::int32_t> const i32 = {7};
  ha::SafetensorsWriter writer;
  writer.add("odd", {1, 3}, f32);   // 12 bytes, after which the doubles must still be aligned
  writer.add("blocks.0.w", {2, 2}, f64);
  writer.add("long", {3}, i64);
  writer.add("one number", {}, i32);
  writer.add("nothing", {0, 4}, nothing);
  writer.add_metadata("pattern", "L -> F \"quoted\"\n");
  writer.write(folder / "model.safetensors");

  ha::Safetensors const file{folder / "model.safetensors"};
  CHECK(file.tensors().size() == 5);
  CHECK(file.info("one number").shape.empty());
  CHECK(file.info("nothing").shape == std::vector<Index>{0, 4});
  auto const same = [](auto const& a, auto const& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
  };
  CHECK(same(file.read_doubles("blocks.0.w"), f64));
  CHECK(same(file.read_floats("odd"), f32));
  CHECK(same(file.read_int64s("long"), i64));
  CHECK(file.read_int64s("one number") == std::vector<std::int64_t>{7});
  CHECK(file.read_floats("nothing").empty());
  CHECK(file.metadata() == std::map<std::string, std::string>{{"pattern", "L -> F \"quoted\"\n"}});
  CHECK(file.info("blocks.0.w").begin % 8 == 0);
  CHECK(std::distance(std::filesystem::directory_iterator{folder.path()}, {}) == 1);
}

TEST_CASE("half precision and bfloat16 read as the numbers they are") {
  ScratchFolder const folder;
  // 1, -2, the smallest subnormal 2^-24, the largest 65504, infinity, -0
  std::vector<std::uint16_t> const half = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x7c00, 0x8000}, brain = {0x3f80, 0xc000, 0x0001};
  std::string data(reinterpret_cast<char const*>(half.data()), 12);
  data.append(reinterpret_cast<char const*>(brain.data()), 6);
  auto const header = R"({"h":{"dtype":"F16","shape":[6],"data_offsets":[0,12]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[12,18]}})";
  ha::Safetensors const file{folder.file("half.safetensors", with_length(header, data))};
  CHECK(file.read_doubles("h") == std::vector<double>{1, -2, 0x1p-24, 65504, std::numeric_limits<double>::infinity(), 0});
  CHECK(std::signbit(file.read_floats("h")[5]));
  CHECK(file.read_floats("b") == std::vector<float>{1, -2, 0x1p-133f});
}

TEST_CASE("truncated files and lying lengths are refused") {
  check_each({{"", "it is empty"},
              {std::string("\2\0\0\0\0\0\0", 7), "only 7 bytes"},
              {with_length("{}", "", 3), "a header of 3 bytes, but only 2 follow"},
              {with_length("{}", "", 100'000'001), "a header of 100000001 bytes; at most 100000000"},
              {with_length("{}", "", std::uint64_t{1} << 63), "a header of 9223372036854775808 bytes; at most 100000000"},
              {with_length("{}", "", ~std::uint64_t{0}), "a header of 18446744073709551615 bytes; at most 100000000"}});
  CHECK(refusal(with_length("{}", "")) == no_error);
  std::string const golden = content_of(std::string(HYBRIDATTN_GOLDEN_DIR) + "/policies/l2_norm.safetensors");
  for (std::size_t const missing : {1u, 100u, 2000u}) CHECK(refusal(golden.substr(0, golden.size() - missing)) != no_error);
  CHECK_THAT(refusal(golden + "x"), Contains("of the data, which has"));
}

TEST_CASE("a header that is not what the format says is refused with one clear line, and the place") {
  std::string nested = "{\"w\":";
  for (int i = 0; i < 100'000; ++i) nested += "{\"a\":";
  check_each({{with_length("", ""), "the header: not a JSON object"},
              {with_length("[1]", ""), "the header: not a JSON object"},
              {with_length(" {}", ""), "the header: not a JSON object"},
              {with_length("\xef\xbb\xbf{}", ""), "the header: not a JSON object"},
              {with_length("{\"w\":", ""), "line 1, column 6: not JSON: it ends too early"},
              {with_length("{\"\xff\":1}", ""), "line 1, column 3: not JSON: unexpected '\\xff'"},
              {with_length("{\"\xc0\xaf\":1}", ""), "unexpected '\\xc0'"},
              {with_length("{\"\xed\xa0\x80\":1}", ""), "unexpected '\\xa0'"},
              {with_length("{\"\\ud800\":1}", ""), "not JSON"},
              {with_length("{\"w\":" + std::string(200'000, '['), ""), "line 1, column 69: nested deeper than 64 levels"},
              {with_length(nested, ""), "nested deeper than 64 levels"},
              {with_length("{\"__metadata__\":{}} // why", ""), "column 21: not JSON: comments are not allowed"},
              {with_length("{\"__metadata__\":{} /* why */}", ""), "comments are not allowed"},
              {with_length("{\"__metadata__\":{},\n }", ""), "line 2, column 2: not JSON: a comma before '}'"},
              {with_length("{\"w\":[1,]}", ""), "a comma before ']'"},
              {with_length("{\"w\":NaN}", ""), "NaN and Infinity are not allowed"},
              {with_length("{\"w\":-Infinity}", ""), "NaN and Infinity are not allowed"},
              {with_length("{'w':1}", ""), "column 2: not JSON: unexpected '"},
              {with_length("{}{}", ""), "column 3: not JSON: unexpected '{'"},
              {with_length("{\"a\tb\":1}", ""), "unexpected '\\x09'"},
              {with_length(std::string("{}\0junk", 7), ""), "column 3: a NUL byte"},
              {with_length(std::string("{\"a\0b\":1}", 9), ""), "column 4: a NUL byte"},
              {with_length(R"({"__metadata__":{"a":1}})", ""), "__metadata__ 'a' is not text"},
              {with_length(R"({"__metadata__":[]})", ""), "must map text to text"},
              {with_length(R"({"__metadata__":{},"__metadata__":{}})", ""), "column 33: the key '__metadata__' occurs twice in one object"},
              {with_length(R"({"__metadata__":{"a":"1","a":"2"}})", ""), "the key 'a' occurs twice"},
              {with_length(R"({"a\nb":7})", ""), "tensor 'a\\x0ab'"}});
}

TEST_CASE("a tensor whose entry lies is refused with its name") {
  CHECK(refusal(one_tensor(R"("F32","shape":[2],"data_offsets":[0,8])")) == no_error);
  std::string many = "1";
  for (int i = 0; i < 100; ++i) many += ",1";
  check_each({
      {with_length(R"({"w":7})", ""), "tensor 'w': no 'dtype'"},
      {one_tensor(R"(4,"shape":[2],"data_offsets":[0,8])"), "dtype must be a word"},
      {one_tensor(R"("","shape":[2],"data_offsets":[0,8])"), "dtype must be a word"},
      {one_tensor(R"("F\u001b32","shape":[2],"data_offsets":[0,8])"), "dtype must be a word"},
      {one_tensor("\"" + std::string(1000, 'F') + R"(","shape":[2],"data_offsets":[0,8])"), "dtype must be a word of at most 32"},
      {one_tensor(R"("F32","data_offsets":[0,8])"), "no 'shape'"},
      {one_tensor(R"("F32","shape":2,"data_offsets":[0,8])"), "shape must be a list"},
      {one_tensor(R"("F32","shape":{"a":2},"data_offsets":[0,8])"), "shape must be a list"},
      {one_tensor(R"("F32","shape":[2,)" + many + R"(],"data_offsets":[0,8])"), "shape must be a list of at most 32 extents"},
      {one_tensor(R"("F32","shape":[-2],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[2.0],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":["2"],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[true],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[2],"data_offsets":[0,8.0])"), "data_offsets must hold integers from 0"},
      {one_tensor(R"("F32","shape":[9223372036854775808],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[99999999999999999999],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[1e999],"data_offsets":[0,8])"), "a number that is too large"},
      {one_tensor(R"("F32","shape":[4611686018427387904,4],"data_offsets":[0,8])"), "more bytes than can be counted"},
      {one_tensor(R"("F32","shape":[2147483648,2147483648,4],"data_offsets":[0,8])"), "more bytes than can be counted"},
      {one_tensor(R"("F99","shape":[4294967296,4294967296],"data_offsets":[0,8])"), "more bytes than can be counted"},
      {one_tensor(R"("F32","shape":[3],"data_offsets":[0,8])"), "[0, 8] do not hold the 12 bytes"},
      {one_tensor(R"("F32","shape":[2],"data_offsets":[8,0])"), "[8, 0] end before they begin"},
      {one_tensor(R"("F99","shape":[2],"data_offsets":[8,0])"), "[8, 0] end before they begin"},
      {one_tensor(R"("F32","shape":[2],"data_offsets":[0])"), "must be a list of two"},
      {one_tensor(R"("F32","shape":[2],"data_offsets":[-8,0])"), "data_offsets must hold integers from 0"},
      {one_tensor(R"("F32","shape":[4],"data_offsets":[0,16])"), "ends at byte 16 of the data, which has 8"},
      {one_tensor(R"("F99","shape":[4],"data_offsets":[0,9223372036854775807])"), "ends at byte 9223372036854775807 of the data"},
      {one_tensor(R"("F32","shape":[1],"data_offsets":[4,8])"), "bytes 0 to 4 of the data belong to no tensor"},
      {one_tensor(R"("F32","shape":[1],"data_offsets":[0,4])"), "the tensors end at byte 4 of the data, which has 8"},
      {one_tensor(R"("I32","shape":[2],"data_offsets":[0,8]},"v":{"dtype":"I8","shape":[4],"data_offsets":[4,8])"),
       "tensor 'v' starts at byte 4 inside another one"},
      {one_tensor(R"("I32","shape":[2],"data_offsets":[0,8]},"v":{"dtype":"F99","shape":[2],"data_offsets":[0,8])"),
       "starts at byte 0 inside another one"},
  });
}

TEST_CASE("a tensor of a dtype that is not known is an error only for who reads it") {
  ScratchFolder const folder;
  auto const open = [&](char const* dtype) {
    auto const entry =
        std::string("\"") + dtype + R"(","shape":[4],"data_offsets":[0,4]},"v":{"dtype":"F32","shape":[1],"data_offsets":[4,8])";
    return ha::Safetensors{folder.file("x.safetensors", one_tensor(entry))};
  };
  for (char const* dtype : {"F8_E8M0", "F8_E4M3", "F8_E4M3FNUZ", "BOOL", "F6_E3M2", "F99", "U8"}) {
    INFO(dtype);
    auto const file = open(dtype);
    CHECK(file.read_floats("v").size() == 1);
    CHECK(file.info("w").dtype == dtype);
    CHECK(file.read_bytes("w") == std::vector<char>{'1', '2', '3', '4'});
    CHECK_THROWS_WITH(file.read_floats("w"), Contains("tensor 'w' of dtype " + std::string(dtype) + " cannot be read as F32"));
  }
}

TEST_CASE("what lies there in place of weights is called what it is") {
  std::string const zip("PK\x03\x04\x00\x00\x08\x08\x00\x00", 10), gzip("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", 10);
  std::string tar(512, '\0');
  tar.replace(0, 4, "file").replace(257, 5, "ustar");
  check_each({{"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "it is no safetensors file, but a git-lfs pointer"},
              {"<!DOCTYPE html>\n<html>", "but an HTML page"},
              {"\xef\xbb\xbf \n<HTML lang=en>", "but an HTML page"},
              {"<?xml version=\"1.0\"?><Error>AccessDenied</Error>", "but an XML file"},
              {R"({"error":"Repository not found"})", R"(but a JSON text that begins '{"error":"Repository not found"}')"},
              {"Entry not found", "but a text that begins 'Entry not found'"},
              {"Invalid \x1b[31m", "a header of"},
              {"Pas trouv\xc3\xa9\n" + std::string(600, ' '), "but a text that begins 'Pas trouv\xc3\xa9\\x0a"},
              {"1234567", "but a text that begins '1234567'"},
              {zip, "but a zip archive, as PyTorch's .bin"},
              {std::string("\x80\x02}q\x00X", 6), "but a Python pickle"},
              {"GGUF\3", "but a GGUF file"},
              {gzip, "but a gzip file"},
              {std::string("\x89HDF\r\n\x1a\n\0\0", 10), "but an HDF5 file"},
              {tar, "but a tar archive"},
              {std::string(4096, '\0'), "but a file that begins with zeros only"}});
}

TEST_CASE("what is no regular file is refused at once, and called what it is") {
  ScratchFolder const folder;
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  std::filesystem::create_symlink("pipe", folder / "to pipe");
  std::filesystem::create_symlink("loop", folder / "loop");
  std::filesystem::create_symlink("nowhere", folder / "to nowhere");
  auto const file = folder.file("file", with_length("{}", ""));
  std::filesystem::create_symlink("file", folder / "to file");
  CHECK_THROWS_WITH(ha::Safetensors{folder / "missing"}, Contains("missing: there is no such file"));
  CHECK_THROWS_WITH(ha::Safetensors{file / "below"}, Contains("there is no such file"));
  CHECK_THROWS_WITH(ha::Safetensors{folder.path()}, Contains("it is a folder, not a regular file"));
  CHECK_THROWS_WITH(ha::Safetensors{folder / "pipe"}, Contains("it is a pipe, not a regular file"));
  CHECK_THROWS_WITH(ha::Safetensors{folder / "to pipe"}, Contains("it is a pipe, not a regular file"));
  CHECK_THROWS_WITH(ha::Safetensors{folder / "loop"}, Contains("it is a loop of symbolic links"));
  CHECK_THROWS_WITH(ha::Safetensors{folder / "to nowhere"}, Contains("there is no such file"));
  CHECK_THROWS_WITH(ha::Safetensors{"/dev/zero"}, Contains("it is a device, not a regular file"));
  CHECK_THROWS_WITH(ha::Safetensors{folder / "e\x1b[2Jvil\n\xff"}, Contains("e\\x1b[2Jvil\\x0a\\xff: there is no such file"));
  CHECK_NOTHROW(ha::Safetensors{folder / "to file"});
  CHECK_THROWS_WITH(ha::read_regular_file(folder / "pipe", 100, "x: "), Contains("x: it is a pipe"));
  CHECK_THROWS_WITH(ha::read_regular_file("/dev/zero", 100, "x: "), Contains("x: it is a device"));
  CHECK_THROWS_WITH(ha::read_regular_file(file, 9, "x: "), Contains("it has 10 bytes or more; at most 9 are allowed"));
  CHECK(ha::read_regular_file(file, 10, "x: ").size() == 10);
  CHECK_THROWS_WITH(ha::read_regular_file("/proc/self/maps", 9, "x: "), Contains("at most 9 are allowed"));   // its size is given as 0
  CHECK(ha::read_regular_file("/proc/self/maps", 1 << 24, "x: ").size() > 100);
}

TEST_CASE("names out of files are shown on one line, and nothing in them reaches the terminal") {
  CHECK(ha::escaped("model.norm.weight") == "'model.norm.weight'");
  std::string const words = "Gr\xc3\xb6\xc3\x9f \xe6\xa8\xa1 \xf0\x9f\x98\x80";
  CHECK(ha::escaped(words) == "'" + words + "'");
  CHECK(ha::escaped("a\n\r\t\x1b[31m\x7f") == "'a\\x0a\\x0d\\x09\\x1b[31m\\x7f'");
  CHECK(ha::escaped(std::string_view("a\0b", 3)) == "'a\\x00b'");
  CHECK(ha::escaped("\\x1b") == "'\\\\x1b'");   // must differ from the byte 0x1b
  // A control sequence, an override of the direction of writing, and an invisible letter.
  CHECK(ha::escaped("\xc2\x9b"
                    "31m \xe2\x80\xae \xef\xbb\xbf") == "'\\u{9b}31m \\u{202e} \\u{feff}'");
  CHECK(ha::escaped("\xff\xc3( \xc0\x80 \xed\xa0\x80 \xf4\x90\x80\x80 \xe2\x82") ==
        "'\\xff\\xc3( \\xc0\\x80 \\xed\\xa0\\x80 \\xf4\\x90\\x80\\x80 \\xe2\\x82'");
  CHECK(ha::escaped(std::string(1'000'000, 'a')) == "'" + std::string(80, 'a') + "...'");
  CHECK(ha::escaped(std::string(79, 'a') + "\xc3\xb6") == "'" + std::string(79, 'a') + "...'");   // whole letters only
}

// The bounds are on bytes at once and on allocations, as multiples of the file's size, because they hold on every machine.
TEST_CASE("hostile headers are refused in memory and time that follow the size of the file") {
  auto const repeated = [](std::string const& part, std::size_t bytes) {
    std::string text;
    while (text.size() < bytes) text += part;
    return text;
  };
  std::size_t const bytes = 1'000'000;
  std::string keys = "{", tensors = "{";
  for (int i = 0; keys.size() < bytes; ++i) keys += "\"" + std::to_string(i) + "\":0,";
  for (int i = 0; tensors.size() < bytes; ++i)
    tensors += "\"" + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)";
  std::string const cases[] = {with_length("{\"w\":" + std::string(bytes, '['), ""),
                               with_length("{\"w\":" + repeated("{\"a\":", bytes), ""),
                               with_length("{\"w\":[" + repeated("[],", bytes) + "0]}", ""),
                               with_length("{\"w\":[" + repeated("0,", bytes) + "0]}", ""),
                               with_length("{\"w\":[" + repeated("0,", 2'100'000) + "0]}", ""),
                               with_length("{\"w\":{\"shape\":[" + repeated("9,", bytes) + "0]}}", ""),
                               with_length("{\"__metadata__\":" + keys + "\"\":0}}", ""),
                               with_length(keys + "\"w\":0}", ""),
                               with_length(tensors + "\"w\":0}", ""),
                               with_length("{\"" + std::string(bytes, 'a') + "\":0}", ""),
                               with_length("{\"" + std::string(bytes, 'a'), ""),
                               with_length("{" + std::string(bytes, ' ') + "]", ""),
                               with_length("{\"w\":1" + std::string(bytes, '0') + "}", ""),
                               with_length("{\"w\":\"" + repeated("\\u0000", bytes) + "\"}", ""),
                               std::string(bytes, '{'),
                               std::string(bytes, 'a')};
  ScratchFolder const folder;
  for (auto const& content : cases) {
    INFO(content.substr(8, 60));
    auto const path = folder.file("bad.safetensors", content);
    std::string error;
    auto const use = memory::of([&] { error = error_of([&] { ha::Safetensors{path}; }); });
    INFO(error);
    CHECK(error != no_error);
    CHECK(error.size() < 500);
    auto const size = static_cast<std::ptrdiff_t>(content.size());
    CHECK(use.bytes < 40 * size);
    CHECK(use.takes < size);
  }
}

namespace {

// Returns the message of the Error that f throws if no larger block of memory can be allocated.
template <class F> std::string error_within(std::size_t largest, F f) {
  memory::largest = largest;
  std::string const error = error_of(f);
  memory::largest = ~std::size_t{0};
  return error;
}

}  // namespace

TEST_CASE("a file that memory does not hold is an error that names it, in one line") {
  ScratchFolder const folder;
  std::string const header = "{\"" + std::string(300'000, 'a') + "\":0}", json = "{\"a\": [" + std::string(300'000, ' ') + "]}";
  auto const path = folder.file("x\x1b.safetensors", with_length(header, ""));
  auto const config = folder.file("config.json", json);
  std::string const shown = "safetensors file " + (folder / "x").string() + "\\x1b.safetensors: ";
  auto const open = [&] { ha::Safetensors{path}; };
  CHECK(error_within(100'000, open) == shown + "out of memory: 300006 bytes for the header did not fit");
  CHECK(error_within(400'000, open) == shown + "the header: out of memory: 300006 bytes for the JSON did not fit");
  auto const read = [&] { ha::read_regular_file(config, 1'000'000, "x: "); };
  CHECK(error_within(100'000, read) == "x: out of memory: 300010 bytes for the file did not fit");
  CHECK(error_within(400'000, read) == no_error);
  std::string const long_text = "{\"a\": \"" + std::string(300'000, 'b') + "\"}";
  auto const parse = [&] { ha::parse_json(long_text, "x: "); };
  CHECK(error_within(100'000, parse) == "x: out of memory: 300009 bytes for the JSON did not fit");
}

TEST_CASE("a tensor that is larger than the memory is an error of its reader") {
  ScratchFolder const folder;
  std::string const header = R"({"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}})";
  auto const path = folder.file("sparse.safetensors", with_length(header, ""));
  std::error_code error;
  std::filesystem::resize_file(path, 8 + header.size() + (std::uintmax_t{1} << 42), error);
  if (error) return;   // the file system cannot have such files
  ha::Safetensors const file{path};
  memory::largest = 1 << 30;   // so that machines with much memory fail too
  CHECK_THROWS_WITH(file.read_floats("w"), Contains("sparse.safetensors: out of memory: 4398046511104 bytes for a tensor did not fit"));
  CHECK_THROWS_WITH(file.read_doubles("w"), Contains("out of memory"));
  memory::largest = ~std::size_t{0};
  CHECK(file.read_doubles("w", 1'000'000'000, 3) == std::vector<double>(3));
  CHECK_THROWS_WITH(file.read_doubles("w", 1099511627775, 2), Contains("of 1099511627776"));
  CHECK_THROWS_WITH(file.read_doubles("w", -1, 2), Contains("elements -1"));
}

TEST_CASE("the writer refuses what it could not read back") {
  std::vector<float> const three(3);
  ha::SafetensorsWriter writer;
  CHECK_THROWS_WITH(writer.add("w", {2, 2}, three), Contains("3 elements for 'w', whose shape has 4"));
  std::vector<float> const nothing;
  CHECK_THROWS_WITH(writer.add("w", {ha::Index{1} << 62, 8}, nothing), Contains("[4611686018427387904, 8]"));
  CHECK_THROWS_WITH(writer.add("w", {-1, 0}, nothing), Contains("[-1, 0]"));
  writer.add("w", {3}, three);
  CHECK_THROWS_WITH(writer.add("w", {3}, three), Contains("'w' is taken"));
  CHECK_THROWS_WITH(writer.add("__metadata__", {3}, three), Contains("is taken"));
  CHECK_THROWS_WITH(writer.add_elsewhere("v", {"F99", {1}}, "1"), Contains("unknown dtype 'F99'"));
  writer.add_metadata("bad", "\xff");
  ScratchFolder const folder;
  CHECK_THROWS_WITH(writer.write(folder / "x"), Contains("not UTF-8"));
  CHECK(folder.is_empty());
}

TEST_CASE("a full disk leaves nothing, and what was there before stays") {
  ha::ignore_file_size_signal();
  ScratchFolder const folder;
  std::vector<double> const many(10'000);
  ha::SafetensorsWriter writer;
  writer.add("w", {10'000}, many);
  {
    FullDisk const full{4096};
    CHECK_THROWS_WITH(writer.write(folder / "model.safetensors"), Contains("model.safetensors") && Contains("File too large"));
    CHECK(folder.is_empty());
  }
  ha::write_file_atomically(folder / "model.safetensors", "before");
  {
    FullDisk const full{4096};
    CHECK_THROWS_AS(writer.write(folder / "model.safetensors"), ha::Error);
  }
  CHECK(content_of(folder / "model.safetensors") == "before");
  CHECK(std::distance(std::filesystem::directory_iterator{folder.path()}, {}) == 1);
  writer.write(folder / "model.safetensors");
  CHECK(ha::Safetensors{folder / "model.safetensors"}.read_doubles("w") == many);
}

TEST_CASE("a place that cannot be written to is named") {
  ScratchFolder const folder;
  auto const file = folder.file("file", "content");
  CHECK_THROWS_WITH(ha::write_file_atomically(file / "below", "x"), Contains("below") && Contains("Not a directory"));
  CHECK_THROWS_WITH(ha::write_file_atomically(folder / "missing/x", "x"), Contains("No such file"));
  CHECK_THROWS_WITH(ha::write_file_atomically(folder.path(), "x"), Contains("is not a file"));
  CHECK_THROWS_WITH(ha::write_file_atomically("/dev/null", "x"), Contains("is not a file"));
  CHECK_THROWS_AS(ha::write_file_atomically("/proc/x", "x"), ha::Error);
  CHECK(content_of(file) == "content");
}

TEST_CASE("a file that is never committed was never there") {
  ScratchFolder const folder;
  {
    ha::AtomicFile file{folder / "log"};
    file.write("half");
    CHECK(!std::filesystem::exists(folder / "log"));
    CHECK(!folder.is_empty());
  }
  CHECK(folder.is_empty());
}

TEST_CASE("what a killed process left of a file goes with the next one, and nothing else does") {
  ScratchFolder const folder;
  for (char const* name : {"log.12-0.partial", "log.99999999-3.partial", "log.partial", "log.old.12-0.partial", "log.12-0.partial2",
                           "catalog.12-0.partial", "log.x-0.partial"})
    folder.file(name, "left");
  std::filesystem::create_symlink(folder / "log.partial", folder / "log.7-7.partial");
  ha::AtomicFile living{folder / "log"};   // another writer of the same file, still at work
  living.write("one");
  ha::write_file_atomically(folder / "log", "two");
  CHECK(content_of(folder / "log") == "two");
  living.commit();
  CHECK(content_of(folder / "log") == "one");
  std::vector<std::string> left;
  for (auto const& entry : std::filesystem::directory_iterator{folder.path()}) left.push_back(entry.path().filename().string());
  std::ranges::sort(left);
  CHECK(left == std::vector<std::string>{"catalog.12-0.partial", "log", "log.12-0.partial2", "log.7-7.partial", "log.old.12-0.partial",
                                         "log.partial", "log.x-0.partial"});
}

TEST_CASE("bytes are read as they lie, and asked for one tensor at a time where they are elsewhere") {
  ScratchFolder const folder;
  std::vector<float> const here = {1, 2};
  ha::SafetensorsWriter writer;
  writer.add("here", {2}, here);
  writer.add_elsewhere("there", {"I32", {2}}, {nullptr, 8});
  std::string const bytes = "\1\2\3\4\5\6\7\x8";
  writer.write(folder / "x", [&](std::string_view wanted) {
    CHECK(wanted.size() == 8);
    return std::string_view(bytes);
  });
  ha::Safetensors const file{folder / "x"};
  auto const read = file.read_bytes("there");
  CHECK(std::string(read.begin(), read.end()) == bytes);
  CHECK(file.read_floats("here") == here);
  CHECK_THROWS_WITH(file.read_bytes("nowhere"), Contains("no tensor 'nowhere'"));
}
