// NVIDIA GPUs, and every operation and policy on them. hybridattn/hybridattn.hpp includes this under nvcc.
#ifndef HYBRIDATTN_CUDA_CUH
#define HYBRIDATTN_CUDA_CUH

#include <hybridattn/backend/cuda/cuda.cuh>
#include <hybridattn/gpu_operations.hpp>

#endif
