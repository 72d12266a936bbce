#include "options.hpp"

#include <functional>
#include <map>

#include "../common/command_line.hpp"

namespace llava {

namespace {

using command_line::one_of;
using command_line::real_number;
using command_line::refuse;
using command_line::whole_number;

using Set = std::function<void(const std::string& option, const std::string& value)>;

}  // namespace

const char* usage() {
  return "usage: fastv-llava -m LLM.gguf --mmproj MMPROJ.gguf --image FILE [--image FILE ...] -p PROMPT [options]\n"
         "\n"
         "Answers a prompt about pictures with a GGUF model (architectures llama, qwen, qwen2, qwen2vl), and drops "
         "most\n"
         "visual tokens behind layer K, as FastV does.\n"
         "\n"
         "  -m FILE               language model\n"
         "  --mmproj FILE         its vision encoder and projector\n"
         "  --image FILE          a PNG or JPEG picture; several are read in order, at the markers <__media__> of the\n"
         "                        prompt or ahead of it\n"
         "  --visual-embeddings FILE   visual tokens computed elsewhere, in place of both: a safetensors file with "
         "one\n"
         "                        [tokens, width] tensor a picture or frame, read in the order of their names\n"
         "  -p TEXT               what to ask (\"Describe the picture.\")\n"
         "  -n N                  tokens to generate at most (128)\n"
         "  -c N                  context: prompt and answer together (the model's)\n"
         "  -t N                  threads (one per core)\n"
         "  --temp X, --seed N    sampling: 0 takes the likeliest token (0, 0)\n"
         "  --chat-template NAME  vicuna, chatml, ... or none (the model's own)\n"
         "  --kv f16|q8_0         type of the KV cache (f16)\n"
         "  --ubatch N            prompt tokens that go through the layers at a time (512)\n"
         "\n"
         "  --fastv-k N           filtering layer K: layers that run on the whole prompt (2)\n"
         "  --fastv-r X           filtering ratio R: share of the visual tokens that is dropped then, 0 to 1 (0.5)\n"
         "  --fastv-keep N        keep exactly N visual tokens, whatever R says\n"
         "  --fastv-score RULE    last: by the last prompt token's attention (default); window: the same, shared out\n"
         "                        over windows of 6 x 6 tokens; grid: half of the count on an even grid; random;\n"
         "                        uniform: an even grid alone\n"
         "  --fastv-by WAY        graph: inside the graph, on whichever device it runs on (default); host: between\n"
         "                        two graphs\n"
         "  --no-fastv            keep every token\n"
         "\n"
         "  --compare             run unpruned and pruned, and print both side by side\n"
         "  --overlay FILE        draw which tokens stayed on the pictures, as PNG or SVG\n"
         "  --json FILE           write everything that was measured\n";
}

Options read_options(int count, char** arguments) {
  Options options;
  fastv::Config fastv;
  bool prune = true;
  const auto store = [](std::string& place) {
    return [&place](const std::string&, const std::string& v) { place = v; };
  };
  const auto number = [](auto& place) {
    return [&place](const std::string& option, const std::string& value) {
      place = static_cast<std::decay_t<decltype(place)>>(whole_number(option, value));
    };
  };
  const std::map<std::string, Set> with_value = {
      {"-m", store(options.model)},
      {"--mmproj", store(options.vision)},
      {"--visual-embeddings", store(options.embeddings)},
      {"--image", [&](const std::string&, const std::string& v) { options.pictures.push_back(v); }},
      {"-p", store(options.prompt)},
      {"-n", number(options.generate)},
      {"-c", number(options.context)},
      {"-t", number(options.threads)},
      {"--temp", [&](const std::string& o, const std::string& v) { options.temperature = real_number(o, v); }},
      {"--seed", number(options.seed)},
      {"--chat-template", store(options.chat_template)},
      {"--kv",
       [&](const std::string& o, const std::string& v) {
         options.engine.cache_type = one_of<ggml_type>(o, v, {{"f16", GGML_TYPE_F16}, {"q8_0", GGML_TYPE_Q8_0}});
       }},
      {"--ubatch", number(options.engine.piece)},
      {"--fastv-k", number(fastv.filtering_layer)},
      {"--fastv-r", [&](const std::string& o, const std::string& v) { fastv.filtering_ratio = real_number(o, v); }},
      {"--fastv-keep", number(fastv.keep_count)},
      {"--fastv-score",
       [&](const std::string& o, const std::string& v) {
         const auto rule =
             one_of<std::size_t>(o, v, {{"last", 0}, {"window", 1}, {"grid", 2}, {"random", 3}, {"uniform", 4}});
         fastv.window_rows = fastv.window_columns = rule == 1 ? 6 : 0;
         fastv.uniform_share = rule == 2 ? 0.5 : 0;
         fastv.selection = rule == 3   ? fastv::Selection::random
                           : rule == 4 ? fastv::Selection::uniform
                                       : fastv::Selection::top_k;
       }},
      {"--fastv-by",
       [&](const std::string& o, const std::string& v) {
         options.engine.prune_by =
             one_of<PruneBy>(o, v, {{"graph", PruneBy::graph}, {"host", PruneBy::between_graphs}});
       }},
      {"--overlay", store(options.overlay)},
      {"--json", store(options.json)},
  };
  const std::map<std::string, Set> without = {
      {"--no-fastv", [&](const std::string&, const std::string&) { prune = false; }},
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
  if (options.pictures.empty() && options.embeddings.empty())
    refuse("name a picture with --image, or hand over --visual-embeddings");
  if (options.generate == 0) refuse("-n is 0: ask for at least one token");
  if (options.engine.piece == 0) refuse("--ubatch is 0: use at least 1");
  if (!(options.temperature >= 0)) refuse("--temp must not be negative");
  if (options.compare && !prune) refuse("--compare needs something to compare with: leave --no-fastv out");
  if (!options.overlay.empty() && options.pictures.empty()) refuse("--overlay needs a picture to draw on: use --image");
  if (prune) {
    if (const fastv::Status status = validate(fastv); !status) refuse(status.message().c_str());
    if (fastv.filtering_layer == 0 && fastv.selection == fastv::Selection::top_k)
      refuse("--fastv-k is 0, where no layer has attended yet: use 1 or more, or --fastv-score random or uniform");
    options.schedule = {fastv};
  } else {
    options.schedule.clear();
  }
  return options;
}

}  // namespace llava
