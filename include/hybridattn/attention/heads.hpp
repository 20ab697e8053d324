// What layers with softmax heads have in common: options for their queries, keys and outputs.
#ifndef HYBRIDATTN_ATTENTION_HEADS_HPP
#define HYBRIDATTN_ATTENTION_HEADS_HPP

namespace hybridattn {

// RMSNorm over the entries of each query and key head: y = x rstd w (plain) or x rstd (1 + w) (zero-centred).
enum class QkNorm { none, plain, zero_centred };
// Which entries of a head turn together: (i, i + rotary_dim/2), or (2i, 2i + 1).
enum class Rotary { half_split, interleaved };

}  // namespace hybridattn
#endif
