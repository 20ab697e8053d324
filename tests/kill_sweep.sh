#!/usr/bin/env bash
# A sweep that is interrupted, killed and started again gives what one without any of it gives, but for times.
# kill_sweep.sh SWEEP_PROGRAM
set -uo pipefail
sweep=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0

complain() { echo "FAILED: $1" >&2; failures=$((failures + 1)); }

# run OPTIONS...: they take the place of these. Without a PATH there is no gnuplot, whose pictures take long.
run() {
  local -A options=([--data]=synthetic [--steps]=16 [--seq-len]=32 [--batch]=1 [--seed]=5 [--threads]=1 [--patterns]=LLLL,FFFF,DDDD)
  local words=() name
  while (($#)); do
    if [[ $1 == --fresh ]]; then words+=("$1"); else options[$1]=$2 && shift; fi
    shift
  done
  for name in "${!options[@]}"; do words+=("$name" "${options[$name]}"); done
  PATH=/nowhere exec "$sweep" "${words[@]}"
}
without_times() {
  sed 's/,"tokens_per_second".*//' "$1"/*.jsonl
  grep -vE '"(training_time|tokens_per_second|milliseconds_per_step)"' "$1/comprehensive_comparison.json"
  cat "$1"/*.tsv
}
same_results() {
  without_times "$folder/whole" >"$folder/expected"
  without_times "$1" | cmp -s - "$folder/expected" || complain "$2 gives other results: $(without_times "$1" | diff - "$folder/expected" | head -5)"
  [[ -z $(ls "$1" | grep -E 'checkpoint|partial') ]] || complain "$2 left $(ls "$1" | grep -E 'checkpoint|partial')"
}
# wait_for FILES...: until one of them is there, or what should make it has ended.
wait_for() {
  local file
  while kill -0 $pid 2>/dev/null; do
    for file; do [[ -e $file ]] && return; done
    sleep 0.01
  done
  for file; do [[ -e $file ]] && return; done
  complain "none of $*"
}

(run --out "$folder/whole") >/dev/null 2>&1 || complain "a whole sweep ends with $?"

# Killed like by a power cut, in the second pattern or soon after, again and again, also before it says a word: it always goes on.
for round in 1 2 3 4; do
  (run --out "$folder/killed" --checkpoint-every 0) >/dev/null 2>&1 &
  pid=$!
  wait_for "$folder"/killed/full_only.{checkpoint,result}.safetensors
  sleep 0.$((RANDOM % 3))
  kill -KILL $pid
  wait $pid 2>/dev/null
  [[ -e $folder/killed/full_only.result.safetensors ]] && break
done
if [[ -e $folder/killed/dsa_only.result.safetensors ]]; then
  words="all of them are finished already"
elif [[ -e $folder/killed/full_only.result.safetensors ]]; then
  words="resuming: 2 of 3 patterns are finished"
else
  words="resuming: 1 of 3 patterns are finished, full_only goes on after step"
fi
(run --out "$folder/killed") >"$folder/stdout" 2>/dev/null || complain "a sweep after kills ends with $?"
grep -q "$words" "$folder/stdout" || complain "not '$words': $(cat "$folder/stdout")"
same_results "$folder/killed" "a killed sweep"

# Ctrl-C finishes its step and writes a checkpoint, even if none is due for long. Stopped first, to see that it is within the
# first pattern; if it was too quick, again.
lines() { cat "$folder"/stopped/linear_only.jsonl* 2>/dev/null | wc -l; }
for _ in {1..200}; do
  rm -rf "$folder/stopped"
  (run --out "$folder/stopped" --checkpoint-every 1000000) >"$folder/stdout" 2>/dev/null &
  pid=$!
  until (($(lines) > 0)) || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
  kill -STOP $pid
  steps=$(lines)
  kill -INT $pid
  kill -CONT $pid
  wait $pid
  status=$?
  ((steps < 15)) && break
done
((status == 130)) || complain "an interrupted sweep does not end with exit code 130"
[[ -e $folder/stopped/linear_only.checkpoint.safetensors ]] || complain "an interrupted sweep left no checkpoint"
grep -q "interrupted: 0 of 3 patterns are finished and kept; the same command goes on from here" "$folder/stdout" || complain "no way on: $(cat "$folder/stdout")"

# Other arguments are refused, with both values and the ways out, and nothing is touched.
refused() {
  local words=$1
  shift
  ls -l --time-style=full-iso "$folder/stopped" >"$folder/before"
  (run --out "$folder/stopped" "$@") >/dev/null 2>"$folder/stderr"
  (($? == 2)) || complain "$*: not refused"
  (($(wc -l <"$folder/stderr") == 1)) || complain "$*: stderr has $(wc -l <"$folder/stderr") lines"
  local word
  while IFS= read -r -d '|' word; do
    grep -qF -- "$word" "$folder/stderr" || complain "$*: no '$word' in: $(cat "$folder/stderr")"
  done <<<"$words|another --out|--fresh|"
  ls -l --time-style=full-iso "$folder/stopped" | cmp -s - "$folder/before" || complain "$*: something was touched"
}
head -c 40000 /dev/zero | tr '\0' 'a' >"$folder/text"
refused "--steps 16|--steps 17" --steps 17
refused "--seq-len 32|--seq-len 33" --seq-len 33
refused "--batch 1|--batch 2" --batch 2
refused "--validation 200|--validation 100" --validation 100
refused "--seed 5|--seed 6" --seed 6
refused "synthetic recall|$folder/text" --data "$folder/text"
cp "$folder/stopped/linear_only.checkpoint.safetensors" "$folder/checkpoint"
head -c 100000 "$folder/checkpoint" >"$folder/stopped/linear_only.checkpoint.safetensors"
refused "linear_only.checkpoint.safetensors"
cp "$folder/checkpoint" "$folder/stopped/linear_only.checkpoint.safetensors"
(run --out "$folder/stopped" --threads 2) >"$folder/stdout" 2>/dev/null || complain "a sweep after Ctrl-C ends with $?"
grep -q "resuming: 0 of 3 patterns are finished, linear_only goes on after step" "$folder/stdout" || complain "no word of going on: $(cat "$folder/stdout")"
same_results "$folder/stopped" "an interrupted sweep"

# A finished one is done, until --fresh.
(run --out "$folder/stopped") >"$folder/stdout" 2>"$folder/stderr" || complain "a finished sweep ends with $?"
grep -q "all of them are finished already; --fresh trains them again" "$folder/stdout" || complain "a finished sweep does not say so"
grep -q "linear_only" "$folder/stdout" || complain "a finished sweep shows no table"
[[ -s $folder/stderr ]] && complain "a finished sweep trains: $(cat "$folder/stderr")"
same_results "$folder/stopped" "a finished sweep"
(run --out "$folder/stopped" --fresh --steps 2 --patterns LLLL) >"$folder/stdout" 2>/dev/null || complain "a fresh sweep ends with $?"
grep -q "resuming\|already" "$folder/stdout" && complain "a fresh sweep remembers"
(($(wc -l <"$folder/stopped/linear_only.jsonl") == 2)) || complain "a fresh sweep does not train"
[[ -e $folder/stopped/full_only.result.safetensors ]] && complain "a fresh sweep leaves old results"

((failures == 0)) && echo "killed, interrupted and whole: the same results"
exit $((failures > 0))
