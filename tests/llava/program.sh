#!/bin/sh
# fastv-llava as a user meets it, on the scenes model exported to GGUF: the answer, the same as llama-mtmd-cli's, the
# overlay and the JSON; and one clear sentence for each thing that can be wrong.
#
#   sh tests/llava/program.sh BUILD_FOLDER LLAMA_CPP_PREFIX
set -eu
cd "$(dirname "$0")/../.."
build=$1 llama_cpp=$2
program=$build/examples/llava/fastv-llava
out=$build/program
rm -rf "$out" && mkdir -p "$out"
"$build/examples/export_gguf" "$out" >/dev/null
picture=examples/scenes/pictures/scene_20.png
question="list the digits from left to right ."
fail() {
  echo "program.sh: $*" >&2
  exit 1
}
ask() { "$program" -m "$out/scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" -t 1 -n 16 "$@"; }

# It ends without waiting for its logger (llama.cpp's issue 22142), so that on a busy machine the last words may be lost;
# the very last ones are two line ends.
for attempt in 1 2 3 4 5 6 7 8 9 10; do
  "$llama_cpp/bin/llama-mtmd-cli" -m "$out/scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" --image "$picture" \
    -p "$question" -n 16 --temp 0 -t 1 >"$out/expected.txt" 2>/dev/null || fail "llama-mtmd-cli failed"
  [ "$(tail -c 2 "$out/expected.txt" | od -An -c | tr -d ' ')" != '\n\n' ] || break
done
expected=$(xargs <"$out/expected.txt")
[ -n "$expected" ] || fail "llama-mtmd-cli gave no answer"
for by in graph host; do
  for rule in "--no-fastv" "--fastv-k 3 --fastv-r 0.5" "--fastv-k 3 --fastv-keep 72 --fastv-score window" "--fastv-k 3 --fastv-score uniform"; do
    # shellcheck disable=SC2086
    answer=$(ask --image "$picture" -p "$question" $rule --fastv-by $by 2>/dev/null | xargs)
    [ "$answer" = "$expected" ] || fail "with $rule by $by it answers '$answer', not '$expected'"
  done
done
ask --image "$picture" -p "$question" --compare --overlay "$out/overlay.png" --json "$out/run.json" >"$out/compare.txt"
grep -q "layers 0-1: 157, layers 2-7: 85" "$out/compare.txt" || fail "the comparison lacks the tokens of each layer"
grep -q "of the first" "$out/compare.txt" || fail "the comparison lacks the agreement"
python3 -c "
import json, sys
run = json.load(open('$out/run.json'))['runs'][1]
assert len(run['kept']) == 85 and sorted(set(run['kept'])) == run['kept'], run['kept']
assert run['tokens_in_layer'] == [157, 157] + [85] * 6, run['tokens_in_layer']
assert open('$out/overlay.png', 'rb').read(8) == b'\\x89PNG\\r\\n\\x1a\\n'"
# Two pictures, and a marker that says where the first goes.
ask --image "$picture" --image examples/scenes/pictures/scene_00.png -p "$question" --json "$out/two.json" >/dev/null 2>&1
python3 -c "
import json
assert len(json.load(open('$out/two.json'))['prompt']['visual']) == 2"
# The same visual tokens from a file.
python3 - "$out/frames.safetensors" <<'END'
import json, struct, sys
tokens, width = 64, 128
data = b''.join(struct.pack('<f', ((i * 2654435761) % 1000) / 500 - 1) for i in range(tokens * width))
header = {f'frame_{f}': {'dtype': 'F32', 'shape': [tokens, width], 'data_offsets': [f * len(data), (f + 1) * len(data)]}
          for f in range(2)}
text = json.dumps(header).encode()
open(sys.argv[1], 'wb').write(struct.pack('<Q', len(text)) + text + data * 2)
END
"$program" -m "$out/scenes.gguf" --visual-embeddings "$out/frames.safetensors" -p "$question" -n 4 -t 1 \
  --json "$out/frames.json" >/dev/null 2>&1 || fail "--visual-embeddings failed"
