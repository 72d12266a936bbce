#include "layers.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <stdexcept>

namespace llava {

namespace {

// What libllama has in its code, and not in the file's keys.
struct Family {
  const char* name;
  std::uint32_t period = 1;    // K must be a multiple of it: layers without RoPE or with mixtures come in a pattern
  std::uint32_t windows = 0;   // of so many layers one sees everything; 0: no windows, unless a key says which
  bool full_first = false;     // it is the first of them, not the last
  const char* rows = "l_out";  // what libllama calls the rows that a layer hands to the next
  const char* input = "";      // and what layer 0 reads, where embeddings are scaled or normed first, or get positions
  std::uint32_t interval = 1;  // of so many layers the last attends, and the others are recurrent
};

// Sorted by name.
constexpr Family families[] = {
    // clang-format off
    {"afmoe", 4, 4, false, "l_out", "inp_embd_scaled"}, {"apertus"}, {"arcee"}, {"arctic"}, {"bailingmoe"},
    {"bailingmoe2"}, {"bitnet"}, {"bloom", 1, 0, false, "l_out", "inp_norm-0"}, {"chatglm"}, {"codeshell"},
    {"cohere2", 1, 4}, {"cohere2moe", 1, 4, true}, {"command-r"}, {"dbrx"}, {"deci"}, {"deepseek"}, {"deepseek2"},
    {"deepseek2-ocr"}, {"dots1"}, {"ernie4_5"}, {"ernie4_5-moe"}, {"exaone"}, {"exaone-moe", 1, 4}, {"exaone4"},
    {"falcon"}, {"falcon-h1"}, {"gemma", 1, 0, false, "l_out", "inp_scaled"},
    {"gemma2", 1, 2, false, "l_out", "inp_scaled"}, {"gemma3", 1, 6}, {"gemma4"}, {"glm4"}, {"glm4moe"},
    {"gpt-oss", 1, 2}, {"gpt2", 1, 0, false, "l_out", "inpL"}, {"gptneox"}, {"granite"}, {"granite_swa"},
    {"granitehybrid"}, {"granitemoe"}, {"grovemoe"}, {"hunyuan-dense"}, {"hunyuan-moe"}, {"hunyuan_vl"}, {"hy_v3"},
    {"internlm2"}, {"jais"}, {"jais2"}, {"jamba"}, {"kimi-linear"}, {"laguna", 1, 4, true}, {"lfm2"}, {"lfm2moe"},
    {"llama"}, {"llama4", 4, 4}, {"maincoder"}, {"maple"}, {"mellum", 1, 4}, {"mimo2"}, {"minicpm"}, {"minimax-m2"},
    {"mistral3"}, {"mistral4"}, {"mpt"}, {"muse-glimmer", 1, 4, false, "l_out", "embd_norm"}, {"nanbeige"},
    {"nemotron"}, {"nemotron_h", 1, 0, false, "nemotron_h_block_out"},
    {"nemotron_h_moe", 1, 0, false, "nemotron_h_block_out"}, {"olmo"}, {"olmo2", 1, 4}, {"olmoe"}, {"openelm"},
    {"orion"}, {"paddleocr"}, {"pangu-embedded"}, {"phi2"}, {"phi3"}, {"phimoe"}, {"plamo"},
    {"plamo2", 1, 0, false, "ffn_residual"}, {"plamo3", 1, 8}, {"qwen"}, {"qwen2"}, {"qwen2moe"}, {"qwen2vl"},
    {"qwen3"}, {"qwen35", 1, 0, false, "l_out", "", 4}, {"qwen35moe", 1, 0, false, "l_out", "", 4}, {"qwen3moe"},
    {"qwen3next", 1, 0, false, "l_out", "", 4}, {"qwen3vl"}, {"qwen3vlmoe"}, {"refact"}, {"seed_oss"},
    {"smollm3", 4}, {"spark2_5"}, {"stablelm"}, {"starcoder", 1, 0, false, "l_out", "inpL"}, {"starcoder2"},
    {"xverse"},
    // clang-format on
};

// Architectures that libllama runs and that cannot be cut, or not yet; ahead of their first layer most can be pruned.
constexpr struct {
  Family family;
  const char* reason;
  bool ahead = true;
} uncut[] = {
    {{"baichuan"}, "what its layers are depends on how many there are"},
    {{"chameleon"}, "llama.cpp's graph of it aborts where a call asks for no logits", false},
    {{"cogvlm"}, "it runs other weights on what it is given as embeddings"},
    {{"deepseek32"}, "it chooses the keys that a token attends to among all, dropped ones too"},
    {{"gemma3n", 1, 5}, "every layer reads embeddings of its own, by the tokens' ids"},
    {{"grok"}, "llama.cpp runs it without flash attention, whose node the scores are read from"},
    {{"minicpm3"}, "how much a layer adds depends on how many there are"},
    {{"minimax-01"}, "how its layers forget depends on how many there are"},
    {{"smallthinker", 1, 4, true}, "behind the layers that see the whole prompt its pattern does not begin anew"},
    {{"step35"}, "libllama gives the rows between its layers no name of their own"},
    {{"talkie"}, "every layer reads the embeddings again"},
};

// deepseek2 has no low-rank queries with so many layers, which no half of another may have then.
bool is_lite(const ModelFile& file, std::uint32_t layers) {
  return file.architecture() == "deepseek2" &&
         (layers == 26 || layers == 27 || (layers == 48 && file.vocabulary() == 128256));
}

// What libllama takes of a model of so many layers from their number, which neither half has; null: nothing.
const char* counted(const ModelFile& file, std::uint32_t layers) {
  const std::string& name = file.architecture();
  if ((name == "gemma2" && layers == 46) || (name == "gemma3" && layers == 62)) return "the scale of its attention";
  if (name == "exaone4" && layers == 64) return "its sliding windows";
  return is_lite(file, layers) ? "how its queries are made" : nullptr;
}

std::runtime_error cannot(const ModelFile& file, const std::string& reason) {
  return std::runtime_error(file.path() + ": the architecture " + file.architecture() +
                            " cannot be pruned by FastV here: " + reason);
}

const Family& family_of(const ModelFile& file, std::string& why_uncut) {
  for (const auto& [family, reason, ahead] : uncut) {
    if (file.architecture() != family.name) continue;
    if (!ahead) throw cannot(file, reason);
    why_uncut = reason;
    return family;
  }
  for (const Family& family : families)
    if (file.architecture() == family.name) return family;
  throw cannot(file, "it has not been tried; --help names those that have");
}

std::uint32_t expected_layers(const ModelFile& file) {
  const std::uint32_t blocks = file.whole("block_count", 0), further = file.whole("nextn_predict_layers", 0);
  if (blocks <= further) throw std::runtime_error(file.path() + " has no layers: its key block_count is missing or 0");
  if (blocks > 512)
    throw std::runtime_error(file.path() + " has " + std::to_string(blocks) +
                             " layers, but llama.cpp runs 512 at most");
  return blocks - further;
}

}  // namespace

std::string Layers::rows_of(std::uint32_t layer) const {
  return (layer < deepstack ? std::string("deepstack_out") : rows) + "-" + std::to_string(layer);
}

std::vector<std::string> architectures(bool alone_ahead) {
  std::vector<std::string> names;
  if (!alone_ahead)
    for (const Family& family : families) names.emplace_back(family.name);
  else
    for (const auto& [family, reason, ahead] : uncut)
      if (ahead) names.emplace_back(family.name);
  return names;
}

Layers layers_of(const ModelFile& file) {
  Layers layers;
  const Family& family = family_of(file, layers.uncut);
  const std::uint32_t n = expected_layers(file);
  if (const char* what = counted(file, n))
    layers.uncut = std::string("libllama tells ") + what + " by the number of layers, " + std::to_string(n) +
                   ", which neither half has";
  layers.all.resize(n);
  // From some position on, attention is scaled by it, and libllama is told others than the true ones.
  if (file.number("attention.temperature_scale").value_or(0) != 0)
    layers.positions = file.whole("attention.temperature_length",
                                  file.whole("rope.scaling.original_context_length", file.whole("context_length", 0)));
  layers.rows = family.rows;
  layers.input = family.input;
  layers.chunked = file.architecture() == "llama4";

  const bool windows = layers.chunked ? file.number("attention.sliding_window").value_or(1) != 0
                                      : file.whole("attention.sliding_window", 0) != 0;
  if (layers.chunked && windows) layers.positions = 8191;
  const std::vector<double> listed = file.numbers("attention.sliding_window_pattern");
  const std::uint32_t in_family = file.architecture() == "exaone4" && n == 64 ? 4 : family.windows;
  const std::uint32_t every = file.whole("attention.sliding_window_pattern", in_family);
  const std::uint32_t attending = file.whole("full_attention_interval", family.interval);
  for (std::uint32_t i = 0; i < n; ++i) {
    Layer& layer = layers.all[i];
    if (windows && (!listed.empty() || in_family != 0))
      layer.windowed = !listed.empty() ? i < listed.size() && listed[i] != 0
                       : every == 0    ? true
                                       : i % every != (family.full_first ? 0 : every - 1);
    layer.kv_heads =
        file.whole_in_layer("attention.head_count_kv", i, file.whole_in_layer("attention.head_count", i, 1));
    layer.attends = (attending <= 1 || (i + 1) % attending == 0) && layer.kv_heads != 0;
  }

  // What must come out even on both sides of the cut.
  std::uint32_t period = family.period;
  for (const std::uint32_t step : {attending, file.whole("interleave_moe_layer_step", 1)})
    period = std::lcm(period, std::max(step, 1u));
  layers.deepstack = file.whole("n_deepstack_layers", 0);
  // Granite adds them ahead of some layers instead, and says which.
  std::uint32_t reached = layers.deepstack;
  const std::vector<double> mapping = file.numbers("deepstack_mapping");
  for (std::uint32_t i = 0; i < mapping.size(); ++i)
    if (mapping[i] >= 0) reached = std::max(reached, i + 1);
  const std::uint32_t shared = file.whole("attention.shared_kv_layers", 0);
  for (std::uint32_t k = 1; k < n; ++k) {
    // Layers that share keys take them from the last two that have their own.
    const bool keys_are_there = shared == 0 || k + 2 + shared <= n;
    const bool tail_attends =
        std::any_of(layers.all.begin() + k, layers.all.end(), [](const Layer& l) { return l.attends; });
    if (is_lite(file, k + 1) || is_lite(file, n - k) || !tail_attends) continue;
    if (k % period == 0 && k >= reached && layers.all[k - 1].attends && !layers.all[k - 1].windowed && keys_are_there)
      layers.filtering_layers.push_back(k);
  }
  const std::vector<double> sections = file.numbers("rope.dimension_sections");
  if (file.architecture().rfind("glm4", 0) == 0 && (sections.size() < 2 || sections[0] <= 0 || sections[1] <= 0))
    throw cannot(file, "without positions of rows and columns it takes no embeddings: it is no vision-language model");
  if (file.whole("embedding_length_per_layer_input", 0) != 0)
    layers.uncut = "every layer reads embeddings of its own, by the tokens' ids";
  if (layers.uncut.empty() && layers.filtering_layers.empty())
    layers.uncut = "none of its " + std::to_string(n) +
                   " layers but the last sees the whole prompt, so that it could rank visual tokens";
  if (!layers.uncut.empty()) {
    layers.filtering_layers.clear();
    layers.uncut = cannot(file, layers.uncut).what() + std::string("; ahead of its first layer it can, by --fastv-k 0");
  }
  return layers;
}

std::string ranges(const std::vector<std::uint32_t>& values) {
  std::string text;
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::size_t last = i;
    while (last + 1 < values.size() && values[last + 1] == values[last] + 1) ++last;
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]) + (last > i ? "-" + std::to_string(values[last]) : "");
    i = last;
  }
  return text;
}

