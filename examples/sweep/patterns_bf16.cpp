// The models of the sweep in bf16. They are in a file of their own, which CMake's HYBRIDATTN_EXAMPLES_IN_BF16 leaves out.
#include "run_of.hpp"

namespace sweep {

std::vector<CompiledPattern> patterns_in_bf16() { return compile<ha::bf16, HYBRIDATTN_SWEEP_PATTERNS>(); }

}  // namespace sweep
