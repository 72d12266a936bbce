#!/bin/sh
# Which lines of include/fastv the tests run, adaptors included: builds the tests with gcov, runs them, and prints a
# percentage a header and every line that was not run. Status 1 if one of those is not explained in tests/uncovered.txt,
# or if an explanation there is of no use any more. Needs LibTorch and llama.cpp (cmake/llama_cpp.sh) beside what it
# installs.
set -eu
cd "$(dirname "$0")/.."
. cmake/packages.sh
need g++ cmake ninja-build perl libeigen3-dev nlohmann-json3-dev libgtest-dev libtorch-dev

work=build/coverage
llama_cpp=$(sh cmake/llama_cpp.sh)/prefix
# Without optimisation a line counts when it runs, and FASTV_VECTORS takes its narrowest path.
configure_and_build $work coverage -G Ninja -DFASTV_BUILD_BENCHMARKS=OFF -DFASTV_NATIVE=OFF -DFASTV_LLAMA_CPP_DIR="$llama_cpp" \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="--coverage -O0" -DCMAKE_C_FLAGS="--coverage -O0"
find $work -name '*.gcda' -delete
for program in unit_tests cuda_test decoder_test llava/ggml_test; do $work/tests/$program --gtest_brief=1 >/dev/null; done
$work/examples/libtorch/torch_test --gtest_brief=1 >/dev/null
$work/tests/c_face_test >/dev/null
$work/tests/golden_check tests/golden/*.safetensors >/dev/null
# Each object's counts, line by line; a line is covered if any instance in any program ran it.
rm -rf $work/gcov
mkdir -p $work/gcov
# A function nobody calls is in none of them: a translation unit that keeps them all shows those.
echo '#include <fastv/fastv.hpp>' >$work/all.cpp
g++ -std=c++17 -O0 --coverage -fkeep-inline-functions -I"$PWD/include" -c $work/all.cpp -o $work/all.o
objects=$(find "$PWD/$work" -name '*.gcda' -o -name all.gcno)
(cd $work/gcov && for object in $objects; do
  gcov --source-prefix "$OLDPWD" --relative-only --stdout "$object" 2>/dev/null
done) >$work/lines.txt
perl -e '
  my (%run, %text, $file);
  open my $in, "<", $ARGV[0] or die;
  while (<$in>) {
    if (/^ *-: *0:Source:(.*)/) { $file = $1 =~ m{(?:^|/)include/fastv/((?:detail/)?\w+\.h(?:pp)?)$} ? $1 : ""; next }
    next unless $file && /^ *([-#=\d*]+): *(\d+):(.*)/ && $2 > 0 && $1 ne "-";
    my ($count, $line, $code) = ($1, $2, $3);
    # Of a function that is always inlined, the body alone is counted.
    next if $code =~ /FASTV_INLINE/ && $code !~ /\{\s*[^\s}]/;
    $run{$file}{$line} = ($run{$file}{$line} || 0) + ($count =~ /^\d/ ? 1 : 0);
    $text{$file}{$line} = $code;
  }
  die "gcov saw no header of include/fastv\n" unless %run;
  my (%explained, %used);
  open my $list, "<", $ARGV[1] or die;
  while (<$list>) { $explained{"$1\0$2"} = 1 if m{^((?:detail/)?\w+\.h(?:pp)?): (.*)$} }
  my ($all, $covered, $bad) = (0, 0, 0);
  for my $f (sort keys %run) {
    my @lines = sort { $a <=> $b } keys %{$run{$f}};
    my @missed = grep { !$run{$f}{$_} } @lines;
    $all += @lines; $covered += @lines - @missed;
    printf "%-22s %5d lines  %6.2f%%\n", $f, scalar @lines, 100 * (@lines - @missed) / @lines;
    for my $l (@missed) {
      (my $t = $text{$f}{$l}) =~ s/^\s+//;
      my $known = $explained{"$f\0$t"};
      $used{"$f\0$t"} = 1 if $known;
      $bad = 1 unless $known;
      printf "  %s line %d%s: %s\n", $f, $l, $known ? " (explained)" : " NOT RUN", $t;
    }
  }
  printf "%-22s %5d lines  %6.2f%%\n", "include/fastv", $all, 100 * $covered / $all;
  for (sort keys %explained) { next if $used{$_}; s/\0/: /; print "tests/uncovered.txt explains a line that runs, or is gone: $_\n"; $bad = 1 }
  exit $bad;' $work/lines.txt tests/uncovered.txt
