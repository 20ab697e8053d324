// Operations on bf16 tensors. The tensors are stored in bf16; an operation computes in float, on copies, and rounds what it writes.
#ifndef HYBRIDATTN_TENSOR_IN_FLOAT_HPP
#define HYBRIDATTN_TENSOR_IN_FLOAT_HPP

#include <hybridattn/backend/cpu/convert.hpp>   // a GPU backend has its own
#include <hybridattn/tensor/roles.hpp>

#include <tuple>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace detail {

// Copies of bf16 tensors, as functions for zip. Tensors of other scalars are read and written where they are.
template <class B> struct ReadInFloat {
  B& backend;
  template <int Rank, class V> void operator()(Path const&, View<bf16 const, Rank> const& x, Tensor<float, Rank, B>& copy, V& view) const {
    view = {nullptr, x.shape};
    if (x.empty()) return;
    copy = {backend, x.shape};
    convert(backend, x, out(copy));
    view = in(copy);
  }
  template <class V, class T> void operator()(Path const&, V const& x, T&, V& view) const { view = x; }
};
template <class B> struct WriteInFloat {
  B& backend;
  template <int Rank> void operator()(Path const&, View<bf16, Rank> const& y, Tensor<float, Rank, B>& copy, View<float, Rank>& view) const {
    view = {nullptr, y.shape};
    if (y.empty()) return;
    copy = {backend, y.shape};
    convert(backend, View<bf16 const, Rank>(y), out(copy));   // an operation may add to what it writes
    view = out(copy);
  }
  template <class V, class T> void operator()(Path const&, V const& y, T&, V& view) const { view = y; }
};
template <class B> struct RoundBack {
  B& backend;
  template <int Rank> void operator()(Path const&, Tensor<float, Rank, B> const& copy, View<bf16, Rank> const& y) const {
    if (copy) convert(backend, in(copy), y);
  }
  template <class T, class V> void operator()(Path const&, T const&, V const&) const {}
};

// An argument of an operation on bf16 tensors, as the operation in float takes it.
template <class B, class Argument> struct InFloatArgument {
  Argument const& value;
  InFloatArgument(B&, Argument const& argument) : value(argument) {}
  void finish(B&) const {}
};
template <class B, int Rank> struct InFloatArgument<B, View<bf16 const, Rank>> {
  Tensor<float, Rank, B> copy;
  View<float const, Rank> value;
  InFloatArgument(B& backend, View<bf16 const, Rank> const& x) { ReadInFloat<B>{backend}(Path{}, x, copy, value); }
  void finish(B&) const {}
};
template <class B, int Rank> struct InFloatArgument<B, View<bf16, Rank>> {
  View<bf16, Rank> y;
  Tensor<float, Rank, B> copy;
  View<float, Rank> value;
  InFloatArgument(B& backend, View<bf16, Rank> const& written) : y(written) { WriteInFloat<B>{backend}(Path{}, y, copy, value); }
  void finish(B& backend) const { RoundBack<B>{backend}(Path{}, copy, y); }
};
template <class B, template <class> class G> struct InFloatArgument<B, G<In<bf16>>> {
  G<Owned<float, B>> copies;
  G<In<float>> value;
  InFloatArgument(B& backend, G<In<bf16>> const& group) { zip(ReadInFloat<B>{backend}, group, copies, value); }
  void finish(B&) const {}
};
template <class B, template <class> class G> struct InFloatArgument<B, G<Out<bf16>>> {
  G<Out<bf16>> const& group;
  G<Owned<float, B>> copies;
  G<Out<float>> value;
  InFloatArgument(B& backend, G<Out<bf16>> const& written) : group(written) { zip(WriteInFloat<B>{backend}, group, copies, value); }
  void finish(B& backend) const { zip(RoundBack<B>{backend}, copies, group); }
};

template <class Argument> inline constexpr bool holds_bf16 = false;
template <int Rank> inline constexpr bool holds_bf16<View<bf16 const, Rank>> = true;
template <int Rank> inline constexpr bool holds_bf16<View<bf16, Rank>> = true;
template <template <class> class G> inline constexpr bool holds_bf16<G<In<bf16>>> = true;
template <template <class> class G> inline constexpr bool holds_bf16<G<Out<bf16>>> = true;

}  // namespace detail

// y = x, tensor by tensor, each element rounded to the scalar of y. Skips tensors without elements.
template <class B, template <class> class G, class From, class To> void convert(B& backend, G<From> const& x, G<To>& y) {
  zip(
      [&](Path const&, auto const& from, auto& to) {
        if (from) convert(backend, in(from), out(to));
      },
      x, y);
}

// A copy of a group with every tensor in the wide scalar.
template <class B, template <class> class G, class T> G<Owned<wide_t<T>, B>> widen(B& backend, G<Owned<T, B>> const& group) {
  auto wide = allocate_together<wide_t<T>>(backend, shapes_of(group));
  convert(backend, group, wide);
  return wide;
}

// Calls f with the arguments, float copies in place of bf16 tensors. Then rounds the copies of those that f writes. Views and groups of
// views are tensors here.
template <class B, class F, class... Arguments> void in_float(B& backend, F f, Arguments const&... arguments) {
  std::tuple<detail::InFloatArgument<B, Arguments>...> floats{detail::InFloatArgument<B, Arguments>{backend, arguments}...};
  std::apply(
      [&](auto const&... argument) {
        f(argument.value...);
        (argument.finish(backend), ...);
      },
      floats);
}

// Arguments with bf16 tensors, of which an operation takes float copies.
namespace detail {
template <class Op, class B, class... Arguments>
concept ForwardInFloat =
    (holds_bf16<Arguments> || ...) && requires(B& b, InFloatArgument<B, Arguments>&... a) { On<Op, B>::forward(b, a.value...); };
template <class Op, class B, class... Arguments>
concept BackwardInFloat =
    (holds_bf16<Arguments> || ...) && requires(B& b, InFloatArgument<B, Arguments>&... a) { On<Op, B>::backward(b, a.value...); };
template <class Op, class B, class... Arguments>
concept ExtendInFloat =
    (holds_bf16<Arguments> || ...) && requires(B& b, InFloatArgument<B, Arguments>&... a) { On<Op, B>::extend(b, a.value...); };
}  // namespace detail

// The base of an operation on a backend that computes in float and double, and has bf16 from this:
//   template <> struct On<Mine, Cpu> : InFloat<Mine, Cpu> {
//     using InFloat::forward, InFloat::backward;
//     template <std::floating_point T> static void forward(...)
template <class Op, class B> struct InFloat {
  template <class... Arguments> requires detail::ForwardInFloat<Op, B, Arguments...>
  static void forward(B& backend, Arguments const&... arguments) {
    in_float(backend, [&](auto const&... floats) { On<Op, B>::forward(backend, floats...); }, arguments...);
  }
  template <class... Arguments> requires detail::BackwardInFloat<Op, B, Arguments...>
  static void backward(B& backend, Arguments const&... arguments) {
    in_float(backend, [&](auto const&... floats) { On<Op, B>::backward(backend, floats...); }, arguments...);
  }
  template <class... Arguments> requires detail::ExtendInFloat<Op, B, Arguments...>
  static void extend(B& backend, Arguments const&... arguments) {
    in_float(backend, [&](auto const&... floats) { On<Op, B>::extend(backend, floats...); }, arguments...);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
