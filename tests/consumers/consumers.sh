#!/usr/bin/env bash
# A program by every way into the library, without -march and without a warning: consumers.sh SOURCE_DIR HANA_DIR COMPILER EIGEN_DIR
set -euo pipefail
library=$(realpath "$1") hana=$2 compiler=$3
here=$library/tests/consumers
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
plain=("$compiler" -std=c++20 -Wall -Wextra -Wconversion -Wpedantic -Werror -idirafter "$hana")
eigen=(-isystem "$4")

# Every way ends here: the program checks what it computes.
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
cp -r "$library/CMakeLists.txt" "$library/LICENSE" "$library/include" "$library/cmake" "$folder/hybridattn"
cmake_door fetch_content -DHYBRIDATTN_SOURCE="$folder/hybridattn"

read -ra flags < <(PKG_CONFIG_PATH=$folder/prefix/share/pkgconfig pkg-config --cflags --libs hybridattn)
"${plain[@]}" "$here/door.cpp" "${flags[@]}" -o "$folder/pkg_config"
run pkg-config "$folder/pkg_config"

# One file, optimised here, where of other libraries only Hana is installed.
mkdir -p "$folder/one/hybridattn"
cp "$library/single_include/hybridattn/hybridattn.hpp" "$folder/one/hybridattn"
"${plain[@]}" -O2 -I"$folder/one" "$here/consumer.cpp" -o "$folder/one_file"
run "one file" "$folder/one_file"
foreign=$("${plain[@]}" -M -I"$folder/one" "$here/consumer.cpp" | tr ' ' '\n' | grep -E '/(nlohmann|Eigen|CLI|catch2)/' || true)
[[ -z $foreign ]] || { echo "FAILED: the one file needs $foreign" >&2; exit 1; }

# Every door of single_include alone in a folder, then all of them in any order in two halves of a program, then with include/.
mapfile -t doors < <(cd "$library/single_include" && find hybridattn -name '*.hpp' | LC_ALL=C sort)
for door in "${doors[@]}"; do
  rm -rf "$folder/one" && mkdir -p "$folder/one/$(dirname "$door")"
  cp "$library/single_include/$door" "$folder/one/$door"
  echo "#include <$door>" | "${plain[@]}" "${eigen[@]}" -I"$folder/one" -x c++ -fsyntax-only - || { echo "FAILED: $door alone" >&2; exit 1; }
done
printf '#include <%s>\n' "${doors[@]}" >"$folder/forward.hpp"
tac "$folder/forward.hpp" >"$folder/backward.hpp"
echo '#include "backward.hpp"' >"$folder/other.cpp"
"${plain[@]}" "${eigen[@]}" -I"$library/single_include" -include "$folder/forward.hpp" "$here/consumer.cpp" "$folder/other.cpp" -o "$folder/all_doors"
run "${#doors[@]} doors of single_include" "$folder/all_doors"
"${plain[@]}" "${eigen[@]}" -fsyntax-only -I"$library/single_include" -I"$library/include" -include "$folder/backward.hpp" \
  -include hybridattn/train/checkpoint.hpp -include hybridattn/attention/gdn/reference.hpp "$here/consumer.cpp"
