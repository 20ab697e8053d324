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
  need '/usr/lib/*/libboost_context.so' libboost-context-dev
  need /usr/include/nlohmann/json.hpp nlohmann-json3-dev
  need /usr/include/CLI/CLI.hpp libcli11-dev
}

as_root() { if ((EUID == 0)); then "$@"; else sudo "$@"; fi; }

install_needed() {
  ((${#needed[@]})) || return 0
  if ! command -v apt-get >/dev/null; then
    echo "these Debian packages are missing, and there is no apt-get to install them: ${needed[*]}" >&2
    exit 2
  fi
  echo "== installing ${needed[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
}

# The archive's index, where no one has read it yet: a package can be downloaded only then.
know_package() {
  command -v apt-cache >/dev/null || return 0
  apt-cache show "$1" >/dev/null 2>&1 || as_root apt-get update -qq || true
}

# Compiled once, compiled for ever, where ccache is.
launcher=()
if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
