// What a user gets wrong, one at a time: -DMISTAKE=0 compiles, every other number must not, and the first error says why.
#include <hybridattn/hybridattn.hpp>

namespace ha = hybridattn;

#if MISTAKE == 1  // no keys to attend to
using Mixer = ha::SparseAttention<ha::SparseOptions{.top_k = 0}>;
#elif MISTAKE == 2  // a count and a share
using Mixer = ha::SparseAttention<ha::SparseOptions{.top_k = 8, .top_k_percent = 50}>;
#else
using Mixer = ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 50}>;
#endif
static_assert(ha::AttentionPolicy<Mixer>);

#if MISTAKE == 3  // a letter that does not exist
using Model = ha::LanguageModel<ha::Pattern<"LXFL">>;
#elif MISTAKE == 4  // no layer
using Model = ha::LanguageModel<ha::Stack<>>;
#else
using Model = ha::LanguageModel<ha::Pattern<"LDFL">>;
#endif

using Params = Model::Params<ha::Owned<float, ha::Cpu>>;
void both_passes(ha::Cpu& cpu, Model const& model, Params const& params, ha::TokenBatch<ha::Cpu> const& batch) {
  auto saved = model.forward(cpu, params, batch);
#if MISTAKE == 5  // saved is not given away
  auto const gradients = model.backward(cpu, params, batch, saved, 1);
#else
  auto const gradients = model.backward(cpu, params, batch, std::move(saved), 1);
#endif
}
