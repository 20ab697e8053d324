#!/usr/bin/env bash
# Object files of one program that were compiled apart: with the headers in another order, and with other flags.
# odr.sh ODR_CPP INCLUDE_FOLDER COMPILER [FLAGS...]
set -euo pipefail
source=$1 include=$2
shift 2
compile=("$@") compiler=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
fail() { echo "FAILED: $*" >&2; exit 1; }
gnu() { [[ $("$compiler" --version) == *"Free Software Foundation"* ]]; }

# main NAMES...: a program that calls these parts and prints what they say.
main() {
  echo '#include <cstdio>'
  echo '#include <string>'
  printf 'std::string %s();\n' "$@"
  echo 'int main() {'
  printf 'std::printf("%%s: %%s\\n", "%s", %s().c_str());\n' $(for name; do echo "$name" "$name"; done)
  echo '}'
}

# Every header, in two orders. With link-time optimisation g++ compares what the two say about each type and function.
headers() { find "$include" -name '*.hpp' -printf '%P\n' | LC_ALL=C sort "$@" | sed 's/.*/#include <&>/'; }
headers >first.hpp
headers -r >second.hpp
lto=()
gnu && lto=(-flto -Wodr -Wlto-type-mismatch -Werror)
main first second >main.cpp
for part in first second; do "${compile[@]}" "${lto[@]}" -DPART=$part -include $part.hpp -c "$source" -o $part.o; done
"${compile[@]}" "${lto[@]}" main.cpp first.o second.o -o two
./two >two.txt
[[ $(cut -d: -f2 two.txt | uniq | wc -l) == 1 ]] || fail "two orders of the headers differ: $(cat two.txt)"

# Parts of one program with other flags each. What this CPU cannot run is left out.
declare -A flags=(
  [v2]="-march=x86-64-v2 -O2 -DNDEBUG"
  [v3]="-march=x86-64-v3 -O2 -DNDEBUG"
  [v4]="-march=x86-64-v4 -O2 -DNDEBUG"
  [native]="-march=native -O2 -DNDEBUG"
  [without_fma]="-march=x86-64-v3 -mno-fma -O2 -DNDEBUG"
  [with_checks]="-march=x86-64-v3 -O2 -DNDEBUG -DHYBRIDATTN_BOUNDS_CHECKS=1"
  [unoptimised]="-march=x86-64-v3 -O0 -DNDEBUG"
)
[[ $(uname -m) == x86_64 ]] || flags=([native]="-O2 -DNDEBUG" [unoptimised]="-O0 -DNDEBUG")
link=("$compiler" -pthread)
declare -A compilers=()
for name in "${!flags[@]}"; do compilers[$name]=$compiler; done
if gnu && command -v clang++-19 >/dev/null; then
  flags[by_clang]=${flags[v3]:-${flags[native]}} compilers[by_clang]=clang++-19
fi
export OMP_NUM_THREADS=3
mapfile -t names < <(printf '%s\n' "${!flags[@]}" | LC_ALL=C sort)
printf '%s\n' "${names[@]}" | xargs -P "$(nproc)" -I{} bash -c "$(declare -p flags compilers compile source)"'
  read -ra own <<<"${flags[{}]}"
  "${compilers[{}]}" "${compile[@]:1}" "${own[@]}" -DPART={} -c "$source" -o {}.o'
# Parts whose flags say the same to the library share its definitions. On some CPUs native is such a twin, and its tuning alone
# lets it round otherwise, so it is left out there.
version_of() { nm -C "$1.o" | grep -oE 'hybridattn::v[a-z0-9_A-Z]*' | LC_ALL=C sort | uniq -c | sort -rn | awk 'NR == 1 { print $2 }'; }
for name in "${names[@]}"; do
  [[ $name == native || $(version_of "$name") != "$(version_of native)" ]] && continue
  echo "left out, as it is ${name} with another tuning: native"
  mapfile -t names < <(printf '%s\n' "${names[@]}" | grep -vx native)
done

parts=()
: >alone.txt
for name in "${names[@]}"; do
  main "$name" >main.cpp
  "${link[@]}" main.cpp "$name.o" -o "alone_$name"
  if said=$("./alone_$name" 2>/dev/null); then
    echo "$said" >>alone.txt
    parts+=("$name")
  else
    [[ $name == v[34] || $name == with* ]] || fail "$name alone does not run"
    echo "left out, as this CPU cannot run it: $name"
  fi
done
cat alone.txt
((${#parts[@]} > 2)) || fail "only ${parts[*]} run"

# Each part computes in the whole program what it computes alone, whichever the linker meets first.
together() {
  "${link[@]}" main.cpp "$@" -o together
  ./together >together.txt
  diff alone.txt together.txt || fail "parts that are linked in the order $* compute something else than alone"
}
main "${parts[@]}" >main.cpp
objects=("${parts[@]/%/.o}")
together "${objects[@]}"
mapfile -t objects < <(printf '%s\n' "${objects[@]}" | tac)
together "${objects[@]}"

# They share no definition of the library but Error's.
shared=$(for name in "${parts[@]}"; do
  nm -C "$name.o" | grep -E ' [VWuw] .*hybridattn' | cut -c18- | LC_ALL=C sort -u
done | LC_ALL=C sort | uniq -d | grep -vE '(hybridattn::|10hybridattn5)Error[^v]*$' || true)
[[ -z $shared ]] || fail "parts share these definitions: $shared"
[[ $(nm -C "${parts[0]}.o" | grep -cE ' [VWuw] .*hybridattn::v') -gt 100 ]] || fail "nm shows no definitions of ${parts[0]}"

# Parts that exchange a type of the library have the same flags, or do not link, and the linker says which are wanted.
cat >giver.cpp <<'TEXT'
#include <hybridattn/hybridattn.hpp>
float taken(hybridattn::View<float const, 1> x) { return x(0); }
hybridattn::Seed given() { return {}; }
hybridattn::Seed variable;
TEXT
cat >user.cpp <<'TEXT'
#include <hybridattn/hybridattn.hpp>
float taken(hybridattn::View<float const, 1>);
hybridattn::Seed given();
extern hybridattn::Seed variable;
int main() {
  float const one = 1;
  variable = given();
  return taken({&one, {1}}) == 1 ? 0 : 1;
}
TEXT
"${compile[@]}" -c giver.cpp
"${compile[@]}" user.cpp giver.o -o same && ./same || fail "two parts with the same flags do not exchange a view"
"${compile[@]}" -c -DNDEBUG giver.cpp -o other.o
if "${compile[@]}" user.cpp other.o -o other 2>errors; then fail "parts with other flags exchange types of the library"; fi
name_of() { nm -C "$1" | sed -nE 's/.* T taken\(hybridattn::(v[a-z0-9_A-Z]*)::View.*/\1/p'; }
for wanted in "taken(hybridattn::$(name_of giver.o)::View" "given[abi:$(name_of giver.o)]" "variable[abi:$(name_of giver.o)]"; do
  grep -F "undefined" errors | grep -qF "$wanted" || fail "the linker does not ask for $wanted: $(cat errors)"
done
[[ $(name_of giver.o) != $(name_of other.o) ]] || fail "two flags, one name: $(name_of other.o)"
echo "${#parts[@]} parts, each as alone; $(name_of giver.o) and $(name_of other.o) do not link"
