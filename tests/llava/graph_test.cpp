// FastV inside a graph of ggml: a small decoder of LLaMA's blocks whose whole prefill is one graph, with the pruner of
// ggml.hpp between two of its layers. Held to the core's indices and to llama_decode.
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <gtest/gtest.h>

#include <fastv/ggml.hpp>
#include <numeric>

#include "llama_oracle.hpp"
#include "prompts.hpp"

namespace {

using fastv::Config;
using fastv::Index;
using prompts::largest_difference;

struct Decoded {
  std::vector<float> logits;
  std::vector<Index> kept;
  std::vector<std::vector<float>> scores;  // of each stage
};

// Shapes: n tokens, d width, H query heads, G KV heads, c head dimension.
class GraphDecoder {
 public:
  explicit GraphDecoder(const tiny_gguf::LanguageModel& spec, const std::string& path)
      : spec_(spec), backend_(ggml_backend_cpu_init()) {
    ggml_context* all = nullptr;
    file_.reset(gguf_init_from_file(path.c_str(), {false, &all}));
    weights_.reset(all);
    ggml_backend_cpu_set_n_threads(backend_.get(), 1);
  }

  // rows [n, d] at positions 0, 1, ...
  Decoded prefill(const std::vector<float>& rows, const std::vector<fastv::TokenSpan>& visual,
                  const std::vector<Config>& schedule) {
    const std::size_t d = spec_.hidden, n = rows.size() / d, nodes = 64 * spec_.layers + 512;
    context_.reset(
        ggml_init({nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
    graph_ = ggml_new_graph_custom(context_.get(), nodes, false);
    fastv::graph::Pruner pruner{fastv::Span<const Config>(schedule)};
    EXPECT_TRUE(pruner.begin({n, spec_.layers, visual}));

    ggml_tensor* const input =
        in(ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, spec_.hidden, static_cast<std::int64_t>(n)));
    ggml_tensor* const places = in(ggml_new_tensor_1d(context_.get(), GGML_TYPE_I32, static_cast<std::int64_t>(n)));
    ggml_tensor *hidden = input, *positions = places;
    std::vector<ggml_tensor*> kept, scores, masks;
    std::size_t stage = 0;
    for (std::uint32_t layer = 0; layer < spec_.layers; ++layer) {
      if (stage < schedule.size() && schedule[stage].filtering_layer == layer) {
        scores.push_back(out(
            *fastv::graph::scores(context_.get(), query_, ggml_cast(context_.get(), keys_, GGML_TYPE_F32), scale())));
        kept.push_back(out(*pruner.select(context_.get(), scores.back())));
        hidden = ggml_get_rows(context_.get(), hidden, kept.back());
        positions = *fastv::graph::gather_positions(context_.get(), positions, 1, kept.back());
        ++stage;
      }
      if (masks.empty() || masks.back()->ne[0] != hidden->ne[1])
        masks.push_back(in(ggml_new_tensor_2d(context_.get(), GGML_TYPE_F16, hidden->ne[1], hidden->ne[1])));
      hidden = block(layer, hidden, positions, masks.back());
    }
    hidden = ggml_view_2d(context_.get(), hidden, hidden->ne[0], 1, hidden->nb[1],
                          static_cast<std::size_t>(hidden->ne[1] - 1) * hidden->nb[1]);
    ggml_tensor* logits =
        out(ggml_mul_mat(context_.get(), weight("output.weight"), norm(hidden, weight("output_norm.weight"))));

    const ggml_gallocr_ptr memory(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend_.get())));
    EXPECT_TRUE(ggml_gallocr_alloc_graph(memory.get(), graph_));
    ggml_backend_tensor_set(input, rows.data(), 0, ggml_nbytes(input));
    std::vector<std::int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    ggml_backend_tensor_set(places, order.data(), 0, ggml_nbytes(places));
    for (ggml_tensor* mask : masks) {
      const auto m = static_cast<std::size_t>(mask->ne[0]);
      std::vector<ggml_fp16_t> causal(m * m, ggml_fp32_to_fp16(-INFINITY));
      for (std::size_t row = 0; row < m; ++row)
        std::fill_n(causal.begin() + static_cast<std::ptrdiff_t>(row * m), row + 1, ggml_fp32_to_fp16(0));
      ggml_backend_tensor_set(mask, causal.data(), 0, ggml_nbytes(mask));
    }
    EXPECT_TRUE(pruner.set_inputs([](ggml_tensor* tensor, const void* data, std::size_t bytes) {
      ggml_backend_tensor_set(tensor, data, 0, bytes);
    }));
    EXPECT_EQ(ggml_backend_graph_compute(backend_.get(), graph_), GGML_STATUS_SUCCESS);

    Decoded decoded;
    decoded.logits = read<float>(logits);
    decoded.kept.resize(n);
    std::iota(decoded.kept.begin(), decoded.kept.end(), Index{0});
    for (std::size_t i = 0; i < kept.size(); ++i) {
      std::vector<Index> left;
      for (const std::int32_t index : read<std::int32_t>(kept[i]))
        left.push_back(decoded.kept[static_cast<std::size_t>(index)]);
      decoded.kept = std::move(left);
      decoded.scores.push_back(read<float>(scores[i]));
    }
    return decoded;
  }

