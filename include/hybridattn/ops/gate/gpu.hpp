#ifndef HYBRIDATTN_OPS_GATE_GPU_HPP
#define HYBRIDATTN_OPS_GATE_GPU_HPP

#include <hybridattn/ops/gate/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Swiglu, B> : InFloat<Swiglu, B> {
  using InFloat<Swiglu, B>::forward, InFloat<Swiglu, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 1> gate, View<T const, 1> up, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::SwigluForward<T>{gate, up, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 1> gate, View<T const, 1> up, View<T const, 1> d_y, View<T, 1> d_gate, View<T, 1> d_up) {
    for_each(gpu, d_y.count(), gpu::SwigluBackward<T>{gate, up, d_y, d_gate, d_up});
  }
};

template <GpuBackend B> struct On<SigmoidGate, B> : InFloat<SigmoidGate, B> {
  using InFloat<SigmoidGate, B>::forward, InFloat<SigmoidGate, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 1> x, View<T const, 1> z, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::SigmoidGateForward<T>{x, z, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 1> x, View<T const, 1> z, View<T const, 1> d_y, View<T, 1> d_x, View<T, 1> d_z) {
    for_each(gpu, d_y.count(), gpu::SigmoidGateBackward<T>{x, z, d_y, d_x, d_z});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
