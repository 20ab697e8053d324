#!/usr/bin/env bash
# The examples train and generate, together: generate.sh TRAIN GENERATE GOLDEN_MODELS
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
small=("$folder/text" --model-dim 32 --heads 2 --batch 2 --seq-len 32 --save-every 10)

"$train" "${small[@]}" --steps 40 --out "$folder/whole" >"$folder/log" || fail "training"
grep -q 'validation loss' "$folder/log" || fail "no validation loss"
rm "$folder/log"   # whose "saved" is another run's
"$train" "${small[@]}" --steps 1000000 --out "$folder/stopped" >"$folder/log" &
train_pid=$!
until grep -qs saved "$folder/log" || ! kill -0 $train_pid 2>/dev/null; do sleep 0.01; done   # the event, however long it takes
kill -INT $train_pid
wait $train_pid
[[ $? == 130 ]] || fail "an interrupt is not the end of a run"
grep -q 'interrupted: the same command goes on' "$folder/log" || fail "an interrupt says nothing"
"$train" "${small[@]}" --steps 40 --out "$folder/whole" | grep -q 'going on after step 40' || fail "a finished run does not say so"
cp "$folder/log" "$folder/other"
says 'the data is not the same' "$train" "$folder/other" "${small[@]:1}" --out "$folder/stopped"
says "pattern 'XX' is not compiled in" "$train" "${small[@]}" --pattern XX

# Refused before anything is trained or written.
says '--steps 1e3 is not allowed' "$train" "${small[@]}" --steps 1e3
says "--backend 'gpu' is not allowed; it must be cpu, emulator or cuda" "$train" "${small[@]}" --backend gpu
says 'build/sweep-emulator --target train' "$train" "${small[@]}" --backend emulator
says '--learning-rate nan is not allowed' "$train" "${small[@]}" --learning-rate nan
says '--batch 0 is not allowed' "$train" "$folder/text" --batch 0
says '--seed -1 is not allowed' "$train" "${small[@]}" --seed -1
says 'No such file or directory' "$train" "${small[@]}" --out "$folder/nowhere/model"
says 'not a file' "$train" "${small[@]}" --out "$folder"
says 'not the name of a file' "$train" "${small[@]}" --out "$folder/"
says "--out '' is not allowed" "$train" "${small[@]}" --out ''
says 'it is a folder' "$train" "$folder" "${small[@]:1}"
says 'there is memory for' "$train" "$folder/text" --model-dim 1000000 --heads 2 --batch 2 --seq-len 32 --out "$folder/refused"
head -c 300 "$folder/text" >"$folder/tenth"
says 'to validate on' "$train" "$folder/tenth" "${small[@]:1}" --out "$folder/refused"
cp "$folder/text" "$folder"/$'bad\xff'
says 'not UTF-8' "$train" "$folder"/$'bad\xff' "${small[@]:1}" --out "$folder/refused"
(ulimit -f 4; says 'too large' "$train" "${small[@]}" --out "$folder/refused"; exit $failures) || fail "a full disk"
"$train" "${small[@]}" --steps 40 --out "$folder/refused" >/dev/full 2>"$folder/error"
[[ $? == 2 ]] && grep -q 'cannot write to stdout' "$folder/error" || fail "a full stdout: $(cat "$folder/error")"
cp "$folder/text" "$folder/both"
says 'both' "$train" "$folder/both" "${small[@]:1}" --out "$folder/both"
cmp -s "$folder/both" "$folder/text" || fail "a text is overwritten"
says '--steps may be given only once' "$train" "${small[@]}" --steps 1 --steps 2
compgen -G "$folder/refused*" >/dev/null && fail "something was written"

# What is taken up is what was asked for.
says 'it was trained with --batch 2' "$train" "$folder/text" --model-dim 32 --heads 2 --batch 4 --seq-len 32 --out "$folder/whole" --steps 50
says 'the file holds' "$train" "${small[@]}" --pattern FFFF --steps 50 --out "$folder/whole"
says 'optimizer.learning_rate' "$train" "${small[@]}" --learning-rate 0.5 --steps 50 --out "$folder/whole"

