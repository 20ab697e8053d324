// Checkpoints: a run goes on in another process as if it had never stopped, bit for bit.
//
//   Progress done;
//   if (std::filesystem::exists("run.safetensors")) {
//     done = load_checkpoint(cpu, "run.safetensors", model, params, optimizer);
//     text.restore(done.data);
//   }
//   for (Index step = done.step; step < 1000;) {
//     train_step(cpu, model, params, optimizer, make_batch(cpu, text.next_batch(4, 128)));
//     if (++step % 100 == 0) save_checkpoint(cpu, "run.safetensors", model, params, optimizer, {.step = step, .data = text.state()});
//   }
//
// A process may be killed at any moment: under the name stands the last checkpoint that was finished, or none. The file is a
// safetensors file (checkpoint/file.hpp says what is in it), which other programs read too.
#ifndef HYBRIDATTN_TRAIN_CHECKPOINT_HPP
#define HYBRIDATTN_TRAIN_CHECKPOINT_HPP

#include <hybridattn/train/checkpoint/describe.hpp>
#include <hybridattn/train/checkpoint/file.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace checkpoint {

template <class Params> std::vector<StoredTensor> tensors_of(Params const& params) {
  std::vector<StoredTensor> list;
  collect("", params, list);
  return list;
}
template <class Params> std::vector<StoredTensor> tensors_of(Params const& params, AdamW<Params> const& optimizer) {
  auto list = tensors_of(params);
  collect(mean_prefix, optimizer.state().mean, list);
  collect(square_prefix, optimizer.state().square, list);
  return list;
}

// With the names of what does not decay, and the updates of what had a gradient in some steps only; tensors begin with the
// parameters.
template <class Params>
Json describe(AdamW<Params> const& optimizer, std::vector<Index> const& updates, std::vector<StoredTensor> const& tensors) {
  Json json;
  to_json(json, optimizer.options());
  json["steps"] = optimizer.steps();
  json["without_decay"] = Json::array();
  json["updates"] = Json::object();
  for (std::size_t i = 0; i < optimizer.decays().size(); ++i) {
    if (tensors[i].bytes == 0) continue;
    if (!optimizer.decays()[i]) json["without_decay"].push_back(tensors[i].name);
    if (updates[i] != optimizer.steps()) json["updates"][tensors[i].name] = updates[i];
  }
  return json;
}

}  // namespace checkpoint

// Writes a run to a file, or leaves what stands there when that fails. Throws Error with the file's name; and, before it writes,
// where a step since the last read was bad.
template <class B, class Model, class Params>
void save_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params const& params, AdamW<Params>& optimizer,
                     Progress const& progress = {}) {
  optimizer.read(backend);
  auto const tensors = checkpoint::tensors_of(params, optimizer);
  auto json = checkpoint::describe(model);
  json["optimizer"] = checkpoint::describe(optimizer, optimizer.updates(backend), tensors);
  checkpoint::write(backend, path, std::move(json), tensors, progress);
}

// Takes parameters, moments and step count out of a file. Throws Error where the file is damaged, or of another pattern,
// size, dtype, optimizer or version, and names both, or cannot be read to its end; then nothing was touched.
template <class B, class Model, class Params>
Progress load_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params& params, AdamW<Params>& optimizer,
                         LoadOptions options = {}) {
  checkpoint::File const file{path};
  auto const tensors = checkpoint::tensors_of(params, optimizer);
  file.check_model(checkpoint::describe(model), tensors.front().info.dtype, false);
  if (!options.other_optimizer_options) file.check_optimizer(checkpoint::describe(optimizer, optimizer.updates(backend), tensors));
  file.check_tensors(tensors, true);
  auto progress = file.progress();
  auto const [steps, updates] = file.optimizer_steps(std::span(tensors).first(optimizer.decays().size()));
  file.read_all_or_none(backend, tensors);
  optimizer.restore(backend, steps, updates);
  return progress;
}

// The parameters alone, for a model that is not trained any more: what only training reads may differ from the file's.
//   auto const params = load_parameters<float>(cpu, "run.safetensors", model);
template <class T, class B, class Model> auto load_parameters(B& backend, std::filesystem::path const& path, Model const& model) {
  checkpoint::File const file{path};
  std::error_code ignored;   // then reading will fail
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

// The configuration of a checkpoint's model, whose pattern must be that of Model; the header comes from read_checkpoint_header.
template <class Model> typename Model::Config checkpoint_config(CheckpointHeader const& header) {
  return checkpoint::configuration<Model>(header.json, "checkpoint: ");
}

// What stands in a file: its pattern, configuration and step, without any tensor.
inline CheckpointHeader read_checkpoint_header(std::filesystem::path const& path) { return checkpoint::File{path}.header(); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