 private:
  ggml_tensor* weight(const std::string& name) const { return ggml_get_tensor(weights_.get(), name.c_str()); }
  float scale() const { return 1 / std::sqrt(static_cast<float>(spec_.hidden / spec_.heads)); }
  ggml_tensor* in(ggml_tensor* tensor) {
    ggml_set_input(tensor);
    return tensor;
  }
  ggml_tensor* out(ggml_tensor* tensor) {
    ggml_set_output(tensor);
    ggml_build_forward_expand(graph_, tensor);
    return tensor;
  }
  template <class T>
  static std::vector<T> read(const ggml_tensor* tensor) {
    std::vector<T> values(ggml_nbytes(tensor) / sizeof(T));
    ggml_backend_tensor_get(tensor, values.data(), 0, values.size() * sizeof(T));
    return values;
  }
  ggml_tensor* norm(ggml_tensor* x, ggml_tensor* by) {
    return ggml_mul(context_.get(), ggml_rms_norm(context_.get(), x, spec_.rms_eps), by);
  }

  // hidden [d, n], positions [n], mask [n, n]. Leaves the layer's queries [c, H, n] and keys [c, G, n], after RoPE.
  ggml_tensor* block(std::uint32_t layer, ggml_tensor* hidden, ggml_tensor* positions, ggml_tensor* mask) {
    ggml_context* ctx = context_.get();
    const std::string at = "blk." + std::to_string(layer) + ".";
    const std::int64_t c = spec_.hidden / spec_.heads, n = hidden->ne[1];
    const auto heads = [&](ggml_tensor* x, const char* name, std::int64_t count) {
      return ggml_reshape_3d(ctx, ggml_mul_mat(ctx, weight(at + name), x), c, count, n);
    };
    const auto rope = [&](ggml_tensor* x) {
      return ggml_rope_ext(ctx, x, positions, nullptr, static_cast<int>(c), GGML_ROPE_TYPE_NORMAL,
                           static_cast<int>(spec_.context), spec_.rope_base, 1, 0, 1, 32, 1);
    };
    const auto attended = [&](ggml_tensor* x) {
      return ggml_permute(ctx, ggml_cast(ctx, x, GGML_TYPE_F16), 0, 2, 1, 3);
    };
    ggml_tensor* x = norm(hidden, weight(at + "attn_norm.weight"));
    query_ = rope(heads(x, "attn_q.weight", spec_.heads));
    keys_ = rope(heads(x, "attn_k.weight", spec_.kv_heads));
    ggml_tensor* attention =
        ggml_flash_attn_ext(ctx, ggml_permute(ctx, query_, 0, 2, 1, 3), attended(keys_),
                            attended(heads(x, "attn_v.weight", spec_.kv_heads)), mask, scale(), 0, 0);  // [c, H, n]
    ggml_prec_set_acc(attention, GGML_PREC_F32);
    hidden = ggml_add(
        ctx, hidden,
        ggml_mul_mat(ctx, weight(at + "attn_output.weight"), ggml_reshape_2d(ctx, attention, c * spec_.heads, n)));
    x = norm(hidden, weight(at + "ffn_norm.weight"));
    x = ggml_swiglu_split(ctx, ggml_mul_mat(ctx, weight(at + "ffn_gate.weight"), x),
                          ggml_mul_mat(ctx, weight(at + "ffn_up.weight"), x));
    return ggml_add(ctx, hidden, ggml_mul_mat(ctx, weight(at + "ffn_down.weight"), x));
  }

