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
  [[ " $* " == *" --patterns "* ]] || set -- "$@" --patterns LLLL
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
refused "LFLF|not compiled in|LFFL|run_of.hpp" --patterns LFLF --data "$folder/text"
refused "--seq-len 0|at least 2" --seq-len 0 --data "$folder/text"
refused "--batch 0|at least 1" --batch 0 --data "$folder/text"
refused "--validation 0|at least 1" --validation 0 --data "$folder/text"
refused "--steps 0|at least 1" --steps 0 --data "$folder/text"
refused "--threads -1" --threads -1 --data "$folder/text"
refused "--no-such-option" --no-such-option
refused "--steps 1e3|whole number" --steps 1e3 --data "$folder/text"
refused "--steps ''|whole number" --steps '' --data "$folder/text"
refused "--steps 0x10|whole number" --steps 0x10 --data "$folder/text"
refused "--steps 4x|whole number" --steps 4x --data "$folder/text"
refused "--batch 99999999999999999999|at most" --batch 99999999999999999999 --data "$folder/text"
refused "--seed -1|whole number" --seed -1 --data "$folder/text"
refused "--seed 18446744073709551616|at most 18446744073709551615" --seed 18446744073709551616 --data "$folder/text"
refused "--checkpoint-every nan|finite" --checkpoint-every nan --data "$folder/text"
refused "--checkpoint-every -1|at least 0" --checkpoint-every -1 --data "$folder/text"
refused "--backend 'gpu'|cpu, emulator or cuda" --backend gpu --data "$folder/text"
refused "--backend ''|cpu, emulator or cuda" --backend '' --data "$folder/text"
refused "--backend emulator|compiled for cpu|cmake --preset sweep-emulator" --backend emulator --data "$folder/text"
refused "--backend cuda|compiled for cpu|cmake --preset sweep-cuda" --backend cuda --data "$folder/text"
refused "--threads 1000000|at most" --threads 1000000 --data "$folder/text"
refused "there is memory for" --seq-len 2147483647 --batch 2147483647 --data synthetic
refused "it is a folder" --data "$folder"

# Texts and names.
head -c 1000 "$folder/text" >"$folder/tenth"   # whose last tenth is shorter than a window
cp "$folder/text" "$folder"/$'bad\xff'
refused "100 bytes to validate on|128" --data "$folder/tenth"
refused "not UTF-8" --data "$folder"/$'bad\xff'
( # an endless one
  ulimit -v 1000000
  exec "$sweep" --patterns LLLL --data /dev/zero --out "$folder/endless" >/dev/null 2>"$folder/stderr"
)
(($? == 2)) && grep -q "no memory for more than .* bytes" "$folder/stderr" || complain "an endless text: $(cat "$folder/stderr")"

# Without a PATH there is no gnuplot, whose pictures take long.
tiny=(--steps 2 --patterns LLLL --seq-len 16 --batch 1 --threads 1 --backend cpu)
cp "$folder/text" "$folder"/$'new\nline'
for round in first second; do
  PATH=/nowhere "$sweep" --data "$folder"/$'new\nline' --out "$folder"/$'out\n' "${tiny[@]}" >"$folder/stdout" 2>"$folder/stderr" || complain "a newline in a name, the $round time: $(cat "$folder/stderr")"
done
grep -q 'new\\x0aline' "$folder/stdout" || complain "a newline in a name is not escaped: $(cat "$folder/stdout")"
grep -q "all of them are finished already" "$folder/stdout" || complain "a newline in a name spoils the folder: $(cat "$folder/stdout")"

# A pipe is a text like any other.
PATH=/nowhere "$sweep" --data <(cat "$folder/text") --out "$folder/piped" "${tiny[@]}" >/dev/null 2>"$folder/stderr" || complain "a pipe: $(cat "$folder/stderr")"
PATH=/nowhere "$sweep" --data "$folder/text" --out "$folder/piped" "${tiny[@]}" 2>&1 | grep -q "finished already" || complain "a pipe's text is not the file's"

# A signal ends the wait for a pipe that nobody writes.
mkfifo "$folder/fifo"
exec 8<>"$folder/fifo"
for signal in INT TERM; do
  PATH=/nowhere "$sweep" --data "$folder/fifo" --out "$folder/waiting" "${tiny[@]}" 8>&- &
  pid=$!
  until [[ $(cat /proc/$pid/comm) == "$(basename "$sweep")" ]] && ls -l /proc/$pid/fd | grep -q "$folder/fifo" || ! kill -0 $pid; do sleep 0.01; done 2>/dev/null   # it reads
  kill -$signal $pid
  for _ in {1..60000}; do kill -0 $pid 2>/dev/null && sleep 0.01; done
  kill -KILL $pid 2>/dev/null && complain "SIG$signal does not end the wait for a text"
  wait $pid 2>/dev/null
  (($? == 128 + $(kill -l $signal))) || complain "SIG$signal does not end the wait for a text"
