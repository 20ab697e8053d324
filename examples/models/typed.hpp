// What kernels.cpp, kernels_bf16.cpp and files.cpp compile for each other. A function template that the other one calls is only declared here;
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

// T is the scalar of the parameters: float, or bf16 where CMake's HYBRIDATTN_EXAMPLES_IN_BF16 is on.
template <class Stack, class T> using ParamsOf = typename ha::LanguageModel<Stack>::template Params<ha::Owned<T, Machine>>;

template <class Stack, class T> struct TypedRun {
  Machine& machine;
  ha::LanguageModel<Stack> const& model;
  ParamsOf<Stack, T> params;
  ha::AdamW<ParamsOf<Stack, T>> optimizer;

  TypedRun(Machine& on, ha::LanguageModel<Stack> const& of, ha::Seed seed, ha::AdamWOptions options)
      : machine(on), model(of), params(model.template initialize<T>(machine, seed)), optimizer(machine, params, std::move(options)) {}
};

// In files.cpp, for Trained.
template <class Stack, class T> void save_run(TypedRun<Stack, T>& run, std::filesystem::path const& path, ha::Progress const& progress);
template <class Stack, class T> ha::Progress load_run(TypedRun<Stack, T>& run, std::filesystem::path const& path);

// f(T{}) with the scalar of this name.
template <class F> auto with_dtype(std::string const& dtype, F f) {
  if (dtype == "float") return f(float{});
#ifdef HYBRIDATTN_EXAMPLES_IN_BF16
  if (dtype == "bf16") return f(ha::bf16{});
#endif
  ha::fail("a model in ", dtype, " is not compiled in; configure with -DHYBRIDATTN_EXAMPLES_IN_BF16=ON");
}

template <class Stack> using ConfigOf = typename ha::LanguageModel<Stack>::Config;
template <class Stack, class T> using Load = std::function<ParamsOf<Stack, T>(Machine&, ha::LanguageModel<Stack> const&)>;

// In kernels.cpp and kernels_bf16.cpp, for Trained and Released.
template <class Stack, class T> std::unique_ptr<StoredModel> make_stored(ConfigOf<Stack> const& config, Load<Stack, T> load);
// One of Trained.
template <class T> std::unique_ptr<NewModel> new_model_in(std::string const& pattern, Sizes sizes);

}  // namespace models
#endif
