#!/usr/bin/env bash
# What every program does alike, whatever it is for: habits.sh VERSION PROGRAM...
set -uo pipefail
version=$1
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0
complain() { echo "FAILED: $name $1: $(cat "$folder/stdout" "$folder/stderr")" >&2; failures=$((failures + 1)); }
# ends CODE COMMAND...: with that exit code.
ends() {
  local code=$1 status
  shift
  "$@" >"$folder/stdout" 2>"$folder/stderr"
  status=$?
  ((status == code)) || complain "${*:2} ends with $status, not $code"
}
# complains WORDS: one line on stderr, with the program's name once; nothing on stdout.
complains() {
  [[ ! -s $folder/stdout ]] || complain "prints something before it complains"
  [[ $(wc -l <"$folder/stderr") == 1 && $(grep -c "^$name: " "$folder/stderr") == 1 && $(grep -c "$name: $name:" "$folder/stderr") == 0 ]] || complain "does not say in one line"
  grep -qF -- "$1" "$folder/stderr" || complain "does not say '$1'"
}

for program in "$@"; do
  name=$(basename "$program")
  ends 0 "$program" --version
  [[ $(cat "$folder/stdout") == "$name (hybridattn) $version" ]] || complain "has another version"
  ends 2 "$program" --no-such-option
  complains "--no-such-option"
  ends 2 bash -c '"$1" --version >/dev/full' - "$program"
  complains "cannot write to stdout: No space left on device"
  exec 9> >(true)
  wait $!   # nobody reads any more
  ends 141 bash -c 'trap "" PIPE; "$1" --version >&9' - "$program"
  ends 141 bash -c '"$1" --version >&9' - "$program"
  [[ ! -s $folder/stderr ]] || complain "does not end quietly"
  exec 9>&-
  ends 0 bash -c '"$1" --version <&- >&- 2>&-' - "$program"
done
((failures == 0)) && echo "$# programs have the same habits"
exit $((failures > 0))
