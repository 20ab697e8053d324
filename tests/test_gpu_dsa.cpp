// Sparse attention on the emulator of a GPU: the laws, in every stage of training.
#include "catch.hpp"
#include "gpu.hpp"
#include "verdicts.hpp"

#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;

namespace {

template <int top_k> using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = top_k}>;

// The first size of the laws, in a stage.
template <class P, class T> auto in_stage(ha::Stage stage) {
  auto size = ha::testing::Samples<P>::sizes().front();
  size.stage = stage;
  return ha::testing::Adaptor<P, Gpu, T>{size};
}

}  // namespace

TEST_CASE("sparse attention keeps every law on the emulator in the stages that train the indexer", "[laws]") {
  check_all(judge(in_stage<Sparse<8>, float>(ha::Stage::dense_warm_up)));
  check_all(judge(in_stage<Sparse<8>, double>(ha::Stage::sparse)));
}
TEST_CASE("sparse attention keeps every law on the emulator at every size", "[sizes]") {
  check_all(ha::testing::judge<Sparse<8>, Gpu, float>());
  check_all(ha::testing::judge<Sparse<8>, Gpu, double>());
}
TEST_CASE("sparse attention keeps every law in the stages that train the indexer, in the other scalar", "[sizes]") {
  check_all(judge(in_stage<Sparse<8>, double>(ha::Stage::dense_warm_up)));
  check_all(judge(in_stage<Sparse<8>, float>(ha::Stage::sparse)));
}
TEST_CASE("sparse attention with one key and with a share of the keys keeps every law", "[sizes]") {
  check_all(judge(in_stage<Sparse<1>, float>(ha::Stage::language_model)));
  check_all(judge(in_stage<ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 25}>, double>(ha::Stage::language_model)));
}
