// A checkpoint is a file with a model and all that a training run needs to go on. It is a safetensors file, which other programs
// read too; checkpoint/file.hpp says what is in it.
//
//   auto const header = read_checkpoint_header("run.safetensors");
//   Model const model{checkpoint_config<Model>(header)};
//   auto const params = load_parameters<float>(cpu, "run.safetensors", model);
//
// The functions here know no optimizer. The caller passes an optimizer's state as NamedGroups; train/checkpoint.hpp does so for AdamW.
#ifndef HYBRIDATTN_STORE_CHECKPOINT_HPP
#define HYBRIDATTN_STORE_CHECKPOINT_HPP

#include <hybridattn/store/checkpoint/describe.hpp>
#include <hybridattn/store/checkpoint/file.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace checkpoint {

template <class Params> std::vector<StoredTensor> tensors_of(Params const& params) {
  std::vector<StoredTensor> list;
  collect("", params, list);
  return list;
}
template <class Params> std::vector<StoredTensor> tensors_of(Params const& params, NamedGroups const& optimizer) {
  auto list = tensors_of(params);
  list.insert(list.end(), optimizer.tensors.begin(), optimizer.tensors.end());
  return list;
}

}  // namespace checkpoint

// Writes a run to a file. If this fails, throws Error with the file's name and leaves an older file of that name as it was.
template <class B, class Model, class Params>
void save_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params const& params, NamedGroups const& optimizer,
                     Progress const& progress = {}) {
  auto json = checkpoint::describe(model);
  json["optimizer"] = optimizer.numbers;
  checkpoint::write(backend, path, std::move(json), checkpoint::tensors_of(params, optimizer), progress);
}

// Reads parameters and the optimizer's groups from a file. check_numbers(numbers, where) gets the optimizer's numbers from the file and
// must throw an Error that begins with `where` if they do not fit. Throws Error if the file is damaged, cannot be read to its end, or
// has another pattern, size, dtype or version than the model; it names both. Parameters and groups then have their old values.
template <class B, class Model, class Params, class CheckNumbers>
Progress load_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params& params, NamedGroups const& optimizer,
                         CheckNumbers check_numbers) {
  checkpoint::File const file{path};
  auto const tensors = checkpoint::tensors_of(params, optimizer);
  file.check_model(checkpoint::describe(model), tensors.front().info.dtype, false);
  check_numbers(file.optimizer(), file.where());
  file.check_tensors(tensors, true);
  auto progress = file.progress();
  file.read_all_or_none(backend, tensors);
  return progress;
}

// Reads the parameters alone, for a model that is not trained any more. Settings that only training reads may differ from the file's.
//   auto const params = load_parameters<float>(cpu, "run.safetensors", model);
template <class T, class B, class Model> auto load_parameters(B& backend, std::filesystem::path const& path, Model const& model) {
  checkpoint::File const file{path};
  std::error_code ignored;   // an unreadable file is an error of File::read
  auto const needed = bytes<T>(model.params()), there = static_cast<std::size_t>(std::filesystem::file_size(path, ignored));
  check(needed <= there, "checkpoint ", one_line(path.string()), ": the model's parameters take ", needed, " bytes, the whole file has ",
        there);
  auto params = allocate_together<T>(backend, model.params());
  auto const tensors = checkpoint::tensors_of(params);
  file.check_model(checkpoint::describe(model), tensors.front().info.dtype, true);
  file.check_tensors(tensors, false);
  file.read(backend, tensors);
  return params;
}

// Returns the configuration of a checkpoint's model. Model must have the checkpoint's pattern. read_checkpoint_header makes the header.
template <class Model> typename Model::Config checkpoint_config(CheckpointHeader const& header) {
  return checkpoint::configuration<Model>(header.json, "checkpoint: ");
}

// Reads a file's pattern, configuration and step, but no tensor.
inline CheckpointHeader read_checkpoint_header(std::filesystem::path const& path) { return checkpoint::File{path}.header(); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
