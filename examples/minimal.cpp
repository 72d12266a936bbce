// FastV in an engine's own loop: prune once, after layer K, and decode on what is left. The engine here is a stand-in
// with random attention; a complete transformer that does the same is examples/reference/decoder.hpp.
#include <cstdio>
#include <fastv/fastv.hpp>
#include <numeric>
#include <vector>

int main() {
  const std::size_t n = 631, layers = 32, heads = 32, width = 4096;  // LLaVA-1.5-7B
  const std::vector<fastv::TokenSpan> visual = {{35, 576}};          // its image
  std::vector<float> hidden(n * width, 0.5f), last_row(heads * n);   // [n, width]; attention of the last token
  std::vector<int> positions(n);
  std::iota(positions.begin(), positions.end(), 0);
  for (std::size_t i = 0; i < last_row.size(); ++i) last_row[i] = static_cast<float>(i * 2654435761u % 1000) / 500e3f;

  fastv::Config config;          // K and R of the paper
  config.filtering_layer = 2;    // prune after 2 layers
  config.filtering_ratio = 0.5;  // drop half of the visual tokens
  fastv::Pruner<float> pruner(config);
  fastv::Slots slots;  // where each layer's cache stands
  if (!slots.append(n)) return 1;

  for (std::size_t layer = 0; layer < layers; ++layer) {
    // ... run the layer on hidden and positions; their keys and values go into its cache ...
    if (!pruner.due(layer + 1)) continue;
    const auto kept = pruner.prune(fastv::probabilities(last_row.data(), heads, 1, n), visual);
    if (!kept) return std::puts(kept.message().c_str()), 1;
    if (!fastv::compact(kept, fastv::rows(hidden.data(), n, width)) || !fastv::compact(kept, positions)) return 1;
    hidden.resize(kept.size() * width), positions.resize(kept.size());
    if (!slots.keep(layer + 1, kept)) return 1;
    std::printf("layers 0-%zu ran on %zu tokens, the others run on %zu\n", layer, n, kept.size());
  }

  for (const std::size_t layer : {std::size_t{0}, layers - 1})  // decoding: one position, a slot in each layer's cache
    std::printf("layer %zu: position %zu goes into slot %zu\n", layer, slots.tokens(), slots.length(layer));
  if (!slots.append(1)) return 1;  // one token has been decoded
  std::printf("next is position %zu, over %zu keys in layer %zu\n", slots.tokens(), slots.length(layers - 1),
              layers - 1);
}
