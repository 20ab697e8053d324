// The machine that sweep, train and generate compute on. Their code is one text for all backends. A program is compiled for one of them,
// which CMake's HYBRIDATTN_EXAMPLE_BACKEND names: cpu, emulator or cuda.
#ifndef HYBRIDATTN_EXAMPLES_MACHINE_HPP
#define HYBRIDATTN_EXAMPLES_MACHINE_HPP

#include "program.hpp"

#include <hybridattn/backend/cpu/cpu.hpp>

#if HYBRIDATTN_CUDA
#include <hybridattn/backend/cuda/cuda.cuh>
#elif defined(HYBRIDATTN_EXAMPLES_ON_EMULATOR)
#include <hybridattn/backend/emulator/emulator.hpp>
#endif

namespace program {

// Of each backend: its type, its name in --backend, a machine for --threads, the words for where it computes, and its memory in bytes.
#if HYBRIDATTN_CUDA
using Machine = ha::Cuda;
inline constexpr std::string_view backend = "cuda";
inline Machine make_machine(int threads) {
  ha::check(threads == 0, "--threads ", threads, " is not allowed with --backend cuda; it must be 0, because the GPU computes");
  return Machine{};
}
inline std::string place_of(Machine const& gpu) { return gpu.device_name(); }
inline double memory_limit(Machine const&) { return static_cast<double>(Machine::device_memory()); }
#elif defined(HYBRIDATTN_EXAMPLES_ON_EMULATOR)
using Machine = ha::Emulator;
inline constexpr std::string_view backend = "emulator";
inline Machine make_machine(int threads) { return Machine{{.threads = threads}}; }
inline std::string place_of(Machine const& emulator) { return std::to_string(emulator.threads()) + " threads that emulate a GPU"; }
inline double memory_limit(Machine const&) { return memory_limit(); }
#else
using Machine = ha::Cpu;
inline constexpr std::string_view backend = "cpu";
inline Machine make_machine(int threads) { return Machine{threads}; }
inline std::string place_of(Machine const& cpu) { return std::to_string(cpu.threads()) + " threads"; }
inline double memory_limit(Machine const&) { return memory_limit(); }
#endif

// Throws unless this program computes on the backend that `name` names. `program` is what builds one that does.
inline void check_backend(std::string const& name, std::string const& program) {
  ha::check(name == "cpu" || name == "emulator" || name == "cuda", "--backend '", name,
            "' is not allowed; it must be cpu, emulator or cuda");
  std::string const preset = name == "cpu" ? "sweep" : "sweep-" + name;
  ha::check(name == backend, "--backend ", name, " is not allowed; this program is compiled for ", backend, ". To compile it for ", name,
            ": cmake --preset ", preset, " && cmake --build build/", preset, " --target ", program);
}

}  // namespace program
#endif
