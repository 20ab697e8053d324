#!/usr/bin/env bash
# sweep, train and generate on the emulator do what they do on the CPU. backends.sh CPU_FOLDER EMULATOR_FOLDER: where the programs are.
set -uo pipefail
cpu=$1 emulator=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0
fail() { echo "FAILED: $*" >&2; failures=$((failures + 1)); }

# says SENTENCE COMMAND...: it fails, and says so.
says() {
  local sentence=$1 output
  shift
  if output=$("$@" 2>&1); then fail "$* succeeds"; fi
  grep -qF -- "$sentence" <<<"$output" || fail "$* says: $output"
}
# close NAME EXPECTED FOUND: two files of as many numbers, equal but for the rounding of float.
close() {
  paste "$2" "$3" | awk -v name="$1" '
    function size(x) { return x < 0 ? -x : x }
    NF != 2 || size($1 - $2) > 1e-5 * size($1) { print "FAILED: " name " on the CPU and on the emulator: " $0 > "/dev/stderr"; bad = 1 }
    END { exit bad || NR == 0 }' || failures=$((failures + 1))
}

for i in {1..12}; do echo "the quick brown fox jumps over the lazy dog, number $i"; done >"$folder/text"

# A sweep. Without a PATH there is no gnuplot, whose pictures take long.
sweep() {
  local program=$1
  shift
  PATH=/nowhere exec "$program/sweep" --steps 5 --seq-len 16 --batch 1 --seed 5 --data "$folder/text" "$@"
}
losses() {
  sed -E 's/.*"loss":([^,]*).*/\1/' "$1"/*.jsonl
  grep '"val_loss"' "$1/comprehensive_comparison.json" | tr -d ' ,' | cut -d: -f2
}
without_times() {
  sed 's/,"tokens_per_second".*//' "$1"/*.jsonl
  grep -vE '"(training_time|tokens_per_second|milliseconds_per_step)"' "$1/comprehensive_comparison.json"
}
(sweep "$cpu" --out "$folder/cpu") >/dev/null 2>&1 || fail "a sweep on the CPU ends with $?"
(sweep "$emulator" --backend emulator --out "$folder/emulator") >"$folder/stdout" 2>/dev/null || fail "a sweep on the emulator ends with $?"
grep -q "threads that emulate a GPU" "$folder/stdout" || fail "the sweep does not say where it computes: $(cat "$folder/stdout")"
losses "$folder/cpu" >"$folder/expected"
losses "$folder/emulator" >"$folder/found"
(($(wc -l <"$folder/expected") == 8 * 6)) || fail "a sweep has other losses than 5 of each of 8 patterns in training, and one in validation"
close "a sweep's losses" "$folder/expected" "$folder/found"
for backend in cpu emulator; do
  (($(grep -c "\"backend\": \"$backend\"" "$folder/$backend/comprehensive_comparison.json") == 8)) ||
    fail "the results do not name the backend $backend"
done

# Interrupted in its first pattern, it leaves a checkpoint. Another backend does not touch it, and the same one goes on.
(sweep "$emulator" --out "$folder/stopped" --checkpoint-every 1000000) >"$folder/stdout" 2>/dev/null &
pid=$!
until [[ -n $(cat "$folder"/stopped/1_sandwich.jsonl* 2>/dev/null) ]] || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
kill -INT $pid
wait $pid
(($? == 130)) || fail "an interrupted sweep does not end with exit code 130"
[[ -e $folder/stopped/1_sandwich.checkpoint.safetensors ]] || fail "an interrupted sweep leaves no checkpoint: $(ls "$folder/stopped")"
ls -l --time-style=full-iso "$folder/stopped" >"$folder/before"
(sweep "$cpu" --out "$folder/stopped") >/dev/null 2>"$folder/stderr"
(($? == 2)) && grep -q 'a run with --backend emulator .*this one has --backend cpu; take another --out, or --fresh' "$folder/stderr" ||
  fail "a sweep of another backend: $(cat "$folder/stderr")"
ls -l --time-style=full-iso "$folder/stopped" | cmp -s - "$folder/before" || fail "a sweep of another backend touches the folder"
(sweep "$emulator" --out "$folder/stopped") >"$folder/stdout" 2>/dev/null || fail "a sweep that goes on ends with $?"
grep -q "resuming: 0 of 8 patterns are finished, 1_sandwich goes on after step" "$folder/stdout" ||
  fail "no word of going on: $(cat "$folder/stdout")"
without_times "$folder/emulator" >"$folder/expected"
without_times "$folder/stopped" | cmp -s - "$folder/expected" || fail "an interrupted sweep gives other results"

# Models that are trained on one backend continue texts on both.
small=("$folder/text" --pattern LDDL --steps 2 --model-dim 32 --heads 2 --batch 1 --seq-len 16)
for backend in cpu emulator; do
  "${!backend}/train" "${small[@]}" --backend $backend --out "$folder/$backend.safetensors" >"$folder/log" ||
    fail "training on $backend ends with $?"
  sed -nE 's/.* loss ([0-9.]+).*/\1/p' "$folder/log" >"$folder/losses_of_$backend"
  "${!backend}/generate" "$folder/cpu.safetensors" --prompt 'the quick' --temperature 0 --max-new-tokens 5 \
    >"$folder/text_of_$backend" 2>"$folder/speed" || fail "generating on $backend ends with $?"
done
grep -q "threads that emulate a GPU" "$folder/speed" || fail "generate does not say where it computes: $(cat "$folder/speed")"
close "the losses of train" "$folder/losses_of_cpu" "$folder/losses_of_emulator"   # with the digits that it prints
(($(wc -c <"$folder/text_of_cpu") == 15)) && cmp -s "$folder/text_of_cpu" "$folder/text_of_emulator" ||
  fail "generate continues otherwise on the emulator"
says 'it was trained with --batch 1 --seq-len 16 --backend emulator' "$cpu/train" "${small[@]}" --out "$folder/emulator.safetensors"
says 'it was trained with --batch 1 --seq-len 16 --backend cpu' "$emulator/train" "${small[@]}" --out "$folder/cpu.safetensors"

for program in sweep train generate; do
  says "this program is compiled for emulator. To compile it for cpu: cmake --preset sweep && cmake --build build/sweep --target $program" \
    "$emulator/$program" --backend cpu
done
((failures == 0)) && echo "the emulator does what the CPU does"
exit $((failures > 0))