std::uint32_t filtering_layer(const Layers& layers, std::optional<std::uint32_t> asked) {
  const std::vector<std::uint32_t>& can = layers.filtering_layers;
  if (asked == 0u) return 0;
  if (!layers.uncut.empty()) throw std::runtime_error(layers.uncut);
  if (!asked) {
    const auto from_2 = std::lower_bound(can.begin(), can.end(), 2u);
    return from_2 == can.end() ? can.back() : *from_2;
  }
  if (std::binary_search(can.begin(), can.end(), *asked)) return *asked;
  throw std::invalid_argument("the filtering layer K is " + std::to_string(*asked) + ", but this model of " +
                              std::to_string(layers.all.size()) + " layers can be pruned behind K = " + ranges(can) +
                              " alone, or ahead of the first at K = 0");
}

namespace {

// What both halves share.
Part part_of(const ModelFile& file, const Layers& layers, std::uint32_t first, std::uint32_t count) {
  Part part;
  part.first = first;
  part.count = count;
  const auto n = static_cast<std::uint32_t>(layers.all.size());
  // Where a pattern of windows is counted from the first layer, the part says of each layer what it is.
  if (std::any_of(layers.all.begin(), layers.all.end(), [](const Layer& layer) { return layer.windowed; })) {
    std::vector<bool>& windowed = part.flags["attention.sliding_window_pattern"];
    for (std::uint32_t i = first; i < first + count; ++i) windowed.push_back(i < n && layers.all[i].windowed);
  }
  // What libllama takes from the number of layers where the file does not say it.
  if (file.architecture() == "minicpm" && !file.number("residual_scale"))
    part.reals["residual_scale"] = 1.4f / std::sqrt(static_cast<float>(n));
  if (file.architecture() == "deepseek2" && file.whole("expert_gating_func", 0) == 0)
    part.wholes["expert_gating_func"] =
        (n == 47 || n == 48) && file.vocabulary() == 154880 ? 2 : 1;  // sigmoid, softmax
  return part;
}

}  // namespace

