// The GPU that a test runs on: under nvcc a real one, otherwise the emulator.
#ifndef HYBRIDATTN_TESTS_GPU_HPP
#define HYBRIDATTN_TESTS_GPU_HPP

#if defined(__CUDACC__)
#include <hybridattn/cuda.cuh>
using Gpu = hybridattn::Cuda;
#else
#include <hybridattn/emulator.hpp>
using Gpu = hybridattn::Emulator;
#endif

#endif
