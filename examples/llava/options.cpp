#include "options.hpp"

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

using Set = std::function<void(const std::string& option, const std::string& value)>;

}  // namespace

const char* usage() {
  static const std::string text = [] {
    std::string names;
    std::size_t column = 0;
    for (const std::string& name : architectures()) {
      if (column + name.size() + 2 > 112)
        names += ",\n  ", column = 0;
      else if (!names.empty())
        names += ", ";
      names += name;
      column += name.size() + 2;
    }
    return std::string(
               "usage: fastv-llava -m LLM.gguf --mmproj MMPROJ.gguf --image FILE [--image FILE ...] -p PROMPT "
               "[options]\n"
               "\n"
               "Answers a prompt about pictures with a GGUF model, and drops most visual tokens behind layer K, as "
               "FastV\n"
               "does. Without --image and -p it talks, line by line; /image FILE there shows a picture, /bye ends.\n"
               "\n"
               "  -m FILE               language model\n"
               "  --mmproj FILE         its vision encoder and projector\n"
               "  --image FILE          a PNG or JPEG picture; several are read in order, at the markers <__media__> "
               "of the\n"
               "                        prompt or ahead of it\n"
               "  --visual-embeddings FILE   visual tokens computed elsewhere, in place of both: a safetensors file "
               "with one\n"
               "                        [tokens, width] tensor a picture or frame, read in the order of their names\n"
               "  -p TEXT               what to ask (\"Describe the picture.\")\n"
               "  -n N                  tokens to generate at most (128)\n"
               "  -c N                  context: prompt and answer together; 0: what the model was made for (4096)\n"
               "  -b N, -ub N           tokens that go into llama.cpp in one call (2048), and through the layers "
               "(512)\n"
               "  -t N                  threads (one per core)\n"
               "  -ngl N                layers on the GPU, from the last on (all)\n"
               "  --rpc HOST:PORT,...   llama.cpp's RPC servers, which carry layers as a GPU does\n"
               "  --cache-type-k TYPE, --cache-type-v TYPE   of the KV cache: f32, f16, bf16, q8_0, q4_0, ... (f16)\n"
               "  --temp X              sampling: 0 takes the likeliest token (0)\n"
               "  --top-k N, --top-p X, --min-p X, --seed N   of it (40, 0.95, 0.05, 0)\n"
               "  --chat-template NAME  vicuna, chatml, ..., the text of a Jinja template, or none (the model's own)\n"
               "  --jinja               render it by llama.cpp's Jinja engine even where libllama recognises it\n"
               "  -fa MODE              flash attention: on, which is where attention is looked at; auto is the same\n"
               "\n"
               "  --fastv-k N           filtering layer K: layers that run on the whole prompt (the smallest from 2 on "
               "that\n"
               "                        this model can be pruned behind)\n"
               "  --fastv-r X           filtering ratio R: share of the visual tokens that is dropped then, 0 to 1 "
               "(0.5)\n"
               "  --fastv-keep N        keep exactly N visual tokens, whatever R says\n"
               "  --fastv-score RULE    last: by the last prompt token's attention (default); window: the same, shared "
               "out\n"
               "                        over windows of 6 x 6 tokens; grid: half of the count on an even grid; "
               "random;\n"
               "                        uniform: an even grid alone\n"
               "  --fastv-config FILE   K, R and rule as --sweep wrote them\n"
               "  --no-fastv            keep every token\n"
               "\n"
               "  --compare             run unpruned and pruned, and print both side by side\n"
               "  --overlay FILE        draw which tokens stayed on the pictures, as PNG or SVG\n"
               "  --json FILE           write everything that was measured\n"
               "\n"
               "  --sweep FILE          measure what pruning costs on your own questions, JSON lines of\n"
               "                        {\"picture\": FILE, \"question\": TEXT, \"answer\": TEXT if known}: divergence "
               "from the\n"
               "                        unpruned model, equal tokens and answers, FLOPs, time, memory, for each of\n"
               "  --sweep-k N,N,...     (the smallest K, and a quarter and half of the way up)\n"
               "  --sweep-r X,X,...     (0.5,0.75,0.9)\n"
               "  --sweep-score RULE,...   (last,window,random)\n"
               "  --sweep-out STEM      writes STEM.csv, STEM.json, STEM.png and STEM-attention.png (sweep)\n"
               "  --max-kl X, --max-drop X   recommend the cheapest setting within these: mean divergence in nats, "
               "accuracy\n"
               "                        (0.1, 0.02)\n"
               "  --write-config FILE   write that setting\n"
               "\n"
               "Architectures:\n  ") +
           names + "\n";
  }();
  return text.c_str();
}

void set_rule(fastv::Config& config, const std::string& rule) {
  const auto number = one_of<std::size_t>("--fastv-score", rule,
                                          {{"last", 0}, {"window", 1}, {"grid", 2}, {"random", 3}, {"uniform", 4}});
  config.window_rows = config.window_columns = number == 1 ? 6 : 0;
  config.uniform_share = number == 2 ? 0.5 : 0;
  config.selection = number == 3   ? fastv::Selection::random
                     : number == 4 ? fastv::Selection::uniform
                                   : fastv::Selection::top_k;
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
      {"--fastv-score", [&](const std::string&, const std::string& v) { set_rule(fastv, v); }},
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
         fastv::Config checked;
         for (const std::string& rule : options.sweep.rules) set_rule(checked, rule);
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

  if (options.model.empty()) refuse("name the language model's GGUF file with -m");
  if (options.embeddings.empty()) {
    if (options.vision.empty() && !options.pictures.empty())
      refuse("name the vision encoder's GGUF file with --mmproj, or hand over --visual-embeddings");
  } else if (!options.vision.empty() || !options.pictures.empty()) {
    refuse("--visual-embeddings takes the place of --mmproj and --image: use one or the other");
  }
  if (!options.sweep.questions.empty()) {
    if (options.vision.empty()) refuse("name the vision encoder's GGUF file with --mmproj");
    if (options.compare || !options.overlay.empty() || !options.json.empty() || !options.pictures.empty() ||
        !options.prompt.empty() || !options.prune)
      refuse(
          "--sweep has pictures and prompts of its own: leave -p, --image, --compare, --overlay, --json, --no-fastv "
          "out");
    for (const double ratio : options.sweep.filtering_ratios)
      if (!(ratio >= 0 && ratio <= 1)) refuse("--sweep-r must lie between 0 and 1");
  } else if (options.chat()) {
    if (options.vision.empty()) refuse("name the vision encoder's GGUF file with --mmproj");
    if (options.compare || !options.overlay.empty() || !options.json.empty())
      refuse("--compare, --overlay and --json need a prompt: use -p and --image");
  } else if (options.pictures.empty() && options.embeddings.empty()) {
    refuse("name a picture with --image, or hand over --visual-embeddings");
  }
  if (options.prompt.empty() && !options.chat() && options.sweep.questions.empty())
    options.prompt = "Describe the picture.";
  if (options.generate == 0) refuse("-n is 0: ask for at least one token");
  if (options.engine.batch == 0) refuse("-b is 0: use at least 1");
  if (options.engine.micro_batch == 0) refuse("-ub is 0: use at least 1");
  if (!(options.temperature >= 0)) refuse("--temp must not be negative");
  if (options.compare && !options.prune) refuse("--compare needs something to compare with: leave --no-fastv out");
  if (!options.overlay.empty() && options.pictures.empty()) refuse("--overlay needs a picture to draw on: use --image");
  if (const fastv::Status status = validate(fastv); options.prune && !status) refuse(status.message().c_str());
  return options;
}

}  // namespace llava
