#!/usr/bin/env bash
# scripts/gpu_check checks itself: what it would run on a GPU, its programs on the emulator, and that it notices what fails.
# gpu_check.sh SOURCE_FOLDER FOLDER_OF_PROGRAMS
set -uo pipefail
check=$1/scripts/gpu_check programs=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0
fail() { echo "FAILED: $*" >&2; failures=$((failures + 1)); }

# The list. Without a device the exit status is 77.
listed=$("$check" "$programs" --list)
status=$?
((status == 77 || status == 0)) || fail "--list ends with $status"
for part in device operations_float full gdn dsa bf16 golden models released patterns graph kernels products memcheck racecheck profile; do
  grep -qE "^round [0-9]+ +$part +at most +[0-9]+ s " <<<"$listed" || fail "--list does not show $part"
done
total=$(sed -nE 's/^[0-9]+ parts, at most ([0-9]+) s$/\1/p' <<<"$listed")
((${total:-9999} < 600)) || fail "a check may take ${total:-an unknown number of} s; it is to take less than 600"
grep -qE '^round [0-9]+ +golden +at most +[0-9]+ s +[0-9]+ kB ' <<<"$listed" || fail "--list does not show the size of a program"
echo "$listed" | tail -2
for mistake in '' '/nowhere' "$programs --backend tpu" "$programs --fast" "$programs $programs"; do
  "$check" $mistake >"$folder/said" 2>&1
  [[ $? == 2 ]] && grep -q '^usage: gpu_check FOLDER' "$folder/said" || fail "gpu_check $mistake says: $(cat "$folder/said")"
done

# The programs on the emulator.
"$check" "$programs" --backend emulator --out "$folder/results" || fail "the check on the emulator ends with $?"
grep -q '^| graph | well |' "$folder/results/gpu_check.md" || fail "no table"
grep -q '"part": "kernels", "verdict": "well"' "$folder/results/gpu_check.json" || fail "no JSON"

# A program that fails, hangs or is missing does not stop the others.
mkdir "$folder/programs"
printf '#!/bin/sh\nexit 3\n' >"$folder/programs/test_gpu_golden"
printf '#!/bin/sh\nexit 0\n' >"$folder/programs/gpu_kernels"
chmod +x "$folder"/programs/*
"$check" "$folder/programs" --backend emulator --out "$folder/bad" >/dev/null 2>&1
[[ $? == 1 ]] || fail "a program that fails is not noticed"
for row in '| golden | exit status 3 |' '| graph | not built |' '| kernels | well |'; do
  grep -qF "$row" "$folder/bad/gpu_check.md" || fail "the table has no row $row"
done

# The pages hold what the last run found, and a new run changes them.
mkdir -p "$folder/tree/scripts"
cp -r "$1/docs" "$1/README.md" "$folder/tree"
cp "$1/scripts/gpu_record" "$folder/tree/scripts"
"$folder/tree/scripts/gpu_record"
cmp -s "$1/README.md" "$folder/tree/README.md" || fail "README does not say what docs/cuda.md says of the last run; run scripts/gpu_record"
"$folder/tree/scripts/gpu_record" "$folder/bad"
grep -q '^| golden | exit status 3 |' "$folder/tree/docs/cuda.md" || fail "docs/cuda.md does not get the results"
grep -qE '^[|] GPU kernels .*[|] 1 of 4 parts well, commit `unknown` [|]$' "$folder/tree/README.md" || fail "README does not get the verdict"
exit $((failures > 0))