# A checkpoint in use is refused, by whom, also under another name; a dead process uses nothing.
ln -s used "$folder/alias"
rm "$folder/log"
"$train" "${small[@]}" --steps 100000000 --out "$folder/used" >"$folder/log" 2>&1 &
train_pid=$!
until grep -qs saved "$folder/log" || ! kill -0 $train_pid 2>/dev/null; do sleep 0.01; done
says "in use by process $train_pid on" "$train" "${small[@]}" --steps 100000000 --out "$folder/used"
says "in use by process $train_pid on" "$train" "${small[@]}" --steps 10 --out "$folder/alias"
kill -KILL $train_pid
wait $train_pid 2>/dev/null
"$train" "${small[@]}" --steps 20 --out "$folder/alias" >"$folder/log" || fail "a checkpoint of a dead process"
grep -q 'going on after step' "$folder/log" || fail "a checkpoint of a dead process is not taken up"
[[ -L $folder/alias && ! -e $folder/used.lock ]] || fail "a link is replaced, or a lock stays"

# A text may be a pipe; a signal ends the wait for it.
"$train" <(cat "$folder/text") "${small[@]:1}" --steps 40 --out "$folder/piped" >/dev/null || fail "a pipe"
"$train" /dev/stdin "${small[@]:1}" --steps 40 --out "$folder/piped" <"$folder/text" | grep -q 'going on after step 40' || fail "stdin"
mkfifo "$folder/fifo"
exec 8<>"$folder/fifo"
for signal in INT TERM; do
  "$train" "$folder/fifo" "${small[@]:1}" --out "$folder/waiting" 8>&- &
  train_pid=$!
  until [[ $(cat /proc/$train_pid/comm) == "$(basename "$train")" ]] && ls -l /proc/$train_pid/fd | grep -q "$folder/fifo" || ! kill -0 $train_pid; do sleep 0.01; done 2>/dev/null   # it reads
  kill -$signal $train_pid
  for _ in {1..60000}; do kill -0 $train_pid 2>/dev/null && sleep 0.01; done
  kill -KILL $train_pid 2>/dev/null && fail "SIG$signal does not end the wait for a text"
  wait $train_pid 2>/dev/null
  [[ $? == $((128 + $(kill -l $signal))) ]] || fail "SIG$signal does not end the wait for a text"
done
exec 8>&-

# Closed descriptors: nothing lands in a checkpoint that was meant for the terminal.
for closed in '<&-' '>&-' '2>&-' '<&- >&- 2>&-'; do
  rm -f "$folder/closed"
  (eval 'exec "$train" "${small[@]}" --steps 40 --out "$folder/closed" '"$closed") >/dev/null 2>&1 || fail "training with $closed"
  cmp -s "$folder/closed" "$folder/whole" || fail "$closed changes the checkpoint"
done

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
says 'there is memory for' "$generate" "$folder/whole" --prompt x --max-new-tokens 9223372036854775807
says '--max-new-tokens -1 is not allowed' "$generate" "$folder/whole" --prompt x --max-new-tokens -1
says 'build/sweep-cuda --target generate' "$generate" "$folder/whole" --prompt x --backend cuda
says '--temperature nan is not allowed' "$generate" "$folder/whole" --prompt x --temperature nan
says "--tokens '' is not allowed" "$generate" "$folder/whole" --tokens 1,,2
says '--tokens 300 is not allowed' "$generate" "$folder/whole" --tokens 300
says 'there is nothing to continue' "$generate" "$folder/whole" --prompt ''
says 'cannot write to stdout' bash -c '"$1" "$2" --prompt x >/dev/full' - "$generate" "$folder/whole"
"$generate" "$folder/whole" --prompt x --max-new-tokens 100000 2>"$folder/error" | head -c 1 >/dev/null
[[ ${PIPESTATUS[0]} == 141 && ! -s $folder/error ]] || fail "a closed pipe: $(cat "$folder/error")"

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
