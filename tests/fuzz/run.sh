#!/usr/bin/env bash
# Runs one target for some seconds, with the corpus that earlier runs left: run.sh TARGET SECONDS. scripts/fuzz builds it first.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1 seconds=$2
seeds=tests/fuzz/seeds/$target
log=build/fuzz/$target.log
corpus=build/fuzz/corpus/$target findings=build/fuzz/findings/$target
mkdir -p "$corpus" "$findings"

# The inputs' files stand in memory, where the system has such a folder.
memory=/dev/shm
[[ -w $memory ]] || memory=${TMPDIR:-/tmp}
TMPDIR=$(mktemp -d -p "$memory" hybridattn-fuzz-XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
export ASAN_OPTIONS=quarantine_size_mb=16:malloc_context_size=6

options=(-max_total_time="$seconds" -timeout=60 -rss_limit_mb=1024 -max_len=8192 -print_final_stats=1 -artifact_prefix="$findings/")
[[ -f tests/fuzz/$target.dict ]] && options+=(-dict="tests/fuzz/$target.dict")
if build/fuzz/tests/fuzz/fuzz_"$target" "${options[@]}" "$corpus" "$seeds" >"$log" 2>&1; then
  runs=$(awk '/number_of_executed_units/ { print $2 }' "$log")
  covered=$(grep -o 'cov: [0-9]* ft: [0-9]*' "$log" | tail -1)
  echo "$target: $runs runs, $covered (edges, features), nothing found"
else
  grep -m1 -E '^finding:|ERROR:|runtime error:' "$log" || tail -20 "$log"
  sed -n "s|.*Test unit written to |$target: the input is |p" "$log"
  echo "$target: FAILED. The stack is in $log; run the input again by build/fuzz/tests/fuzz/fuzz_$target INPUT"
  exit 1
fi
