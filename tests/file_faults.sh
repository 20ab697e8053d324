#!/usr/bin/env bash
# A file operation that fails, or a kill before any of them: the program says what failed, leaves nothing half-written, and the same
# command then goes on to the bits that a run without any of it gives.
# file_faults.sh COMPILER quick|most|full sweep|train PROGRAM
set -uo pipefail
compiler=$1 amount=$2 kind=$3 program=$4
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0 runs=0
complain() { echo "FAILED: $1" >&2; failures=$((failures + 1)); }

"$compiler" -std=c++20 -O1 -shared -fPIC "$(dirname "$0")/file_faults.cpp" -o "$folder/file_faults.so" -ldl || exit 2
for i in {1..40}; do echo "the quick brown fox jumps over the lazy dog, number $i"; done >"$folder/text"

# The run in question, its results in folder $1. Without a PATH the sweep draws no pictures, which take long.
if [[ $kind == sweep ]]; then
  run() { PATH=/nowhere exec "$program" --data "$folder/text" --patterns LLLL,FFFF --steps 3 --seq-len 8 --batch 1 --threads 1 --checkpoint-every 0 --out "$1"; }
  results() {
    sed 's/,"tokens_per_second".*//' "$1"/*.jsonl
    grep -vE '"(training_time|tokens_per_second|milliseconds_per_step)"' "$1/comprehensive_comparison.json"
    cat "$1"/*.tsv
  }
else
  run() { mkdir -p "$1" && exec "$program" "$folder/text" --model-dim 8 --heads 1 --seq-len 8 --batch 1 --steps 4 --save-every 1 --out "$1/model"; }
  results() { cat "$1/model"; }
fi
left_behind() { ls -A "$1" 2>/dev/null | grep -E 'checkpoint|partial|lock'; }
check_whole() {
  results "$folder/out" | cmp -s - "$folder/expected" || complain "$1: other results"
  [[ -z $(left_behind "$folder/out") ]] || complain "$1: left $(left_behind "$folder/out")"
}
(run "$folder/whole") >/dev/null 2>"$folder/stderr" || complain "a whole run ends with $?: $(cat "$folder/stderr")"
results "$folder/whole" >"$folder/expected"

# with_fault FAULT FOLDER: the run; bash says nothing of those that are killed.
with_fault() {
  { (export FILE_FAULT=$1 FILE_FAULT_MARK="$folder/fired" LD_PRELOAD="$folder/file_faults.so"; run "$2") >/dev/null 2>"$folder/stderr"; } 2>/dev/null
}
with_fault "rename 3 KILL" "$folder/half"
(($? == 137)) && [[ -n $(left_behind "$folder/half") ]] || complain "no run was killed half-way"
rm -f "$folder"/half/{.lock,model.lock,*.partial}   # of the dead
ls -A "$folder/half" | grep -qE 'checkpoint|^model$' || complain "the run that was killed half-way kept nothing to read"

# fault CALL N WHAT: false when the run has fewer such calls.
fault() {
  local name="the $1 number $2, $3" status
  rm -rf "$folder/out" "$folder/fired"
  [[ $1 == read ]] && cp -r "$folder/half" "$folder/out"   # also what was kept is read
  with_fault "$1 $2 $3" "$folder/out"
  status=$?
  [[ -e $folder/fired ]] || return 1
  runs=$((runs + 1))
  case $3 in
    EINTR | SHORT) ((status == 0)) || complain "$name: exit code $status: $(cat "$folder/stderr")" ;;
    KILL) ((status == 137)) || complain "$name: exit code $status" ;;
    *)
      # Nothing is lost where a file that was read, or a folder, cannot be closed, or where a plot's script is not copied.
      ((status == 2 || status == 0)) || complain "$name: exit code $status"
      if ((status == 2)); then
        [[ $(grep -cE "^$kind: .*(No space left|Input/output error)" "$folder/stderr") == 1 ]] || complain "$name: $(cat "$folder/stderr")"
        ls -A "$folder/out" 2>/dev/null | grep -E 'partial|lock' && complain "$name: left a half-written file"
      elif [[ $1 != close && $1 != open && $1 != read ]]; then
        complain "$name: no error"
      fi
      ;;
  esac
  if ((status != 0)); then
    (run "$folder/out") >/dev/null 2>"$folder/stderr" || complain "$name, then again: exit code $?: $(cat "$folder/stderr")"
  fi
  check_whole "$name"
}
# every CALL WHAT: at such calls of the run, which lie ever farther apart.
every() {
  local n=1
  while fault "$1" "$n" "$2"; do
    case $amount in
      full) n=$((n + 1 + n / 16)) ;;
      most) n=$((n * 2)) ;;
      *) n=$((n * 4)) ;;
    esac
  done
  ((n > 1)) || complain "the run has no $1"
}

if [[ $amount != quick ]]; then
  for what in ENOSPC EIO EINTR SHORT KILL; do every write $what; done
  for call in open fsync rename close; do for what in ENOSPC EIO EINTR KILL; do every $call $what; done; done
  for what in EIO EINTR SHORT KILL; do every read $what; done
else
  every write ENOSPC
  every write KILL
  every fsync EIO
  every rename KILL
  every rename EINTR
  every read SHORT
fi
((failures == 0)) && echo "$runs faults: each is said, none of them changes a result"
exit $((failures > 0))
