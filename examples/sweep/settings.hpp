// What a sweep is asked for.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_SETTINGS_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_SETTINGS_HPP

#include "../machine.hpp"

#include <hybridattn/core/view.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace sweep {

// The study's eight.
inline constexpr std::string_view studied = "LFFL,FLFL,LLFF,FFLL,LDDL,DLDL,LLDD,DDLL";

struct Settings {
  hybridattn::Index steps = 1000, seq_len = 128, batch = 2, validation = 200;
  std::uint64_t seed = 1;
  int threads = 0;
  std::string backend{program::backend};
  std::string dtype = "float";
  std::string patterns{studied};
  std::vector<std::string> data;
  std::filesystem::path out = "results";
  double checkpoint_every = 5;   // seconds
  bool fresh = false;
};

}  // namespace sweep
#endif
