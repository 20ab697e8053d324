// Every operation's kernels in float and double: what the compiler makes of them for a GPU.
#include <hybridattn/cuda.cuh>
#include <hybridattn/testing/operations.hpp>

namespace ha = hybridattn;

template <class Op, class T> void compile(ha::Cuda& gpu) {
  using Operation = ha::testing::Operation<Op>;
  typename Operation::Config const c{};
  ha::SequencesOn<ha::Cuda> const s;
  Operation::template forward<ha::Cuda, T>(gpu, c, s, {}, {});
  if constexpr (requires { Operation::template backward<ha::Cuda, T>(gpu, c, s, {}, {}, {}, {}); })
    Operation::template backward<ha::Cuda, T>(gpu, c, s, {}, {}, {}, {});
}
template <class T, class... Ops> void compile_all(ha::Cuda& gpu, std::tuple<Ops...> const*) { (compile<Ops, T>(gpu), ...); }
template void compile_all<float>(ha::Cuda&, ha::testing::AllOperations const*);
template void compile_all<double>(ha::Cuda&, ha::testing::AllOperations const*);

// Operations without laws of their own.
template <class T> void compile_others(ha::Cuda& gpu) {
  ha::On<ha::AllFinite, ha::Cuda>::forward<T>(gpu, {});
  ha::On<ha::AdamWCheck, ha::Cuda>::forward<T>(gpu, {}, {}, {}, {});
}
template void compile_others<float>(ha::Cuda&);
template void compile_others<double>(ha::Cuda&);
void compile_steps(ha::Cuda& gpu) {
  ha::On<ha::CountTargets, ha::Cuda>::forward(gpu, {}, {}, {});
  ha::On<ha::OpenStep, ha::Cuda>::forward(gpu, {});
  ha::On<ha::AddBatchLosses, ha::Cuda>::forward(gpu, 1, {}, {});
  ha::On<ha::DecideStep, ha::Cuda>::forward(gpu, {}, {}, {}, {}, {}, {});
  ha::On<ha::CloseStep, ha::Cuda>::forward(gpu, {}, {}, {}, {});
}
