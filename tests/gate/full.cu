// Full attention's kernels for every room of a head, in float and double: what the compiler makes of them for a GPU.
#include <hybridattn/attention/full/gpu.hpp>
#include <hybridattn/backend/cuda/cuda.cuh>

namespace ha = hybridattn;

template <class T> void compile(ha::Cuda& gpu, ha::full::Config const& c, ha::SequencesOn<ha::Cuda> const& s) {
  using Full = ha::On<ha::Full, ha::Cuda>;
  Full::forward<T>(gpu, c, s, {}, {}, {});
  Full::backward<T>(gpu, c, s, {}, {}, {}, {}, {});
  Full::extend<T>(gpu, c, s, {}, {}, {});
}
template void compile<float>(ha::Cuda&, ha::full::Config const&, ha::SequencesOn<ha::Cuda> const&);
template void compile<double>(ha::Cuda&, ha::full::Config const&, ha::SequencesOn<ha::Cuda> const&);
