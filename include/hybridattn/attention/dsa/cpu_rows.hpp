// Rows of chosen keys.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_ROWS_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_ROWS_HPP

#include <hybridattn/attention/cpu_rows.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

using attention::dot_row, attention::dot_rows, attention::head_of, attention::heads_of, attention::key_room, attention::Rows,
    attention::weighted_rows;

// The keys of one query, relative to the start of its sequence.
struct Keys {
  std::int32_t const* indices;
  Index count;

  HYBRIDATTN_INLINE Index operator[](Index j) const { return indices[j]; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
