// Sparse attention's kernels, in float and double: what the compiler makes of them for a GPU.
#include <hybridattn/attention/dsa/gpu.hpp>
#include <hybridattn/backend/cuda/cuda.cuh>

namespace ha = hybridattn;

template <class T> void compile(ha::Cuda& gpu, ha::dsa::Config const& c, ha::SequencesOn<ha::Cuda> const& s) {
  using Dsa = ha::On<ha::DSA, ha::Cuda>;
  Dsa::forward<T>(gpu, c, s, {}, {}, {});
  Dsa::backward<T>(gpu, c, s, {}, {}, {}, {}, {});
  Dsa::extend<T>(gpu, c, s, {}, {}, {});
}
template void compile<float>(ha::Cuda&, ha::dsa::Config const&, ha::SequencesOn<ha::Cuda> const&);
template void compile<double>(ha::Cuda&, ha::dsa::Config const&, ha::SequencesOn<ha::Cuda> const&);
