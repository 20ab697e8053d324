// The models of the sweep in float.
#include "run_of.hpp"

namespace sweep {

std::vector<CompiledPattern> patterns_in_float() { return compile<float, HYBRIDATTN_SWEEP_PATTERNS>(); }

}  // namespace sweep
