#!/usr/bin/env bash
# Programs for GPUs compile with nvcc without a warning, from the headers and from the single files, and say clearly that there is no GPU:
# cuda.sh SOURCE_FOLDER. Exit status 77: there is no nvcc.
set -euo pipefail
source=$1
command -v nvcc >/dev/null || { echo "skipped: nvcc is not installed"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
nvcc=(nvcc -std=c++20 -O1 -DNDEBUG -arch=sm_90 -Xcompiler -Wall,-Wextra -Werror all-warnings)

"${nvcc[@]}" -I"$source/include" "$source/examples/quickstart.cu" -o "$folder/quickstart"
echo "quickstart.cu compiles"
if output=$(OMP_NUM_THREADS=1 "$folder/quickstart" "$source/README.md" 2>&1); then
  echo "quickstart.cu runs on a GPU"
else
  grep -qE 'Cuda: (no NVIDIA driver is installed|no GPU was found|the driver is for)' <<<"$output" || { echo "FAILED: quickstart.cu says: $output" >&2; exit 1; }
  tail -1 <<<"$output"
fi

# A program for GPUs computes on the CPU too.
echo '#include <hybridattn/hybridattn.hpp>
namespace ha = hybridattn;
template <class P> void both(ha::Cpu& cpu) {
  auto const config = P::complete({}, 32, 2);
  ha::SequencesOn<ha::Cpu> const s{cpu, ha::Sequences::equal(1, 8)};
  auto x = ha::allocate<float>(cpu, P::inputs(config, s)), d_x = ha::allocate<float>(cpu, P::inputs(config, s));
  auto y = ha::allocate<float>(cpu, P::outputs(config, s));
  auto saved = ha::allocate<float>(cpu, P::saved(config, s));
  ha::On<P, ha::Cpu>::forward(cpu, config, s, in(x), out(y), out(saved));
  ha::On<P, ha::Cpu>::backward(cpu, config, s, in(x), in(y), in(saved), in(y), out(d_x));
}
int main() {
  ha::Cpu cpu;
  both<ha::Full>(cpu);
  both<ha::GDN>(cpu);
  both<ha::DSA>(cpu);
}' >"$folder/cpu.cu"
"${nvcc[@]}" -I"$source/include" "$folder/cpu.cu" -o "$folder/cpu" && "$folder/cpu"
echo "a .cu computes on the CPU"

# The page says what runs.
echo '#include <hybridattn/hybridattn.hpp>
#include <hybridattn/support_matrix.hpp>
#include <cstdio>
int main() { std::printf("%s", hybridattn::support_matrix<hybridattn::AllPolicies, std::tuple<hybridattn::Cuda>>().c_str()); }' >"$folder/support.cu"
"${nvcc[@]}" -I"$source/include" "$folder/support.cu" -o "$folder/support"
while read -r row; do
  grep -qxF -- "$row" "$source/docs/cuda.md" || { echo "FAILED: docs/cuda.md shall hold $row" >&2; exit 1; }
done < <("$folder/support")
echo "docs/cuda.md shows what runs on Cuda"

# Kernels are found by their names: the program registers them by the same names that their code has.
mkdir "$folder/keep"
cat >"$folder/names.cu" <<'END'
#include <hybridattn/cuda.cuh>
void names(hybridattn::Cuda& gpu) { hybridattn::On<hybridattn::Fill, hybridattn::Cuda>::forward<float>(gpu, 1, {}); }
END
"${nvcc[@]}" --keep --keep-dir "$folder/keep" -I"$source/include" -c "$folder/names.cu" -o "$folder/names.o"
entries=$(grep -ohE '^\.visible \.entry \w+' "$folder"/keep/*.ptx | awk '{ print $3 }' | sort -u)
[[ -n $entries ]] || { echo "FAILED: no kernel in the code" >&2; exit 1; }
for entry in $entries; do
  grep -q ", $entry," "$folder"/keep/*.stub.c || { echo "FAILED: the program does not register $entry" >&2; exit 1; }
done
echo "$(wc -w <<<"$entries") kernels are registered by their names"

# Every single file, in one program.
(cd "$source/single_include" && find hybridattn -name '*.hpp' ! -name emulator.hpp ! -name eigen.hpp -printf '#include <%p>\n' | LC_ALL=C sort) >"$folder/all.cu"
"${nvcc[@]}" -I"$source/single_include" -c "$folder/all.cu" -o "$folder/all.o"
echo "$(wc -l <"$folder/all.cu") single files compile with nvcc"

# Products::cublas, linked.
echo '#include <hybridattn/cuda.cuh>
int main() {
  hybridattn::Cuda gpu({.products = hybridattn::Products::cublas});
  hybridattn::On<hybridattn::Linear, hybridattn::Cuda>::forward<float>(gpu, {}, {}, {});
}' >"$folder/cublas.cu"
"${nvcc[@]}" -DHYBRIDATTN_CUBLAS=1 -I"$source/include" "$folder/cublas.cu" -lcublas -o "$folder/cublas"
echo "a program with cuBLAS links"

# A pattern of the sweep, as far as nvcc compiles it without g++.
"${nvcc[@]}" -cuda -x cu -I"$source/include" '-DHYBRIDATTN_SWEEP_PATTERNS="FFFF"' "$source/examples/sweep/patterns.cpp" -o "$folder/patterns.ii"
echo "a pattern of the sweep compiles with nvcc"

# Another front end reads the code for the device, for its warnings. clang 19 does not know the headers of CUDA 13: one that it includes is
# gone, and the declaration of a launch is missing.
if command -v clang++-19 >/dev/null; then
  mkdir "$folder/clang"
  : >"$folder/clang/texture_fetch_functions.h"
  echo '#include <cuda_runtime.h>
extern "C" cudaError_t cudaConfigureCall(dim3, dim3, size_t = 0, cudaStream_t = nullptr);' >"$folder/clang/launch.h"
  toolkit=$(dirname "$(dirname "$(command -v nvcc)")")
  for kernels in "$source"/tests/gate/*.cu; do
    clang++-19 -x cuda --cuda-device-only --cuda-gpu-arch=sm_80 -nocudalib --cuda-path="$toolkit" -std=c++20 -O1 -DNDEBUG -I"$folder/clang" -include launch.h \
      -I"$source/include" -Wall -Wextra -Werror -Wno-unknown-cuda-version -Wno-unknown-attributes -fsyntax-only "$kernels"
  done
  echo "clang reads the kernels without a warning"
fi
