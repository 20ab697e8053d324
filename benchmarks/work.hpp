// What the policies are timed on: numbers like those of a layer, and the floating-point operations that the equations need.
#ifndef HYBRIDATTN_BENCHMARKS_WORK_HPP
#define HYBRIDATTN_BENCHMARKS_WORK_HPP

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace bench {

namespace ha = hybridattn;
using ha::Index;

// Numbers like those of a layer: unit queries and keys for GDN, decays near 1, beta between 0 and 1.
template <class B, class Group> void fill_like_a_layer(B& backend, Group& group) {
  ha::zip(
      [&]<class T, int Rank>(ha::Path const& path, ha::Tensor<T, Rank, B>& tensor) {
        ha::Random random{ha::Seed{1}, path.str()};
        std::vector<T> values(tensor.byte_count() / sizeof(T));
        double const width = 1 / std::sqrt(static_cast<double>(tensor.shape()[Rank - 1]));
        for (T& value : values) {
          if (path.name == "g") value = static_cast<T>(-0.1 * random.uniform());
          else if (path.name == "beta") value = static_cast<T>(random.uniform());
          else value = static_cast<T>(random.normal() * (path.name == "v" ? 1 : width));
        }
        ha::upload(backend, values, tensor);
      },
      group);
}

inline Index pairs(Index T, Index k) {
  Index sum = 0;
  for (Index t = 0; t < T; ++t) sum += std::min(t + 1, k);
  return sum;
}
// Floating-point operations that the equations need.
inline double forward_flops(ha::full::Config const& c, Index T) { return 4.0 * static_cast<double>(pairs(T, T) * c.head_dim); }
inline double backward_flops(ha::full::Config const& c, Index T) { return 10.0 * static_cast<double>(pairs(T, T) * c.head_dim); }
inline double forward_flops(ha::gdn::Config const& c, Index T) { return 6.0 * static_cast<double>(T * c.key_dim * c.value_dim); }
inline double backward_flops(ha::gdn::Config const& c, Index T) { return 12.0 * static_cast<double>(T * c.key_dim * c.value_dim); }
// Attention over the keys of a query and, in stages that train the indexer, its loss over the same keys.
struct SparseWork {
  double all, attended, attention, indexer;   // pairs, pairs, and flops a pair of q . k of all heads and of the indexer's score
  SparseWork(ha::dsa::Config const& c, Index T)
      : all(static_cast<double>(pairs(T, T))), attended(c.stage == ha::Stage::dense_warm_up ? all : static_cast<double>(pairs(T, 64))),
        attention(2 * static_cast<double>(c.num_heads * c.head_dim)), indexer(2 * static_cast<double>(c.index_heads * c.index_dim)) {}
};
inline double forward_flops(ha::dsa::Config const& c, Index T) {
  SparseWork const w{c, T};
  double const loss = c.stage == ha::Stage::language_model ? 0 : w.attended * (w.attention + w.indexer);
  return (c.stage == ha::Stage::dense_warm_up ? 0 : w.all * w.indexer) + 2 * w.attended * w.attention + loss;
}
inline double backward_flops(ha::dsa::Config const& c, Index T) {
  SparseWork const w{c, T};
  double const loss = c.stage == ha::Stage::language_model ? 0 : w.attended * (w.attention + 3 * w.indexer);
  return (c.stage == ha::Stage::dense_warm_up ? 0 : 5 * w.attended * w.attention) + loss;
}

}  // namespace bench
#endif
