// export_gguf: writes the scenes model as a pair of GGUF files, for llama.cpp. --help says how.
#include <cstdio>

#include "../common/command_line.hpp"
#include "gguf_model.hpp"

namespace {

const char* const usage =
    "export_gguf [--type f16|f32] [--class-token last|first] [--model FOLDER] OUT_FOLDER\n"
    "\n"
    "Writes OUT_FOLDER/scenes.gguf and OUT_FOLDER/mmproj-scenes.gguf. Then:\n"
    "\n"
    "  llama-mtmd-cli -m scenes.gguf --mmproj mmproj-scenes.gguf --image examples/scenes/pictures/scene_00.png \\\n"
    "    -p \"where is the white 8 ?\" -n 16 --temp 0\n"
    "\n"
    "  --type         of the matrices (f16; f32 is exactly what was published)\n"
    "  --class-token  where the reader sets it among the patches: last in llama.cpp (see gguf_model.hpp), first where\n"
    "                 https://github.com/ggml-org/llama.cpp/issues/25814 is mended\n"
    "  --model        config.json, preprocessor_config.json, model.safetensors, vocab.txt (the scenes model)\n";

}  // namespace

int main(int argc, char** argv) {
  try {
    std::string folder = FASTV_SCENES_FOLDER "/model", out;
    ggml_type type = GGML_TYPE_F16;
    scenes::ClassToken class_token = scenes::ClassToken::last;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const auto value = [&] {
        if (i + 1 == argc) command_line::refuse(argument + " needs a value");
        return std::string(argv[++i]);
      };
      if (argument == "--help" || argument == "-h") {
        std::fputs(usage, stdout);
        return 0;
      }
      if (argument == "--type")
        type = command_line::one_of<ggml_type>(argument, value(), {{"f16", GGML_TYPE_F16}, {"f32", GGML_TYPE_F32}});
      else if (argument == "--class-token")
        class_token = command_line::one_of<scenes::ClassToken>(
            argument, value(), {{"last", scenes::ClassToken::last}, {"first", scenes::ClassToken::first}});
      else if (argument == "--model")
        folder = value();
      else if (argument.rfind("-", 0) != 0 && out.empty())
        out = argument;
      else
        command_line::refuse("\"" + argument + "\" is no option, or a second folder: see --help");
    }
    if (out.empty()) command_line::refuse("no folder to write to is named: see --help");
    scenes::write_language_model(folder, out + "/scenes.gguf", type);
    scenes::write_vision(folder, out + "/mmproj-scenes.gguf", type, class_token);
    std::printf("%s/scenes.gguf\n%s/mmproj-scenes.gguf\n", out.c_str(), out.c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "export_gguf: %s\n", error.what());
    return 2;
  }
}
