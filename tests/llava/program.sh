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
picture=examples/scenes/pictures/scene_02.png
question="where is the red 8 ?"
fail() {
  echo "program.sh: $*" >&2
  exit 1
}
ask() { "$program" -m "$out/scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" -t 1 -n 16 "$@"; }

# What llama-mtmd-cli answers. It ends without waiting for its logger (llama.cpp's issue 22142), so that on a busy machine the
# last words may be lost; the very last ones are two line ends.
theirs() {
  for attempt in 1 2 3 4 5 6 7 8 9 10; do
    "$llama_cpp/bin/llama-mtmd-cli" "$@" --temp 0 -t 1 >"$out/expected.txt" 2>/dev/null || fail "llama-mtmd-cli failed with $*"
    [ "$(tail -c 2 "$out/expected.txt" | od -An -c | tr -d ' ')" != '\n\n' ] || break
  done
}
theirs -m "$out/scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" --image "$picture" -p "$question" -n 16
expected=$(xargs <"$out/expected.txt")
[ -n "$expected" ] || fail "llama-mtmd-cli gave no answer"
for rule in "--no-fastv" "--fastv-k 3 --fastv-r 0.5" "--fastv-k 3 --fastv-keep 72 --fastv-score window" "--fastv-k 3 --fastv-score uniform" \
  "--fastv-k 3 -ub 64 -b 128 -ngl 0 -c 1024 --cache-type-k q8_0 --cache-type-v bf16"; do
  # shellcheck disable=SC2086
  answer=$(ask --image "$picture" -p "$question" $rule 2>/dev/null | xargs)
  [ "$answer" = "$expected" ] || fail "with $rule it answers '$answer', not '$expected'"
done
# Layers on two other machines, by llama.cpp's RPC backend: the same answers. Here nothing lies in host memory.
port=$((20000 + $$ % 20000))
for p in $port $((port + 1)); do
  "$build/tests/llava/rpc_server" "127.0.0.1:$p" >"$out/rpc_$p.txt" 2>&1 &
  servers="${servers:-} $!"
done
# shellcheck disable=SC2064,SC2086
trap "kill $servers 2>/dev/null || :" EXIT  # they are gone by then, if all went well
for attempt in 1 2 3 4 5 6 7 8 9 10; do
  ! grep -q "endpoint" "$out/rpc_$port.txt" || ! grep -q "endpoint" "$out/rpc_$((port + 1)).txt" || break
  sleep 0.3
done
for rule in "--no-fastv" "--fastv-k 3 --fastv-r 0.5" "--fastv-k 3 --fastv-r 0.5 -ngl 4"; do
  # shellcheck disable=SC2086
  answer=$(ask --image "$picture" -p "$question" $rule --rpc "127.0.0.1:$port,127.0.0.1:$((port + 1))" 2>"$out/error.txt" | xargs)
  [ "$answer" = "$expected" ] || fail "with $rule over RPC it answers '$answer', not '$expected': $(cat "$out/error.txt")"
done
# shellcheck disable=SC2086
kill $servers
# Sampling is repeatable.
for attempt in 1 2; do
  ask --image "$picture" -p "$question" --temp 2 --top-k 5 --top-p 0.9 --min-p 0.01 --seed 7 >"$out/sampled_$attempt.txt" 2>/dev/null
done
cmp -s "$out/sampled_1.txt" "$out/sampled_2.txt" || fail "with one seed it answers twice differently"
# A conversation: the same question in its first turn, and a picture in a later one.
printf '/image %s\n%s\n/image %s\n%s\n/image none.png\n/bye\n' "$picture" "$question" examples/scenes/pictures/scene_00.png "$question" |
  ask --fastv-k 3 >"$out/chat.txt" 2>"$out/chat_errors.txt" || fail "the conversation failed"
