#include "options.hpp"

#include <algorithm>
#include <functional>
#include <map>

#include "../common/command_line.hpp"
#include "sweep.hpp"

namespace llava {

namespace {

using command_line::one_of;
using command_line::real_number;
using command_line::refuse;
using command_line::whole_number;

// "f16", "q8_0", ...
ggml_type cache_type(const std::string& option, const std::string& value) {
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1,
                               GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL})
    if (value == ggml_type_name(type)) return type;
  refuse(option + " is \"" + value +
         "\" but must be a type of llama.cpp's caches: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl");
}

// "2,8,16"
std::vector<std::string> parts(const std::string& text) {
  std::vector<std::string> all{""};
  for (const char c : text)
    if (c == ',')
      all.emplace_back();
    else
      all.back() += c;
  return all;
}

// What the model, its pictures and numbers must be, whatever is asked for.
void expect_inputs(const Options& options) {
  if (options.model.empty()) refuse("name the language model's GGUF file with -m");
  if (options.embeddings.empty()) {
    if (options.vision.empty() && !options.pictures.empty())
      refuse("name the vision encoder's GGUF file with --mmproj, or hand over --visual-embeddings");
  } else if (!options.vision.empty() || !options.pictures.empty()) {
    refuse("--visual-embeddings takes the place of --mmproj and --image: use one or the other");
  }
  if (options.generate == 0) refuse("-n is 0: ask for at least one token");
  if (options.engine.batch == 0) refuse("-b is 0: use at least 1");
  if (options.engine.micro_batch == 0) refuse("-ub is 0: use at least 1");
  if (!(options.temperature >= 0)) refuse("--temp must not be negative");
}

void expect_sweep(Options& options) {
  if (options.vision.empty()) refuse("name the vision encoder's GGUF file with --mmproj");
  if (options.compare || !options.overlay.empty() || !options.json.empty() || !options.pictures.empty() ||
      !options.prompt.empty() || !options.prune)
    refuse(
        "--sweep has pictures and prompts of its own: leave -p, --image, --compare, --overlay, --json, --no-fastv "
        "out");
  const bool weighs = std::any_of(options.sweep.rules.begin(), options.sweep.rules.end(),
                                  [](const std::string& rule) { return rule_of(rule).weighs_heads; });
  if (weighs && options.sweep.calibrate == 0)
    refuse("a rule of --sweep-score weighs heads: say by how many questions, with --calibrate");
  if (!weighs && options.sweep.calibrate != 0) options.sweep.rules.emplace_back("heads");
  for (const double ratio : options.sweep.filtering_ratios)
    if (!(ratio >= 0 && ratio <= 1)) refuse("--sweep-r must lie between 0 and 1");
}

// One answer, or a conversation.
void expect_run(Options& options, const Rule& rule) {
  if (options.chat()) {
    if (options.vision.empty()) refuse("name the vision encoder's GGUF file with --mmproj");
    if (options.compare || !options.overlay.empty() || !options.json.empty())
      refuse("--compare, --overlay and --json need a prompt: use -p and --image");
  } else if (options.pictures.empty() && options.embeddings.empty()) {
    refuse("name a picture with --image, or hand over --visual-embeddings");
  }
  if (options.sweep.calibrate != 0) refuse("--calibrate needs questions: name a file of them with --sweep");
  if (options.compare && !options.prune) refuse("--compare needs something to compare with: leave --no-fastv out");
  if (!options.overlay.empty() && options.pictures.empty()) refuse("--overlay needs a picture to draw on: use --image");
  if (options.prompt.empty() && !options.chat()) options.prompt = "Describe the picture.";
  if (!options.prune) return;
  const fastv::Config& fastv = options.fastv;
  if (const fastv::Status status = validate(fastv); !status) refuse(status.message().c_str());
  options.engine.features = fastv.selection == fastv::Selection::diverse;
  if (options.load.filtering_layer == 0u && fastv::uses_scores(fastv))
    refuse("--fastv-k is 0, where no layer has run whose attention could rank tokens: use --fastv-score " +
           rules_ahead());
  if (!rule.weighs_heads) return;
  if (options.head_weights.empty())
    refuse("--fastv-score " + options.rule +
           " needs weights of heads: --sweep with --calibrate and --write-config writes them, --fastv-config reads "
           "them");
  if (options.load.filtering_layer != options.calibrated_at)
    refuse("the weights of heads are of K = " + std::to_string(options.calibrated_at) + ", but --fastv-k is " +
           std::to_string(*options.load.filtering_layer) + ": calibrate them there too");
  options.engine.head_weights = options.head_weights;
}

using Set = std::function<void(const std::string& option, const std::string& value)>;

}  // namespace

