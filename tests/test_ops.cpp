// Operations that have no golden files, and properties of other operations that golden files do not test.
#include "catch.hpp"

#include <hybridattn/core/random.hpp>
#include <hybridattn/ops/cross_entropy/cross_entropy.hpp>
#include <hybridattn/ops/layer_norm/layer_norm.hpp>
#include <hybridattn/ops/rope/rope.hpp>
#include <hybridattn/train/schedule.hpp>

#include <Eigen/Core>

namespace ha = hybridattn;
using ha::Index;

namespace {

using Rows = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Rows noise(Index rows, Index columns, char const* name) {
  ha::Random random{ha::Seed{11}, name};
  return Rows::NullaryExpr(rows, columns, [&] { return random.normal(); });
}
ha::View<double, 2> view(Rows& x) { return {x.data(), {x.rows(), x.cols()}}; }
ha::View<double const, 2> read(Rows const& x) { return {x.data(), {x.rows(), x.cols()}}; }
ha::View<double const, 1> read_line(Rows const& x) { return {x.data(), {x.size()}}; }

Rows layer_norm(Rows const& x, Rows const& w, Rows const& b) {
  Rows const centred = x.colwise() - x.rowwise().mean();
  Rows const deviation = (centred.rowwise().squaredNorm() / static_cast<double>(x.cols())).array() + 1e-6;
  Rows y = centred.array().colwise() / deviation.col(0).array().sqrt();
  return (y.array().rowwise() * w.row(0).array()).rowwise() + b.row(0).array();
}

}  // namespace

TEST_CASE("LayerNorm equals Eigen") {
  ha::Cpu cpu{1};
  Rows const x = noise(37, 12, "x"), w = noise(1, 12, "w"), b = noise(1, 12, "b");
  Rows y(37, 12);
  ha::On<ha::LayerNorm, ha::Cpu>::forward(cpu, 1e-6, read(x), read_line(w), read_line(b), view(y));
  CHECK((y - layer_norm(x, w, b)).cwiseAbs().maxCoeff() < 1e-13);
}

TEST_CASE("a rotation with no share copies, and backward turns forward back") {
  ha::Cpu cpu{1};
  Rows x = noise(6, 16, "x"), y(6, 16), back(6, 16);
  auto const heads = [](Rows& r) { return ha::View<double, 3>{r.data(), {3, 2, 16}}; };
  std::vector<std::int32_t> const positions{0, 5, 9};
  ha::View<std::int32_t const, 1> const at{positions.data(), {3}};
  for (Index rotary_dim : {0, 8, 16})
    for (bool interleaved : {false, true}) {
      ha::Rope::Options const o{rotary_dim, 10000, interleaved};
      ha::Tensor<double, 3, ha::Cpu> angles{cpu, {10, 2, rotary_dim / 2}};
      if (angles) ha::On<ha::RopeAngles, ha::Cpu>::forward(cpu, o, {}, out(angles));
      ha::On<ha::Rope, ha::Cpu>::forward(cpu, o, in(angles), at, ha::View<double const, 3>(heads(x)), heads(y));
      ha::On<ha::Rope, ha::Cpu>::backward(cpu, o, in(angles), at, ha::View<double const, 3>(heads(y)), heads(back));
      CHECK((back - x).cwiseAbs().maxCoeff() < 1e-15);
      CHECK((y == x) == (rotary_dim == 0));
    }
}

TEST_CASE("the loss counts only tokens with a target, takes the first of equal logits") {
  ha::Cpu cpu{1};
  Rows const logits = Rows::Zero(3, 5);
  std::vector<std::int32_t> const targets{0, -100, 2};
  ha::View<std::int32_t const, 1> const at{targets.data(), {3}};
  ha::LossSum sum;
  ha::On<ha::SoftmaxLoss, ha::Cpu>::forward(cpu, read(logits), at, {}, ha::View<double, 2>{}, ha::View<ha::LossSum, 1>{&sum, {1}});
  CHECK(sum.count == 2);
  CHECK(sum.correct == 1);
  CHECK(sum.mean() == Approx(std::log(5.0)));

  ha::Index count = 1;   // left from another batch
  double scale = 0;
  ha::On<ha::CountTargets, ha::Cpu>::forward(cpu, at, ha::View<ha::Index, 1>{&count, {1}}, ha::View<double, 1>{&scale, {1}});
  CHECK(count == 3);
  CHECK(scale == 1.0 / 3);
}

TEST_CASE("backward adds the loss that forward adds, to the last bit") {
  ha::Cpu cpu{1};
  Rows const x = noise(5, 3, "x"), w = noise(4, 3, "w");
  Rows d_x(5, 3), d_w(4, 3);
  std::vector<std::int32_t> const targets{0, 3, -1, 2, 1};
  ha::View<std::int32_t const, 1> const at{targets.data(), {5}};
  ha::LossSum forward{2, 3, 1}, backward = forward;
  ha::On<ha::CrossEntropy, ha::Cpu>::forward(cpu, read(x), read(w), at, ha::View<ha::LossSum, 1>{&forward, {1}});
  double const half = 0.5;
  ha::On<ha::CrossEntropy, ha::Cpu>::backward(cpu, read(x), read(w), at, {&half, {1}}, view(d_x), view(d_w),
                                              ha::View<ha::LossSum, 1>{&backward, {1}});
  CHECK(forward.loss > 2);
  CHECK(backward.loss == forward.loss);
  CHECK((backward.count == 7 && forward.count == 7 && backward.correct == forward.correct));
}

TEST_CASE("a schedule past its end holds its floor") {
  ha::Schedule const cosine{.warmup_steps = 10, .total_steps = 50, .min_rate = 0.1};
  CHECK(cosine(0) == 0);
  CHECK(cosine(10) == 1);
  CHECK(cosine(50) == Approx(0.1));
  CHECK(cosine(500) == Approx(0.1));
  CHECK(ha::Schedule{}(7) == 1);
}

TEST_CASE("a schedule that is all warm-up rises to 1 and stays there, as far as it goes") {
  for (Index total : {Index{0}, Index{5}, Index{10}}) {
    ha::Schedule const all_warmup{.warmup_steps = 10, .total_steps = total, .min_rate = 0.1};
    for (Index step = 0; step < 30; ++step) CHECK(all_warmup(step) == (step < 10 ? static_cast<double>(step) / 10 : 1.0));
  }
  ha::Schedule const one_more{.warmup_steps = 10, .total_steps = 11, .min_rate = 0.1};
  CHECK(one_more(10) == 1);
  CHECK(one_more(11) == Approx(0.1));
  CHECK(ha::Schedule{.total_steps = 1}(0) == 1);
  CHECK(ha::Schedule{.total_steps = 1}(1) == 0);
  CHECK(ha::Schedule{.warmup_steps = 1}(0) == 0);
}
