// Conversion between scalars on the CPU.
#ifndef HYBRIDATTN_BACKEND_CPU_CONVERT_HPP
#define HYBRIDATTN_BACKEND_CPU_CONVERT_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/bf16.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI {

// y = x, each element rounded to the scalar of y. Rows may be spaced.
template <class From, class To, int Rank> void convert(Cpu& cpu, View<From const, Rank> x, View<To, Rank> y) {
  Index const C = y.count() == 0 ? 0 : y.extent(Rank - 1);
  if (C == 0) return;
  Index const rows = y.count() / C;
  parallel_blocks(cpu, rows, std::max<Index>(1, cpu::element_grain / C), [&](Index first, Index last) {
    for (Index n = first; n < last; ++n) {
      From const* const from = x.data + row_offset(x, n);
      To* const to = y.data + row_offset(y, n);
      for (Index i = 0; i < C; ++i) to[i] = static_cast<To>(from[i]);
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
