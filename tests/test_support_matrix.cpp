#include "catch.hpp"
#include "retention.hpp"

#include <hybridattn/support_matrix.hpp>

#include <fstream>
#include <sstream>

namespace {

// Forward only, and in float only.
struct HalfWritten : Retention {
  static constexpr std::string_view name = "half";
};

}  // namespace

template <> struct ha::On<HalfWritten, ha::Cpu> {
  static void forward(Cpu& cpu, HalfWritten::Config const& c, Sequences const& s, Retention::Inputs<In<float>> x,
                      Retention::Outputs<Out<float>> y, Nothing<Out<float>> saved) {
    On<Retention, Cpu>::forward<float>(cpu, c, s, x, y, saved);
  }
};

static_assert(ha::support<>[0].policy == "Full" && ha::support<>[0].backward[1]);

TEST_CASE("README shows the support matrix that the library prints") {
  std::ostringstream readme;
  readme << std::ifstream(std::string(HYBRIDATTN_SOURCE_DIR) + "/README.md").rdbuf();
  INFO("README.md shall hold\n" << ha::support_matrix());
  CHECK(readme.str().find("\n\n" + ha::support_matrix() + "\n") != std::string::npos);
}

TEST_CASE("the support matrix shows what is missing, of anybody's policies") {
  CHECK(ha::support_matrix<std::tuple<ha::GDN, HalfWritten>, std::tuple<ha::Cpu>>() ==
        "| policy | backend | forward | backward | decoding | backward remembers |\n"
        "|---|---|---|---|---|---|\n"
        "| GDN | Cpu | float, double, bf16 | float, double, bf16 | float, double, bf16 | error |\n"
        "| half | Cpu | float | - | - | nothing |\n");
}
