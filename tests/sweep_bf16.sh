#!/usr/bin/env bash
# A sweep in bf16 learns as in float: 100 steps of one pattern. sweep_bf16.sh SWEEP, a sweep that is compiled for bf16 too
set -uo pipefail
sweep=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0
fail() { echo "FAILED: $*" >&2; failures=$((failures + 1)); }
small=(--patterns LFFL --steps 100 --seq-len 64 --batch 2 --validation 20 --data synthetic)

# The scalar and the validation loss of a folder's only pattern.
numbers() { echo "$(value dtype "$1") $(value val_loss "$1")"; }
value() { sed -nE "s/^ *\"$1\": \"?([^\",]+)\"?,$/\1/p" "$2/comprehensive_comparison.json"; }

for dtype in float bf16; do
  "$sweep" "${small[@]}" --dtype $dtype --out "$folder/$dtype" >"$folder/stdout" 2>"$folder/stderr" || fail "--dtype $dtype ends with $?: $(cat "$folder/stderr")"
done
read -r float_dtype float_loss < <(numbers "$folder/float")
read -r bf16_dtype bf16_loss < <(numbers "$folder/bf16")
echo "validation loss after 100 steps: $float_loss in $float_dtype, $bf16_loss in $bf16_dtype"
[[ $float_dtype == float && $bf16_dtype == bf16 ]] || fail "the results are in $float_dtype and $bf16_dtype"
awk "BEGIN { difference = $float_loss - $bf16_loss; exit !(difference < 0.02 && difference > -0.02) }" || fail "the losses are more than 0.02 apart"

# A run goes on in its own scalar only.
"$sweep" "${small[@]}" --dtype bf16 --out "$folder/float" >/dev/null 2>"$folder/stderr"
[[ $? == 2 ]] && grep -q 'a run with --dtype float .*this one has --dtype bf16; take another --out, or --fresh' "$folder/stderr" ||
  fail "a folder in float is taken for bf16: $(cat "$folder/stderr")"
# Stopped and started again, it ends with the same losses.
"$sweep" "${small[@]}" --dtype bf16 --checkpoint-every 0 --out "$folder/stopped" >/dev/null 2>&1 &
sweeping=$!
for ((i = 0; i < 600; ++i)); do
  [[ -f $folder/stopped/1_sandwich.checkpoint.safetensors ]] && break
  sleep 0.1
done
kill -INT $sweeping
wait $sweeping
"$sweep" "${small[@]}" --dtype bf16 --checkpoint-every 0 --out "$folder/stopped" >"$folder/stdout" 2>"$folder/stderr" || fail "the resumed run ends with $?"
grep -q 'goes on after step' "$folder/stdout" || fail "the run was not resumed: $(cat "$folder/stdout")"
read -r _ resumed < <(numbers "$folder/stopped")
[[ $resumed == "$bf16_loss" ]] || fail "resumed, the loss is $resumed instead of $bf16_loss"
exit $((failures > 0))
