// Kernels with one flaw each, in a bound, a mask or an index. The laws must notice each of them.
#include "catch.hpp"

#include <hybridattn/emulator.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;
using ha::Index;

namespace {

// An emulator on which the kernel K gets other parameters: Flaw::make(params) spoils them.
template <class K, class Flaw> class Flawed : public ha::Emulator {
 public:
  using Emulator::Emulator;
  template <class Kernel> void start(ha::Grid grid, typename Kernel::Params const& params) {
    if constexpr (std::is_same_v<Kernel, K>) {
      typename K::Params spoiled = params;
      Flaw::make(spoiled);
      Emulator::start<K>(grid, spoiled);
    } else {
      Emulator::start<Kernel>(grid, params);
    }
  }
};
static_assert(ha::GpuBackend<Flawed<ha::gpu::RmsNormForward<float>, int>>);

// The laws that Subject breaks.
std::string broken_laws(std::vector<ha::testing::Verdict> const& verdicts) {
  std::string broken;
  for (auto const& verdict : verdicts)
    if (!verdict.holds && broken.find(verdict.law) == broken.npos) broken += (broken.empty() ? "" : ", ") + verdict.law;
  return broken;
}
// The laws that an operation or a policy breaks with a flaw in the kernel K, at its first size.
template <class Op, class K, class Flaw> std::string broken_by() {
  using Backend = Flawed<K, Flaw>;
  if constexpr (ha::testing::HasOperation<Op>)
    return broken_laws(judge(ha::testing::OperationOn<Op, Backend, float>{ha::testing::Operation<Op>::sizes().front()}));
  else return broken_laws(judge(ha::testing::Adaptor<Op, Backend, float>{{.num_heads = 4, .num_kv_heads = 2, .head_dim = 8}}));
}

using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = 8}>;
// The same for sparse attention in a stage.
template <class K, class Flaw> std::string broken_by(ha::Stage stage) {
  ha::dsa::Config const size{
      .num_heads = 4, .num_kv_heads = 2, .head_dim = 12, .index_heads = 2, .index_dim = 4, .index_scale = 0.5, .stage = stage};
  return broken_laws(judge(ha::testing::Adaptor<Sparse, Flawed<K, Flaw>, float>{size}));
}

// The same for Gated DeltaNet.
template <class K, class Flaw> std::string broken_by() {
  auto const size = ha::testing::Samples<ha::GDN>::sizes().front();
  return broken_laws(judge(ha::testing::Adaptor<ha::GDN, Flawed<K, Flaw>, float>{size}));
}

template <class T, int Rank> void lose_last(ha::View<T, Rank>& x, int axis) { --x.shape.extent[axis]; }
struct LosesLastColumn {
  static void make(auto& p) { lose_last(p.x, 1); }
};
struct LosesDepth {
  static void make(auto& p) { --p.a.columns; }
};
struct LosesLastToken {
  static void make(auto& p) { lose_last(p.tokens, 0); }
};
struct NextTarget {
  static void make(auto& p) { ++p.targets.data; }
};
struct LosesLastScore {
  static void make(auto& p) { lose_last(p.scores, 1); }
};
struct LosesLastPair {
  static void make(auto& p) { --p.pairs; }
};
struct SeesTheFuture {   // the parameters stay, the tile's queries move on by one
  static void make(auto& p) { p.x.q.data -= p.x.q.stride[0]; }
};
struct WiderWindow {
  static void make(auto& p) { ++p.window; }
};
struct OtherGroup {
  static void make(auto& p) { p.group = 1; }
};
struct NoDelta {
  static void make(auto& p) { p.d_o = p.y; }
};
struct OtherGroupOfBatch {
  static void make(auto& p) { p.batch.group *= 2; }
};
struct NextScore {   // of the next key
  static void make(auto& p) { ++p.scores.data; }
};
struct LosesIndexHead {
  static void make(auto& p) { lose_last(p.batch.x.index_w, 1); }
};
struct OtherScale {
  static void make(auto& p) { p.batch.index_scale *= 2; }
};
struct OtherScores {
  static void make(auto& p) { p.batch.scale *= 2; }
};

