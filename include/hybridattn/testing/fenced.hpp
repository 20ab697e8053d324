// Tensors of a backend inside larger blocks. A kernel that writes beside a tensor, or reads there and uses what it reads, is found.
#ifndef HYBRIDATTN_TESTING_FENCED_HPP
#define HYBRIDATTN_TESTING_FENCED_HPP

#include <hybridattn/core/losses.hpp>
#include <hybridattn/tensor/roles.hpp>
#include <hybridattn/testing/host_tensor.hpp>

#include <cstring>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Where the elements of a tensor stand in its block, counted in elements.
struct Layout {
  std::vector<Index> shape, stride;
  Index first = 0, size = 0;

  // With `spaced` there is a gap behind every row of every axis, as in a packed q|k|v. Otherwise there are no gaps.
  Layout() = default;
  Layout(std::vector<Index> extents, bool spaced) : shape(std::move(extents)), stride(shape.size()) {
    Index step = 1;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      stride[axis] = step;
      step = step * shape[axis] + (spaced ? 1 : 0);
    }
    first = guard + (spaced ? 1 : 0);
    size = first + step + guard;
  }
  Index count() const {
    Index product = 1;
    for (Index extent : shape) product *= extent;
    return product;
  }
  // Calls f(element, place, length) for every row of `length` elements. `element` is the number of the first one, `place` is where it is
  // in the block.
  template <class F> void for_each_row(F f) const {
    std::vector<Index> index(shape.size());
    for (Index element = 0, place = first, all = count(), length = shape.back(); element < all; element += length) {
      f(element, place, length);
      for (std::size_t axis = shape.size() - 1; axis-- > 0;) {
        place += stride[axis];
        if (++index[axis] < shape[axis]) break;
        place -= stride[axis] * shape[axis];
        index[axis] = 0;
      }
    }
  }

 private:
  static constexpr Index guard = 64;   // elements before and behind: a whole number of cache lines
};

// The type of an element at run time: its size, how many numbers stand for it on the host, and functions that convert between the two.
struct Element {
  std::size_t bytes;
  Index numbers;   // of one element
  bool whole;
  double eps;
  void (*fill)(double number, Index count, std::byte* elements);   // with one number, all of an element's
  void (*write)(double const* numbers, Index count, std::byte* elements);
  void (*read)(std::byte const* elements, Index count, double* numbers);
};
namespace detail {

template <class E> E from_numbers(double const* x) {
  if constexpr (std::is_integral_v<E>) return *x == *x ? static_cast<E>(*x) : std::numeric_limits<E>::min();
  else if constexpr (std::is_enum_v<E>) return static_cast<E>(from_numbers<std::underlying_type_t<E>>(x));
  else return static_cast<E>(*x);
}
template <class E> void to_numbers(E const& element, double* x) { *x = static_cast<double>(element); }
template <> inline LossSum from_numbers<LossSum>(double const* x) { return {x[0], from_numbers<Index>(x + 1), from_numbers<Index>(x + 2)}; }
inline void to_numbers(LossSum const& sum, double* x) {
  x[0] = sum.loss, x[1] = static_cast<double>(sum.count), x[2] = static_cast<double>(sum.correct);
}
template <class E> inline constexpr Index numbers_of = std::is_same_v<E, LossSum> ? 3 : 1;

template <class E> void fill(double number, Index count, std::byte* to) {
  double const numbers[] = {number, number, number};
  E const element = from_numbers<E>(numbers);
  for (Index i = 0; i < count; ++i, to += sizeof(E)) std::memcpy(to, &element, sizeof(E));
}
template <class E> void write(double const* numbers, Index count, std::byte* to) {
  for (Index i = 0; i < count; ++i, numbers += numbers_of<E>, to += sizeof(E)) {
    E const element = from_numbers<E>(numbers);
    std::memcpy(to, &element, sizeof(E));
  }
}
template <class E> void read(std::byte const* from, Index count, double* numbers) {
  for (Index i = 0; i < count; ++i, numbers += numbers_of<E>, from += sizeof(E)) {
    E element;
    std::memcpy(&element, from, sizeof(E));
    to_numbers(element, numbers);
  }
}

}  // namespace detail
template <class E> inline constexpr Element element_of{sizeof(E),      detail::numbers_of<E>, std::is_integral_v<E> || std::is_enum_v<E>,
                                                       epsilon_of<E>,  detail::fill<E>,       detail::write<E>,
                                                       detail::read<E>};

