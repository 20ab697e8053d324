// A tensor of a backend inside a larger block, so that what is written beside it, or read there and used, shows.
#ifndef HYBRIDATTN_TESTING_FENCED_HPP
#define HYBRIDATTN_TESTING_FENCED_HPP

#include <hybridattn/testing/host_tensor.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <cstring>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Where the elements of a tensor stand in its block, counted in elements.
struct Layout {
  std::vector<Index> shape, stride;
  Index first = 0, size = 0;

  // `spaced`: with a gap behind every row of every axis, as in a packed q|k|v. Otherwise one after the other.
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
  // f(element, place, length) for every row: its elements are length many from `element` on, in memory from `place` on.
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

template <class E> E element(double value) {
  if constexpr (std::is_integral_v<E>) return value == value ? static_cast<E>(value) : std::numeric_limits<E>::min();
  else return static_cast<E>(value);
}

template <class E, int Rank, class B> class Fenced {
 public:
  // Memory for a tensor that holds `unwritten`, as does everything around it.
  void place(B& backend, Shape<Rank> shape, bool spaced, double unwritten) {
    shape_ = shape;
    if (shape.count() == 0) return;
    layout_ = Layout({shape.extent, shape.extent + Rank}, spaced);
    host_.assign(static_cast<std::size_t>(layout_.size), element<E>(unwritten));
    memory_ = {backend, {layout_.size}};
    upload(backend, host_, memory_);
  }
  void write(B& backend, std::vector<double> const& values) {
    check(std::ssize(values) == shape_.count(), "a tensor of ", shape_.count(), " elements cannot take ", values.size());
    if (!memory_) return;
    layout_.for_each_row([&](Index e, Index place, Index length) {
      std::transform(values.begin() + e, values.begin() + e + length, host_.begin() + place, element<E>);
    });
    upload(backend, host_, memory_);
  }
  View<E, Rank> view() {
    if (!memory_) return {nullptr, shape_};
    Shape<Rank> stride;
    for (int axis = 0; axis < Rank; ++axis) stride.extent[axis] = layout_.stride[static_cast<std::size_t>(axis)];
    return {out(memory_).data + layout_.first, shape_, stride};
  }
  // What it holds now. `trespass` names the first number beside it that has changed since.
  void read(B& backend, HostTensor& to, std::string& trespass) const {
    to.shape.assign(shape_.extent, shape_.extent + Rank);
    if (!memory_) return;
    std::vector<E> now = download(backend, memory_);
    to.values.resize(static_cast<std::size_t>(layout_.count()));
    layout_.for_each_row([&](Index e, Index place, Index length) {
      std::copy_n(now.begin() + place, length, to.values.begin() + e);
      std::copy_n(host_.begin() + place, length, now.begin() + place);
    });
    auto const as_it_was = [&](Index place) {
      return std::memcmp(&now[static_cast<std::size_t>(place)], &host_[static_cast<std::size_t>(place)], sizeof(E)) == 0;
    };
    if (!trespass.empty() || std::memcmp(now.data(), host_.data(), now.size() * sizeof(E)) == 0) return;
    Index place = 0;
    while (as_it_was(place)) ++place;
    trespass = sentence("memory beside ", to.name, " is overwritten, ", place - layout_.first, " elements from its start");
  }

 private:
  Shape<Rank> shape_;
  Layout layout_;
  std::vector<E> host_;
  Tensor<E, 1, B> memory_;
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
