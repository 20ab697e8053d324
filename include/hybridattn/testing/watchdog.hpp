// A Watchdog makes an endless loop a failed test instead of tests that hang.
#ifndef HYBRIDATTN_TESTING_WATCHDOG_HPP
#define HYBRIDATTN_TESTING_WATCHDOG_HPP

#include <hybridattn/core/config.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Watches the code that runs while it lives. After `patience` it calls `bark`. An endless loop cannot be stopped from outside, so by
// default `bark` ends the program and says why.
class Watchdog {
 public:
  static inline std::chrono::milliseconds patience =
      std::chrono::minutes(20);   // what it watches takes milliseconds, or seconds where much runs
  static inline std::function<void(std::string const&)> bark = [](std::string const& what) {
    std::fprintf(stderr, "%s does not end\n", what.c_str());
    std::fflush(nullptr);
    std::_Exit(1);
  };

  explicit Watchdog(std::string what) : what_(std::move(what)), thread_([this] { watch(); }) {}
  Watchdog(Watchdog const&) = delete;
  Watchdog& operator=(Watchdog const&) = delete;
  ~Watchdog() { stop(); }

  // Ends the watch. Returns whether the watched code ended in time.
  bool stop() {
    {
      std::lock_guard const lock{mutex_};
      over_ = true;
    }
    changed_.notify_one();
    if (thread_.joinable()) thread_.join();
    return !barked_;
  }

 private:
  void watch() {
    std::unique_lock lock{mutex_};
    if (changed_.wait_for(lock, patience, [this] { return over_; })) return;
    barked_ = true;
    bark(what_);
  }

  std::string what_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false, barked_ = false;
  std::thread thread_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
