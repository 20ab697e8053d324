#include "catch.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/io/safetensors.hpp>

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

// The error of opening a file with these bytes.
std::string refusal(std::string_view bytes) {
  ScratchFolder const folder;
  try {
    ha::Safetensors{folder.file("bad.safetensors", bytes)};
  } catch (ha::Error const& error) {
    return error.what();
  }
  return "accepted";
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
  // Inputs are exact in float.
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
  writer.add("odd", {1, 3}, f32);   // 12 bytes: the doubles must still lie aligned
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
  check_each({{"", "only 0 bytes"},
              {"1234567", "only 7 bytes"},
              {with_length("{}", "", 3), "a header of 3 bytes, but only 2 follow"},
              {with_length("{}", "", 100'000'001), "a header of 100000001 bytes; at most 100000000"},
              {with_length("{}", "", ~std::uint64_t{0}), "a header of 18446744073709551615 bytes; at most 100000000"}});
  CHECK(refusal(with_length("{}", "")) == "accepted");
  std::string const golden = content_of(std::string(HYBRIDATTN_GOLDEN_DIR) + "/policies/l2_norm.safetensors");
  for (std::size_t const missing : {1u, 100u, 2000u}) CHECK(refusal(golden.substr(0, golden.size() - missing)) != "accepted");
  CHECK_THAT(refusal(golden + "x"), Contains("of the data, which has"));
}

TEST_CASE("a header that is not what the format says is refused with one clear line") {
  check_each({{with_length("", ""), "not a JSON object"},
              {with_length("[1]", ""), "not a JSON object"},
              {with_length("{\"w\":", ""), "not JSON (at its byte"},
              {with_length("{\"\xff\":1}", ""), "not JSON"},
              {with_length("{\"w\":" + std::string(200'000, '['), ""), "not JSON"},
              {with_length(R"({"__metadata__":{"a":1}})", ""), "__metadata__ 'a' is not text"},
              {with_length(R"({"__metadata__":[]})", ""), "must map text to text"},
              {with_length(R"({"w":{},"w":{}})", ""), "the key 'w' twice"},
              {with_length(R"({"__metadata__":{"a":"1","a":"2"}})", ""), "the key 'a' twice"},
              {with_length(R"({"a\nb":7})", ""), "tensor 'a?b'"}});
}

TEST_CASE("a tensor whose entry lies is refused with its name") {
  CHECK(refusal(one_tensor(R"("F32","shape":[2],"data_offsets":[0,8])")) == "accepted");
  check_each({
      {with_length(R"({"w":7})", ""), "tensor 'w': no 'dtype'"},
      {one_tensor(R"("F99","shape":[2],"data_offsets":[0,8])"), "tensor 'w': unknown dtype 'F99'"},
      {one_tensor(R"(4,"shape":[2],"data_offsets":[0,8])"), "dtype must be a word"},
      {one_tensor(R"("F32","data_offsets":[0,8])"), "no 'shape'"},
      {one_tensor(R"("F32","shape":2,"data_offsets":[0,8])"), "shape must be a list"},
      {one_tensor(R"("F32","shape":[-2],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[2.0],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[99999999999999999999],"data_offsets":[0,8])"), "shape must hold integers from 0"},
      {one_tensor(R"("F32","shape":[1e999],"data_offsets":[0,8])"), "a number that is too large"},
      {one_tensor(R"("F32","shape":[4611686018427387904,4],"data_offsets":[0,8])"), "more bytes than can be counted"},
      {one_tensor(R"("F32","shape":[2147483648,2147483648,4],"data_offsets":[0,8])"), "more bytes than can be counted"},
      {one_tensor(R"("F32","shape":[3],"data_offsets":[0,8])"), "[0, 8] do not hold the 12 bytes"},
      {one_tensor(R"("F32","shape":[2],"data_offsets":[8,0])"), "[8, 0] do not hold the 8 bytes"},
      {one_tensor(R"("F32","shape":[2],"data_offsets":[0])"), "must be a list of two"},
      {one_tensor(R"("F32","shape":[2],"data_offsets":[-8,0])"), "data_offsets must hold integers from 0"},
      {one_tensor(R"("F32","shape":[4],"data_offsets":[0,16])"), "ends at byte 16 of the data, which has 8"},
      {one_tensor(R"("F32","shape":[1],"data_offsets":[4,8])"), "bytes 0 to 4 of the data belong to no tensor"},
      {one_tensor(R"("F32","shape":[1],"data_offsets":[0,4])"), "the tensors end at byte 4 of the data, which has 8"},
      {one_tensor(R"("I32","shape":[2],"data_offsets":[0,8]},"v":{"dtype":"I8","shape":[4],"data_offsets":[4,8])"),
       "tensor 'v' starts at byte 4 inside another one"},
  });
}

TEST_CASE("what is no file cannot be read as one") {
  ScratchFolder const folder;
  CHECK_THROWS_WITH(ha::Safetensors{folder / "missing"}, Contains("missing") && Contains("No such file"));
  CHECK_THROWS_WITH(ha::Safetensors{folder.path()}, Contains("not a regular file"));
}

TEST_CASE("the writer refuses what it could not read back") {
  std::vector<float> const three(3);
  ha::SafetensorsWriter writer;
  CHECK_THROWS_WITH(writer.add("w", {2, 2}, three), Contains("3 elements for 'w', whose shape has 4"));
  writer.add("w", {3}, three);
  CHECK_THROWS_WITH(writer.add("w", {3}, three), Contains("'w' is taken"));
  CHECK_THROWS_WITH(writer.add("__metadata__", {3}, three), Contains("is taken"));
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
