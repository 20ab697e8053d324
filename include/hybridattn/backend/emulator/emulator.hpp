// A GPU on the host: kernels run with every thread a fiber, slowly, and their mistakes become errors. docs/emulator.md shows which.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_EMULATOR_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_EMULATOR_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/emulator/engine.hpp>
#include <hybridattn/backend/gpu/convert.hpp>
#include <hybridattn/backend/hidden_memory.hpp>
#include <hybridattn/core/type_name.hpp>

#include <memory>
#include <string_view>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct EmulatorOptions {
  int schedule = 1;   // the order of threads, warps and blocks
  int threads = 0;    // of the host, on which blocks run; 0: as many as Cpu{} has
};

class Emulator {
 public:
  static constexpr std::string_view name = "Emulator";

  // testing::Machine: the number is a schedule.
  static constexpr bool takes_schedule = true;

  // The order in which threads, warps and blocks run: 1 to 6 are forward, backward and random orders, in which a warp runs until it must
  // wait, or warps take turns. Larger numbers are other random orders. The result of a correct kernel does not depend on it. Throws Error
  // for a schedule below 1, and for threads that Cpu refuses.
  explicit Emulator(EmulatorOptions options = {}) : schedule_(options.schedule), cpu_(options.threads) {
    check(schedule_ >= 1, "Emulator: schedule ", schedule_, "; schedules are numbers from 1 on");
    for (int thread = 0; thread < threads(); ++thread)
      engines_.push_back(std::make_unique<emulator::Engine>(emulator::Schedule{schedule_}));
  }
  explicit Emulator(int schedule) : Emulator(EmulatorOptions{.schedule = schedule}) {}

  void* take(std::size_t bytes) {
    return pool_.take(
        bytes, [this](std::size_t n) { return memory_.allocate(n, pool_.held()); },
        [this](void* block, std::size_t n) { memory_.release(block, n); }, machine_memory());
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }
  void trim() noexcept {
    pool_.trim([this](void* block, std::size_t n) { memory_.release(block, n); });
  }
  void upload(void* to, void const* from, std::size_t bytes) {
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void download(void* to, void const* from, std::size_t bytes) {
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void copy(void* to, void const* from, std::size_t bytes) {
    check(owns(to) && owns(from), "Emulator: a copy on the device was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    check(owns(to), "Emulator: a fill was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memset(to, std::to_integer<int>(value), bytes);
  }
  void synchronise() {}
  bool owns(void const* memory) const { return memory_.owns(memory); }
  Pool& pool() { return pool_; }
  // Of the host.
  int threads() const { return cpu_.threads(); }
  // Kernels that were started.
  std::size_t launches() const { return launches_; }

  // Runs a kernel to its end, its blocks on all cores. Throws Error where it makes a mistake, or is given memory of the host.
  template <class K> void start(Grid grid, typename K::Params const& params) {
    check_addresses<K>(params);
    ++launches_;
    constexpr std::size_t shared = std::is_empty_v<typename K::Shared> ? 0 : sizeof(typename K::Shared);
    run({type_name<K>,
         [](void* memory, void const* p) { K::run(*static_cast<typename K::Shared*>(memory), *static_cast<typename K::Params const*>(p)); },
         &params, K::threads, shared, grid});
  }

 private:
  void run(emulator::Launch const& launch) {
    HiddenMemory::Open const open{memory_};
    Grid const grid = launch.grid;
    Index const blocks = grid.x * grid.y * grid.z;
    parallel_for(cpu_, blocks, [&](Index task, int thread) {
      Index const block = schedule_ % 3 == 2 ? blocks - 1 - task : task;
      engines_[static_cast<std::size_t>(thread)]->run_block(launch, {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y});
    });
    for (auto& engine : engines_) engine->end_launch();
  }
  // Throws Error where a word of the parameters is an address of the host's memory: a GPU cannot read it. Numbers are smaller than
  // addresses or larger. Two small numbers side by side may look like an address, but there is no memory.
  template <class K> void check_addresses([[maybe_unused]] typename K::Params params) const {
#if defined(__GNUC__) && !defined(__clang__)
    __builtin_clear_padding(&params);  // which may hold anything, half an address too
    auto const* const bytes = reinterpret_cast<std::byte const*>(&params);
    for (std::size_t at = 0; at + sizeof(void*) <= sizeof params; at += sizeof(void*)) {
      void* address;
      std::memcpy(&address, bytes + at, sizeof address);
      auto const number = reinterpret_cast<std::uintptr_t>(address);
      if (number < lowest_address || number >= std::uintptr_t{1} << 47 || memory_.owns(address)) continue;
      bool const is_memory = msync(reinterpret_cast<void*>(number / 4096 * 4096), 1, MS_ASYNC) == 0;
      check(!is_memory, "Emulator: kernel ", type_name<K>(), ": the parameters hold an address of the host's memory, at byte ", at,
            "; a GPU cannot read it");
    }
#endif
  }

  // Of the memory that programs take. The address sanitizer's own memory is below.
  static constexpr std::uintptr_t lowest_address = std::uintptr_t{1} << (HYBRIDATTN_ASAN ? 45 : 40);

  int schedule_;
  Cpu cpu_;
  HiddenMemory memory_{"Emulator"};
  Pool pool_;
  std::vector<std::unique_ptr<emulator::Engine>> engines_;  // one for each thread of the host
  std::size_t launches_ = 0;
};
static_assert(GpuBackend<Emulator>);

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
