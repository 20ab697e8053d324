#!/usr/bin/env bash
# train and generate in bf16: train_bf16.sh TRAIN GENERATE GOLDEN_MODELS, programs that are compiled for bf16 too
set -uo pipefail
train=$1 generate=$2 models=$3
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

for i in {1..200}; do echo "the quick brown fox jumps over the lazy dog, number $i"; done >"$folder/text"
small=("$folder/text" --model-dim 32 --heads 2 --batch 2 --seq-len 32)

# It learns as in float.
for dtype in float bf16; do
  "$train" "${small[@]}" --steps 80 --dtype $dtype --out "$folder/$dtype" >"$folder/log" || fail "training in $dtype ends with $?"
  sed -nE 's/^validation loss ([0-9.]+);.*/\1/p' "$folder/log" >"$folder/loss_$dtype"
done
float_loss=$(<"$folder/loss_float") bf16_loss=$(<"$folder/loss_bf16")
echo "validation loss after 80 steps: $float_loss in float, $bf16_loss in bf16"
awk "BEGIN { difference = $float_loss - $bf16_loss; exit !($bf16_loss < 4.5 && difference < 0.05 && difference > -0.05) }" ||
  fail "the losses are more than 0.05 apart, or larger than 4.5"

# tensors DTYPE WORDS FILE: how many tensors of a checkpoint have this scalar and a name that matches.
tensors() { head -c 100000 "$3" | grep -aoE "\"$2\":\{[^{}]*\}" | grep -c "\"dtype\":\"$1\""; }
parameters='(embedding|head|norm|blocks\.[^"]*)'
weights=$(tensors BF16 "$parameters" "$folder/bf16") wide=$(tensors F32 "$parameters" "$folder/bf16")
masters=$(tensors F32 "optimizer\.master\.$parameters" "$folder/bf16")
echo "the checkpoint has $weights parameters in BF16, $wide in F32, and $masters masters"
((weights > 0 && wide > 0 && masters == weights + wide)) || fail "a parameter has no master"
(($(tensors BF16 "optimizer\.[^\"]*" "$folder/bf16") == 0)) || fail "the optimizer holds bf16"
(($(tensors F32 "optimizer\.master\.[^\"]*" "$folder/float") == 0)) || fail "a checkpoint in float has masters"

# Interrupted after a quarter of its steps and started again, it ends with the same bits.
mkfifo "$folder/lines"
"$train" "${small[@]}" --steps 80 --dtype bf16 --save-every 1 --out "$folder/stopped" >"$folder/lines" &
training=$!
exec 9<"$folder/lines"
while read -r line <&9 && [[ $line != 'step 20/'* ]]; do :; done
kill -INT $training
grep -q 'interrupted: the same command goes on after step' <&9 || fail "an interrupt says nothing"
wait $training
(($? == 130)) || fail "an interrupt is not the end of a run"
exec 9<&-
"$train" "${small[@]}" --steps 80 --dtype bf16 --out "$folder/stopped" >"$folder/log" || fail "the resumed run ends with $?"
grep -q 'going on after step [2-7][0-9]$' "$folder/log" || fail "the run is not taken up: $(cat "$folder/log")"
grep -q "^validation loss $bf16_loss;" "$folder/log" || fail "resumed, it ends with $(tail -1 "$folder/log")"
cmp -s "$folder/stopped" "$folder/bf16" || fail "resumed, it ends with another checkpoint"

# A run goes on in its own scalar only, and nothing is written.
for dtype in float bf16; do cp "$folder/$dtype" "$folder/$dtype.before"; done
says "dtype: 'F32' in the file, 'BF16' in the model" "$train" "${small[@]}" --steps 90 --dtype bf16 --out "$folder/float"
says "dtype: 'BF16' in the file, 'F32' in the model" "$train" "${small[@]}" --steps 90 --dtype float --out "$folder/bf16"
for dtype in float bf16; do cmp -s "$folder/$dtype" "$folder/$dtype.before" || fail "a checkpoint in $dtype has changed"; done
for word in BF16 double; do
  says "--dtype $word is not allowed; it must be float or bf16" "$train" "${small[@]}" --dtype $word --out "$folder/refused"
  says "--dtype $word is not allowed; it must be float or bf16" "$generate" "$folder/bf16" --prompt x --dtype $word
done
compgen -G "$folder/refused*" >/dev/null && fail "something was written"

# twice COMMAND...: leaves what it prints in a file; it prints the same twice.
twice() {
  "$@" >"$folder/printed" 2>"$folder/stderr" || fail "$* ends with $?: $(cat "$folder/stderr")"
  "$@" 2>/dev/null | cmp -s - "$folder/printed" || fail "$* prints another text the second time"
}
# A checkpoint tells generate its scalar, whatever --dtype says.
twice "$generate" "$folder/bf16" --prompt 'the quick' --max-new-tokens 30 --temperature 0
(($(wc -c <"$folder/printed") == 40)) || fail "9 + 30 bytes and a line's end are $(wc -c <"$folder/printed") bytes"
twice "$generate" "$folder/bf16" --prompt 'the quick' --max-new-tokens 30 --seed 3
# Of each token a cache has 64 numbers for a full layer. Of these there are two; 4 bytes more are the token.
long=(--max-new-tokens 1000000000000)
says 'takes 2.6e+05 GB' "$generate" "$folder/bf16" --prompt x "${long[@]}"
says 'takes 5.16e+05 GB' "$generate" "$folder/float" --prompt x "${long[@]}" --dtype bf16
# A released folder has the scalar that --dtype names. This one has one full layer.
released=("$generate" "$models/qwen3_5_text_tiny" --tokens 1,2,3 --temperature 0)
twice "${released[@]}" --dtype bf16 --max-new-tokens 5
grep -qE '^([0-9]+ ){5}$' "$folder/printed" || fail "a released folder in bf16 continues with $(cat "$folder/printed")"
says 'takes 1.32e+05 GB' "${released[@]}" --dtype bf16 "${long[@]}"
says 'takes 2.6e+05 GB' "${released[@]}" "${long[@]}"
exit $((failures > 0))
