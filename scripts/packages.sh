# Sourced by the other scripts: installs what is missing. need PROGRAM_OR_FILE PACKAGE, then install_needed.

needed=()
need() {
  if [[ $1 == /* ]]; then
    compgen -G "$1" >/dev/null || needed+=("$2")
  else
    command -v "$1" >/dev/null || needed+=("$2")
  fi
}

need_build_tools() {
  need g++ g++
  need cmake cmake
  need ninja ninja-build
  need /usr/include/boost/hana/tuple.hpp libboost-dev
  need /usr/include/nlohmann/json.hpp nlohmann-json3-dev
  need /usr/include/CLI/CLI.hpp libcli11-dev
}

install_needed() {
  ((${#needed[@]})) || return 0
  if ! command -v apt-get >/dev/null; then
    echo "these Debian packages are missing, and there is no apt-get to install them: ${needed[*]}" >&2
    exit 2
  fi
  local sudo=()
  ((EUID == 0)) || sudo=(sudo)
  echo "== installing ${needed[*]}"
  "${sudo[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
}

# Compiled once, compiled for ever, where ccache is.
launcher=()
if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