struct TwiceTheScale {
  static void make(auto& p) { p.scale *= 2; }
};
struct NextBeta {   // of the next token
  static void make(auto& p) { p.x.beta.data += p.x.beta.stride[0]; }
};

}  // namespace

TEST_CASE("a flaw in a kernel of an operation breaks a law", "[flawed]") {
  using namespace ha::gpu;
  CHECK(broken_by<ha::RmsNorm, RmsNormForward<float>, LosesLastColumn>() != "");
  CHECK(broken_by<ha::Linear, Multiply<float, 32>, LosesDepth>() != "");
  CHECK(broken_by<ha::Embedding, EmbeddingBackward<float>, LosesLastToken>() != "");
  CHECK(broken_by<ha::SoftmaxLoss, SoftmaxLossRow<float>, NextTarget>() != "");
  CHECK(broken_by<ha::TopK, SelectTopK<float>, LosesLastScore>() != "");
  CHECK(broken_by<ha::Rope, Turn<float>, LosesLastPair>() != "");
}
TEST_CASE("a flaw in a kernel of full attention breaks a law", "[flawed]") {
  using Windowed = ha::FullAttention<ha::FullOptions{.window = 16}>;
  CHECK(broken_by<Windowed, ha::full::Forward<float, 32>, WiderWindow>().find("true values") != std::string::npos);
  CHECK(broken_by<Windowed, ha::full::KeyGradients<float, 32>, WiderWindow>().find("true values") != std::string::npos);
  CHECK(broken_by<ha::Full, ha::full::Forward<float, 32>, OtherGroup>().find("true values") != std::string::npos);
  CHECK(broken_by<ha::Full, ha::full::Forward<float, 32>, SeesTheFuture>().find("packed equals") != std::string::npos);
  CHECK(broken_by<ha::Full, ha::full::QueryGradients<float, 32>, NoDelta>() != "");
  CHECK(broken_by<ha::Full, ha::full::Decode<float, 32>, OtherGroup>().find("decodes the whole") != std::string::npos);
}
TEST_CASE("a flaw in a kernel of sparse attention breaks a law", "[flawed]") {
  using namespace ha::dsa;
  auto const plain = ha::Stage::language_model, dense = ha::Stage::dense_warm_up, sparse = ha::Stage::sparse;
  CHECK(broken_by<ScoreKeys<float>, LosesIndexHead>(plain) != "");
  CHECK(broken_by<SelectKeys<float>, NextScore>(plain) != "");
  CHECK(broken_by<Attend<float>, OtherGroupOfBatch>(plain) != "");
  CHECK(broken_by<AttendQueryGradients<float>, NoDelta>(plain) != "");
  CHECK(broken_by<AttendKeyGradients<float>, OtherScores>(plain) != "");
  CHECK(broken_by<IndexLoss<float>, OtherScale>(sparse) != "");
  CHECK(broken_by<IndexQueryGradients<float>, OtherScale>(dense) != "");
  CHECK(broken_by<IndexKeyGradients<float>, OtherScale>(sparse) != "");
}
TEST_CASE("a flaw in a kernel of gated DeltaNet breaks a law", "[flawed]") {
  using namespace ha::gdn;
  CHECK(broken_by<PrepareChunks<float, 32>, TwiceTheScale>() != "");
  CHECK(broken_by<ForwardChunks<float, 32>, TwiceTheScale>() != "");
  CHECK(broken_by<StatesOfChunks<float, 32>, NextBeta>() != "");
  CHECK(broken_by<GradientsOfStates<float, 32>, TwiceTheScale>() != "");
  CHECK(broken_by<GradientsOfTokens<float, 32>, NextBeta>() != "");
  CHECK(broken_by<ForwardSteps<float, 32>, TwiceTheScale>().find("decodes the whole") != std::string::npos);
}
