#!/usr/bin/env bash
# scripts/sweep chooses the build by --backend, and asks for a GPU before it installs or builds anything. sweep_command.sh SOURCE_FOLDER
set -uo pipefail
source=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0
complain() { echo "FAILED: $1: $(cat "$folder/stderr")" >&2; failures=$((failures + 1)); }

# A copy without a build folder, and a PATH with nothing but this. What the script would start for a build leaves its words in `started`.
cp -r "$source/scripts" "$folder/scripts"
mkdir "$folder/bin"
for program in bash dirname grep cat mkdir; do ln -s "$(command -v $program)" "$folder/bin/$program"; done
# fake NAME SHELL_COMMANDS
fake() {
  printf '#!/bin/bash\n%s\n' "$2" >"$folder/bin/$1"
  chmod +x "$folder/bin/$1"
}
for program in cmake apt-get apt-cache sudo env; do fake $program "echo $program \"\$@\" >>'$folder/started'; exit 1"; done
for program in g++ ninja gnuplot; do fake $program 'exit 0'; done
fake ldconfig 'echo "libc.so.6 (libc6,x86-64) => /lib/libc.so.6"'

run() {
  rm -f "$folder/started"
  PATH="$folder/bin" /bin/bash "$folder/scripts/sweep" "$@" >"$folder/stdout" 2>"$folder/stderr"
}
# refused SENTENCE ARGUMENTS...: it says only this, and starts nothing.
refused() {
  local sentence=$1 status
  shift
  run "$@"
  status=$?
  ((status == 2)) || complain "$*: exit code $status, not 2"
  [[ $(cat "$folder/stderr") == "sweep: $sentence" && ! -s $folder/stdout ]] || complain "$*: not 'sweep: $sentence'"
  [[ ! -e $folder/started && ! -e $folder/build ]] || complain "$*: it starts something"
}
# built PRESET ARGUMENTS...: it configures this preset.
built() {
  local preset=$1
  shift
  run "$@"
  grep -q -- "^cmake --preset $preset\( \|$\)" "$folder/started" || complain "$*: no build of $preset"
  rm -rf "$folder/build"
}

refused "--backend gpu is not allowed; it must be cpu, emulator or cuda" --backend gpu --steps 2
refused "--backend '' is not allowed; it must be cpu, emulator or cuda" --steps 2 --backend=
refused "--backend cuda needs nvcc, which is not found; install the CUDA Toolkit and add its folder bin to PATH" --steps 2 --backend cuda
fake nvcc 'exit 0'
refused "--backend cuda needs an NVIDIA driver, and there is neither libcuda.so.1 nor nvidia-smi; cpu and emulator need none" --backend cuda
fake ldconfig 'echo "libcuda.so.1 (libc6,x86-64) => /lib/libcuda.so.1"'
fake nvidia-smi 'echo "No devices were found"; exit 6'
refused "--backend cuda needs a GPU, and the driver finds none; cpu and emulator need none" --backend=cuda

# A build that fails ends the script, so each of these shows only what it begins.
for program in apt-get apt-cache sudo env; do fake $program 'exit 0'; done   # some machine lacks a package for the build
fake nvidia-smi 'echo "GPU 0: NVIDIA H100 PCIe (UUID: GPU-1)"'
built sweep-cuda --backend cuda --data text
built sweep-emulator --backend emulator --data text
built sweep --data text
built sweep --backend cpu --data text
built sweep-emulator --backend cpu --data text --backend emulator

((failures == 0)) && echo "every --backend gets its build, or one sentence"
exit $((failures > 0))
