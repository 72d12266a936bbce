#include "layers.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>

namespace llava {

namespace {

// What libllama has in its code, and not in the file's keys.
struct Family {
  const char* name;
  std::uint32_t period = 1;   // K must be a multiple of it: layers without RoPE or with mixtures come in a pattern
  std::uint32_t windows = 0;  // of so many layers one sees everything; 0: no windows, unless a key says which
  bool full_first = false;    // it is the first of them, not the last
};

// Sorted by name.
constexpr Family families[] = {
    {"llama"}, {"qwen"}, {"qwen2"}, {"qwen2vl"}, {"qwen35"},
};

// Architectures that libllama runs and that cannot be cut, or not yet.
constexpr struct {
  const char *name, *reason;
} refused[] = {
    {"bloom", "it normalises what it is given, embeddings as well as hidden rows"},
    {"gemma", "it scales what it is given, embeddings as well as hidden rows"},
    {"gemma2", "it scales what it is given, embeddings as well as hidden rows"},
    {"gemma3n", "every layer reads embeddings of its own, by the tokens' ids"},
    {"gpt2", "it adds learned positions to what it is given, embeddings as well as hidden rows"},
    {"starcoder", "it adds learned positions to what it is given, embeddings as well as hidden rows"},
};

std::runtime_error cannot(const ModelFile& file, const std::string& reason) {
  return std::runtime_error(file.path() + ": the architecture " + file.architecture() +
                            " cannot be pruned by FastV here: " + reason);
}

const Family& family_of(const ModelFile& file) {
  for (const auto& [name, reason] : refused)
    if (file.architecture() == name) throw cannot(file, reason);
  for (const Family& family : families)
    if (file.architecture() == family.name) return family;
  throw cannot(file, "it has not been tried; --no-fastv runs what llama.cpp runs, and --help names the architectures");
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

bool Layers::any_recurrent() const {
  return std::any_of(all.begin(), all.end(), [](const Layer& layer) { return !layer.attends; });
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (const Family& family : families) names.emplace_back(family.name);
  return names;
}

Layers layers_of(const ModelFile& file) {
  const Family& family = family_of(file);
  const std::uint32_t n = expected_layers(file);
  Layers layers;
  layers.all.resize(n);
  layers.chunked = file.architecture() == "llama4";

  const bool windows = file.architecture() == "llama4" ? file.number("attention.sliding_window").value_or(1) != 0
                                                       : file.whole("attention.sliding_window", 0) != 0;
  const std::vector<double> listed = file.numbers("attention.sliding_window_pattern");
  const std::uint32_t every = file.whole("attention.sliding_window_pattern", family.windows);
  const std::uint32_t attending = file.number("full_attention_interval") ? file.whole("full_attention_interval", 1) : 1;
  for (std::uint32_t i = 0; i < n; ++i) {
    Layer& layer = layers.all[i];
    if (windows && (!listed.empty() || family.windows != 0))
      layer.windowed = !listed.empty() ? i < listed.size() && listed[i] != 0
                       : every == 0    ? true
                                       : i % every != (family.full_first ? 0 : every - 1);
    layer.attends =
        (attending <= 1 || (i + 1) % attending == 0) && file.number_in_layer("attention.head_count_kv", i, 1) != 0;
  }

  // What must come out even on both sides of the cut.
  std::uint32_t period = family.period;
  for (const std::uint32_t step : {attending, file.whole("interleave_moe_layer_step", 1)})
    if (step > 1) period = period / std::min(period, step) * std::max(period, step);
  const std::uint32_t deepstack = file.whole("n_deepstack_layers", 0);
  const std::uint32_t shared = file.whole("attention.shared_kv_layers", 0);
  for (std::uint32_t k = 1; k < n; ++k) {
    // Layers that share keys take them from the last two that have their own.
    const bool keys_are_there = shared == 0 || k + 2 + shared <= n;
    if (k % period == 0 && k >= deepstack && layers.all[k - 1].attends && !layers.all[k - 1].windowed && keys_are_there)
      layers.filtering_layers.push_back(k);
  }
  if (file.whole("embedding_length_per_layer_input", 0) != 0)
    throw cannot(file, "every layer reads embeddings of its own, by the tokens' ids");
  if (layers.filtering_layers.empty())
    throw cannot(file, "none of its " + std::to_string(n) +
                           " layers but the last sees the whole prompt, so that it could rank visual tokens");
  return layers;
}

std::uint32_t filtering_layer(const Layers& layers, std::optional<std::uint32_t> asked) {
  const std::vector<std::uint32_t>& can = layers.filtering_layers;
  if (!asked) {
    const auto from_2 = std::lower_bound(can.begin(), can.end(), 2u);
    return from_2 == can.end() ? can.back() : *from_2;
  }
  if (std::binary_search(can.begin(), can.end(), *asked)) return *asked;
  std::string list;
  for (std::size_t i = 0; i < can.size(); ++i) {
    std::size_t last = i;
    while (last + 1 < can.size() && can[last + 1] == can[last] + 1) ++last;
    list += (i == 0 ? "" : ", ") + std::to_string(can[i]) + (last > i ? "-" + std::to_string(can[last]) : "");
    i = last;
  }
  throw std::invalid_argument("the filtering layer K is " + std::to_string(*asked) + ", but this model of " +
                              std::to_string(layers.all.size()) + " layers can be pruned behind K = " + list +
                              " alone");
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
  // The one that counts layers for it, where its file does not say.
  if (file.architecture() == "minicpm" && !file.number("residual_scale"))
    part.reals["residual_scale"] = 1.4f / std::sqrt(static_cast<float>(n));
  return part;
}

}  // namespace

Part head_of(const ModelFile& file, const Layers& layers, std::uint32_t k) {
  Part part = part_of(file, layers, 0, k + 1);
  if (file.number("nextn_predict_layers")) part.wholes["nextn_predict_layers"] = 0;
  if (file.number("attention.shared_kv_layers")) part.wholes["attention.shared_kv_layers"] = 0;
  // Never run, so the matrix that is there anyway will do.
  if (file.has_tensor("output.weight")) part.tensors["output.weight"] = "token_embd.weight";
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
  // It is handed rows, and looks none up.
  if (file.has_tensor("output.weight")) part.tensors["token_embd.weight"] = "output.weight";
  return part;
}

}  // namespace llava
