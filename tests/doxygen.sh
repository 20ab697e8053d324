#!/usr/bin/env bash
# Doxygen has nothing to warn of, and its pages carry the headers' own words: doxygen.sh SOURCE_FOLDER. Exit code 77: no doxygen here.
set -euo pipefail
command -v doxygen >/dev/null || { echo "SKIPPED: doxygen is not installed (Debian: doxygen)"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$1"
{ cat docs/Doxyfile; echo "OUTPUT_DIRECTORY = $folder"; } | doxygen -

# holds PAGE SENTENCE
holds() { grep -qF -- "$2" "$folder/doxygen/$1" || { echo "FAILED: $1 does not say: $2" >&2; exit 1; }; }
holds dsa_8hpp.html "each query attends to the top_k keys that a small indexer picks"   # of a file
holds structhybridattn_1_1full_1_1Saved.html "[N, H], natural logarithm"   # of a member, behind it
holds classhybridattn_1_1Sequences.html "cu_seqlens [number + 1]: sequence i has"   # of a function, in front of it
echo "$(find "$folder/doxygen" -name '*.html' | wc -l) pages, no warning"
