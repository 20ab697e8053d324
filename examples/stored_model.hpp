// A model in a file or a folder, its layers known when the program runs: what generate needs of it, whatever its pattern.
// models.hpp lists the patterns, and models/ compiles them.
#ifndef HYBRIDATTN_EXAMPLES_STORED_MODEL_HPP
#define HYBRIDATTN_EXAMPLES_STORED_MODEL_HPP

#include "machine.hpp"

#include <hybridattn/infer/generate.hpp>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace models {

namespace ha = hybridattn;
using program::Machine;

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
  virtual std::unique_ptr<Decoder> load(Machine& machine) const = 0;
};
// A checkpoint that `train` left: one of models::Trained.
std::unique_ptr<StoredModel> from_checkpoint(std::filesystem::path const& path);
// A released model: one of models::Released, its parameters in float or bf16. Fields of its config.json may be read as if they were not
// there.
std::unique_ptr<StoredModel> from_folder(std::filesystem::path const& folder, std::vector<std::string> const& ignored_fields,
                                         std::string const& dtype);

}  // namespace models
#endif