python3 -c "
import json
assert [s['count'] for s in json.load(open('$out/frames.json'))['prompt']['visual']] == [64, 64]"

# M-RoPE, on random weights: two pictures, pruned inside the graph and between two graphs alike.
make="$build/tests/llava/make_gguf"
"$make" --architecture qwen2vl --hidden 64 --kv-heads 2 "$out/qwen2vl.gguf" >/dev/null
"$make" --projector qwen2vl_merger --projection 64 "$out/mmproj-qwen2vl.gguf" >/dev/null
for by in graph host; do
  "$program" -m "$out/qwen2vl.gguf" --mmproj "$out/mmproj-qwen2vl.gguf" --image "$picture" \
    --image examples/scenes/pictures/scene_00.png -p "hi" -n 4 -t 1 --fastv-by $by --json "$out/qwen2vl_$by.json" >/dev/null 2>&1 ||
    fail "qwen2vl by $by failed"
done
python3 -c "
import json
a, b = (json.load(open(f'$out/qwen2vl_{by}.json')) for by in ('graph', 'host'))
assert len(a['prompt']['visual']) == 2 and a['prompt']['visual'][0]['columns'] > 0, a['prompt']
assert a['runs'][0]['kept'] == b['runs'][0]['kept'] and len(a['runs'][0]['kept']) < a['prompt']['tokens']"

# wrong EXPECTED_WORDS ARGUMENTS...: one sentence that has the words, and status 2.
wrong() {
  words=$1
  shift
  status=0
  "$program" "$@" >/dev/null 2>"$out/error.txt" || status=$?
  sed -i '/^Looking at the pictures/d' "$out/error.txt"  # a slow machine shows how far it is
  cat "$out/error.txt"
  [ $status = 2 ] || fail "status $status, not 2, for: $*"
  [ "$(wc -l <"$out/error.txt")" = 1 ] || fail "not one sentence for: $*"
  grep -qF -- "$words" "$out/error.txt" || fail "no word of '$words' for: $*"
}
good="-m $out/scenes.gguf --mmproj $out/mmproj-scenes.gguf"
head -c 100000 "$out/scenes.gguf" >"$out/short.gguf"
# shellcheck disable=SC2086
{
  wrong "is not a GGUF file" -m README.md --mmproj "$out/mmproj-scenes.gguf" --image "$picture"
  wrong "cannot open" -m "$out/none.gguf" --mmproj "$out/mmproj-scenes.gguf" --image "$picture"
  wrong "cut short" -m "$out/short.gguf" --mmproj "$out/mmproj-scenes.gguf" --image "$picture"
  wrong "the architecture is \"clip\"" -m "$out/mmproj-scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" --image "$picture"
  wrong "cannot load it as an mmproj file" -m "$out/scenes.gguf" --mmproj "$out/scenes.gguf" --image "$picture"
  wrong "neither a PNG nor a JPEG" $good --image README.md
  wrong "the context holds 100" $good --image "$picture" -c 100
  wrong "filtering_ratio is 1.5" $good --image "$picture" --fastv-r 1.5
  wrong "filtering_layer is 8" $good --image "$picture" --fastv-k 8
  wrong "no layer has attended yet" $good --image "$picture" --fastv-k 0
  wrong "keep_count is 145" $good --image "$picture" --fastv-keep 145
  wrong "there is no option" $good --image "$picture" --frobnicate
  wrong "a value is missing" $good --image
  wrong "must be one of" $good --image "$picture" --fastv-score best
  wrong "no chat template" $good --image "$picture" --chat-template nonsense
  wrong "name a picture" $good
  wrong "picture markers" $good --image "$picture" -p "<__media__> <__media__>"
}
echo "fastv-llava answers as llama-mtmd-cli does: $expected"
