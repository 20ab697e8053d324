// Rotary positions (arXiv 2104.09864): pair number i of a head turns by position * theta^(-2i / rotary_dim).
// Pairs are (i, i + rotary_dim/2), or (2i, 2i + 1) when interleaved; entries from rotary_dim on stay as they are.
// Backward turns back.
#ifndef HYBRIDATTN_OPS_ROPE_ROPE_HPP
#define HYBRIDATTN_OPS_ROPE_ROPE_HPP

#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, options, angles, positions, x, y)      x, y [N, H, D], positions [N]: the row of angles of each token, or
//                                                            nothing for row n of token n; y may be x
//   backward(backend, options, angles, positions, d_y, d_x)  d_x may be d_y
// They throw on a rotary_dim that is odd or does not fit the head.
struct Rope {
  struct Options {
    Index rotary_dim = 0;
    double theta = 10000;
    bool interleaved = false;
  };
};
//   forward(backend, options, positions, angles)   angles [P, 2, rotary_dim/2]: cosine and sine of these positions [P], or of
//                                                  0 .. P - 1 without positions; throws on a theta that is not positive, and on
//                                                  a GPU on a rotary_dim above 256
struct RopeAngles {};

// Throws Error where rotary_dim is odd or does not fit the head.
inline void check_rotary_dim(Rope::Options const& o, Index head_dim) {
  check(0 <= o.rotary_dim && o.rotary_dim <= head_dim && o.rotary_dim % 2 == 0, "Rope: rotary_dim ", o.rotary_dim,
        " is not allowed; it must be even, and in 0 .. ", head_dim, ", the size of a head");
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/rope/cpu.hpp>

#endif
