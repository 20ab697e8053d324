// Language models whose layers are known when the program runs: what train and generate need of one, whatever its pattern.
// models.hpp lists the patterns, and models/ compiles them, once for both programs.
#ifndef HYBRIDATTN_EXAMPLES_ANY_MODEL_HPP
#define HYBRIDATTN_EXAMPLES_ANY_MODEL_HPP

#include <hybridattn/infer/generate.hpp>
#include <hybridattn/store/progress.hpp>
#include <hybridattn/train/adamw.hpp>
#include <hybridattn/train/data.hpp>
#include <hybridattn/train/train_step.hpp>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace models {

namespace ha = hybridattn;

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
  virtual std::unique_ptr<Run> start(ha::Cpu& cpu, ha::Seed seed, ha::AdamWOptions options) const = 0;
};

struct Sizes {
  ha::Index vocab_size, model_dim, num_heads;
};
// One of models::Trained: "LFFL". Throws where there is no such pattern.
std::unique_ptr<NewModel> new_model(std::string const& pattern, Sizes sizes);

// Sees every token as it is drawn, and returns whether its sequence goes on.
using OnToken = std::function<bool(ha::Index sequence, std::int32_t token)>;

// A model with its parameters, ready to continue texts.
class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual ha::Generated generate(ha::TokenLists const& prompts, ha::GenerateOptions const& options, OnToken on_token) = 0;
};

// A model in a file or a folder; its parameters are not read yet.
class StoredModel {
 public:
  virtual ~StoredModel() = default;
  virtual ha::Index vocab_size() const = 0;
  virtual ha::Index parameter_count() const = 0;
  // What decoding remembers of one sequence with room for so many tokens.
  virtual double cache_bytes(ha::Index tokens) const = 0;
  // Its parameters. The model must live as long as the decoder.
  virtual std::unique_ptr<Decoder> load(ha::Cpu& cpu) const = 0;
};
// A checkpoint that `train` left: one of models::Trained.
std::unique_ptr<StoredModel> from_checkpoint(std::filesystem::path const& path);
// A released model: one of models::Released. Fields of its config.json may be read as if they were not there.
std::unique_ptr<StoredModel> from_folder(std::filesystem::path const& folder, std::vector<std::string> const& ignored_fields);

}  // namespace models
#endif
