#!/usr/bin/env bash
# The kernels on Arm: compiled by g++ for aarch64, run by qemu. arm.sh TESTS_FOLDER INCLUDE_FOLDER HANA_FOLDER. Exit code 77: a tool is missing.
set -euo pipefail
tests=$1 include=$2 hana=$3
for tool in aarch64-linux-gnu-g++-12 qemu-aarch64; do
  command -v $tool >/dev/null || { echo "arm: $tool is missing (Debian: g++-12-aarch64-linux-gnu, qemu-user)"; exit 77; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
compile=(aarch64-linux-gnu-g++-12 -std=c++20 -static -Wall -Wextra -Wconversion -Werror "-I$include" -idirafter "$hana" -idirafter /usr/include/eigen3)

"${compile[@]}" -O0 -c "$tests/catch_main.cpp" -o "$folder/main.o"
for test in test_gemm test_threads test_gdn laws_on_arm; do
  "${compile[@]}" -O2 -DHYBRIDATTN_GOLDEN_DIR="\"$tests/golden\"" -DEIGEN_DONT_VECTORIZE "$tests/$test.cpp" "$folder/main.o" -o "$folder/$test"
  echo "== $test"
  # Without the tests of processes: what starts a program, forks with threads or limits memory would meet qemu.
  qemu-aarch64 -cpu max "$folder/$test" '~OMP_NUM_THREADS*' '~threads of the environment' '~a thread that the system refuses*' '~a Cpu works in a child*'
done
