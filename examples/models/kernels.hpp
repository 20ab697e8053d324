// All that the models of train and generate compute. Only kernels.cpp and kernels_bf16.cpp include this header.
#ifndef HYBRIDATTN_EXAMPLES_MODELS_KERNELS_HPP
#define HYBRIDATTN_EXAMPLES_MODELS_KERNELS_HPP

#include "typed.hpp"

#include <optional>
#include <tuple>

namespace models {

template <class Stack, class T> class RunOf final : public Run {
 public:
  RunOf(Machine& machine, ha::LanguageModel<Stack> const& model, ha::Seed seed, ha::AdamWOptions options)
      : run_(machine, model, seed, std::move(options)) {}

  void start_step(ha::Batch const& batch, double rate) override {
    step_.emplace(ha::start_step(run_.machine, run_.model, run_.params, run_.optimizer, make_batch(run_.machine, batch), {.rate = rate}));
  }
  ha::StepResult read() override { return step_.value().read(); }
  ha::LossSum loss(ha::Batch const& batch) override { return run_.model.loss(run_.machine, run_.params, make_batch(run_.machine, batch)); }
  void save(std::filesystem::path const& path, ha::Progress const& progress) override { save_run(run_, path, progress); }
  ha::Progress load(std::filesystem::path const& path) override { return load_run(run_, path); }

 private:
  TypedRun<Stack, T> run_;
  std::optional<ha::PendingStep<Machine, ParamsOf<Stack, T>>> step_;
};

template <class Stack, class T> class NewModelOf final : public NewModel {
 public:
  explicit NewModelOf(Sizes s)
      : model_({.vocab_size = s.vocab_size, .model_dim = s.model_dim, .num_heads = s.num_heads, .feed_forward = {}, .layers = {}}) {}

  ha::Index parameter_count() const override { return model_.parameter_count(); }
  std::unique_ptr<Run> start(Machine& machine, ha::Seed seed, ha::AdamWOptions options) const override {
    return std::make_unique<RunOf<Stack, T>>(machine, model_, seed, std::move(options));
  }

 private:
  ha::LanguageModel<Stack> model_;
};

template <class Stack, class T> class DecoderOf final : public Decoder {
 public:
  DecoderOf(Machine& machine, ha::LanguageModel<Stack> const& model, ParamsOf<Stack, T> params)
      : machine_(machine), model_(model), params_(std::move(params)) {}

  ha::Generated generate(ha::TokenLists const& prompts, ha::GenerateOptions const& options, OnToken on_token) override {
    return ha::generate(machine_, model_, params_, prompts, options, on_token);
  }

 private:
  Machine& machine_;
  ha::LanguageModel<Stack> const& model_;
  ParamsOf<Stack, T> params_;
};

template <class Stack, class T> class StoredModelOf final : public StoredModel {
 public:
  StoredModelOf(ConfigOf<Stack> const& config, Load<Stack, T> load) : model_(config), load_(std::move(load)) {}

  ha::Index vocab_size() const override { return model_.config().vocab_size; }
  ha::Index parameter_count() const override { return model_.parameter_count(); }
  double cache_bytes(ha::Index tokens) const override {
    return static_cast<double>(ha::bytes<T>(ha::cache_shapes(model_, {.batch = 1, .capacity = tokens})));
  }
  std::unique_ptr<Decoder> load(Machine& machine) const override {
    return std::make_unique<DecoderOf<Stack, T>>(machine, model_, load_(machine, model_));
  }

 private:
  ha::LanguageModel<Stack> model_;
  Load<Stack, T> load_;
};

template <class T> std::unique_ptr<NewModel> new_model_in(std::string const& pattern, Sizes sizes) {
  std::unique_ptr<NewModel> model;
  with_pattern(Trained{}, pattern, [&](auto choice) {
    model = std::make_unique<NewModelOf<typename decltype(choice)::Stack, T>>(sizes);
    return true;
  });
  return model;
}

template <class Stack, class T> std::unique_ptr<StoredModel> make_stored(ConfigOf<Stack> const& config, Load<Stack, T> load) {
  return std::make_unique<StoredModelOf<Stack, T>>(config, std::move(load));
}

template <class, class> struct KernelsOf;
template <class... Choices, class T> struct KernelsOf<List<Choices...>, T> {
  static constexpr std::tuple functions{&make_stored<typename Choices::Stack, T>...};
};

}  // namespace models
#endif
