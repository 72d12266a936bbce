// BatchPruner: every sequence comes out as a Pruner alone gives it, whatever is wrong with its neighbours.
#include "views.hpp"

namespace {

using namespace fuzz;

struct Sequence {
  oracle::Layout prompt;
  Block<TokenSpan> visual{0};
  Block<Index> prior{0};
  fastv::QueryKey<float> evidence{};
};

}  // namespace

FASTV_FUZZ_TARGET(batch) {
  constexpr std::size_t heads = 2, dim = 4;
  const Block<float> query(heads * dim), keys(400 * dim);
  oracle::Rng rng = in.random();
  for (float& x : query) x = static_cast<float>(rng.real(-1, 1));
  for (float& x : keys) x = static_cast<float>(rng.real(-1, 1));
  const float hidden = -oracle::infinity();
  const Block<float> hide_all(400, hidden);
  fastv::BatchPruner<float> pruner;
  FUZZ_CHECK(pruner.scores(0).empty());
  for (std::size_t rounds = in.between(1, 2); rounds > 0; --rounds) {  // the second finds memory that has been used
    std::vector<Sequence> sequences(in.below(5));
    std::vector<fastv::Request> requests;
    std::size_t first = 0;
    bool sorted = true;
    for (Sequence& s : sequences) {
      s.prompt = layout(in, 2, 20, !in.one_in(5));
      fastv::Config settings = config(in, 40);
      settings.selection = static_cast<fastv::Selection>(in.one_in(3) ? in.between(1, 2) : 0);
      if (in.one_in(8)) settings.filtering_ratio = in.hostile_real();
      if (in.one_in(5)) settings.window_rows = settings.window_columns = in.between(1, 3);
      own_ratios(in, settings, s.prompt.visual);
      if (in.one_in(8) && !s.prompt.visual.empty()) {
        TokenSpan& span = s.prompt.visual[in.below(s.prompt.visual.size())];
        (in.chance() ? span.first : span.count) = in.hostile();
      }
      s.visual = Block<TokenSpan>(s.prompt.visual);
      s.evidence = fastv::query_key(fastv::heads(query.data(), fastv::TokenMajor{1, heads, dim}),
                                    fastv::heads(keys.data(), fastv::TokenMajor{s.prompt.tokens, 1, dim}), 0.5f);
      if (in.one_in(4)) {  // the last row again
        s.prior = Block<Index>(1, static_cast<Index>(s.prompt.tokens - 1));
        settings.prior_rows = s.prior.view();
      }
      switch (in.below(16)) {
        case 0: s.evidence.query.heads = in.hostile() | 1; break;  // odd: the only KV head allows any
        case 1: s.evidence.key.tokens = in.hostile(); break;
        case 2: s.evidence.key.dim = static_cast<std::size_t>(-1) - in.below(99); break;
        case 3: s.evidence.scale = 0; break;
        case 4: s.evidence.key.data = nullptr; break;
        case 5: s.evidence.bias = {hide_all.data(), s.prompt.tokens}; break;  // every score is 0
        default: break;
      }
      // Heads that no buffer backs cannot be told from those that are there, unless there are more than can be.
      fastv::QueryKey<float>& e = s.evidence;
      if (e.query.heads <= fastv::max_tokens && e.query.heads != heads) e.query.heads = 0;
      if (e.key.tokens != s.prompt.tokens && e.key.tokens <= fastv::max_tokens) e.key.tokens = 0;
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
    if (!batch) {
      FUZZ_CHECK(pruner.scores(0).empty() && batch.indices.empty());
      continue;
    }
    std::size_t failed = 0, at = 0;
    FUZZ_CHECK(batch.sequences.size() == requests.size() && batch.cumulative.size() == requests.size() + 1);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const fastv::Request& request = requests[i];
      fastv::Pruner<float> alone(request.visual.empty() ? fastv::Config{} : request.config);
      const fastv::Kept kept = sequences[i].prompt.visual_tokens() == 0  // then evidence is not looked at
                                   ? alone.prune(fastv::NoEvidence{request.tokens}, request.visual)
                                   : alone.prune(sequences[i].evidence, request.visual);
      // Alone, the length of the prompt is the evidence's own, and text alone passes whatever the settings.
      const bool length = request.visual.empty() || sequences[i].evidence.prompt_tokens() == request.tokens;
      const fastv::Kept& ours = batch.sequences[i];
      check_message(ours.status);
      const bool fine = length && kept;
      FUZZ_CHECK(static_cast<bool>(ours) == fine);
      if (kept.code() == Errc::bad_value) FUZZ_CHECK(ours.code() == kept.code());
      failed += fine ? 0u : 1u;
      FUZZ_CHECK(batch.cumulative[i] == at && ours.prompt_tokens == request.tokens);
      FUZZ_CHECK(ours.size() == (fine ? kept.size() : request.tokens));
      const fastv::KeptRows rows = batch.sequence(i);
      FUZZ_CHECK(rows.status && rows.prompt_tokens == request.tokens && rows.indices.data() == ours.indices.data());
      for (std::size_t t = 0; t < ours.size(); ++t) {
        FUZZ_CHECK(ours.indices[t] == (fine ? kept.indices[t] : t));
        FUZZ_CHECK(batch.indices[at + t] == request.first + ours.indices[t]);
      }
      at += ours.size();
      const std::size_t scored = fine && !request.visual.empty() ? alone.scores().size() : 0;
      FUZZ_CHECK(pruner.scores(i).size() == scored);
      for (std::size_t t = 0; t < scored; ++t) FUZZ_CHECK(pruner.scores(i)[t] == alone.scores()[t]);
      FUZZ_CHECK(ours.nan_scores == (fine ? kept.nan_scores : 0));
      FUZZ_CHECK(ours.zero_scores == (fine ? kept.zero_scores : 0));
    }
    FUZZ_CHECK(batch.failed == failed && batch.size() == at && batch.cumulative[requests.size()] == at);
    FUZZ_CHECK(pruner.scores(requests.size()).empty());
    const fastv::KeptRows all = batch;
    FUZZ_CHECK(all.status && all.prompt_tokens == fastv::KeptRows::unknown && all.indices.size() == at);
  }
}
