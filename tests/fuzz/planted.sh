#!/usr/bin/env bash
# A target that finds nothing proves little. Plants a fault into a copy of the library, which the target must find in two minutes:
# planted.sh TARGET. A fault is one line of sed; it must change the copy.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1
case $target in
  safetensors) file=io/safetensors.hpp fault='s/end - begin == bytes/end - begin >= bytes/' ;;                 # offsets beyond the shape
  checkpoint) file=store/checkpoint/file.hpp fault='s/= progress.note;/= progress.note.substr(0, 5);/' ;;       # a long note is cut
  folder) file=store/hugging_face/weights.hpp fault='s/info.shape == shape/info.shape.size() == shape.size()/' ;;   # a larger tensor
  text) file=io/text.hpp fault='s/point < 0xe000/point < 0xda00/' ;;                                           # a surrogate in UTF-8
  command_line) file=../../examples/options.hpp fault='s/ \&\& value <= most)/)/' ;;                       # sizes without end
  sampling) file=infer/sampling.hpp fault='s/a.token < b.token); }/a.token > b.token); }/' ;;                  # ties the wrong way
  policies) file=attention/full/cpu_extend.hpp fault='s/past_ + t + 1 - window_)/past_ + t - window_)/' ;;   # one key too many
  *) echo "usage: planted.sh TARGET" >&2; exit 2 ;;
esac

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r CMakeLists.txt CMakePresets.json cmake include examples tests scripts "$copy"
sed -i "$fault" "$copy/include/hybridattn/$file"
cmp -s "include/hybridattn/$file" "$copy/include/hybridattn/$file" && { echo "FAILED: $fault changes nothing in $file any more" >&2; exit 1; }

if "$copy/scripts/fuzz" 2 "$target" >"$copy/said" 2>&1; then
  echo "FAILED: $target does not find $fault in $file" >&2
  exit 1
fi
grep -q '^finding:\|ERROR: \|runtime error:' "$copy/said" || { cat "$copy/said" >&2; echo "FAILED: not by a finding" >&2; exit 1; }
echo "found: $fault in $file"
cat "$copy/said"
