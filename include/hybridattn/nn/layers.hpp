// A list of layers of any depth, for which the compiler instantiates each type of layer once. The only header with Boost.Hana.
#ifndef HYBRIDATTN_NN_LAYERS_HPP
#define HYBRIDATTN_NN_LAYERS_HPP

#include <hybridattn/tensor/roles.hpp>

#include <boost/hana/fwd/type.hpp>
#include <boost/hana/integral_constant.hpp>
#include <boost/hana/tuple.hpp>
#include <boost/hana/type.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace hana = boost::hana;

template <class... Ts> struct Types {};

// Types<A, B> + type_c<A> = Types<A, B>;  Types<A, B> + type_c<C> = Types<A, B, C>
template <class... Ts, class T> constexpr auto operator+(Types<Ts...>, hana::basic_type<T>) {
  if constexpr ((std::is_same_v<Ts, T> || ...)) return Types<Ts...>{};
  else return Types<Ts..., T>{};
}
// Each type once, in order of first appearance.
template <class... Ts> using Distinct = decltype((Types<>{} + ... + hana::type_c<Ts>));

namespace detail {
template <class T, class... Ts> constexpr std::size_t position(Types<Ts...>) {
  std::size_t n = 0;
  (void)((std::is_same_v<Ts, T> || (++n, false)) || ...);
  return n;
}
}  // namespace detail

// The places of a list's layers: layer i is element places[i].index of the array of its type, number places[i].type.
template <class... Layers_> struct Plan {
  struct Place {
    std::size_t type, index;
  };
  static constexpr std::size_t depth = sizeof...(Layers_);
  using Kinds = Distinct<Layers_...>;

  static constexpr std::array<Place, depth> places = [] {
    std::array<Place, depth> result{};
    std::size_t layer = 0, used[depth] = {};
    auto const place = [&](std::size_t type) { result[layer++] = {type, used[type]++}; };
    (place(detail::position<Layers_>(Kinds{})), ...);
    return result;
  }();
  static constexpr std::size_t count(std::size_t type) {
    std::size_t n = 0;
    for (Place place : places) n += place.type == type;
    return n;
  }
};

// One element Of<Layer> per layer. Equal layers share an array; visiting a layer is one comparison per distinct type.
template <class Plan, template <class> class Of, class Kinds = typename Plan::Kinds> struct Layers;
template <class Plan, template <class> class Of, class... Kinds> struct Layers<Plan, Of, Types<Kinds...>> {
  static constexpr std::size_t depth = Plan::depth;

  template <class Numbers> struct Storage;
  template <std::size_t... types> struct Storage<std::index_sequence<types...>> {
    using type = hana::tuple<std::array<Of<Kinds>, Plan::count(types)>...>;
  };
  typename Storage<std::make_index_sequence<sizeof...(Kinds)>>::type arrays;

  // Calls f(type_c<Layer>, layer's number, its elements in several lists of this plan...) for layer i.
  template <class F, class... Lists> static void visit(std::size_t i, F&& f, Lists&... lists) { (visit_if<Kinds>(i, f, lists...), ...); }
  template <class F, class... Lists> static void for_each(F&& f, Lists&... lists) {
    for (std::size_t i = 0; i < depth; ++i) visit(i, f, lists...);
  }
  template <class F, class... Lists> static void for_each_reversed(F&& f, Lists&... lists) {
    for (std::size_t i = depth; i-- > 0;) visit(i, f, lists...);
  }
  // For loops over fields: f(layer's number, elements...).
  template <class F, class... Lists> static void for_each_layer(F&& f, Lists&... lists) {
    for_each([&](auto, std::size_t i, auto&... elements) { f(static_cast<int>(i), elements...); }, lists...);
  }

 private:
  template <class Kind, class F, class... Lists> static void visit_if(std::size_t i, F& f, Lists&... lists) {
    constexpr auto type = detail::position<Kind>(Types<Kinds...>{});
    auto const place = Plan::places[i];
    if (place.type == type) f(hana::type_c<Kind>, i, hana::at_c<type>(lists.arrays)[place.index]...);
  }
};

// One value for each of several types, found by type.
template <class Key, class Value> struct Keyed {
  Value value{};
};
template <template <class> class Of, class Kinds> struct ByType;
template <template <class> class Of, class... Kinds> struct ByType<Of, Types<Kinds...>> : Keyed<Kinds, Of<Kinds>>... {
  template <class Key> auto& get() { return of<Key>(*this); }
  template <class Key> auto const& get() const { return of<Key>(*this); }

 private:
  template <class Key, class Self> static auto& of(Self& self) {
    static_assert((std::is_same_v<Key, Kinds> || ...),
                  "the stack has no layer of this policy: ask for one of its policies, with exactly the same options");
    using Found = Keyed<Key, Of<Key>>;
    return static_cast<std::conditional_t<std::is_const_v<Self>, Found const, Found>&>(self).value;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
