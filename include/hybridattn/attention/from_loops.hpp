// A policy's own loops as kernels of one thread: right and slow, for a policy that has no kernels yet.
#ifndef HYBRIDATTN_ATTENTION_FROM_LOOPS_HPP
#define HYBRIDATTN_ATTENTION_FROM_LOOPS_HPP

#include <hybridattn/attention/policy.hpp>
#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

// A pass of a policy: P::Loops::forward or backward with these arguments.
template <class P, class T> struct LoopsForward {
  static constexpr int threads = 32;
  struct Params {
    typename P::Config config;
    View<Sequence const, 1> sequences;
    typename P::template Inputs<In<T>> x;
    typename P::template Outputs<Out<T>> y;
    typename P::template Saved<Out<T>> saved;
    View<T, 1> scratch;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (simt::thread_id() == 0) P::Loops::template forward<T>(p.config, p.sequences, p.x, p.y, p.saved, p.scratch);
  }
};
template <class P, class T> struct LoopsBackward {
  static constexpr int threads = 32;
  struct Params {
    typename P::Config config;
    View<Sequence const, 1> sequences;
    typename P::template Inputs<In<T>> x;
    typename P::template Outputs<In<T>> y;
    typename P::template Saved<In<T>> saved;
    typename P::template Outputs<In<T>> d_y;
    typename P::template Inputs<Out<T>> d_x;
    View<T, 1> scratch;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (simt::thread_id() == 0) P::Loops::template backward<T>(p.config, p.sequences, p.x, p.y, p.saved, p.d_y, p.d_x, p.scratch);
  }
};

}  // namespace gpu

// template <ha::GpuBackend B> struct ha::On<Mine, B> : ha::FromLoops<Mine, B> {};
//
// Mine::Loops has, for a scalar T:
//   scratch<T>(config, sequences)   how many elements of T the loops need besides their arguments; on the host
//   forward<T> (config, sequences, x, y, saved, scratch)              HYBRIDATTN_HD
//   backward<T>(config, sequences, x, y, saved, d_y, d_x, scratch)    HYBRIDATTN_HD
// where `sequences` is a View<Sequence const, 1> and `scratch` a View<T, 1>. The Config is copied to the machine, so it holds only
// numbers.
template <class P, class B> struct FromLoops : InFloat<P, B> {
  using InFloat<P, B>::forward, InFloat<P, B>::backward;
  template <std::floating_point T, class M>
  static void forward(B& gpu, typename P::Config const& c, SequencesOn<M> const& s, typename P::template Inputs<In<T>> x,
                      typename P::template Outputs<Out<T>> y, typename P::template Saved<Out<T>> saved) {
    Tensor<T, 1, B> scratch{gpu, {P::Loops::template scratch<T>(c, s)}};
    launch<gpu::LoopsForward<P, T>>(gpu, {}, {c, s.table().list, x, y, saved, out(scratch)});
  }
  template <std::floating_point T, class M>
  static void backward(B& gpu, typename P::Config const& c, SequencesOn<M> const& s, typename P::template Inputs<In<T>> x,
                       typename P::template Outputs<In<T>> y, typename P::template Saved<In<T>> saved,
                       typename P::template Outputs<In<T>> d_y, typename P::template Inputs<Out<T>> d_x) {
    Tensor<T, 1, B> scratch{gpu, {P::Loops::template scratch<T>(c, s)}};
    launch<gpu::LoopsBackward<P, T>>(gpu, {}, {c, s.table().list, x, y, saved, d_y, d_x, out(scratch)});
  }
};
// Whether a policy runs from its loops on this backend.
template <class P, class B>
concept RunsFromLoops = std::is_base_of_v<FromLoops<P, B>, On<P, B>>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
