#!/usr/bin/env bash
# The library's headers define no macro but HYBRIDATTN_...: macros.sh INCLUDE_FOLDER COMPILER [FLAGS...]
set -euo pipefail
include=$1
shift
export LC_ALL=C

# The names of all macros after the includes on stdin.
macros() { "$@" -x c++ -dM -E - | sed -E 's/^#define ([A-Za-z0-9_]+).*/\1/' | sort -u; }
ours() { find "$include" -name '*.hpp' -printf '#include <%P>\n' | sort; }
# What the headers include of other people's, where it exists.
theirs() {
  grep -rhoE '^ *# *include <[^>]*>' "$include" | grep -v '<hybridattn/' | sed -E 's/^ *# *include (<[^>]*>)/\1/' | sort -u |
    sed -E 's/(.*)/#if __has_include(\1)\n#include \1\n#endif/'
}

leaked=$(comm -23 <(ours | macros "$@") <(theirs | macros "$@") | grep -v '^HYBRIDATTN_' || true)
[[ -z $leaked ]] || { printf 'FAILED: these macros lack HYBRIDATTN_: %s\n' "$leaked" >&2; exit 1; }
count=$(ours | macros "$@" | grep -c '^HYBRIDATTN_.*[^P]$')
((count > 5)) || { echo "FAILED: only $count macros of the library are seen" >&2; exit 1; }
echo "no macro without HYBRIDATTN_ among $(ours | wc -l) headers"
