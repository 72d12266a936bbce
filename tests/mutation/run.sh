#!/bin/sh
# Applies each fault of mutations.txt to a copy of the sources, builds the tests named for it and runs them: a line a
# fault, killed by what, or SURVIVED. Status 1 if one survives, does not build, or is not found exactly once. Faults of an
# adaptor are left out, and named, where its engine is not installed.
#
#   sh tests/mutation/run.sh         all of them
#   sh tests/mutation/run.sh 1/3     the first of every three, and so on: a part that is the same each time
#   sh tests/mutation/run.sh 17      number 17 alone
#   sh tests/mutation/run.sh find    says which are not found exactly once, and builds nothing
set -eu
cd "$(dirname "$0")/../.."
. cmake/packages.sh
need g++ perl libeigen3-dev nlohmann-json3-dev libgtest-dev

part=${1:-1/1}
work=build/mutation
rm -rf $work
mkdir -p $work/cuda  # tests in folders build there
# A record a file: NUMBER holds what it breaks, where, the tests, old, new.
perl -e '
  local $/ = ""; my $n = 0;
  while (<STDIN>) {
    next unless /^# (.*)\n(\S+) \[(.*)\]\n- (.*)\n\+ (.*)\n+\z/;
    ++$n; open my $out, ">", "$ARGV[0]/$n.record" or die; print $out "$1\n$2\n$3\n$4\n$5\n";
  }
  print "$n\n";' $work <tests/mutation/mutations.txt >$work/count
count=$(cat $work/count)
[ "$count" = "$(grep -c '^- ' tests/mutation/mutations.txt)" ] || { echo "mutations.txt has records that cannot be read" >&2; exit 1; }
case "$part" in
  find) numbers=$(seq 1 "$count") ;;
  */*) numbers=$(seq "${part%/*}" "${part#*/}" "$count") ;;
  *) numbers=$part ;;
esac
for number in $numbers; do
  [ -f "$work/$number.record" ] || { echo "tests/mutation/run.sh: there is no fault '$number': say 1 to $count, a part like 1/3, find, or nothing" >&2; exit 2; }
done

# In place: replaces the old text if it is found exactly once in all of PATH. Prints the file.
cat >$work/replace.sh <<'SCRIPT'
tree=$1 path=$2
files=$(find "$tree/$path" -name '*.h' -o -name '*.hpp')
OLD=$3 NEW=$4 perl -0 -e '
  my $found = "";
  for my $file (@ARGV) {
    open my $in, "<", $file or die; my $text = <$in>;
    my $times = () = $text =~ /\Q$ENV{OLD}\E/g;
    next unless $times;
    exit 1 if $times > 1 || $found;
    $found = $file;
  }
  exit 1 unless $found;
  open my $in, "<", $found or die; my $text = <$in>;
  $text =~ s/\Q$ENV{OLD}\E/$ENV{NEW}/;
  open my $out, ">", $found or die; print $out $text;' $files
SCRIPT
copy_tree() {
  mkdir -p "$1"/examples
  cp -r include "$1"/
  cp -r examples/reference "$1"/examples/
}
if [ "$part" = find ]; then
  status=0
  for n in $numbers; do
    { read -r breaks; read -r path; read -r tests; IFS= read -r old; IFS= read -r new; } <$work/"$n".record
    rm -rf $work/tree
    copy_tree $work/tree
    sh $work/replace.sh $work/tree "$path" "$old" "$new" || { status=1; printf '%3d NOT FOUND ONCE  %s: %s\n' "$n" "$breaks" "$old"; }
  done
  exit $status
fi

# The engines, as cmake/llama_cpp.sh and the packages install them.
llama=${FASTV_LLAMA_CPP:-${XDG_CACHE_HOME:-$HOME/.cache}/fastv/llama.cpp-v0.5.0}/prefix
torch=${FASTV_LIBTORCH:-/usr}
torch_include="-isystem $torch/include"
[ "$torch" != /usr ] || torch_include=""  # where the compiler looks by itself, in an order of its own
absent=""
[ -f "$llama/include/ggml.h" ] || absent="$absent ggml"
[ -f "$torch/include/ATen/ATen.h" ] || absent="$absent torch"

# build TEST TREE PROGRAM : the test against the tree's sources. Unoptimised, since it takes longer to build than to run
# (but for Eigen's products). gtest and the engines' headers are compiled once.
cat >$work/build.sh <<SCRIPT
set -eu
test=\$1 tree=\$2 program=\$3
flags="-std=c++17 -w -I\$tree/include -I\$tree/examples -I\$tree/examples/reference -Itests -isystem /usr/include/eigen3"
gtest="$work/counted_new.o -lgtest -lgtest_main -pthread"
case \$test in
  golden_check) g++ \$flags -O1 tests/golden_check.cpp -o "\$program" ;;
  c_face)
    gcc -std=c99 -w -I\$tree/include -c tests/c_face_test.c -o "\$program.o"
    g++ \$flags -O0 tests/c_face.cpp "\$program.o" -o "\$program"
    ;;
  ggml) g++ \$flags -O0 -include $work/plain.hpp -isystem $llama/include tests/llava/ggml_test.cpp -o "\$program" \
    -L$llama/lib -Wl,-rpath,$llama/lib -lggml-base -lggml -lggml-cpu \$gtest ;;
  torch) g++ \$flags -O0 -include $work/torch.hpp $torch_include tests/torch_test.cpp -o "\$program" \
    -L$torch/lib -Wl,-rpath,$torch/lib -ltorch -ltorch_cpu -lc10 \$gtest ;;
  *) g++ \$flags -O0 -include $work/plain.hpp tests/"\$test"_test.cpp -o "\$program" \$gtest ;;
