#!/usr/bin/env bash
# One program through every door into the library, without -march and without a warning: consumers.sh SOURCE_DIR HANA_DIR COMPILER
set -euo pipefail
library=$(realpath "$1") hana=$2 compiler=$3
here=$library/tests/consumers
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
plain=("$compiler" -std=c++20 -Wall -Wextra -Wconversion -Wpedantic -Werror -idirafter "$hana")

# Every door ends here: the program learns.
run() { echo "== $1: $("$2")"; }

configure() { cmake -G Ninja -DCMAKE_CXX_COMPILER="$compiler" -DHYBRIDATTN_HANA_DIR="$hana" "$@" >"$folder/log" 2>&1; }
# cmake_door NAME DEFINITIONS...
cmake_door() {
  local name=$1
  shift
  configure -S "$here" -B "$folder/$name" -DDOOR="$name" "$@" && cmake --build "$folder/$name" >>"$folder/log" 2>&1 ||
    { cat "$folder/log" >&2; exit 1; }
  run "$name" "$folder/$name/consumer"
}

configure -S "$library" -B "$folder/library" -DCMAKE_INSTALL_PREFIX="$folder/first" \
  -DHYBRIDATTN_BUILD_TESTS=OFF -DHYBRIDATTN_BUILD_EXAMPLES=OFF -DHYBRIDATTN_BUILD_BENCHMARKS=OFF || { cat "$folder/log" >&2; exit 1; }
cmake --install "$folder/library" >/dev/null
mv "$folder/first" "$folder/prefix"   # an installed library may move
cmake_door find_package -DCMAKE_PREFIX_PATH="$folder/prefix"

cmake_door add_subdirectory -DHYBRIDATTN_SOURCE="$library"

mkdir "$folder/hybridattn"
cp -r "$library/CMakeLists.txt" "$library/LICENSE" "$library/include" "$library/scripts" "$folder/hybridattn"
cmake_door fetch_content -DHYBRIDATTN_SOURCE="$folder/hybridattn"

read -ra flags < <(PKG_CONFIG_PATH=$folder/prefix/share/pkgconfig pkg-config --cflags --libs hybridattn)
"${plain[@]}" "$here/consumer.cpp" "${flags[@]}" -o "$folder/pkg_config"
run pkg-config "$folder/pkg_config"

# The one file, as it is and where only Hana is installed; optimised here.
header=hybridattn/hybridattn.hpp
mkdir -p "$folder/alone/hybridattn"
sed 's/__has_include(<[^>]*>)/0/' "$library/single_include/$header" >"$folder/alone/$header"
"${plain[@]}" -O2 -I"$folder/alone" "$here/consumer.cpp" -o "$folder/single_include"
run single_include "$folder/single_include"
"${plain[@]}" -fsyntax-only -I"$library/single_include" "$here/consumer.cpp"
foreign=$("${plain[@]}" -M -I"$folder/alone" "$here/consumer.cpp" | tr ' ' '\n' | grep -E '/(nlohmann|Eigen|CLI|catch2)/' || true)
[[ -z $foreign ]] || { echo "FAILED: the one file needs $foreign" >&2; exit 1; }
