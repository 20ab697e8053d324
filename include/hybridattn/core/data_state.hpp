// Where a source of training data stands, as a checkpoint keeps it.
#ifndef HYBRIDATTN_CORE_DATA_STATE_HPP
#define HYBRIDATTN_CORE_DATA_STATE_HPP

#include <hybridattn/core/config.hpp>

#include <cstdint>
#include <string>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Where a source's training batches stand, and which source's they are.
struct DataState {
  std::string description;     // for whoever reads it
  std::uint64_t seed = 0;
  std::uint64_t content = 0;   // a hash of the text, or of the task's options
  std::uint64_t drawn = 0;     // random numbers, see Random

  friend bool operator==(DataState const&, DataState const&) = default;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
