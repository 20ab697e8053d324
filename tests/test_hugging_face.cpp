// Released models in folders of the Hugging Face layout, compared with all that the published implementation computes from them.
// `test_hugging_face [.table]` prints the errors of every folder.
#include "released_models.hpp"

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;
using namespace released;

namespace {

using Maker = std::unique_ptr<AnyModel> (*)(fs::path const&);
using Makers = std::map<std::pair<std::string, double>, Maker>;   // by pattern and share of a head that turns, in percent
template <class T, int rotary_percent, ha::Text... patterns> void add_makers(Makers& makers) {
  ((makers[{patterns.letters, rotary_percent}] = [](fs::path const& folder) -> std::unique_ptr<AnyModel> {
     return std::make_unique<ModelIn<ModelOf<rotary_percent, patterns>, T, ha::Cpu>>(folder);
   }),
   ...);
}
// The folder's model, or null if this program does not compile its type.
std::unique_ptr<AnyModel> open_model(Makers const& makers, fs::path const& folder) {
  auto const s = hf::read_settings(folder);
  auto const found = makers.find({s.pattern, rotary_percent_of(s)});
  return found == makers.end() ? nullptr : found->second(folder);
}
std::unique_ptr<AnyModel> open_in_double(fs::path const& folder) {
  Makers makers;
  add_makers<double, 25, "LFFL", "LF", "LLLF">(makers);
  add_makers<double, 50, "LFFL", "LF", "LLLF">(makers);
  add_makers<double, 100, "LFFL", "LF">(makers);
  return open_model(makers, folder);
}
std::unique_ptr<AnyModel> open_in_float(fs::path const& folder) {
  Makers makers;
  add_makers<float, 50, "LFFL", "LF">(makers);
  return open_model(makers, folder);
}

Errors errors_of(Released const& truth) {
  Errors e;
  auto const in_double = open_in_double(truth.folder()), balanced = open_in_double(truth.folder()),
             in_float = open_in_float(truth.folder());
  INFO(truth.folder() << " has the pattern " << hf::pattern(truth.folder()) << ", or a rotary share, that open_in_double does not list");
  REQUIRE(in_double != nullptr);
  compare_written(truth, *in_double, e);
  compare_passes(truth, *in_double, e);
  compare_training(truth, *in_double, e);
  compare_auxiliary(truth, *balanced, e);
  if (in_float != nullptr) compare_in_float(truth, *in_float, e);
  return e;
}
std::map<std::string, Errors> const& all_errors() {
  static std::map<std::string, Errors> const errors = [] {
    std::map<std::string, Errors> result;
    for (auto const& truth : released_models()) result[truth.name()] = errors_of(truth);
    return result;
  }();
  return errors;
}

}  // namespace

TEST_CASE("released models give their own logits, losses, gradients and trained parameters, and are written back as they were") {
  CHECK((!all_errors().empty() || golden::elsewhere()));
  for (auto const& [name, e] : all_errors()) {
    INFO(name);
    check_worst("logits", e.logits, 1e-11);
    check_worst("hidden states", e.hidden, 1e-11);
    check_worst("router probabilities", e.router, 1e-11);
    check_worst("loss", e.loss, 1e-11);
    check_worst("gradients", e.gradients, 1e-10);
    check_worst("auxiliary loss", e.auxiliary_loss, 1e-11);
    check_worst("gradients with the auxiliary loss", e.auxiliary_gradients, 1e-10);
    check_worst("losses and norms of ten steps", e.training_loss, 1e-9);
    check_worst("trained parameters", e.trained, 1e-9);
    check_worst("written back", e.written, 0);
    check_worst("logits in float", e.float_logits, e.float_logits_allowed);
    check_worst("gradients in float", e.float_gradients, e.float_gradients_allowed);
    CHECK(e.experts_differ == 0);
  }
}

TEST_CASE("the errors of every released model", "[.table]") {
  std::printf("%-20s %8s %8s %8s %8s %8s %8s %8s %8s %8s %8s  float: %8s %8s\n", "folder", "written", "logits", "hidden", "router", "loss",
              "grads", "aux", "auxgrads", "steps", "trained", "logits", "grads");
  for (auto const& [name, e] : all_errors()) {
    std::printf("%-20s", name.c_str());
    for (auto const* worst : {&e.written, &e.logits, &e.hidden, &e.router, &e.loss, &e.gradients, &e.auxiliary_loss, &e.auxiliary_gradients,
                              &e.training_loss, &e.trained, &e.float_logits, &e.float_gradients}) {
      std::printf(worst == &e.float_logits ? "         " : " ");
      if (worst->compared) std::printf("%8.1e", worst->error);
      else std::printf("%8s", "-");
    }
    std::printf("\n");
  }
}