[ "$(head -n 1 "$out/chat.txt" | xargs)" = "$expected" ] || fail "in a conversation it answers '$(head -n 1 "$out/chat.txt")', not '$expected'"
[ "$(wc -l <"$out/chat.txt")" = 2 ] || fail "the conversation has not two answers"
grep -q "none.png" "$out/chat_errors.txt" || fail "a picture that is not there is not named"
ask --image "$picture" -p "$question" --compare --overlay "$out/overlay.png" --json "$out/run.json" >"$out/compare.txt"
grep -q "layers 0-1: 619, layers 2-11: 331" "$out/compare.txt" || fail "the comparison lacks the tokens of each layer"
grep -q "of the first" "$out/compare.txt" || fail "the comparison lacks the agreement"
python3 -c "
import json, sys
run = json.load(open('$out/run.json'))['runs'][1]
assert len(run['kept']) == 331 and sorted(set(run['kept'])) == run['kept'], run['kept']
assert run['tokens_in_layer'] == [619, 619] + [331] * 10, run['tokens_in_layer']
assert open('$out/overlay.png', 'rb').read(8) == b'\\x89PNG\\r\\n\\x1a\\n'"
# Ahead of the first layer: the whole model runs on what is kept.
for rule in random uniform max-min coverage; do
  answer=$(ask --image "$picture" -p "$question" --fastv-k 0 --fastv-r 0.25 --fastv-score $rule --json "$out/ahead.json" 2>/dev/null | xargs)
  [ -n "$answer" ] || fail "at K = 0, by $rule, nothing is answered"
  python3 -c "
import json
run = json.load(open('$out/ahead.json'))['runs'][0]
assert len(run['kept']) == 475 and run['tokens_in_layer'] == [475] * 12, run['tokens_in_layer']"
done
answer=$(ask --image "$picture" -p "$question" --fastv-k 0 --no-fastv 2>/dev/null | xargs)
[ "$answer" = "$expected" ] || fail "at K = 0, unpruned, it answers '$answer', not '$expected'"
# Two pictures, and a marker that says where the first goes.
ask --image "$picture" --image examples/scenes/pictures/scene_00.png -p "$question" --json "$out/two.json" >/dev/null 2>&1
python3 -c "
import json
assert len(json.load(open('$out/two.json'))['prompt']['visual']) == 2"
# The same visual tokens from a file.
python3 - "$out/frames.safetensors" <<'END'
import json, struct, sys
tokens, width = 64, 256
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

# The sweep of README.md, whose numbers are those that are printed, but for time. A question that is answered alone is
# answered as the sweep counts it, and the setting that is recommended can be used.
sweep=$(sed -n 's/^build\/llava\/examples\/llava\/fastv-llava \(-m build\/scenes.*--sweep.*\)$/\1/p' examples/llava/README.md | sed "s|build/scenes/|$out/|g; s|--write-config [^ ]*||")
[ -n "$sweep" ] || fail "README.md shows no sweep"
# shellcheck disable=SC2086
"$program" $sweep --sweep-out "$out/sweep" --write-config "$out/sweep.cfg" -t 1 >"$out/sweep.txt" 2>/dev/null || fail "the sweep failed"
for file in sweep.csv sweep.json sweep.png sweep-attention.png; do [ -s "$out/$file" ] || fail "the sweep wrote no $file"; done
python3 - "$out" <<'END'
import csv, json, re, sys
out = sys.argv[1]
def rows(text):
    found = {}
    for line in text.splitlines():
        m = re.match(r' *(-|\d+) +(\d+)% (\S.*?) +(\S+) +(\S+) +(\S+) +(\S+)% +(\S+)% +(\S+)% +(\S+)% +(\S+)% +(\S+) ms +(\S+)$', line)
        if m: found[m[1], m[2], m[3]] = [float(m[i]) for i in (7, 8, 9, 10, 13)]
    return found
