// Every operation and policy on GPU backends.
#ifndef HYBRIDATTN_GPU_OPERATIONS_HPP
#define HYBRIDATTN_GPU_OPERATIONS_HPP

#include <hybridattn/attention/dsa/gpu.hpp>
#include <hybridattn/attention/from_loops.hpp>
#include <hybridattn/attention/full/gpu.hpp>
#include <hybridattn/attention/gdn/gpu.hpp>
#include <hybridattn/ops/adamw/gpu.hpp>
#include <hybridattn/ops/arithmetic/gpu.hpp>
#include <hybridattn/ops/balance/gpu.hpp>
#include <hybridattn/ops/causal_conv1d/gpu.hpp>
#include <hybridattn/ops/cross_entropy/gpu.hpp>
#include <hybridattn/ops/embedding/gpu.hpp>
#include <hybridattn/ops/gate/gpu.hpp>
#include <hybridattn/ops/gdn_gate/gpu.hpp>
#include <hybridattn/ops/grouped_linear/gpu.hpp>
#include <hybridattn/ops/l2_norm/gpu.hpp>
#include <hybridattn/ops/layer_norm/gpu.hpp>
#include <hybridattn/ops/linear/gpu.hpp>
#include <hybridattn/ops/moe/gpu.hpp>
#include <hybridattn/ops/rms_norm/gpu.hpp>
#include <hybridattn/ops/rope/gpu.hpp>
#include <hybridattn/ops/top_k/gpu.hpp>

#endif
