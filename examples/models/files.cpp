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
    stored = make_stored<Stack>(ha::checkpoint_config<ha::LanguageModel<Stack>>(header),
                                [path](Machine& machine, auto const& model) { return ha::load_parameters<float>(machine, path, model); });
    return true;
  });
  return stored;
}

std::unique_ptr<StoredModel> from_folder(std::filesystem::path const& folder, std::vector<std::string> const& ignored_fields) {
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
    stored = make_stored<Stack>(
        hf::config<ha::LanguageModel<Stack>>(folder, reading),
        [folder, reading](Machine& machine, auto const& model) { return hf::load<float>(machine, model, folder, reading); });
    return true;
  };
  with_pattern(Released{}, settings.pattern, use, differs);
  return stored;
}

template <class Stack> void save_run(TypedRun<Stack>& run, std::filesystem::path const& path, ha::Progress const& progress) {
  save_checkpoint(run.machine, path, run.model, run.params, run.optimizer, progress);
}
template <class Stack> ha::Progress load_run(TypedRun<Stack>& run, std::filesystem::path const& path) {
  return load_checkpoint(run.machine, path, run.model, run.params, run.optimizer);
}

template <class> struct FilesOf;
template <class... Choices> struct FilesOf<List<Choices...>> {
  static constexpr std::tuple functions{&save_run<typename Choices::Stack>..., &load_run<typename Choices::Stack>...};
};
template struct FilesOf<Trained>;

}  // namespace models
