#!/usr/bin/env bash
# Two translation units with every header of the library link into one program, whatever the order of the headers:
# odr.sh ODR_CPP INCLUDE_FOLDER COMPILER [FLAGS...]
set -euo pipefail
source=$1 include=$2
shift 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

headers() { find "$include" -name '*.hpp' -printf '%P\n' | LC_ALL=C sort "$@" | sed 's/.*/#include <&>/'; }
headers >"$folder/first.hpp"
headers -r >"$folder/second.hpp"
# With link-time optimisation g++ compares what the two say about each type and function.
lto=()
[[ $("$1" --version) == *"Free Software Foundation"* ]] && lto=(-flto -Wodr -Wlto-type-mismatch -Werror)
"$@" "${lto[@]}" -DPART=first -DWITH_MAIN -include "$folder/first.hpp" -c "$source" -o "$folder/first.o"
"$@" "${lto[@]}" -DPART=second -include "$folder/second.hpp" -c "$source" -o "$folder/second.o"
"$@" "${lto[@]}" "$folder/first.o" "$folder/second.o" -o "$folder/odr"
"$folder/odr"
