// What runs where: which policy has a forward, a backward and decoding, on which backend, in which scalars. Asked of the
// compiler, so it cannot be out of date.
#ifndef HYBRIDATTN_SUPPORT_MATRIX_HPP
#define HYBRIDATTN_SUPPORT_MATRIX_HPP

#include <hybridattn/attention/attention.hpp>

#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI {

// The library's own.
using AllPolicies = std::tuple<Full, GDN, DSA>;
using AllBackends = std::tuple<Cpu>;
using AllScalars = std::tuple<float, double, bf16>;

// How backends and scalars are called in tables. A backend may have a `name`.
template <class T> inline constexpr std::string_view table_name = "a type without a name";
template <class T> requires requires { T::name; } inline constexpr std::string_view table_name<T> = T::name;
template <> inline constexpr std::string_view table_name<float> = "float";
template <> inline constexpr std::string_view table_name<double> = "double";
template <> inline constexpr std::string_view table_name<bf16> = "bf16";

// One policy on one backend; a flag for each scalar.
template <std::size_t scalars> struct Support {
  std::string_view policy, backend;
  std::array<bool, scalars> forward, backward, decoding;
  std::string_view saved;   // what backward remembers besides inputs and outputs
};

namespace detail {

template <class T> using Of = std::type_identity<T>;

template <class P, class B, class... Ts> constexpr Support<sizeof...(Ts)> support_of(Of<std::tuple<Ts...>>) {
  return {P::name,
          table_name<B>,
          {HasForward<P, B, Ts>...},
          {HasBackward<P, B, Ts>...},
          {Decodes<P, B, Ts>...},
          P::template Saved<Shapes>::field_list};
}
template <class Scalars, class... Ps, class... Bs> constexpr auto support_rows(Of<std::tuple<Ps...>>, Of<std::tuple<Bs...>>) {
  std::array<Support<std::tuple_size_v<Scalars>>, sizeof...(Ps) * sizeof...(Bs)> rows;
  std::size_t row = 0;
  auto const add = [&]<class P>(Of<P>) { ((rows[row++] = support_of<P, Bs>(Of<Scalars>{})), ...); };
  (add(Of<Ps>{}), ...);
  return rows;
}
template <class... Ts> constexpr std::array<std::string_view, sizeof...(Ts)> table_names(Of<std::tuple<Ts...>>) {
  return {table_name<Ts>...};
}

// "float, double"
template <std::size_t n> std::string listed(std::array<bool, n> const& holds, std::array<std::string_view, n> const& names) {
  std::string text;
  for (std::size_t i = 0; i < n; ++i)
    if (holds[i]) text.append(text.empty() ? "" : ", ").append(names[i]);
  return text.empty() ? "-" : text;
}

}  // namespace detail

// The rows of the table: policies, and each one's backends.
template <class Policies = AllPolicies, class Backends = AllBackends, class Scalars = AllScalars>
inline constexpr auto support = detail::support_rows<Scalars>(detail::Of<Policies>{}, detail::Of<Backends>{});

// The table in Markdown, a line for each row. For policies of your own: support_matrix<std::tuple<Mine, Full>>(). For GPUs, after their
// header: support_matrix<AllPolicies, std::tuple<Cpu, Emulator>>().
template <class Policies = AllPolicies, class Backends = AllBackends, class Scalars = AllScalars> std::string support_matrix() {
  auto const names = detail::table_names(detail::Of<Scalars>{});
  std::string text = "| policy | backend | forward | backward | decoding | backward remembers |\n|---|---|---|---|---|---|\n";
  auto const cell = [&](std::string_view content) { text.append("| ").append(content).append(" "); };
  for (auto const& row : support<Policies, Backends, Scalars>) {
    cell(row.policy);
    cell(row.backend);
    cell(detail::listed(row.forward, names));
    cell(detail::listed(row.backward, names));
    cell(detail::listed(row.decoding, names));
    cell(row.saved.empty() ? "nothing" : row.saved);
    text += "|\n";
  }
  return text;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
