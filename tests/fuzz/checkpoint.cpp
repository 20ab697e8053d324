// A checkpoint is loaded, saved and loaded again. An input is a file; or, where it starts with '{', the description in a file
// whose tensors are right, and behind a line %%% what to change in the file's header: lines OLD=>NEW.
#include "fuzz.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/train/checkpoint.hpp>

namespace {

using namespace fuzz;

using Model = ha::LanguageModel<ha::Stack<ha::Full>>;   // small: each tensor is read a dozen times
using Params = Model::Params<ha::Owned<float, ha::Cpu>>;

struct Run {
  ha::Cpu cpu{1};
  Model model{{.vocab_size = 3, .model_dim = 4, .num_heads = 1, .feed_forward = {.hidden_dim = 2}}};
  Params params;
  ha::AdamW<Params> optimizer;
  ha::Progress progress;

  explicit Run(std::uint64_t seed) : params(model.initialize<float>(cpu, ha::Seed{seed})), optimizer(cpu, params, {}) {}

  void load(std::filesystem::path const& path) { progress = load_checkpoint(cpu, path, model, params, optimizer); }
  void save(std::filesystem::path const& path) { save_checkpoint(cpu, path, model, params, optimizer, progress); }

  std::vector<ha::checkpoint::StoredTensor> tensors() const {
    auto const of_params = ha::checkpoint::tensors_of(params);
    return ha::checkpoint::tensors_of(params, ha::checkpoint::groups_of(optimizer, std::vector<Index>(of_params.size()), of_params));
  }
  // All that a checkpoint keeps, bit for bit.
  std::string state() {
    std::string bytes = std::to_string(progress.step) + progress.note + progress.data.description;
    auto const append = [&](void const* data, std::size_t size) { bytes.append(static_cast<char const*>(data), size); };
    for (auto const& tensor : tensors()) append(tensor.data, tensor.bytes);
    for (std::uint64_t const number : {progress.data.seed, progress.data.content, progress.data.drawn}) append(&number, sizeof number);
    for (auto const& [name, numbers] : progress.history) bytes += name, append(numbers.data(), numbers.size() * sizeof(double));
    for (Index const updates : optimizer.updates(cpu)) bytes += std::to_string(updates) + " ";
    return bytes + std::to_string(optimizer.steps());
  }
};

// A file with the tensors of a run, which says this of itself.
void write_described(std::filesystem::path const& path, std::string_view description) {
  static Run const run{1};
  ha::SafetensorsWriter writer;
  for (auto const& tensor : run.tensors())
    if (tensor.bytes > 0) writer.add_elsewhere(tensor.name, tensor.info, {static_cast<char const*>(tensor.data), tensor.bytes});
  std::vector<double> const losses{2.5, 2.25};
  writer.add("history.loss", {2}, losses);
  writer.add_metadata("hybridattn", std::string(description));
  writer.write(path);
}
void change_header(std::filesystem::path const& path, std::string_view changes) {
  if (changes.empty()) return;
  std::string const file = content_of(path);
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof length);
  std::string header = file.substr(8, length);
  while (!changes.empty()) {
    auto const line = changes.substr(0, changes.find('\n'));
    changes.remove_prefix(std::min(line.size() + 1, changes.size()));
    auto const arrow = std::min(line.find("=>"), line.size()), found = header.find(line.substr(0, arrow));
    if (found != header.npos && header.size() < 60'000) header.replace(found, arrow, line.substr(std::min(arrow + 2, line.size())));
  }
  auto const data = file.substr(8 + length);
  length = header.size();
  folder().file(path.filename().string(), std::string(reinterpret_cast<char const*>(&length), sizeof length) + header + data);
}

// A file is refused and nothing is touched, or it is taken over and comes back the same.
void check_load(std::filesystem::path const& path) {
  Run first{2};
  std::string const before = first.state();
  if (!accepts([&] { first.load(path); })) {
    demand(first.state() == before, "a checkpoint was refused, but something of it was taken");
    return;
  }
  auto const again = folder() / "again.safetensors";
  must("saving what was loaded", [&] { first.save(again); });
  check_files(folder().path(), 2);
  Run second{3};
  must("loading what was saved", [&] { second.load(again); });
  demand(second.state() == first.state(), "another state comes back");
  std::filesystem::remove(again);
}
// The description alone, and the model that it describes.
void check_header(std::filesystem::path const& path) {
  ha::CheckpointHeader header;
  if (!accepts([&] { header = ha::read_checkpoint_header(path); })) return;
  accepts([&] {
    Model const model{ha::checkpoint_config<Model>(header)};
    ha::Cpu cpu{1};
    auto const params = ha::load_parameters<float>(cpu, path, model);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  auto const path = folder() / "input.safetensors";
  std::filesystem::remove(path);
  if (size > 0 && data[0] == '{') {
    std::string const input = text_of(data, size);
    auto const parts = parts_of(input, 2);
    if (!accepts([&] { write_described(path, parts[0]); })) return 0;   // no UTF-8
    change_header(path, parts[1]);
  } else {
    folder().file("input.safetensors", std::string(data, data + size));
  }
  check_load(path);
  check_header(path);
  return 0;
}
