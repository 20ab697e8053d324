// How far a training run is, as a checkpoint keeps it.
#ifndef HYBRIDATTN_STORE_PROGRESS_HPP
#define HYBRIDATTN_STORE_PROGRESS_HPP

#include <hybridattn/core/data_state.hpp>
#include <hybridattn/core/view.hpp>

#include <map>
#include <string>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

// What a run needs to go on, besides parameters and optimizer.
struct Progress {
  Index step = 0;         // training steps that are done
  DataState data = {};    // DataSource::state()
  std::map<std::string, std::vector<double>> history = {};  // what the program counts, a number a step: losses, for instance
  std::string note = {};  // the program's own words, kept as they are
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
