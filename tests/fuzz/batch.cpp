// BatchPruner: every sequence comes out as a Pruner alone gives it, whatever is wrong with its neighbours.
#include "views.hpp"

namespace {

using namespace fuzz;

struct Sequence {
  oracle::Layout prompt;
  Block<TokenSpan> visual{0};
  fastv::QueryKey<float> evidence{};
};

}  // namespace

FASTV_FUZZ_TARGET(batch) {
  constexpr std::size_t heads = 2, dim = 4;
  const Block<float> query(heads * dim), keys(400 * dim);
  oracle::Rng rng = in.random();
  for (float& x : query) x = static_cast<float>(rng.real(-1, 1));
  for (float& x : keys) x = static_cast<float>(rng.real(-1, 1));
  fastv::BatchPruner<float> pruner;
  for (std::size_t rounds = in.between(1, 2); rounds > 0; --rounds) {  // the second finds memory that has been used
    std::vector<Sequence> sequences(in.below(5));
    std::vector<fastv::Request> requests;
    std::size_t first = 0;
    bool sorted = true;
    for (Sequence& s : sequences) {
      s.prompt = layout(in, 2, 20);
      if (in.one_in(8) && !s.prompt.visual.empty()) {
        TokenSpan& span = s.prompt.visual[in.below(s.prompt.visual.size())];
        (in.chance() ? span.first : span.count) = in.hostile();
      }
      s.visual = Block<TokenSpan>(s.prompt.visual);
      s.evidence = fastv::query_key(query.data(), heads, 1, keys.data(), 1, s.prompt.tokens, dim, 0.5f,
                                    fastv::KvLayout::token_major);
      fastv::Config settings = config(in, 40);
      settings.selection = static_cast<fastv::Selection>(in.one_in(3) ? in.between(1, 2) : 0);
      if (in.one_in(8)) settings.filtering_ratio = in.hostile_real();
      switch (in.below(16)) {
        case 0: s.evidence.heads = in.hostile() | 1; break;  // odd: the only KV head allows any
        case 1: s.evidence.keys = in.hostile(); break;
        case 2: s.evidence.dim = static_cast<std::size_t>(-1) - in.below(99); break;
        case 3: s.evidence.scale = 0; break;
        case 4: s.evidence.key = nullptr; break;
        default: break;
      }
      // Heads that no buffer backs cannot be told from those that are there, unless there are more than can be.
      if (s.evidence.heads <= fastv::max_tokens && s.evidence.heads != heads) s.evidence.heads = 0;
      if (s.evidence.keys != s.prompt.tokens && s.evidence.keys <= fastv::max_tokens) s.evidence.keys = 0;
      first += in.below(3);
      if (in.one_in(30)) first = in.hostile();
      sorted = sorted && (requests.empty() || first >= requests.back().first + requests.back().tokens) &&
               first <= fastv::max_tokens && s.prompt.tokens <= fastv::max_tokens - first;
      requests.push_back({settings, s.visual.view(), first, s.prompt.tokens});
      first += s.prompt.tokens;
    }
    const auto evidence_of = [&](std::size_t i) { return sequences[i].evidence; };
    const bool backwards = in.chance();
    const fastv::KeptBatch batch = backwards
                                       ? pruner.prune(Span<const fastv::Request>(requests), evidence_of, Backwards{})
                                       : pruner.prune(Span<const fastv::Request>(requests), evidence_of);
    check_message(batch.status);
    FUZZ_CHECK(static_cast<bool>(batch) == sorted);
    if (!batch) continue;
    std::size_t failed = 0, at = 0;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const fastv::Request& request = requests[i];
      fastv::Pruner<float> alone(request.config);
      fastv::Kept kept = request.visual.empty() ? alone.prune(fastv::NoEvidence{request.tokens}, request.visual)
                                                : alone.prune(sequences[i].evidence, request.visual);
      const bool length = request.visual.empty() || fastv::prompt_tokens(sequences[i].evidence) == request.tokens;
      // Alone, the length of the prompt is the evidence's own, and text alone passes whatever the settings.
      check_message(batch.statuses[i]);
      const bool fine = request.visual.empty() || (length && kept);
      FUZZ_CHECK(static_cast<bool>(batch.statuses[i]) == fine);
      failed += fine ? 0u : 1u;
      const Span<const Index> ours = batch.sequence(i);
      FUZZ_CHECK(batch.cumulative[i] == at && ours.data() == batch.indices.data() + at);
      at += ours.size();
      const bool whole = !fine || request.visual.empty();
      FUZZ_CHECK(ours.size() == (whole ? request.tokens : kept.size()));
      for (std::size_t t = 0; t < ours.size(); ++t)
        FUZZ_CHECK(ours[t] == request.first + (whole ? t : kept.indices[t]));
      const bool scored = fine && !whole && request.config.selection == fastv::Selection::top_k;
      FUZZ_CHECK(pruner.scores(i).size() == (scored ? alone.scores().size() : 0));
      for (std::size_t t = 0; t < pruner.scores(i).size(); ++t) FUZZ_CHECK(pruner.scores(i)[t] == alone.scores()[t]);
      FUZZ_CHECK(batch.nan_scores[i] == (fine && !whole ? kept.nan_scores : 0));
    }
    FUZZ_CHECK(batch.failed == failed && batch.indices.size() == at);
  }
}
