// Options of policies. Those below must compile. mistakes.sh defines POLICY as a policy that must not compile.
#include <hybridattn/attention/attention.hpp>

namespace ha = hybridattn;

template <class... Policies> constexpr bool compile = (ha::AttentionPolicy<Policies> && ...);

#ifdef POLICY
static_assert(compile<ha::POLICY>);
#else
static_assert(compile<ha::FullAttention<ha::FullOptions{.window = 0, .rotary_percent = 0}>,
                      ha::FullAttention<ha::FullOptions{.window = 1, .rotary_percent = 100}>,
                      ha::GatedDeltaNet<ha::GdnOptions{.conv_width = 0}>, ha::GatedDeltaNet<ha::GdnOptions{.conv_width = 1}>,
                      ha::SparseAttention<ha::SparseOptions{.top_k = 1, .rotary_percent = 0, .index_rotary_percent = 100}>,
                      ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 1, .rotary_percent = 100}>,
                      ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 100, .index_rotary_percent = 0}> >);
#endif
