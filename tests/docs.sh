#!/usr/bin/env bash
# Every C++ block of README and the pages is a program that compiles without a warning, with one of the folders of headers alone:
# docs.sh SOURCE_FOLDER include|single_include COMPILER [FLAGS...]
set -euo pipefail
source=$1 include=$2
shift 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Each block stands on the lines that it has on its page, so that an error names them.
for page in "$source"/README.md "$source"/docs/*.md; do
  awk -v name="$folder/$(basename "$page" .md)" -v page="$page" '
    /^```/ { if (block == "" && /^```cpp$/) { block = name NR ".cpp"; printf "#line %d \"%s\"\n", NR + 1, page > block } else block = ""; next }
    block != "" { print > block }' "$page"
done
count=$(find "$folder" -name '*.cpp' | wc -l)
((count > 0)) || { echo "FAILED: no page has a C++ block" >&2; exit 1; }
find "$folder" -name '*.cpp' | sort | xargs -P "$(nproc)" -I{} "$@" -I"$source/$include" -fsyntax-only -Werror {} ||
  { echo "FAILED with -I $include: see above" >&2; exit 1; }
echo "$count C++ blocks compile with $include/"
