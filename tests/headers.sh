#!/usr/bin/env bash
# Headers of the library compile alone, without a warning: the doors, or all: headers.sh doors|all INCLUDE_FOLDER COMPILER [FLAGS...]
set -euo pipefail
include=$2
case $1 in
  doors) depth=2 ;;   # include/hybridattn/DOOR.hpp
  all) depth=9 ;;
  *) exit 2 ;;
esac
shift 2
headers() { find "$include" -maxdepth "$depth" -name '*.hpp' -printf '%P\n' | sort; }
headers |
  xargs -P "$(nproc)" -I{} sh -c 'echo "#include <$0>" | "$@" -x c++ -fsyntax-only -Werror - || { echo "$0 does not compile alone" >&2; exit 255; }' {} "$@"
echo "$(headers | wc -l) headers compile alone"