const char* usage() {
  static const std::string text = [] {
    const auto lines = [](const std::vector<std::string>& all) {
      std::string names;
      std::size_t column = 0;
      for (const std::string& name : all) {
        if (column + name.size() + 2 > 112)
          names += ",\n  ", column = 0;
        else if (!names.empty())
          names += ", ";
        names += name;
        column += name.size() + 2;
      }
      return names;
    };
    return std::string(
               R"(usage: fastv-llava -m LLM.gguf --mmproj MMPROJ.gguf --image FILE [--image FILE ...] -p PROMPT [options]

Answers a prompt about pictures with a GGUF model, and drops most visual tokens behind layer K, as FastV
does. Without --image and -p it talks, line by line; /image FILE there shows a picture, /bye ends.

  -m FILE               language model
  --mmproj FILE         its vision encoder and projector
  --image FILE          a PNG or JPEG picture; several are read in order, at the markers <__media__> of the
                        prompt or ahead of it
  --visual-embeddings FILE   visual tokens computed elsewhere, in place of both: a safetensors file with one
                        [tokens, width] tensor a picture or frame, read in the order of their names
  -p TEXT               what to ask ("Describe the picture.")
  -n N                  tokens to generate at most (128)
  -c N                  context: prompt and answer together; 0: what the model was made for (4096)
  -b N, -ub N           tokens that go into llama.cpp in one call (2048), and through the layers (512)
  -t N                  threads (one per core)
  -ngl N                layers on the GPU, from the last on (all)
  --rpc HOST:PORT,...   llama.cpp's RPC servers, which carry layers as a GPU does
  --cache-type-k TYPE, --cache-type-v TYPE   of the KV cache: f32, f16, bf16, q8_0, q4_0, ... (f16)
  --temp X              sampling: 0 takes the likeliest token (0)
  --top-k N, --top-p X, --min-p X, --seed N   of it (40, 0.95, 0.05, 0)
  --chat-template NAME  vicuna, chatml, ..., the text of a Jinja template, or none (the model's own)
  --jinja               render it by llama.cpp's Jinja engine even where libllama recognises it
  -fa MODE              flash attention: on, which is where attention is looked at; auto is the same

  --fastv-k N           filtering layer K: layers that run on the whole prompt (the smallest from 2 on that
                        this model can be pruned behind); 0: none, by a rule that looks at no attention
  --fastv-r X           filtering ratio R: share of the visual tokens that is dropped then, 0 to 1 (0.5)
  --fastv-keep N        keep exactly N visual tokens, whatever R says
  --fastv-score RULE    last: by the last prompt token's attention (default); window: the same, shared out
                        over windows of 6 x 6 tokens; grid: half of the count on an even grid; mmr, scope:
                        by attention, and unlike those kept (IDPruner, SCOPE); heads, heads-window: by
                        the weights of --calibrate. Without attention: random; uniform: an even grid
                        alone; max-min: each as unlike those kept as can be (DivPrune); coverage: those
                        that the others resemble
  --fastv-config FILE   K, R, rule and weights of heads as --sweep wrote them
  --no-fastv            keep every token

  --compare             run unpruned and pruned, and print both side by side
  --overlay FILE        draw which tokens stayed on the pictures, as PNG or SVG
  --json FILE           write everything that was measured

  --sweep FILE          measure what pruning costs on your own questions, JSON lines of
                        {"picture": FILE, "question": TEXT, "answer": TEXT if known}: divergence from the
                        unpruned model, equal tokens and answers, FLOPs, time, memory, for each of
  --sweep-k N,N,...     (the smallest K, and a quarter and half of the way up)
  --sweep-r X,X,...     (0.5,0.75,0.9)
  --sweep-score RULE,...   (last,window,random); at K = 0 those of them that look at no attention
  --calibrate N         weigh the heads of layer K-1 by the first N questions, at the largest R, and judge by the
                        others: adds the rule heads; (heads + 1) x N prefills for each K
  --sweep-out STEM      writes STEM.csv, STEM.json, STEM.png and STEM-attention.png (sweep)
  --max-kl X, --max-drop X   recommend the cheapest setting within these: mean divergence in nats, accuracy
                        (0.1, 0.02)
  --write-config FILE   write that setting

Architectures:
  )") + lines(architectures()) +
           "\nAt K = 0 alone:\n  " + lines(architectures(true)) + "\n";
  }();
  return text.c_str();
}

Options read_options(int count, char** arguments) {
  Options options;
  fastv::Config& fastv = options.fastv;
  const auto store = [](std::string& place) {
    return [&place](const std::string&, const std::string& v) { place = v; };
  };
  const auto number = [](auto& place) {
    return [&place](const std::string& option, const std::string& value) {
      place = static_cast<std::decay_t<decltype(place)>>(whole_number(option, value));
    };
  };
  const auto real = [](auto& place) {
    return [&place](const std::string& option, const std::string& value) {
      place = static_cast<std::decay_t<decltype(place)>>(real_number(option, value));
    };
  };
  const std::map<std::string, Set> with_value = {
      {"-m", store(options.model)},
      {"--mmproj", store(options.vision)},
      {"--visual-embeddings", store(options.embeddings)},
      {"--image", [&](const std::string&, const std::string& v) { options.pictures.push_back(v); }},
      {"-p", store(options.prompt)},
      {"-n", number(options.generate)},
      {"-c", number(options.engine.context)},
      {"-b", number(options.engine.batch)},
      {"-ub", number(options.engine.micro_batch)},
      {"-t", number(options.engine.threads)},
      {"-ngl",
       [&](const std::string& o, const std::string& v) {
         if (v != "all" && v != "auto") number(options.load.gpu_layers)(o, v);
       }},
      {"-fa",
       [](const std::string&, const std::string& v) {
         if (v == "off" || v == "0")
           refuse("-fa is off, but tokens are ranked by what flash attention reads: leave it on");
         static_cast<void>(one_of<bool>("-fa", v, {{"on", true}, {"auto", true}, {"1", true}}));
       }},
      {"--rpc", [&](const std::string&, const std::string& v) { options.load.servers = parts(v); }},
      {"--temp", real(options.temperature)},
      {"--top-k", number(options.top_k)},
      {"--top-p", real(options.top_p)},
      {"--min-p", real(options.min_p)},
      {"--seed", number(options.seed)},
      {"--chat-template", store(options.chat_template)},
      {"--cache-type-k",
       [&](const std::string& o, const std::string& v) { options.engine.key_type = cache_type(o, v); }},
      {"--cache-type-v",
       [&](const std::string& o, const std::string& v) { options.engine.value_type = cache_type(o, v); }},
      {"--fastv-k",
       [&](const std::string& o, const std::string& v) {
         options.load.filtering_layer = static_cast<std::uint32_t>(whole_number(o, v));
       }},
      {"--fastv-r", real(fastv.filtering_ratio)},
      {"--fastv-keep", number(fastv.keep_count)},
      {"--fastv-score", [&](const std::string&, const std::string& v) { options.rule = v; }},
      {"--fastv-config", [&](const std::string&, const std::string& v) { read_config(v, options); }},
      {"--sweep", store(options.sweep.questions)},
      {"--sweep-k",
       [&](const std::string& o, const std::string& v) {
         options.sweep.filtering_layers.clear();
         for (const std::string& one : parts(v))
           options.sweep.filtering_layers.push_back(static_cast<std::uint32_t>(whole_number(o, one)));
       }},
      {"--sweep-r",
       [&](const std::string& o, const std::string& v) {
         options.sweep.filtering_ratios.clear();
         for (const std::string& one : parts(v)) options.sweep.filtering_ratios.push_back(real_number(o, one));
       }},
      {"--sweep-score",
       [&](const std::string&, const std::string& v) {
         options.sweep.rules = parts(v);
         for (const std::string& rule : options.sweep.rules) static_cast<void>(rule_of(rule));
       }},
      {"--calibrate",
       [&](const std::string& o, const std::string& v) {
         options.sweep.calibrate = whole_number(o, v);
         if (options.sweep.calibrate == 0) refuse("--calibrate is 0: weigh the heads by at least one question");
       }},
      {"--sweep-out", store(options.sweep.stem)},
      {"--max-kl", real(options.sweep.max_kl)},
      {"--max-drop", real(options.sweep.max_drop)},
      {"--write-config", store(options.sweep.config)},
      {"--overlay", store(options.overlay)},
      {"--json", store(options.json)},
  };
  const std::map<std::string, Set> without = {
      {"--no-fastv", [&](const std::string&, const std::string&) { options.prune = false; }},
      {"--jinja", [&](const std::string&, const std::string&) { options.jinja = true; }},
      {"--compare", [&](const std::string&, const std::string&) { options.compare = true; }},
      {"--help", [&](const std::string&, const std::string&) { options.help = true; }},
      {"-h", [&](const std::string&, const std::string&) { options.help = true; }},
  };
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (const auto found = without.find(argument); found != without.end()) {
      found->second(argument, "");
      continue;
    }
    const std::size_t equals = argument[0] == '-' ? argument.find('=') : std::string::npos;
    const std::string name = argument.substr(0, equals);
    const auto found = with_value.find(name);
    if (found == with_value.end())
      refuse("there is no option " + name + "; --help lists them all, and a prompt goes behind -p in quotation marks");
    if (equals == std::string::npos && i + 1 == count) refuse("a value is missing after " + name);
    found->second(name, equals != std::string::npos ? argument.substr(equals + 1) : arguments[++i]);
  }
  if (options.help) return options;

  expect_inputs(options);
  const Rule& rule = rule_of(options.rule);
  set_rule(fastv, rule);
  if (!options.sweep.questions.empty())
    expect_sweep(options);
  else
    expect_run(options, rule);
  return options;
}

}  // namespace llava