Part head_of(const ModelFile& file, const Layers& layers, std::uint32_t k) {
  Part part = part_of(file, layers, 0, k + 1);
  if (file.number("nextn_predict_layers")) part.wholes["nextn_predict_layers"] = 0;
  if (file.number("attention.shared_kv_layers")) part.wholes["attention.shared_kv_layers"] = 0;
  if (file.has_tensor("output.weight")) part.tensors["output.weight"] = "";  // never run
  part.last_is_idle = true;
  return part;
}

Part tail_of(const ModelFile& file, const Layers& layers, std::uint32_t k) {
  Part part = part_of(file, layers, k, file.whole("block_count", 0) - k);
  if (const std::uint32_t dense = file.whole("leading_dense_block_count", 0); dense != 0)
    part.wholes["leading_dense_block_count"] = dense - std::min(dense, k);
  if (file.number("n_deepstack_layers")) part.wholes["n_deepstack_layers"] = 0;
  // Hidden rows are scaled already.
  if (file.number("embedding_scale") || file.architecture() == "minicpm" || file.architecture() == "grok")
    part.reals["embedding_scale"] = 1;
  // It is handed rows, and looks none up: the one matrix is read as both.
  if (file.has_tensor("output.weight")) {
    part.tensors["token_embd.weight"] = "output.weight";
    part.tensors["output.weight"] = "";
  }
  return part;
}

}  // namespace llava
