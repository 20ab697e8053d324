// Gated DeltaNet's kernels for every room of a key, in float and double: what the compiler makes of them for a GPU.
#include <hybridattn/attention/gdn/gpu.hpp>
#include <hybridattn/backend/cuda/cuda.cuh>

namespace ha = hybridattn;

template <class T> void compile(ha::Cuda& gpu, ha::gdn::Config const& c, ha::SequencesOn<ha::Cuda> const& s) {
  using Gdn = ha::On<ha::GDN, ha::Cuda>;
  Gdn::forward<T>(gpu, c, s, {}, {}, {});
  Gdn::backward<T>(gpu, c, s, {}, {}, {}, {}, {});
  Gdn::extend<T>(gpu, c, s, {}, {}, {});
}
template void compile<float>(ha::Cuda&, ha::gdn::Config const&, ha::SequencesOn<ha::Cuda> const&);
template void compile<double>(ha::Cuda&, ha::gdn::Config const&, ha::SequencesOn<ha::Cuda> const&);
