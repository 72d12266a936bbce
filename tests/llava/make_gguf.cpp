// make_gguf: writes a random model of tiny_gguf.hpp. --help says how.
#include <cstdio>
#include <map>
#include <optional>

#include "common/command_line.hpp"
#include "common/progress.hpp"
#include "tiny_gguf.hpp"

namespace {

const char* const usage_text =
    "make_gguf [OPTION VALUE...] FILE : writes a model with random weights as a GGUF file\n"
    "\n"
    "A language model:\n"
    "  --architecture NAME      llama, qwen2vl, gemma3, ... (llama); `list` names all\n"
    "  --type f32|f16|bf16|q8_0|q4_0|q4_K|...   of the matrices (f32)\n"
    "  --layers N --hidden N --heads N --kv-heads N --ffn N --context N --window N\n"
    "  --biases 0|1 --tied 0|1 --rope-factors 0|1 --per-layer 0|1\n"
    "  --rms-eps X --rope-base X --scale X\n"
    "  --vocabulary-from FILE   a GGUF file whose tokenizer is taken over\n"
    "  --vocabulary N           tokens, where the model has its own small vocabulary\n"
    "A vision tower (an mmproj file):\n"
    "  --projector NAME, one of those below\n"
    "  --layers N --hidden N --heads N --ffn N --image-size N --patch-size N --projection N --merge N\n"
    "  --deepstack N            layers whose states go further (qwen3vl_merger)\n"
    "  --queries N              tokens a picture (resampler)\n"
    "  --tiles N                that a picture may be cut into (internvl, mlp, idefics3, lightonocr)\n"
    "Both:\n"
    "  --seed N\n"
    "A tokenizer alone, for --vocabulary-from, with the markers that a projector puts around pictures:\n"
    "  --markers-of NAME        of a projector\n"
    "  --architecture llama|qwen2   whose kind (that of the architecture named below)\n"
    "  --vocabulary N\n"
    "\n"
    "LLaVA-1.5 7B: --type q4_0 --layers 32 --hidden 4096 --heads 32 --kv-heads 32 --ffn 11008 --vocabulary 32000\n";

std::string usage() {
  std::string out = usage_text;
  out += "\nPROJECTORS, and an --architecture behind each:\n";
  for (const tiny_gguf::Projector& one : tiny_gguf::projectors())
    out += "  " + one.name + std::string(20 - one.name.size(), ' ') + one.architecture +
           (one.markers.empty() ? "\n" : ", with --markers-of\n");
  return out;
}

tiny_gguf::Projector projector(const std::string& name) {
  for (tiny_gguf::Projector& one : tiny_gguf::projectors())
    if (one.name == name) return one;
  command_line::refuse("there is no projector \"" + name + "\": see --help");
}

ggml_type type_of(const std::string& name) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const auto type = static_cast<ggml_type>(i);
    const char* known = ggml_type_name(type);
    if (known != nullptr && name == known && ggml_blck_size(type) > 0) return type;
  }
  command_line::refuse("--type does not know \"" + name + "\": f32, f16, bf16, q8_0, q4_0, q4_K are some that it does");
}

struct Options {
  std::map<std::string, std::string> values;
  std::string file;

  std::optional<std::string> take(const std::string& name) {
    const auto found = values.find(name);
    if (found == values.end()) return {};
    std::string value = found->second;
    values.erase(found);
    return value;
  }
  void text(const std::string& name, std::string& to) {
    if (const auto value = take(name)) to = *value;
  }
  template <class Whole>
  void whole(const std::string& name, Whole& to) {
    if (const auto value = take(name)) to = static_cast<Whole>(command_line::whole_number(name, *value));
  }
  void real(const std::string& name, float& to) {
    if (const auto value = take(name)) to = static_cast<float>(command_line::real_number(name, *value));
  }
  void flag(const std::string& name, bool& to) {
    if (const auto value = take(name))
      to = command_line::one_of<bool>(name, *value, {{"0", false}, {"1", true}, {"no", false}, {"yes", true}});
  }
  void none_left(const std::string& kind) const {
    if (!values.empty()) command_line::refuse(values.begin()->first + " is no option of " + kind + ": see --help");
  }
};

template <class Model>
void make(const Model& model, const std::string& file) {
  common::Progress progress("Writing " + file, 100);
  tiny_gguf::write(model, file, [&](double share) { progress.reach(share); });
}

void run(Options options) {
  if (options.values.count("--projector") != 0) {
    tiny_gguf::VisionModel model;
    options.text("--projector", model.projector);
    options.whole("--layers", model.layers);
    options.whole("--hidden", model.hidden);
    options.whole("--heads", model.heads);
    options.whole("--ffn", model.ffn);
    options.whole("--image-size", model.image_size);
    options.whole("--patch-size", model.patch_size);
    options.whole("--projection", model.projection);
    options.whole("--merge", model.merge);
    options.whole("--deepstack", model.deepstack);
    options.whole("--queries", model.queries);
    options.whole("--tiles", model.tiles);
    options.whole("--seed", model.seed);
    options.none_left("a vision tower");
    return make(model, options.file);
  }
  if (const auto name = options.take("--markers-of")) {
    const tiny_gguf::Projector of = projector(*name);
    tiny_gguf::Tokenizer tokenizer{of.architecture, of.markers, 0};
    options.text("--architecture", tokenizer.architecture);
    options.whole("--vocabulary", tokenizer.vocabulary);
    options.none_left("a tokenizer");
    return tiny_gguf::write(tokenizer, options.file);
  }
  tiny_gguf::LanguageModel model = tiny_gguf::tiny_model(options.take("--architecture").value_or("llama"));
  if (const auto type = options.take("--type")) model.type = type_of(*type);
  options.whole("--layers", model.layers);
  options.whole("--hidden", model.hidden);
  options.whole("--heads", model.heads);
  options.whole("--kv-heads", model.kv_heads);
  options.whole("--ffn", model.ffn);
  options.whole("--context", model.context);
  options.whole("--window", model.window);
  options.whole("--deepstack", model.deepstack);
  options.flag("--biases", model.biases);
  options.flag("--tied", model.tied);
  options.flag("--rope-factors", model.rope_factors);
  options.flag("--per-layer", model.per_layer);
  options.real("--rms-eps", model.rms_eps);
  options.real("--rope-base", model.rope_base);
  options.real("--scale", model.scale);
  options.text("--vocabulary-from", model.vocabulary_from);
  options.whole("--vocabulary", model.vocabulary);
  options.whole("--seed", model.seed);
  options.none_left("a language model");
  make(model, options.file);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument == "--help" || argument == "-h") {
        std::fputs(usage().c_str(), stdout);
        return 0;
      }
      if (argument.rfind("--", 0) == 0) {
        if (i + 1 == argc) command_line::refuse(argument + " needs a value: see --help");
        options.values[argument] = argv[++i];
      } else if (options.file.empty()) {
        options.file = argument;
      } else {
        command_line::refuse("there are two files, \"" + options.file + "\" and \"" + argument + "\": name one");
      }
    }
    if (options.values.count("--architecture") != 0 && options.values["--architecture"] == "list") {
      for (const std::string& name : tiny_gguf::architectures()) std::puts(name.c_str());
      return 0;
    }
    if (options.file.empty()) command_line::refuse("no file is named: see --help");
    run(std::move(options));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_gguf: %s\n", error.what());
    return 2;
  }
}
