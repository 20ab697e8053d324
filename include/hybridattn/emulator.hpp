// The emulator of a GPU, and every operation and policy on it.
#ifndef HYBRIDATTN_EMULATOR_HPP
#define HYBRIDATTN_EMULATOR_HPP

#include <hybridattn/backend/emulator/emulator.hpp>
#include <hybridattn/gpu_operations.hpp>

#endif
