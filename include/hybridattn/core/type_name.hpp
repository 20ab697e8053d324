// Names of types, for reports and errors.
#ifndef HYBRIDATTN_CORE_TYPE_NAME_HPP
#define HYBRIDATTN_CORE_TYPE_NAME_HPP

#include <hybridattn/core/config.hpp>

#include <string>
#include <string_view>

namespace hybridattn::inline HYBRIDATTN_ABI {

// The type's name as the compiler spells it, without the library's namespace.
template <class P> std::string type_name() {
  std::string const text = __PRETTY_FUNCTION__;
  auto const library = text.find("hybridattn::"), flags = library + 12;
  std::string const namespace_of_flags = text.substr(flags, text.find("::", flags) + 2 - flags);
  auto const first = text.find("P = ") + 4;
  std::string name = text.substr(first, text.find_first_of(";]", first) - first);
  for (std::string_view const space : {std::string_view("hybridattn::"), std::string_view(namespace_of_flags),
                                       std::string_view("(anonymous namespace)::"), std::string_view("{anonymous}::")})
    while (name.find(space) != name.npos) name.erase(name.find(space), space.size());
  return name;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
