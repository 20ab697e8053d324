// All that the models of train and generate read and write.
#include "typed.hpp"

#include <hybridattn/store.hpp>
#include <hybridattn/train/checkpoint.hpp>

#include <tuple>

namespace models {
namespace {

// {"GDN", "Full"} -> "LF"
std::string letters_of(std::vector<std::string> const& policies) {
  std::string letters;
  for (auto const& name : policies) letters += name == "GDN" ? 'L' : name == "Full" ? 'F' : name == "DSA" ? 'D' : '?';
  return letters;
}

}  // namespace

std::unique_ptr<StoredModel> from_checkpoint(std::filesystem::path const& path) {
  auto const header = ha::read_checkpoint_header(path);
  std::unique_ptr<StoredModel> stored;
  with_pattern(Trained{}, letters_of(header.pattern), [&](auto choice) {
    using Stack = typename decltype(choice)::Stack;
    auto const config = ha::checkpoint_config<ha::LanguageModel<Stack>>(header);
    stored = with_dtype(header.dtype == "BF16" ? "bf16" : "float", [&]<class T>(T) {
      return make_stored<Stack, T>(config,
                                   [path](Machine& machine, auto const& model) { return ha::load_parameters<T>(machine, path, model); });
    });
    return true;
  });
  return stored;
}

std::unique_ptr<StoredModel> from_folder(std::filesystem::path const& folder, std::vector<std::string> const& ignored_fields,
                                         std::string const& dtype) {
  namespace hf = ha::hugging_face;
  hf::ReadOptions const reading{.ignore = ignored_fields};
  auto const settings = hf::read_settings(folder, reading);
  std::unique_ptr<StoredModel> stored;
  std::string differs;
  auto const use = [&](auto choice) {
    using Stack = typename decltype(choice)::Stack;
    try {
      hf::check_types<Stack>(settings);
    } catch (ha::Error const& error) {
      differs = error.what();
      return false;
    }
    auto const config = hf::config<ha::LanguageModel<Stack>>(folder, reading);
    stored = with_dtype(dtype, [&]<class T>(T) {
      return make_stored<Stack, T>(
          config, [folder, reading](Machine& machine, auto const& model) { return hf::load<T>(machine, model, folder, reading); });
    });
    return true;
  };
  with_pattern(Released{}, settings.pattern, use, differs);
  return stored;
}

template <class Stack, class T> void save_run(TypedRun<Stack, T>& run, std::filesystem::path const& path, ha::Progress const& progress) {
  save_checkpoint(run.machine, path, run.model, run.params, run.optimizer, progress);
}
template <class Stack, class T> ha::Progress load_run(TypedRun<Stack, T>& run, std::filesystem::path const& path) {
  return load_checkpoint(run.machine, path, run.model, run.params, run.optimizer);
}

template <class, class> struct FilesOf;
template <class... Choices, class T> struct FilesOf<List<Choices...>, T> {
  static constexpr std::tuple functions{&save_run<typename Choices::Stack, T>..., &load_run<typename Choices::Stack, T>...};
};
template struct FilesOf<Trained, float>;
#ifdef HYBRIDATTN_EXAMPLES_IN_BF16
template struct FilesOf<Trained, ha::bf16>;
#endif

}  // namespace models
