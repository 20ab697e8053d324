// Sparse attention as kernels.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNELS_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNELS_HPP

#include <hybridattn/attention/dsa/kernel_attention.hpp>
#include <hybridattn/attention/dsa/kernel_indexer.hpp>
#include <hybridattn/attention/dsa/kernel_kl.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// Copies keys, values and index keys of new tokens into the cache. A thread has an entry.
template <class T> struct RememberKeys {
  Inputs<In<T>> x;
  Cache<Out<T>> cache;
  SequenceTable sequences;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const D = x.k.extent(2), HK = x.k.extent(1), n = i / (HK * D), h = i / D % HK, d = i % D;
    cache.keys(sequences.owners(n), sequences.positions(n), h, d) = x.k(n, h, d);
    cache.values(sequences.owners(n), sequences.positions(n), h, d) = x.v(n, h, d);
  }
};
template <class T> struct RememberIndexKeys {
  View<T const, 2> index_k;
  View<T, 3> index_keys;
  SequenceTable sequences;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const n = i / index_k.extent(1), d = i % index_k.extent(1);
    index_keys(sequences.owners(n), sequences.positions(n), d) = index_k(n, d);
  }
};

// Sets an element of a gradient to 0. Its rows may have gaps between them.
template <class T, int Rank> struct SetElementZero {
  View<T, Rank> x;

  HYBRIDATTN_HD void operator()(Index i) const {
    if constexpr (Rank == 2) x(i / x.extent(1), i % x.extent(1)) = 0;
    else x(i / (x.extent(1) * x.extent(2)), i / x.extent(2) % x.extent(1), i % x.extent(2)) = 0;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
