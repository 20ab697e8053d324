#!/usr/bin/env bash
# Mistakes do not compile, and the first error says what to do: mistakes.sh MISTAKES_CPP COMPILER [FLAGS...]
set -uo pipefail
source=$1
shift
failures=0

# mistake COMPILE_COMMAND...: it fails, and its first error holds $sentence.
mistake() {
  local first
  if first=$("$@" 2>&1); then echo "FAILED: mistake $number compiles" >&2; failures=$((failures + 1)); return; fi
  first=$(grep -m1 'error' <<<"$first")
  grep -qF -- "$sentence" <<<"$first" || { echo "FAILED: mistake $number says: $first" >&2; failures=$((failures + 1)); }
  echo "$number: $first"
}

"$@" -fsyntax-only -DMISTAKE=0 "$source" || { echo "FAILED: without a mistake it does not compile" >&2; failures=1; }
while IFS='|' read -r number sentence; do
  mistake "$@" -fsyntax-only "-DMISTAKE=$number" "$source"
done <<'MISTAKES'
1|set top_k (a count of keys, >= 1), or top_k = 0 and top_k_percent
2|set top_k (a count of keys, >= 1), or top_k = 0 and top_k_percent
3|a letter that is not in the alphabet
4|a Stack has at least one layer
5|HYBRIDATTN_FIELDS must list every member
6|write On<Policy, Backend>::forward(Backend&, Config const&, Sequences const&, Inputs<In<T>>
7|write On<Policy, Backend>::backward(Backend&, Config const&, Sequences const&, Inputs<In<T>>
8|pass what initialize() returned
9|pass std::move(saved)
10|this policy cannot decode: give it Cache<S> and cache(config, batch, capacity)
MISTAKES
exit $((failures > 0))