shown, printed = rows(open('examples/llava/README.md').read()), rows(open(f'{out}/sweep.txt').read())
assert shown and shown.keys() == printed.keys(), (shown.keys(), printed.keys())
for key, values in shown.items():
    assert all(abs(a - b) < 1 for a, b in zip(values, printed[key])), (key, values, printed[key])
best = next(line for line in open(f'{out}/sweep.txt') if line.startswith('Cheapest'))
assert best in open('examples/llava/README.md').read(), best
config = json.load(open(f'{out}/sweep.cfg'))
assert f"--fastv-k {config['fastv-k']} --fastv-r {config['fastv-r']} --fastv-score {config['fastv-score']}" in best
json.load(open(f'{out}/sweep.json'))
assert len(list(csv.DictReader(open(f'{out}/sweep.csv')))) == len(printed)
END
answer=$(ask --image "$picture" -p "$question" --fastv-config "$out/sweep.cfg" 2>/dev/null | xargs)
[ -n "$answer" ] || fail "with the recommended setting nothing is answered"
python3 - "$out" <<'END'
import json, sys
lists = [q for q in json.load(open('examples/scenes/pictures/questions.json')) if q['kind'] == 'row'][:12]
for q in lists: q['picture'] = '../../../examples/scenes/pictures/' + q['picture']
open(f'{sys.argv[1]}/lists.jsonl', 'w').write(''.join(json.dumps(q) + '\n' for q in lists))
END
sed -i "s|\.\./\.\./\.\./examples|$PWD/examples|" "$out/lists.jsonl"
"$program" -m "$out/scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" --sweep "$out/lists.jsonl" --sweep-k 3 --sweep-r 0.5 --sweep-score last \
  -n 16 -t 1 --sweep-out "$out/lists" >/dev/null 2>&1 || fail "the sweep of lists failed"
right=0
while IFS= read -r line; do
  wanted=$(printf '%s' "$line" | sed 's/.*"answer": "\([^"]*\)".*/\1/')
  one=$(ask --image "$(printf '%s' "$line" | sed 's/.*"picture": "\([^"]*\)".*/\1/')" --fastv-k 3 --fastv-r 0.5 \
    -p "$(printf '%s' "$line" | sed 's/.*"question": "\([^"]*\)".*/\1/')" 2>/dev/null | xargs)
  [ "$one" != "$wanted" ] || right=$((right + 1))
