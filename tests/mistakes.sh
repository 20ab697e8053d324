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
1|a letter that is not in the alphabet
2|a Stack has at least one layer
3|HYBRIDATTN_FIELDS must list every member
4|write On<Policy, Backend>::forward(Backend&, Config const&, Sequences const&, Inputs<In<T>>
5|write On<Policy, Backend>::backward(Backend&, Config const&, Sequences const&, Inputs<In<T>>
6|pass what initialize() returned
7|pass std::move(saved)
8|this policy cannot decode: give it Cache<S> and cache(config, batch, capacity)
9|the stack has no layer of this policy: ask for one of its policies, with exactly the same options
10|the stack has no layer of this policy: ask for one of its policies, with exactly the same options
11|Repeat: the number of repetitions must be at least 1: Repeat<3, GDN, Full>
12|Repeat: the number of repetitions must be at least 1: Repeat<3, GDN, Full>
MISTAKES

# Options that no policy can have, and those at the edge of what it can have.
options=${source%/*}/mistaken_options.cpp
while IFS='|' read -r number sentence; do
  mistake "$@" -fsyntax-only "-DPOLICY=$number" "$options"
done <<'MISTAKES'
FullAttention<ha::FullOptions{.window = -1}>|FullOptions: window is a number of keys, or 0 for all
FullAttention<ha::FullOptions{.rotary_percent = -1}>|FullOptions: rotary_percent is a share of the head, 0 .. 100
FullAttention<ha::FullOptions{.rotary_percent = 101}>|FullOptions: rotary_percent is a share of the head, 0 .. 100
GatedDeltaNet<ha::GdnOptions{.conv_width = -1}>|GdnOptions: conv_width is a number of tokens, or 0 for no convolution
SparseAttention<ha::SparseOptions{.top_k = 0}>|set top_k (a count of keys, >= 1), or top_k = 0 and top_k_percent
SparseAttention<ha::SparseOptions{.top_k = -1}>|set top_k (a count of keys, >= 1), or top_k = 0 and top_k_percent
SparseAttention<ha::SparseOptions{.top_k = 8, .top_k_percent = 50}>|set top_k (a count of keys, >= 1), or top_k = 0 and top_k_percent
SparseAttention<ha::SparseOptions{.top_k = -1, .top_k_percent = 50}>|SparseOptions: top_k >= 1, or top_k_percent in 1 .. 100
SparseAttention<ha::SparseOptions{.top_k = 8, .top_k_percent = -1}>|SparseOptions: top_k >= 1, or top_k_percent in 1 .. 100
SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 101}>|SparseOptions: top_k >= 1, or top_k_percent in 1 .. 100
SparseAttention<ha::SparseOptions{.rotary_percent = -1}>|SparseOptions: a rotary percentage is a share of the head, 0 .. 100
SparseAttention<ha::SparseOptions{.rotary_percent = 101}>|SparseOptions: a rotary percentage is a share of the head, 0 .. 100
SparseAttention<ha::SparseOptions{.index_rotary_percent = -1}>|SparseOptions: a rotary percentage is a share of the head, 0 .. 100
SparseAttention<ha::SparseOptions{.index_rotary_percent = 101}>|SparseOptions: a rotary percentage is a share of the head, 0 .. 100
MISTAKES
"$@" -fsyntax-only "$options" || { echo "FAILED: options that a policy can have do not compile" >&2; failures=1; }
exit $((failures > 0))
