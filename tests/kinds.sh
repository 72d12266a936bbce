#!/bin/sh
# kinds.sh NM FIRST SECOND: two objects of kind_symbols.cpp, compiled for different machines, may both define no function of
# the library. The linker would keep one of the two for both, and a machine of the lesser kind might meet instructions that
# it does not have. Tables (_ZT...: types that a sanitizer asks for) hold no instructions.
set -eu
nm=$1 first=$2 second=$3
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
for object in first second; do
  eval "file=\$$object"
  "$nm" -g --defined-only "$file" | awk 'NF == 3 && $3 ~ /5fastv/ && $3 !~ /^_ZT/ { print $3 }' | sort -u >"$work/$object"
  count=$(wc -l <"$work/$object")
  [ "$count" -ge 50 ] || { echo "$file defines $count functions of the library: not the object that was meant" >&2; exit 1; }
done
comm -12 "$work/first" "$work/second" >"$work/both"
if [ -s "$work/both" ]; then
  echo "both objects define:" >&2
  c++filt <"$work/both" >&2 || cat "$work/both" >&2
  exit 1
fi
echo "no function of the library is defined for both machines: $(wc -l <"$work/first") and $(wc -l <"$work/second") of them"