  tiny_gguf::LanguageModel spec_;
  gguf_context_ptr file_;
  ggml_context_ptr weights_, context_;
  ggml_backend_ptr backend_;
  ggml_cgraph* graph_ = nullptr;
  ggml_tensor *query_ = nullptr, *keys_ = nullptr;
};

tiny_gguf::LanguageModel spec_of() {
  tiny_gguf::LanguageModel spec;
  spec.layers = 6;
  spec.kv_heads = 2;
  return spec;
}

// Random rows for text too, so that graph and llama_decode are handed the same.
llava::Prompt prompt_of(const llava::Halves& halves) {
  return prompts::Builder(halves, 10).picture(8).picture(9).picture(8).prompt;
}

class InAGraph : public testing::TestWithParam<std::vector<std::size_t>> {};

TEST_P(InAGraph, PrunesAsTheCoreDoesAndDecodesAsLlamaDecodeDoes) {
  const std::string& path = prompts::model_file(spec_of(), "llama_graph");
  const llava::Halves halves(path);
  const llava::Prompt prompt = prompt_of(halves);
  std::vector<float> rows;
  for (const llava::Piece& piece : prompt.pieces) rows.insert(rows.end(), piece.rows.begin(), piece.rows.end());
  const std::vector<fastv::TokenSpan> visual = {{64, 81, 9}};  // the first and the last stand for text

  std::vector<Config> schedule;
  for (const std::size_t k : GetParam()) {
    schedule.emplace_back();
    schedule.back().filtering_layer = k;
    schedule.back().filtering_ratio = 0.3;
  }
  GraphDecoder decoder(spec_of(), path);
  const Decoded decoded = decoder.prefill(rows, visual, schedule);
  const fastv::Plan plan = *fastv::make_plan(schedule, {prompt.tokens(), spec_of().layers, visual});
  EXPECT_EQ(decoded.kept.size(), plan.kept());

  oracle::Llama llama(path, 1, 512, 512, schedule.size() == 1);
  if (schedule.size() == 1) llama.hide_all_but(schedule[0].filtering_layer, decoded.kept, prompt.tokens());
  if (schedule.size() < 2) {
    const std::vector<float> expected = llama.prefill(prompt);
    EXPECT_LE(largest_difference(decoded.logits.data(), expected), 1e-3);
  }
  // The kept tokens are the core's on the same scores, stage by stage.
  std::vector<fastv::TokenSpan> spans = visual;
  std::vector<Index> kept(prompt.tokens());
  std::iota(kept.begin(), kept.end(), Index{0});
  for (std::size_t i = 0; i < schedule.size(); ++i) {
    std::vector<float> scores;
    fastv::for_each_visual(fastv::Span<const fastv::TokenSpan>(spans),
                           [&](std::size_t, std::size_t token) { scores.push_back(decoded.scores[i][token]); });
    fastv::Pruner<float> pruner(schedule[i]);
    const fastv::Kept chosen = pruner.prune(fastv::Scores<float>{scores, kept.size()}, spans);
    ASSERT_TRUE(chosen) << chosen.message().c_str();
    std::vector<Index> left;
    for (const Index index : chosen) left.push_back(kept[index]);
    kept = left;
    std::vector<fastv::TokenSpan> next(spans.size());
    next.resize(*fastv::next_spans(chosen, spans, next));
    spans = next;
  }
  EXPECT_EQ(decoded.kept, kept);
}

INSTANTIATE_TEST_SUITE_P(Schedules, InAGraph,
                         testing::Values(std::vector<std::size_t>{}, std::vector<std::size_t>{1},
                                         std::vector<std::size_t>{2}, std::vector<std::size_t>{5},
                                         std::vector<std::size_t>{2, 4}));

}  // namespace