done <"$out/lists.jsonl"
counted=$(python3 -c "
import csv
row = list(csv.DictReader(open('$out/lists.csv')))[1]
print(round(12 * float(row['accuracy'])))")
[ "$right" = "$counted" ] || fail "one by one, $right of 12 lists are right, but the sweep counts $counted"
[ "$right" -gt 0 ] && [ "$right" -lt 12 ] || fail "$right of 12 lists are right, which tells nothing"

# Weights of heads, from half of them: in the table, in the settings, and used by the program. The wrong number of them, or
# another K, is refused.
"$program" -m "$out/scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" --sweep "$out/lists.jsonl" --sweep-k 0,2 --sweep-r 0.5,0.9 --calibrate 6 \
  --sweep-score max-min,heads -n 16 -t 1 --max-kl 100 --max-drop 1 --sweep-out "$out/heads" --write-config "$out/heads.cfg" >"$out/heads.txt" 2>/dev/null ||
  fail "the calibration failed"
grep -q "The first 6 questions weighed the heads" "$out/heads.txt" || fail "the calibration is not told"
python3 - "$out" <<'END'
import csv, json, sys
out = sys.argv[1]
rows = list(csv.DictReader(open(f'{out}/heads.csv')))
assert [(r['k'], r['rule']) for r in rows[1:]] == [('0', 'max-min')] * 2 + [('2', 'max-min'), ('2', 'heads')] * 2, rows
(found,) = json.load(open(f'{out}/heads.json'))['head_weights']
heads = len(found['weights'])
assert found['k'] == 2 and found['questions'] == 6 and abs(sum(found['weights']) - 1) < 1e-5, found
gains = [max(0, without - found['kl_first']) for without in found['kl_first_without']]
assert all(abs(w - g / sum(gains)) < 1e-5 for w, g in zip(found['weights'], gains)), found
config = {'fastv-k': 2, 'fastv-r': 0.5, 'fastv-score': 'heads', 'head-weights': found['weights']}
for name, change in {'weighs': {}, 'alike': {'head-weights': [1 / heads] * heads}, 'mean': {'fastv-score': 'last'},
                     'few': {'head-weights': found['weights'][1:]}, 'odd': {'head-weights': [-1] * heads},
                     'other': {'fastv-k': 3}, 'none': {'head-weights': None}}.items():
    json.dump({k: v for k, v in (config | change).items() if v is not None}, open(f'{out}/{name}.cfg', 'w'))
json.dump({'fastv-score': 'heads', 'head-weights': found['weights']}, open(f'{out}/no_k.cfg', 'w'))
END
for name in weighs alike mean; do
  ask --image "$picture" -p "$question" --fastv-config "$out/$name.cfg" --json "$out/$name.json" >/dev/null 2>&1 || fail "$name.cfg failed"
done
python3 -c "
import json
weighs, alike, mean = (json.load(open(f'$out/{n}.json'))['runs'][0] for n in ('weighs', 'alike', 'mean'))
assert alike['kept'] == mean['kept'] and weighs['kept'] != mean['kept']"

# Projectors of today's models, on random weights: --no-fastv answers token for token as llama-mtmd-cli does, and two
# pictures are pruned.
make="$build/tests/llava/make_gguf"
jinja="{% for m in messages %}[{{ m.role | upper }}] {{ m.content }}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
projectors="mlp:llama qwen2vl_merger:qwen2vl qwen2.5vl_merger:qwen2vl qwen3vl_merger:qwen3vl gemma3:gemma3 internvl:qwen3 idefics3:llama pixtral:mistral3"
for pair in $projectors; do
  projector=${pair%%:*} architecture=${pair##*:}
  model=$out/$projector.gguf vision=$out/mmproj-$projector.gguf
  more="" tower=""
  case $projector in
    qwen3vl_merger) more="--deepstack 2" tower="--deepstack 2 --layers 4" ;;
    idefics3) "$make" --markers-of idefics3 "$out/markers.gguf" >/dev/null && more="--vocabulary-from $out/markers.gguf" ;;
  esac
  # shellcheck disable=SC2086
  "$make" --architecture "$architecture" $more "$model" >/dev/null
  # shellcheck disable=SC2086
  "$make" --projector "$projector" --projection 64 $tower "$vision" >/dev/null
  # By a template that libllama recognises, and by one that its Jinja engine alone can read.
  for template in chatml "$jinja"; do
    how=--no-jinja
    [ "$template" = chatml ] || how=--jinja
    theirs -m "$model" --mmproj "$vision" --image "$picture" -p "hi" -n 8 --chat-template "$template" $how
    answer=$("$program" -m "$model" --mmproj "$vision" --image "$picture" -p "hi" -n 8 -t 1 --chat-template "$template" --no-fastv 2>"$out/error.txt" | tr -d '[:space:]')
    expected_here=$(tr -d '[:space:]' <"$out/expected.txt")
    [ "$answer" = "$expected_here" ] || fail "with $projector and $template it answers '$answer', not '$expected_here': $(cat "$out/error.txt")"
    [ -n "$answer" ] || fail "with $projector and $template nothing is answered"
  done
  "$program" -m "$model" --mmproj "$vision" --image "$picture" --image examples/scenes/pictures/scene_00.png -p "hi" -n 4 -t 1 \
    --chat-template chatml --json "$out/two.json" >/dev/null 2>"$out/error.txt" || fail "$projector: $(cat "$out/error.txt")"
  python3 -c "
