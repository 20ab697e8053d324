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
// What bf16 adds to the kernels of float.
template <int... Ranks> void compile_conversions(ha::Cuda& gpu, std::integer_sequence<int, Ranks...>) {
  (convert(gpu, ha::View<ha::bf16 const, Ranks>{}, ha::View<float, Ranks>{}), ...);
  (convert(gpu, ha::View<float const, Ranks>{}, ha::View<ha::bf16, Ranks>{}), ...);
}
template void compile_conversions(ha::Cuda&, std::integer_sequence<int, 1, 2, 3, 4>);
void compile_in_bf16(ha::Cuda& gpu) {
  ha::On<ha::AllFinite, ha::Cuda>::forward<ha::bf16>(gpu, {});
  ha::On<ha::Fill, ha::Cuda>::forward<ha::bf16>(gpu, {}, {});
}
void compile_steps(ha::Cuda& gpu) {
  ha::On<ha::CountTargets, ha::Cuda>::forward(gpu, {}, {}, {});
  ha::On<ha::OpenStep, ha::Cuda>::forward(gpu, {});
  ha::On<ha::AddBatchLosses, ha::Cuda>::forward(gpu, 1, {}, {});
  ha::On<ha::DecideStep, ha::Cuda>::forward(gpu, {}, {}, {}, {}, {}, {});
  ha::On<ha::CloseStep, ha::Cuda>::forward(gpu, {}, {}, {}, {});
}
