// What kernels.cpp and files.cpp compile for each other. A function template that the other one calls is only declared here;
// the file that defines it also instantiates it for a list of patterns.
#ifndef HYBRIDATTN_EXAMPLES_MODELS_TYPED_HPP
#define HYBRIDATTN_EXAMPLES_MODELS_TYPED_HPP

#include "../models.hpp"
#include "../new_model.hpp"
#include "../stored_model.hpp"

#ifdef HYBRIDATTN_EXAMPLES_ON_EMULATOR
#include <hybridattn/emulator.hpp>
#endif

namespace models {

template <class Stack> using ParamsOf = typename ha::LanguageModel<Stack>::template Params<ha::Owned<float, Machine>>;

template <class Stack> struct TypedRun {
  Machine& machine;
  ha::LanguageModel<Stack> const& model;
  ParamsOf<Stack> params;
  ha::AdamW<ParamsOf<Stack>> optimizer;

  TypedRun(Machine& on, ha::LanguageModel<Stack> const& of, ha::Seed seed, ha::AdamWOptions options)
      : machine(on), model(of), params(model.template initialize<float>(machine, seed)), optimizer(machine, params, std::move(options)) {}
};

// In files.cpp, for Trained.
template <class Stack> void save_run(TypedRun<Stack>& run, std::filesystem::path const& path, ha::Progress const& progress);
template <class Stack> ha::Progress load_run(TypedRun<Stack>& run, std::filesystem::path const& path);

template <class Stack> using ConfigOf = typename ha::LanguageModel<Stack>::Config;
template <class Stack> using Load = std::function<ParamsOf<Stack>(Machine&, ha::LanguageModel<Stack> const&)>;

// In kernels.cpp, for Trained and Released.
template <class Stack> std::unique_ptr<StoredModel> make_stored(ConfigOf<Stack> const& config, Load<Stack> load);

}  // namespace models
#endif
