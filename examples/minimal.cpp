// FastV in an engine's own loop: prune once, after layer K. The engine here is a stand-in with random attention; a
// complete transformer that does the same is examples/reference/decoder.hpp.
#include <cstdio>
#include <fastv/fastv.hpp>
#include <vector>

int main() {
  const std::size_t n = 631, layers = 32, heads = 32, hidden_width = 4096;  // LLaVA-1.5-7B
  const std::vector<fastv::TokenSpan> visual = {{35, 576}};                 // its picture
  std::vector<float> hidden(n * hidden_width, 0.5f), last_row(heads * n);
  std::vector<int> positions(n);
  for (std::size_t i = 0; i < n; ++i) positions[i] = static_cast<int>(i);
  for (std::size_t i = 0; i < last_row.size(); ++i) last_row[i] = static_cast<float>(i * 2654435761u % 1000) / 500e3f;

  fastv::Config config;          // K and R of the paper
  config.filtering_layer = 2;    // prune after 2 layers
  config.filtering_ratio = 0.5;  // drop half of the visual tokens
  fastv::Pruner<float> pruner(config);

  for (std::size_t layer = 0; layer < layers; ++layer) {
    // ... run the layer on hidden, positions and its KV cache ...
    if (!pruner.due(layer + 1)) continue;
    const auto kept = pruner.prune(fastv::probabilities(last_row.data(), heads, 1, n), visual);
    if (!kept) return std::puts(kept.message().c_str()), 1;
    if (!fastv::compact(kept, fastv::rows(hidden.data(), n, hidden_width))) return 1;
    if (!fastv::compact(kept, fastv::rows(positions.data(), n))) return 1;
    std::printf("layers 0-%zu ran on %zu tokens, layers %zu-%zu run on %zu\n", layer, n, layer + 1, layers - 1,
                kept.size());
  }

  const auto plan = pruner.plan({n, layers, visual});  // all lengths, before anything runs
  std::printf("KV length of layer 0: %zu, of layer 31: %zu; the next token's position is %zu\n", plan->kv_length(0),
              plan->kv_length(31), plan->next_position());
}
