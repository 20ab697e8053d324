#!/usr/bin/env bash
# What a user can get wrong at the sweep's command line: each is one clear line on stderr, exit code 2, and nothing
# half-written. bad_input.sh SWEEP_PROGRAM
set -uo pipefail
sweep=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0

complain() { echo "FAILED: $1" >&2; failures=$((failures + 1)); }

# refused WORDS ARGUMENTS...: the line on stderr holds all WORDS (parted by |), and the results folder stays empty.
refused() {
  local words=$1 status
  shift
  "$sweep" --out "$folder/out" "$@" >"$folder/stdout" 2>"$folder/stderr"
  status=$?
  ((status == 2)) || complain "$*: exit code $status, not 2"
  (($(wc -l <"$folder/stderr") == 1)) || complain "$*: stderr has $(wc -l <"$folder/stderr") lines"
  local word
  while IFS= read -r -d '|' word; do
    grep -qF -- "$word" "$folder/stderr" || complain "$*: no '$word' in: $(cat "$folder/stderr")"
  done <<<"$words|"
  [[ -z $(ls -A "$folder/out" 2>/dev/null) ]] || complain "$*: left $(ls "$folder/out")"
  rm -rf "$folder/out"
}

head -c 40000 /dev/zero | tr '\0' 'a' >"$folder/text"
: >"$folder/empty"
echo short >"$folder/short"
echo in the way >"$folder/file"

refused "missing.txt" --data "$folder/missing.txt"
refused "empty" --data "$folder/empty"
refused "$folder/short|128" --data "$folder/short"
refused "'X'|position 2|L or G" --patterns LXFL --data "$folder/text"
refused "LFLF|not compiled in|LFFL|patterns.cpp" --patterns LFLF --data "$folder/text"
refused "--seq-len 0|at least 2" --seq-len 0 --data "$folder/text"
refused "--batch 0|at least 1" --batch 0 --data "$folder/text"
refused "--steps 0|at least 1" --steps 0 --data "$folder/text"
refused "--threads -1" --threads -1 --data "$folder/text"
refused "--no-such-option" --no-such-option

"$sweep" --out "$folder/file/results" --data "$folder/text" --steps 1 >/dev/null 2>"$folder/stderr"
(($? == 2)) && grep -q "$folder/file/results" "$folder/stderr" || complain "a folder below a file: $(cat "$folder/stderr")"

# A full disk: no file may grow beyond 4 KiB. The run log of one pattern is larger.
(
  ulimit -f 4
  "$sweep" --out "$folder/full" --data "$folder/text" --steps 120 --patterns LLLL --seq-len 8 >/dev/null 2>"$folder/full.err"
)
(($? == 2)) || complain "a full disk does not end with exit code 2: $(cat "$folder/full.err")"
grep -qi "large\|space" "$folder/full.err" || complain "a full disk is not named: $(cat "$folder/full.err")"
[[ -z $(ls -A "$folder/full") ]] || complain "a full disk left $(ls "$folder/full")"

# Ctrl-C keeps what is finished and says so. A sweep that was done before it is tried again with more steps.
for steps in 20 200 2000 20000; do
  rm -rf "$folder/stopped"
  "$sweep" --out "$folder/stopped" --data "$folder/text" --steps $steps --seq-len 16 --patterns LLLL,LLLL,FFFF,FFFF,FFFF,FFFF,FFFF,FFFF >"$folder/stdout" 2>"$folder/stderr" &
  pid=$!
  until [[ -e $folder/stopped/linear_only.jsonl ]] || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done   # the event, however long it takes
  kill -INT $pid 2>/dev/null
  wait $pid
  status=$?
  ((status == 0)) || break
done
((status == 130)) || complain "an interrupted sweep does not end with exit code 130"
grep -q "interrupted: .* are finished and kept" "$folder/stdout" || complain "an interrupted sweep does not say what it keeps"
[[ -s $folder/stopped/comprehensive_comparison.json ]] || complain "an interrupted sweep left no results"
compgen -G "$folder/stopped/*.partial" >/dev/null && complain "an interrupted sweep left a half-written file"

((failures == 0)) && echo "all refused as they should be"
exit $((failures > 0))
