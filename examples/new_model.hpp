// A model to be trained, its layers known when the program runs: what train needs of it, whatever its pattern. models.hpp lists
// the patterns, and models/ compiles them.
#ifndef HYBRIDATTN_EXAMPLES_NEW_MODEL_HPP
#define HYBRIDATTN_EXAMPLES_NEW_MODEL_HPP

#include "machine.hpp"

#include <hybridattn/store/progress.hpp>
#include <hybridattn/train/adamw.hpp>
#include <hybridattn/train/data.hpp>
#include <hybridattn/train/train_step.hpp>

#include <filesystem>
#include <memory>
#include <string>

namespace models {

namespace ha = hybridattn;
using program::Machine;

// A model in training: its parameters and their optimizer.
class Run {
 public:
  virtual ~Run() = default;
  // Begins a step down the gradients of a batch, with the learning rate times `rate`. Waits for nothing.
  virtual void start_step(ha::Batch const& batch, double rate) = 0;
  // Waits for the step that was started last. Throws where a step since the last read was bad.
  virtual ha::StepResult read() = 0;
  virtual ha::LossSum loss(ha::Batch const& batch) = 0;
  // A checkpoint of the library, written and taken up again.
  virtual void save(std::filesystem::path const& path, ha::Progress const& progress) = 0;
  virtual ha::Progress load(std::filesystem::path const& path) = 0;
};

// A model that nobody has trained yet; it holds no parameters.
class NewModel {
 public:
  virtual ~NewModel() = default;
  virtual ha::Index parameter_count() const = 0;
  // Random parameters. The model must live as long as the run.
  virtual std::unique_ptr<Run> start(Machine& machine, ha::Seed seed, ha::AdamWOptions options) const = 0;
};

struct Sizes {
  ha::Index vocab_size, model_dim, num_heads;
};
// One of models::Trained: "LFFL", in float or bf16. Throws where there is no such pattern.
std::unique_ptr<NewModel> new_model(std::string const& pattern, Sizes sizes, std::string const& dtype);

}  // namespace models
#endif
