// Checkpoints: another process continues a run with the same bits as if the run had never stopped.
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
// A process may be killed at any moment. The file is then the last complete checkpoint, or does not exist.
#ifndef HYBRIDATTN_TRAIN_CHECKPOINT_HPP
#define HYBRIDATTN_TRAIN_CHECKPOINT_HPP

#include <hybridattn/store/checkpoint.hpp>
#include <hybridattn/train/adamw.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct LoadOptions {
  // Accept a file with other options of the optimizer, and keep the optimizer's own: to continue with another learning rate.
  bool other_optimizer_options = false;
};

template <checkpoint::Either<AdamWOptions> C> void members(C& o, auto f) {
  f("learning_rate", o.learning_rate);
  f("beta_1", o.beta_1);
  f("beta_2", o.beta_2);
  f("epsilon", o.epsilon);
  f("weight_decay", o.weight_decay);
  f("max_norm", o.max_norm);
  f("bias_correction", o.bias_correction);
}

namespace checkpoint {

// Moments, masters in float of parameters in bf16, options and steps, the names of tensors that do not decay, and the updates of tensors
// that had a gradient in some steps only.
template <class Params>
NamedGroups groups_of(AdamW<Params> const& optimizer, std::vector<Index> const& updates, std::vector<StoredTensor> const& params) {
  NamedGroups groups;
  groups.add("mean", optimizer.moments().mean);
  groups.add("square", optimizer.moments().square);
  if constexpr (AdamW<Params>::has_masters) groups.add("master", optimizer.masters());
  Json& json = groups.numbers;
  to_json(json, optimizer.options());
  json["steps"] = optimizer.steps();
  json["without_decay"] = Json::array();
  json["updates"] = Json::object();
  for (std::size_t i = 0; i < params.size(); ++i) {
    if (params[i].bytes == 0) continue;
    if (!optimizer.decays()[i]) json["without_decay"].push_back(params[i].name);
    if (updates[i] != optimizer.steps()) json["updates"][params[i].name] = updates[i];
  }
  return groups;
}

// An optimizer's steps, and for each parameter the number of steps with a gradient for it.
struct StepCounts {
  Index steps = 0;
  std::vector<Index> updates;

  StepCounts() = default;
  StepCounts(Json const& numbers, std::string const& where, std::vector<StoredTensor> const& params) {
    auto const count = [&](Json const& json, char const* key) {
      return safetensors::to_count(safetensors::member(json, key, where), where, key);
    };
    steps = count(numbers, "steps");
    Json const& fewer = safetensors::member(numbers, "updates", where);
    check(fewer.is_object(), where, "'updates' must be a group of numbers");
    for (auto const& param : params) {
      Index const own = param.bytes == 0 ? 0 : fewer.contains(param.name) ? count(fewer, param.name.c_str()) : steps;
      check(own <= steps, where, "updates of ", param.name, ": ", own, " in ", steps, " steps");
      updates.push_back(own);
    }
  }
};

}  // namespace checkpoint

// Writes a run to a file. If that fails, the old file stays. Throws Error with the file's name. Throws before it writes where a step
// since the last read was bad.
template <class B, class Model, class Params>
void save_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params const& params, AdamW<Params>& optimizer,
                     Progress const& progress = {}) {
  optimizer.read(backend);
  auto const groups = checkpoint::groups_of(optimizer, optimizer.updates(backend), checkpoint::tensors_of(params));
  save_checkpoint(backend, path, model, params, groups, progress);
}

// Reads parameters, moments and step count from a file. Throws Error, and changes nothing, where the file is damaged, cannot be read
// to its end, or has another pattern, size, dtype, optimizer or version. The error names both values.
template <class B, class Model, class Params>
Progress load_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params& params, AdamW<Params>& optimizer,
                         LoadOptions options = {}) {
  auto const tensors = checkpoint::tensors_of(params);
  auto const groups = checkpoint::groups_of(optimizer, optimizer.updates(backend), tensors);
  checkpoint::StepCounts counts;
  auto const check_numbers = [&](checkpoint::Json const& theirs, std::string const& where) {
    static constexpr std::string_view ignored[] = {"steps", "updates"};
    if (!options.other_optimizer_options) checkpoint::Comparison{where, "optimizer", ignored}(theirs, groups.numbers, "optimizer");
    counts = {theirs, where, tensors};
  };
  auto progress = load_checkpoint(backend, path, model, params, groups, check_numbers);
  optimizer.restore(backend, counts.steps, counts.updates);
  optimizer.round_masters(backend, params);
  return progress;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
