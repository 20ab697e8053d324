#!/usr/bin/env bash
# Every header of the library compiles alone, without a warning: headers.sh INCLUDE_FOLDER COMPILER [FLAGS...]
set -euo pipefail
include=$1
shift
find "$include" -name '*.hpp' -printf '%P\n' | sort |
  xargs -P "$(nproc)" -I{} sh -c 'echo "#include <$0>" | "$@" -x c++ -fsyntax-only -Werror - || { echo "$0 does not compile alone" >&2; exit 255; }' {} "$@"
echo "$(find "$include" -name '*.hpp' | wc -l) headers compile alone"