done
exec 8>&-

# Something in the way of a result is found before any work.
for file in comprehensive_comparison.json linear_only.jsonl linear_only.result.safetensors loss_comparison.png; do
  mkdir -p "$folder/way/$file"
  PATH=/nowhere "$sweep" --data "$folder/text" --out "$folder/way" "${tiny[@]}" >"$folder/stdout" 2>"$folder/stderr"
  (($? == 2)) && grep -q "$file.*not a" "$folder/stderr" || complain "a folder $file: $(cat "$folder/stderr")"
  [[ ! -s $folder/stdout && $(ls -A "$folder/way") == "$file" ]] || complain "a folder $file: $(ls -A "$folder/way")"
  rm -r "$folder/way"
done

# Closed descriptors: nothing lands in the log that was meant for the terminal.
for closed in '<&-' '>&-' '2>&-' '<&- >&- 2>&-'; do
  rm -rf "$folder/closed"
  (PATH=/nowhere; eval 'exec "$sweep" --data "$folder/text" --out "$folder/closed" "${tiny[@]}" '"$closed") >/dev/null 2>&1 || complain "with $closed it ends with $?"
  grep -vq '^{.*}$' "$folder/closed/linear_only.jsonl" && complain "with $closed the log has $(grep -v '^{.*}$' "$folder/closed/linear_only.jsonl")"
done

# Stdout that cannot be written is an error, and nothing is trained for it.
PATH=/nowhere "$sweep" --data "$folder/text" --out "$folder/deaf" "${tiny[@]}" >/dev/full 2>"$folder/stderr"
(($? == 2)) && grep -q "cannot write to stdout: No space" "$folder/stderr" || complain "a full stdout: $(cat "$folder/stderr")"
[[ -z $(ls -A "$folder/deaf") ]] || complain "a full stdout left $(ls -A "$folder/deaf")"
exec 9> >(true)
wait $!
PATH=/nowhere "$sweep" --data "$folder/text" --out "$folder/deaf" "${tiny[@]}" >&9 2>"$folder/stderr"
(($? == 141)) && [[ ! -s $folder/stderr ]] || complain "a closed stdout: $(cat "$folder/stderr")"
exec 9>&-

# A missing gnuplot is said at once. A folder in use is refused, by whom, until its process is dead. The one in use hangs in a
# gnuplot that never ends: there the first signal asks, and the second one ends.
PATH=/nowhere "$sweep" --data "$folder/text" --out "$folder/bare" "${tiny[@]}" 2>/dev/null | sed -n 3p | grep -q "gnuplot is not installed" || complain "no word of a missing gnuplot"
mkdir "$folder/bin"
printf '#!/bin/sh\necho $$ >"%s/gnuplot.pid"\nexec sleep 1000000\n' "$folder" >"$folder/bin/gnuplot"
chmod +x "$folder/bin/gnuplot"
hang() {
  rm -f "$folder/gnuplot.pid"
  PATH="$folder/bin:$PATH" "$sweep" --data "$folder/text" --out "$folder/used" "${tiny[@]}" >/dev/null 2>&1 &
  pid=$!
  until [[ -s $folder/gnuplot.pid ]] || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
}
hang
ls -lA --time-style=full-iso "$folder/used" >"$folder/before"
for other in 2 3; do
  "$sweep" --data "$folder/text" --out "$folder/used" --fresh "${tiny[@]/#2/$other}" >"$folder/stdout" 2>"$folder/stderr"
  (($? == 2)) && grep -q "in use by process $pid on .* since .* --patterns LLLL .*another --out" "$folder/stderr" || complain "a folder in use: $(cat "$folder/stderr")"
done
ls -lA --time-style=full-iso "$folder/used" | cmp -s - "$folder/before" || complain "a folder in use was touched"
kill -INT $pid
sleep 0.5
kill -0 $pid 2>/dev/null || complain "one signal does not let it finish"
kill -TERM $pid
wait $pid
(($? == 143)) || complain "a second signal does not end it"
kill "$(cat "$folder/gnuplot.pid")"
hang
kill -KILL $pid
wait $pid 2>/dev/null
kill "$(cat "$folder/gnuplot.pid")"
PATH=/nowhere "$sweep" --data "$folder/text" --out "$folder/used" "${tiny[@]}" >/dev/null 2>"$folder/stderr" || complain "a folder of a dead process: $(cat "$folder/stderr")"
[[ -z $(ls -A "$folder/used" | grep -E '^\.|partial|lock') ]] || complain "left behind: $(ls -A "$folder/used")"

"$sweep" --out "$folder/file/results" --data "$folder/text" --steps 1 --patterns LLLL >/dev/null 2>"$folder/stderr"
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
