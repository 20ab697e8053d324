#!/usr/bin/env bash
# The examples train and generate, together: generate.sh TRAIN GENERATE GOLDEN_MODELS
set -uo pipefail
train=$1 generate=$2 models=$3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export GOMP_SPINCOUNT=1000
failures=0
fail() { echo "FAILED: $*" >&2; failures=$((failures + 1)); }

# says SENTENCE COMMAND...: it fails, and says so.
says() {
  local sentence=$1 output
  shift
  if output=$("$@" 2>&1); then fail "$* succeeds"; fi
  grep -qF -- "$sentence" <<<"$output" || fail "$* says: $output"
}

for i in {1..200}; do echo "the quick brown fox jumps over the lazy dog, number $i"; done >"$folder/text"
small=("$folder/text" --model-dim 32 --heads 2 --batch 2 --seq-len 32 --save-every 10)

"$train" "${small[@]}" --steps 40 --out "$folder/whole" >"$folder/log" || fail "training"
grep -q 'validation loss' "$folder/log" || fail "no validation loss"
"$train" "${small[@]}" --steps 1000000 --out "$folder/stopped" >"$folder/log" &
train_pid=$!
until grep -q saved "$folder/log" || ! kill -0 $train_pid 2>/dev/null; do sleep 0.01; done   # the event, however long it takes
kill -INT $train_pid
wait $train_pid
[[ $? == 130 ]] || fail "an interrupt is not the end of a run"
grep -q 'interrupted: the same command goes on' "$folder/log" || fail "an interrupt says nothing"
"$train" "${small[@]}" --steps 40 --out "$folder/whole" | grep -q 'going on after step 40' || fail "a finished run does not say so"
cp "$folder/log" "$folder/other"
says 'the data is not the same' "$train" "$folder/other" "${small[@]:1}" --out "$folder/stopped"
says "pattern 'XX' is not compiled in" "$train" "${small[@]}" --pattern XX

"$generate" "$folder/whole" --prompt 'the quick' --seed 3 --max-new-tokens 30 >"$folder/a" 2>"$folder/speed" || fail "generating"
"$generate" "$folder/whole" --prompt 'the quick' --seed 3 --max-new-tokens 30 >"$folder/b" 2>/dev/null
cmp -s "$folder/a" "$folder/b" || fail "the same seed gives another text"
[[ $(wc -c <"$folder/a") == 40 ]] || fail "9 + 30 bytes and a line's end are $(wc -c <"$folder/a") bytes"
grep -q 'tokens/s' "$folder/speed" || fail "no tokens/s"
"$generate" "$models/qwen3_next_tiny" --tokens 1,2,3 --temperature 0 --max-new-tokens 5 2>/dev/null | grep -qE '^([0-9]+ ){5}$' ||
  fail "a released model"
says 'give the prompt as --tokens' "$generate" "$models/qwen3_next_tiny" --prompt hello
says 'top_p 2 is not allowed' "$generate" "$folder/whole" --prompt x --top-p 2
says 'there is no such file' "$generate" "$folder/nothing" --prompt x
head -c 5000 "$folder/whole" >"$folder/torn"
says 'safetensors file' "$generate" "$folder/torn" --prompt x

# released FIELD VALUE: a released folder of pattern LF, with a field of its config.json changed.
released() {
  rm -rf "$folder/released"
  cp -r "$models/qwen3_5_text_tiny" "$folder/released"
  sed -i "s/\"$1\": [^,]*/\"$1\": $2/" "$folder/released/config.json"
}
continues=("$generate" "$folder/released" --tokens 1,2,3 --temperature 0 --max-new-tokens 5)
released partial_rotary_factor 0.25
says "pattern 'LF' is compiled in with other options" "${continues[@]}"
says 'partial_rotary_factor 0.25 turns 4 of head_dim 16' "${continues[@]}"
released use_cache 'true, "conv_window": 3'
says '--ignore-field conv_window' "${continues[@]}"
"${continues[@]}" --ignore-field conv_window 2>/dev/null | grep -qE '^([0-9]+ ){5}$' || fail "an ignored field"
"$generate" --ignore-field conv_window "${continues[@]:1}" >/dev/null 2>&1 || fail "an ignored field before the folder"
exit $((failures > 0))