// What a tensor's memory and the memory beside it hold before a run.
struct Unwritten {
  double inside = not_a_number, beside = not_a_number;
};

// A tensor of elements of any type in a block of a backend.
template <class B> class FencedBlock {
 public:
  void place(B& backend, Element const& element, std::vector<Index> extents, bool spaced, Unwritten unwritten) {
    element_ = &element;
    layout_ = Layout(std::move(extents), spaced);
    memory_ = {};
    if (layout_.count() == 0) return;
    host_.resize(static_cast<std::size_t>(layout_.size) * element.bytes);
    element.fill(unwritten.beside, layout_.size, host_.data());
    layout_.for_each_row([&](Index, Index place, Index length) { element.fill(unwritten.inside, length, at(host_, place)); });
    memory_ = {backend, {std::ssize(host_)}};
    upload(backend, host_, memory_);
  }
  void write(B& backend, std::vector<double> const& values) {
    Index const count = element_ == nullptr ? 0 : layout_.count() * element_->numbers;
    check(std::ssize(values) == count, "a tensor of ", count, " numbers cannot take ", values.size());
    if (!memory_) return;
    layout_.for_each_row(
        [&](Index e, Index place, Index length) { element_->write(values.data() + e * element_->numbers, length, at(host_, place)); });
    upload(backend, host_, memory_);
  }
  template <class E, int Rank> View<E, Rank> view(Shape<Rank> shape) {
    if (!memory_) return {nullptr, shape};
    Shape<Rank> stride;
    for (int axis = 0; axis < Rank; ++axis) stride.extent[axis] = layout_.stride[static_cast<std::size_t>(axis)];
    return {reinterpret_cast<E*>(out(memory_).data) + layout_.first, shape, stride};
  }
  template <class E, int Rank> View<E, Rank> view() {
    Shape<Rank> shape;
    for (int axis = 0; axis < Rank; ++axis) shape.extent[axis] = layout_.shape[static_cast<std::size_t>(axis)];
    return view<E>(shape);
  }
  // Reads the tensor's values. If memory beside it has changed, `trespass` names the first such place.
  void read(B& backend, HostTensor& to, std::string& trespass) const {
    if (!memory_) return;
    std::vector<std::byte> now = download(backend, memory_);
    to.values.resize(static_cast<std::size_t>(layout_.count() * element_->numbers));
    layout_.for_each_row([&](Index e, Index place, Index length) {
      element_->read(at(now, place), length, to.values.data() + e * element_->numbers);
      std::memcpy(at(now, place), at(host_, place), static_cast<std::size_t>(length) * element_->bytes);
    });
    if (!trespass.empty() || std::memcmp(now.data(), host_.data(), now.size()) == 0) return;
    Index place = 0;
    while (std::memcmp(at(now, place), at(host_, place), element_->bytes) == 0) ++place;
    trespass = sentence("memory beside ", to.name, " is overwritten, ", place - layout_.first, " elements from its start");
  }

 private:
  template <class Bytes> auto* at(Bytes& bytes, Index i) const { return bytes.data() + static_cast<std::size_t>(i) * element_->bytes; }

  Element const* element_ = nullptr;
  Layout layout_;
  std::vector<std::byte> host_;
  Tensor<std::byte, 1, B> memory_;
};

template <class E, int Rank, class B> class Fenced {
 public:
  // Memory for a tensor.
  void place(B& backend, Shape<Rank> shape, bool spaced, Unwritten unwritten) {
    shape_ = shape;
    block_.place(backend, element_of<E>, {shape.extent, shape.extent + Rank}, spaced, unwritten);
  }
  void write(B& backend, std::vector<double> const& values) { block_.write(backend, values); }
  View<E, Rank> view() { return block_.template view<E>(shape_); }
  void read(B& backend, HostTensor& to, std::string& trespass) const {
    to.shape.assign(shape_.extent, shape_.extent + Rank);
    block_.read(backend, to, trespass);
  }

 private:
  Shape<Rank> shape_;
  FencedBlock<B> block_;
};

// The role of a group of such tensors.
template <class T, class B> struct FencedRole {
  template <int Rank> using Held = Fenced<T, Rank, B>;
  template <int Rank> using Wide = Fenced<wide_t<T>, Rank, B>;
  template <int Rank> using Whole = Fenced<std::int32_t, Rank, B>;
  template <int Rank> using State = Fenced<wide_t<T>, Rank, B>;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