import json
run = json.load(open('$out/two.json'))
assert len(run['prompt']['visual']) >= 2, run['prompt']
assert len(run['runs'][0]['kept']) < run['prompt']['tokens'], run['runs']"
done

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
  wrong "holds a vision encoder" -m "$out/mmproj-scenes.gguf" --mmproj "$out/mmproj-scenes.gguf" --image "$picture"
  wrong "cannot load it as the mmproj file" -m "$out/scenes.gguf" --mmproj "$out/scenes.gguf" --image "$picture"
  wrong "neither a PNG nor a JPEG" $good --image README.md
  wrong "the context holds 100" $good --image "$picture" -c 100
  wrong "filtering_ratio is 1.5" $good --image "$picture" --fastv-r 1.5
  wrong "K is 12, but this model of 12 layers can be pruned behind K = 1-11 alone, or ahead of the first at K = 0" $good --image "$picture" --fastv-k 12
  wrong "use --fastv-score random, uniform, max-min, coverage" $good --image "$picture" --fastv-k 0
  wrong "needs weights of heads" $good --image "$picture" --fastv-score heads
  wrong "needs weights of heads" $good --image "$picture" --fastv-config "$out/none.cfg"
  wrong "7 head weights were given, but layer 1 has 8 heads" $good --image "$picture" --fastv-config "$out/few.cfg"
  wrong "a weight of a head is -1" $good --image "$picture" --fastv-config "$out/odd.cfg"
  wrong "no fastv-k that they are of" $good --image "$picture" --fastv-config "$out/no_k.cfg"
  wrong "are of K = 2, but --fastv-k is 3" $good --image "$picture" --fastv-config "$out/weighs.cfg" --fastv-k 3
  wrong "--calibrate needs questions" $good --image "$picture" --calibrate 3
  wrong "--calibrate is 12 but" $good --sweep "$out/lists.jsonl" --calibrate 12
  wrong "--calibrate is 0" $good --sweep "$out/lists.jsonl" --calibrate 0
  wrong "needs a whole number" $good --sweep "$out/lists.jsonl" --calibrate half
  wrong "by how many questions" $good --sweep "$out/lists.jsonl" --sweep-score heads
  wrong "K = 0 alone is swept" $good --sweep "$out/lists.jsonl" --sweep-k 0 --sweep-score random,heads --calibrate 3
  wrong "K is 99" $good --sweep "$out/lists.jsonl" --sweep-k 2,99
  wrong "to --sweep-score, or leave K = 0 out" $good --sweep "$out/lists.jsonl" --sweep-k 0 --sweep-score last
  wrong "keep_count is 577" $good --image "$picture" --fastv-keep 577
  wrong "there is no option" $good --image "$picture" --frobnicate
  wrong "a value is missing" $good --image
  wrong "must be one of" $good --image "$picture" --fastv-score best
  wrong "no chat template" $good --image "$picture" --chat-template nonsense
  wrong "cannot be rendered" $good --image "$picture" --chat-template "{% for m in %}"
  wrong "leave it on" $good --image "$picture" -fa off
  wrong "name a picture" $good -p hi
  wrong "must be a type of" $good --image "$picture" --cache-type-k f17
  wrong "need a prompt" $good --compare
  wrong "no RPC server answers at 127.0.0.1:1" $good --image "$picture" --rpc 127.0.0.1:1
  TMPDIR=$out/none wrong "set TMPDIR to a folder" $good --sweep "$out/lists.jsonl"
  wrong "cannot open the questions" $good --sweep "$out/none.jsonl"
  wrong "line 1: give" $good --sweep README.md
  wrong "has pictures and prompts of its own" $good --sweep "$out/lists.jsonl" -p hi
  wrong "there is no setting" $good --image "$picture" --fastv-config "$out/run.json"
  wrong "picture markers" $good --image "$picture" -p "<__media__> <__media__>"
}
echo "fastv-llava answers as llama-mtmd-cli does: $expected"
