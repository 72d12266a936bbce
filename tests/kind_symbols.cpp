// All of the core, used. kinds.sh compiles it for two machines, as MACHINE, and looks for functions that both objects
// define: of those the linker would keep one, whichever it meets first.
#include "fastv/fastv.hpp"

namespace MACHINE {

using namespace fastv;

struct Own {  // evidence of the user's own
  std::size_t tokens;
  std::size_t prompt_tokens() const { return tokens; }
  template <class Score>
  Status score(Span<const TokenSpan> visual, Span<Score> scores) const {
    for_each_visual(visual, [&](std::size_t i, std::size_t position) { scores[i] = static_cast<Score>(position); });
    return {};
  }
};

template <class Score, class Evidence>
std::size_t pruned(const Evidence& evidence, Span<const TokenSpan> visual) {
  Pruner<Score> pruner;
  const Status room = pruner.reserve(1000, 3, 32, 128, 10);
  if (!room || !pruner.due(2)) return room.message().text[0] != 0 ? 1 : 0;
  const Kept kept = pruner.prune(evidence, visual);
  BatchPruner<Score> batch_pruner;
  const Request request{{}, visual, 0, evidence.prompt_tokens()};
  const KeptBatch batch = batch_pruner.prune(Span<const Request>(&request, 1), [&](std::size_t) { return evidence; });
  Score scores[64];
  static float scratch[1 << 16];
  const Status status = score(Config{}, evidence, visual, Span<Score>(scores), Span<float>(scratch));
  std::size_t sum =
      kept.size() + kept.dropped() + batch.size() + pruner.scores().size() + batch_pruner.scores(0).size();
  for (const Index index : kept) sum += index;
  return sum + (status ? 1u : 0u) + static_cast<std::size_t>(kept.message().c_str()[0]) +
         static_cast<std::size_t>(batch.message().c_str()[0]);
}

template <class T>
std::size_t of_type(const T* data, Span<const TokenSpan> visual, Span<Index> table) {
  const auto query = heads(data, TokenMajor{1, 8, 64});
  const auto loaded = loaded_keys(2, 40, 64, [=](std::size_t, std::size_t token, float* out) {
    for (std::size_t d = 0; d < 64; ++d) out[d] = static_cast<float>(to_float(data[token * 64 + d]));
  });
  const T* blocks[4] = {data, data, data, data};
  const Span<const Index> read_table(table.data(), table.size());
  std::size_t sum = 0;
  const auto all = [&](const auto& evidence) { sum += pruned<float>(evidence, visual); };
  all(probabilities(data, 8, 1, 40));
  all(query_key(query, heads(data, TokenMajor{40, 2, 64}), 0.1f));
  all(query_key(query, heads(data, HeadMajor{2, 16, 64}, read_table, 40), 0.1f));
  all(query_key(query, heads(data, ChunkedHeadMajor{2, 8, 16, 8}, read_table, 40), 0.1f));
  all(query_key(query, heads(Span<const T* const>(blocks), HeadMajor{2, 16, 64}, 40), 0.1f));
  all(query_key(query, loaded, 0.1f));
  all(KeysOnly{heads(data, HeadMajor{2, 40, 64})});
  all(KeysOnly{loaded, 3});
  all(Scores<T>{{data, 10}, 40});
  static float out[2 * 40 * 64];
  const Rope rope{Span<const float>(out, 32), read_table};
  sum += unrotate(heads(data, HeadMajor{2, 40, 64}), rope, Span<float>(out)) ? 1u : 0u;
  sum += value_norms(loaded, visual, Span<float>(out)) ? 1u : 0u;
  Index raters[8];
  sum += *text_raters(data, 40, 64, 64, visual, {30, 8}, Span<Index>(raters), Span<float>(out));
  SoftmaxPart parts[8];
  const auto evidence = query_key(query, heads(data, TokenMajor{40, 2, 64}), 0.1f);
  sum += score_shard(evidence, visual, Span<SoftmaxPart>(parts), Span<float>(out), Span<float>(out)) ? 1u : 0u;
  sum += merge_shards(Span<const SoftmaxPart>(parts), 1, 0, Span<const float>(out), Span<float>(out)) ? 1u : 0u;
  return sum;
}

std::size_t everything(const void* data, Span<const TokenSpan> visual, Span<Index> table, void* out);
std::size_t everything(const void* data, Span<const TokenSpan> visual, Span<Index> table, void* out) {
  std::size_t sum = of_type(static_cast<const float*>(data), visual, table) +
                    of_type(static_cast<const half*>(data), visual, table) +
                    of_type(static_cast<const bfloat16*>(data), visual, table) + pruned<float>(Own{40}, visual) +
                    pruned<double>(Scores<double>{{static_cast<const double*>(data), 10}, 40}, visual) +
                    pruned<float>(NoEvidence{40}, visual);
  const Result<Plan> plan = make_plan(Config{}, Prompt{40, 32, visual});
  const KeptRows kept(table, 40);
  sum += plan->kept() + plan->kv_length(3, 4) + plan->next_position(2) + plan->visual_in_layer(7) + plan->groups();
  sum += compact(kept, rows(out, 40, 64)) ? 1u : 0u;
  sum += compact(kept, Span<Index>(table)) ? 1u : 0u;
  sum += gather(kept, rows(out, 40, 64), rows(out, 40, 64)) ? 1u : 0u;
  sum += compact_mask(kept, rows(out, 40, 40)) ? 1u : 0u;
  sum += compact(kept, position_axes(table.data(), 3, 40)) ? 1u : 0u;
  const KvPages cache = pages(static_cast<float*>(out), HeadMajor{2, 16, 64}, table, 40);
  sum += *compact_pages(kept, cache) + repack_pages(kept, Span<const KvPages>(&cache, 1))->used.size();
  sum += gather_pages(kept, cache, cache) ? 1u : 0u;
  sum += write_indices(kept, table) ? 1u : 0u;
  sum += keep_bias(kept, Span<float>(static_cast<float*>(out), 40), -1.0f) ? 1u : 0u;
  sum += visible_tokens(visual, 40, table) ? 1u : 0u;
  TokenSpan left[4];
  return sum + *next_spans(kept, visual, Span<TokenSpan>(left));
}

}  // namespace MACHINE