esac
SCRIPT
# run PROGRAM TEST[:FILTER]
cat >$work/run.sh <<'SCRIPT'
program=$1 test=${2%%:*} filter=${2#*:}
[ "$filter" = "$2" ] && filter='*'
case $test in
  golden_check) timeout 300 "$program" tests/golden/*.safetensors ;;
  c_face) timeout 300 "$program" ;;
  *) timeout 300 "$program" --gtest_brief=1 --gtest_fail_fast --gtest_filter="$filter" ;;
esac
SCRIPT
# One fault. The tests that build from the same file are run from one program.
cat >$work/one.sh <<'SCRIPT'
set -eu
n=$1 work=build/mutation
{ read -r breaks; read -r path; read -r tests; IFS= read -r old; IFS= read -r new; } <$work/$n.record
tree=$work/$n
mkdir -p $tree/examples
cp -r include $tree/
cp -r examples/reference $tree/examples/
if ! sh $work/replace.sh $tree "$path" "$old" "$new"; then
  printf '%3d NOT FOUND ONCE  %s: %s\n' "$n" "$path" "$old"
  exit 1
fi
built=""
for test in $tests; do
  if [ "${test%%:*}" != "$built" ]; then
    built=${test%%:*}
    if ! sh $work/build.sh "$built" $tree $tree/program >$tree/log 2>&1; then
      printf '%3d DOES NOT BUILD  %s (%s)\n' "$n" "$breaks" $tree/log
      exit 1
    fi
  fi
  status=0
  sh $work/run.sh $tree/program "$test" >$tree/log 2>&1 || status=$?
  if [ $status != 0 ]; then
    by=$(sed -n 's/^\[  FAILED  \] \([A-Za-z0-9_/.]*\).*/\1/p' $tree/log | head -n 1)
    [ $status = 124 ] && by="$test, which did not end"
    printf '%3d killed by %-66s %s\n' "$n" "${by:-$test (status $status)}" "$breaks"
    rm -rf $tree
    exit 0
  fi
done
printf '%3d SURVIVED %-67s %s\n' "$n" "$tests" "$breaks"
exit 1
SCRIPT

here="" left_out=0
for n in $numbers; do
  tests=$(sed -n 3p $work/"$n".record)
  engine=""
  for name in $absent; do
    case " $tests" in *" $name"*) engine=$name ;; esac
  done
  if [ -n "$engine" ]; then
    left_out=$((left_out + 1))
    printf '%3d NOT RUN: %s is not installed  %s\n' "$n" "$engine" "$(sed -n 1p $work/"$n".record)"
  else
    here="$here $n"
  fi
done
[ -n "$here" ] || { echo "no fault was run" >&2; exit 1; }

# Without a fault every test must run and pass, or its failing would say nothing.
for n in $here; do sed -n 3p $work/"$n".record | tr ' ' '\n'; done | sort -u >$work/tests
echo '#include <gtest/gtest.h>' >$work/plain.hpp
g++ -std=c++17 -O0 -w -x c++-header $work/plain.hpp -o $work/plain.hpp.gch
if grep -q '^torch' $work/tests; then
  printf '#include <ATen/ATen.h>\n#include <gtest/gtest.h>\n' >$work/torch.hpp
  # shellcheck disable=SC2086
  g++ -std=c++17 -O0 -w $torch_include -x c++-header $work/torch.hpp -o $work/torch.hpp.gch
fi
g++ -std=c++17 -O1 -c tests/counted_new.cpp -o $work/counted_new.o
sed 's/:.*//' $work/tests | sort -u |
  xargs -P "$(nproc)" -I{} sh -c "sh $work/build.sh {} . $work/{} || { echo '{} does not build without any fault' >&2; exit 255; }"
xargs -P "$(nproc)" -I{} sh -c 'test="{}"; log=build/mutation/$(echo "$test" | tr -c "A-Za-z0-9\n" _).log
  sh build/mutation/run.sh build/mutation/${test%%:*} "$test" >"$log" 2>&1 || { echo "$test fails without any fault" >&2; exit 255; }
  case $test in golden_check | c_face) exit ;; esac
  if grep -q "0 tests from 0" "$log" || ! grep -q "PASSED" "$log" || grep -q "PASSED  \] 0 tests" "$log"; then
    echo "$test names no test" >&2; exit 255; fi' <$work/tests

# shellcheck disable=SC2086
printf '%s\n' $here | xargs -P "$(nproc)" -I{} sh $work/one.sh {} | tee $work/lines || true
# shellcheck disable=SC2086
all=$(printf '%s\n' $here | wc -l) killed=$(grep -c ' killed by ' $work/lines || true)
echo "$killed of $all faults killed (part $part of the $count in tests/mutation/mutations.txt; $left_out of engines that are not installed)"
[ "$killed" = "$all" ]
