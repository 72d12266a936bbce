#!/bin/sh
# Applies each fault of mutations.txt to a copy of the sources, builds the tests named for it and runs them: a line a
# fault, killed by what, or SURVIVED. Status 1 if one survives, does not build, or is not found exactly once.
#
#   sh tests/mutation/run.sh         all of them
#   sh tests/mutation/run.sh 1/3     the first of every three, and so on: a part that is the same each time
#   sh tests/mutation/run.sh 17      number 17 alone
set -eu
cd "$(dirname "$0")/../.."
. cmake/packages.sh
need g++ perl libeigen3-dev nlohmann-json3-dev libgtest-dev

part=${1:-1/1}
work=build/mutation
rm -rf $work
mkdir -p $work
# A record a file: NUMBER holds what it breaks, the file, the tests, old, new.
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
  */*) numbers=$(seq "${part%/*}" "${part#*/}" "$count") ;;
  *) numbers=$part ;;
esac

# build TEST TREE PROGRAM : the test against the tree's sources. No optimisation that takes longer than it saves.
cat >$work/build.sh <<'SCRIPT'
test=$1 tree=$2 program=$3
flags="-std=c++17 -O1 -w -I$tree/include -I$tree/examples/reference -Itests -isystem /usr/include/eigen3"
case $test in
  golden_check) g++ $flags tests/golden_check.cpp -o "$program" ;;
  *) g++ $flags -include gtest/gtest.h tests/"$test"_test.cpp build/mutation/counted_new.o -lgtest -lgtest_main -pthread -o "$program" ;;
esac
SCRIPT
cat >$work/run.sh <<'SCRIPT'
test=$1 program=$2
case $test in
  golden_check) timeout 120 "$program" tests/golden/*.safetensors ;;
  *) timeout 120 "$program" --gtest_brief=1 --gtest_fail_fast ;;
esac
SCRIPT
cat >$work/one.sh <<'SCRIPT'
set -eu
n=$1 work=build/mutation
{ read -r breaks; read -r file; read -r tests; IFS= read -r old; IFS= read -r new; } <$work/$n.record
tree=$work/$n
mkdir -p $tree/examples
cp -r include $tree/
cp -r examples/reference $tree/examples/
# In place: replaces the old text if it is found exactly once.
if ! OLD=$old NEW=$new perl -0pi -e 'my ($o, $n) = @ENV{"OLD", "NEW"}; my $c = () = /\Q$o\E/g; if ($c == 1) { s/\Q$o\E/$n/ } else { $bad = $c } END { exit 1 if defined $bad }' $tree/"$file"; then
  printf '%3d NOT FOUND ONCE  %s: %s\n' "$n" "$file" "$old"
  exit 1
fi
for test in $tests; do
  if ! sh $work/build.sh "$test" $tree $tree/program >$tree/log 2>&1; then
    printf '%3d DOES NOT BUILD  %s (%s)\n' "$n" "$breaks" $tree/log
    exit 1
  fi
  status=0
  sh $work/run.sh "$test" $tree/program >$tree/log 2>&1 || status=$?
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

# Without a fault every test must pass, or its failing would say nothing.
g++ -std=c++17 -O1 -c tests/counted_new.cpp -o $work/counted_new.o
for n in $numbers; do sed -n 3p $work/"$n".record | tr ' ' '\n'; done | sort -u |
  xargs -P "$(nproc)" -I{} sh -c "sh $work/build.sh {} . $work/{} && sh $work/run.sh {} $work/{} >$work/{}.log 2>&1 || { echo '{} fails without any fault' >&2; exit 1; }"

printf '%s\n' $numbers | xargs -P "$(nproc)" -I{} sh $work/one.sh {} | tee $work/lines || true
all=$(printf '%s\n' $numbers | wc -l) killed=$(grep -c ' killed by ' $work/lines || true)
echo "$killed of $all faults killed (part $part of the $count in tests/mutation/mutations.txt)"
[ "$killed" = "$all" ]
