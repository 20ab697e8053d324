// Common steps of layers with softmax heads, before and after the attention itself: norm and rotary on queries and
// keys, and the gate on the output.
#ifndef HYBRIDATTN_ATTENTION_HEADS_HPP
#define HYBRIDATTN_ATTENTION_HEADS_HPP

#include <hybridattn/attention/policy.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/ops/gate/gate.hpp>
#include <hybridattn/ops/rms_norm/rms_norm.hpp>
#include <hybridattn/ops/rope/rope.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// RMSNorm over the entries of each query and key head: y = x rstd w (plain) or x rstd (1 + w) (zero-centred).
enum class QkNorm { none, plain, zero_centred };
// Which entries of a head turn together: (i, i + rotary_dim/2), or (2i, 2i + 1).
enum class Rotary { half_split, interleaved };

// Entries of a head that turn: an even number. head_dim * percent / 200 * 2, which a large head_dim does not overflow.
constexpr Index rotary_size(Index head_dim, int percent) { return (head_dim / 200 * percent + head_dim % 200 * percent / 200) * 2; }

// Rotary positions for all the heads of a layer, by the batch's angles.
template <class T, class B> class Rotation {
 public:
  Rotation(B& backend, SequencesOn<B> const& s, Index head_dim, int percent, Rotary pairs, double theta)
      : options_{rotary_size(head_dim, percent), theta, pairs == Rotary::interleaved} {
    if (!s.any_continue()) positions_ = s.table().positions;
    if (options_.rotary_dim == 0) return;
    angles_ = s.template angles<wide_t<T>>(backend, options_.rotary_dim, theta, [&](View<wide_t<T>, 3> angles) {
      On<RopeAngles, B>::forward(backend, options_, s.any_continue() ? s.table().positions : View<std::int32_t const, 1>{}, angles);
    });
  }
  bool turns() const { return !angles_.empty(); }
  // Both copy where rotary_percent is 0.
  void forward(B& backend, View<T const, 3> x, View<T, 3> y) const { On<Rope, B>::forward(backend, options_, angles_, positions_, x, y); }
  void backward(B& backend, View<T const, 3> d_y, View<T, 3> d_x) const {
    On<Rope, B>::backward(backend, options_, angles_, positions_, d_y, d_x);
  }

 private:
  Rope::Options options_;
  View<std::int32_t const, 1> positions_;   // [N]; empty: the angles have a row for each token
  View<wide_t<T> const, 3> angles_;
};

// One of q and k: raw [N, H, D] -> norm with weight [D] -> rotation -> x.
struct HeadNorm {
  QkNorm kind;
  double eps;

  RmsNorm::Options options() const { return {kind == QkNorm::plain ? NormWeight::plain : NormWeight::zero_centred, eps}; }
  // The initial weight: the norm then multiplies by 1.
  Initial start() const { return Initial::constant(kind == QkNorm::plain ? 1 : 0); }

  template <class B, class T>
  void forward(B& backend, Rotation<T, B> const& rotation, View<T const, 3> raw, Wide<In<T>, 1> weight, View<T, 3> x) const {
    if (kind == QkNorm::none) {
      rotation.forward(backend, raw, x);
      return;
    }
    On<RmsNorm, B>::forward(backend, options(), head_rows(raw), weight, head_rows(x));
    if (rotation.turns()) rotation.forward(backend, View<T const, 3>(x), x);
  }
  // Overwrites d_raw and d_weight.
  template <class B, class T>
  void backward(B& backend, Rotation<T, B> const& rotation, View<T const, 3> raw, Wide<In<T>, 1> weight, View<T const, 3> d_x,
                View<T, 3> d_raw, Wide<Out<T>, 1> d_weight) const {
    if (kind == QkNorm::none) {
      rotation.backward(backend, d_x, d_raw);
      return;
    }
    Tensor<T, 3, B> turned;
    if (rotation.turns()) {
      turned = {backend, d_x.shape};
      rotation.backward(backend, d_x, out(turned));
      d_x = in(turned);
    }
    On<RmsNorm, B>::backward(backend, options(), head_rows(raw), weight, head_rows(d_x), head_rows(d_raw), d_weight, Into::overwrite);
  }
};

// o * sigmoid(z), z the gate's projection of x.
struct SigmoidFinish {
  static constexpr bool gated = true;
  template <class S> using Params = Nothing<S>;

  template <class Config> static Params<Shapes> params(Config const&) { return {}; }
  template <class Config> static Params<Starts> starts(Config const&) { return {}; }

  template <class B, class Config, class T>
  static void forward(B& backend, Config const&, View<T const, 3> o, View<T const, 3> z, Params<In<T>>, View<T, 3> y) {
    On<SigmoidGate, B>::forward(backend, flat(o), flat(z), flat(y));
  }
  template <class B, class Config, class T>
  static void backward(B& backend, Config const&, View<T const, 3> o, View<T const, 3> z, Params<In<T>>, View<T const, 3> d_y,
                       View<T, 3> d_o, View<T, 3> d_z, Params<Out<T>>) {
    On<SigmoidGate, B>::backward(backend, flat(o), flat(z), flat(d_y), flat(d_o), flat(d_z));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
