#include "catch.hpp"

#include "../examples/study_models.hpp"

namespace ha = hybridattn;

namespace {

template <class Stack> ha::Index parameters1() { return ha::LanguageModel<Stack>{study::study1_config<Stack>(49152)}.parameter_count(); }
template <class Stack> ha::Index parameters2() { return ha::LanguageModel<Stack>{study::study2_config<Stack>(49152)}.parameter_count(); }
template <ha::Text text> using One = ha::Pattern<text, study::Study1>;
template <ha::Text text> using Two = ha::Pattern<text, study::Study2>;

}  // namespace

TEST_CASE("study 1's patterns have exactly the published numbers of parameters") {
  CHECK(parameters1<One<"LFFL">>() == 14'064'264);
  CHECK(parameters1<One<"FFLL">>() == 14'064'264);
  CHECK(parameters1<One<"LDDL">>() == 14'106'120);
  CHECK(parameters1<One<"DLDL">>() == 14'106'120);
  CHECK(parameters1<One<"LLLL">>() == 14'101'136);
  CHECK(parameters1<One<"FFFF">>() == 14'027'392);
  CHECK(parameters1<One<"DDDD">>() == 14'111'104);
}

TEST_CASE("study 2's two models have exactly the published numbers of parameters") {
  CHECK(parameters2<Two<"FFFF">>() == 17'832'192);
  CHECK(parameters2<Two<"DDDD">>() == 18'163'968);
}

// The same policies by type, by repetition and by text.
static_assert(std::is_same_v<ha::Pattern<"LFFL">, ha::Stack<ha::GDN, ha::Full, ha::Full, ha::GDN>>);
static_assert(std::is_same_v<ha::Pattern<"G**D">, ha::Stack<ha::GDN, ha::Full, ha::Full, ha::DSA>>);
static_assert(std::is_same_v<ha::Repeat<2, ha::GDN, ha::Full>, ha::Pattern<"GFGF">>);
static_assert(std::is_same_v<One<"G**G">, One<"LFFL">>);

TEST_CASE("what two patterns share starts equal") {
  ha::Cpu cpu{1};
  auto const full = ha::LanguageModel<One<"LFFL">>{study::study1_config<One<"LFFL">>(64)}.initialize<float>(cpu, ha::Seed{5});
  auto const sparse = ha::LanguageModel<One<"DDLL">>{study::study1_config<One<"DDLL">>(64)}.initialize<float>(cpu, ha::Seed{5});
  CHECK(download(cpu, full.embedding) == download(cpu, sparse.embedding));
  CHECK(download(cpu, full.head) == download(cpu, sparse.head));
  auto const& last_of_full = boost::hana::at_c<0>(full.blocks.arrays)[1];    // layer 3 of both is L
  auto const& last_of_sparse = boost::hana::at_c<1>(sparse.blocks.arrays)[1];
  ha::zip(
      [&](ha::Path const& path, auto const& a, auto const& b) {
        INFO(path.str());
        CHECK(download(cpu, a) == download(cpu, b));
      },
      last_of_full, last_of_sparse);
}

TEST_CASE("Gated DeltaNet's gates start as flash-linear-attention or as transformers draw them") {
  using Stack = ha::Stack<ha::GDN>;
  for (auto const start : {ha::gdn::GateStart::fla, ha::gdn::GateStart::transformers}) {
    ha::Cpu cpu{1};
    ha::LanguageModel<Stack>::Config config{.model_dim = 256, .num_heads = 64};
    config.policy<ha::GDN>().gate_start = start;
    auto const params = ha::LanguageModel<Stack>{config}.initialize<double>(cpu, ha::Seed{1});
    auto const& prepare = boost::hana::at_c<0>(params.blocks.arrays)[0].attention.prepare;
    for (double a_log : download(cpu, prepare.a_log)) CHECK((std::log(0.01) <= a_log && a_log <= std::log(16)));
    for (double dt_bias : download(cpu, prepare.dt_bias)) {
      double const step = ha::softplus(dt_bias);
      if (start == ha::gdn::GateStart::fla) CHECK((0.999e-3 <= step && step <= 0.1001));
      else CHECK(dt_bias == 1);
    }
  }
}
