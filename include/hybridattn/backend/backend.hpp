// Machines: where memory lives, and how an operation is computed there.
#ifndef HYBRIDATTN_BACKEND_BACKEND_HPP
#define HYBRIDATTN_BACKEND_BACKEND_HPP

#include <hybridattn/backend/pool.hpp>

#include <concepts>
#include <cstddef>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <class Op, class B> struct On;

// What becomes of what stands where a result goes: several results may be added up in one place.
enum class Into { overwrite, add };

// What a machine offers to the layers above: memory, and copies. take(bytes) throws Error where there is no memory, give(block,
// bytes) never throws, trim() gives what waits in the pool back to the system. fill sets every byte; copy stays on the machine.
//
// A backend has one stream of work: operations, copies and blocks follow each other in the order in which they were asked for, so
// a block that was given back may serve the next request although the work on it is still to come. Upload may return before the
// copy is made, but the host's bytes are its own again; download and synchronise wait until all work asked for is done.
//
// owns(memory) says whether operations here may be given this memory.
template <class B>
concept Backend = requires(B b, void* to, void const* from, std::size_t bytes) {
  { b.take(bytes) } -> std::same_as<void*>;
  { b.give(to, bytes) } noexcept;
  b.trim();
  b.upload(to, from, bytes);
  b.download(to, from, bytes);
  b.copy(to, from, bytes);
  b.fill(to, std::byte{}, bytes);
  b.synchronise();
  { b.owns(from) } -> std::same_as<bool>;
  { b.pool() } -> std::same_as<Pool&>;
};

// A backend that wraps another one names it (`using Inner = Cpu;`), has run(f), which calls f(inner), and arrives(argument), which
// sees each argument of an operation first.
template <class B>
concept Wrapper = requires { typename B::Inner; };

namespace detail {

// The operations of the backend inside.
template <class Op, class B> struct OnInner {};
template <class Op, Wrapper B> struct OnInner<Op, B> {
  template <class Inner = typename B::Inner, class... Args>
  static auto forward(B& backend, Args&&... args) -> decltype(On<Op, Inner>::forward(std::declval<Inner&>(), args...)) {
    (backend.arrives(args), ...);
    return backend.run([&](Inner& inner) { return On<Op, Inner>::forward(inner, args...); });
  }
  template <class Inner = typename B::Inner, class... Args>
  static auto backward(B& backend, Args&&... args) -> decltype(On<Op, Inner>::backward(std::declval<Inner&>(), args...)) {
    (backend.arrives(args), ...);
    return backend.run([&](Inner& inner) { return On<Op, Inner>::backward(inner, args...); });
  }
  template <class Inner = typename B::Inner, class... Args>
  static auto extend(B& backend, Args&&... args) -> decltype(On<Op, Inner>::extend(std::declval<Inner&>(), args...)) {
    (backend.arrives(args), ...);
    return backend.run([&](Inner& inner) { return On<Op, Inner>::extend(inner, args...); });
  }
};

}  // namespace detail

// How one machine computes one operation: `forward` and `backward`, always both, always in this argument order:
//   On<Op, B>::forward (backend, config, sequences, inputs, outputs, saved)
//   On<Op, B>::backward(backend, config, sequences, inputs, outputs, saved, d_outputs, d_inputs)
// with whatever an operation has no use for left out. A policy that decodes has `extend` besides, see attention/policy.hpp.
// A pair without a specialisation has none of them, unless the backend wraps one that does.
template <class Op, class B> struct On : detail::OnInner<Op, B> {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
