// What shapes show is refused in one sentence, before anything is queued.
#include "batches.hpp"

namespace {

using namespace batches;

constexpr std::size_t tokens = 40, heads = 4, kv_heads = 2, dim = 16, layers = 8;

// A batch of one sequence that is right, to be spoilt.
struct Right {
  Config config;
  std::vector<TokenSpan> visual{{3, 30}};
  std::vector<float> query, key;
  cuda::Limits limits;
  cuda::Request request;
  cuda::QueryKey<float> evidence;

  Right() : query(tokens * heads * dim, 0.5f), key(tokens * kv_heads * dim, 0.25f) {
    limits.tokens = tokens;
    limits.heads = heads;
    request = {config, visual, 0, tokens};
    evidence = cuda::query_key(cuda::heads(query.data(), TokenMajor{tokens, heads, dim}),
                               cuda::heads(key.data(), TokenMajor{tokens, kv_heads, dim}), 0.25f);
  }
};

// What the first call that fails says; nothing is queued by it.
template <class Spoil>
std::pair<Errc, std::string> said(const Spoil& spoil) {
  Right right;
  spoil(right);
  Rng rng(1);
  emulation::Queue queue(rng);
  emulation::Pruner pruner;
  std::size_t launches = emulation::Queue::launches();
  Status status = pruner.reserve(right.limits);
  if (status) status = pruner.plan(Span<const cuda::Request>(&right.request, 1), layers, queue);
  if (status) {
    launches = emulation::Queue::launches();
    status = pruner.prune(0, right.evidence, queue);
  }
  if (!status) {
    EXPECT_EQ(emulation::Queue::launches(), launches) << "something was queued";
  }
  return {status.code, message(status)};
}

#define EXPECT_SAYS(code, sentence, ...)                                      \
  do {                                                                        \
    const auto [found, text] = said([](Right& r) { __VA_ARGS__; });           \
    EXPECT_EQ(found, Errc::code) << text;                                     \
    EXPECT_NE(text.find(sentence), std::string::npos) << "it said: " << text; \
  } while (false)

TEST(CudaErrors, ARightBatchPasses) {
  EXPECT_EQ(said([](Right&) {}).first, Errc::ok);
}

TEST(CudaErrors, Limits) {
  EXPECT_SAYS(bad_setting, "Limits::tokens is 0", r.limits.tokens = 0);
  EXPECT_SAYS(bad_setting, "Limits::sequences is 0", r.limits.sequences = 0);
  EXPECT_SAYS(bad_setting, "Limits::stages is 9: use 1 to 8", r.limits.stages = 9);
  EXPECT_SAYS(bad_setting, "65536 rows but a launch has at most 65535", r.limits.rows = 65536);
  EXPECT_SAYS(bad_setting, "room beyond 16777216", r.limits.keys = std::size_t{1} << 40);
  EXPECT_SAYS(too_small, "the batch has 40 rows but there is room for 39", r.limits.tokens = 39, r.limits.keys = 40);
  EXPECT_SAYS(too_small, "30 visual tokens but there is room for 20", r.limits.visual = 20);
  EXPECT_SAYS(too_small, "there is room for 4 and 39", r.limits.keys = 39);
  EXPECT_SAYS(too_small, "there are 4 query heads and 40 keys", r.limits.heads = 3);
}

TEST(CudaErrors, Requests) {
  EXPECT_SAYS(bad_setting, "filtering_layer is 8", r.request.config.filtering_layer = 8);
  EXPECT_SAYS(bad_prompt, "visual span 0 ends before position 50", r.visual[0].count = 47);
  EXPECT_SAYS(bad_prompt, "the last prompt token", r.visual[0].count = 37);
  EXPECT_SAYS(bad_shape, "41 query rows at hand but 40 tokens", r.request.queries = 41);
  EXPECT_SAYS(bad_shape, "first_key 40 but 40 tokens", r.request.first_key = 40);
  static const std::vector<Index> listed{1, 39};
  EXPECT_SAYS(missing_evidence, "the row of prompt position 1", r.request.queries = 1,
              r.request.config.score_rows = ScoreRows::listed, r.request.config.listed_rows = listed);
  static const std::vector<Index> prior{2};
  EXPECT_SAYS(missing_evidence, "the row of prompt position 2", r.request.queries = 1,
              r.request.config.prior_rows = prior);
  static std::vector<TokenSpan> two{{0, 10}, {12, 10}};
  static std::vector<Config> pooled(1);
  EXPECT_SAYS(not_supported, "min_per_image behind a stage that pools", r.request.visual = two, r.limits.stages = 2,
              r.request.config.quota = Quota::pooled, pooled[0] = r.request.config, pooled[0].filtering_layer = 4,
              pooled[0].min_per_image = 1, pooled[0].keep_count = 5, r.request.later = pooled);
  EXPECT_SAYS(too_small, "more different filtering layers than the 1", pooled[0] = {}, pooled[0].filtering_layer = 4,
              r.request.later = pooled);
}

TEST(CudaErrors, Evidence) {
  EXPECT_SAYS(null_data, "the pointer to key is null", r.evidence.key.layout.data = nullptr);
  EXPECT_SAYS(bad_shape, "key has 39 rows but the batch reaches up to row 40", r.evidence.key.layout.tokens = 39);
  EXPECT_SAYS(bad_shape, "query has 1 rows", r.evidence.query.layout.tokens = 1);
  EXPECT_SAYS(not_supported, "head dimension 577 but at most 576", r.evidence.key.layout.dim = 577);
  EXPECT_SAYS(bad_shape, "the head dimension of query is 16 but that of key is 8", r.evidence.key.layout.dim = 8);
  EXPECT_SAYS(bad_shape, "which key's 3 KV heads do not divide",
              r.evidence.key = cuda::heads(r.key.data(), TokenMajor{tokens, 3, dim}));
  EXPECT_SAYS(bad_setting, "scale is -1", r.evidence.scale = -1);
  EXPECT_SAYS(bad_setting, "soft_cap is -1", r.evidence.soft_cap = -1);
  EXPECT_SAYS(bad_stride, "the token stride of key is 8 but its entries reach over",
              r.evidence.key.layout.token_stride = 8);
  EXPECT_SAYS(bad_shape, "heads_total is 2", r.evidence.heads_total = 2);
  EXPECT_SAYS(missing_evidence, "4 of 8 heads, whose scores are partial sums", r.evidence.heads_total = 8);
  EXPECT_SAYS(bad_setting, "Rope has 9 pairs", r.evidence.rope.pairs = 9);
  EXPECT_SAYS(null_data, "Rope::frequencies", r.evidence.rope.pairs = 8);
  static const std::int32_t table[4] = {};
  EXPECT_SAYS(bad_pages, "have 2 pages but 3 are needed",
              r.evidence.key = cuda::heads(r.key.data(), TokenMajor{16, kv_heads, dim}, table, 2));
  EXPECT_SAYS(bad_pages, "hold 0 tokens",
              r.evidence.key = cuda::heads(r.key.data(), TokenMajor{0, kv_heads, dim}, table, 4));
}

TEST(CudaErrors, OtherEvidenceAndStages) {
  Right right;
  Rng rng(1);
  emulation::Queue queue(rng);
  emulation::Pruner pruner;
  const Span<const cuda::Request> requests(&right.request, 1);
  EXPECT_EQ(pruner.plan(requests, layers, queue).code, Errc::too_small) << "no memory yet";
  ASSERT_TRUE(pruner.reserve(right.limits));
  EXPECT_EQ(pruner.prune(0, right.evidence, queue).code, Errc::bad_setting) << "no plan yet";
  ASSERT_TRUE(pruner.plan(requests, layers, queue));
  EXPECT_EQ(pruner.prune(1, right.evidence, queue).code, Errc::bad_setting);
  EXPECT_EQ(pruner.prune(0, cuda::NoEvidence{}, queue).code, Errc::missing_evidence);
  EXPECT_EQ(pruner.prune(0, cuda::Scores{nullptr}, queue).code, Errc::null_data);
  std::vector<float> p(heads * tokens * tokens);
  EXPECT_EQ(pruner.prune(0, cuda::probabilities(p.data(), heads, tokens, tokens - 1), queue).code, Errc::bad_shape);
  EXPECT_EQ(pruner.prune(0, cuda::probabilities(p.data(), heads, tokens - 1, tokens), queue).code, Errc::bad_shape);
  right.request.config.score_rows = ScoreRows::all;
  ASSERT_TRUE(pruner.plan(requests, layers, queue));
  EXPECT_EQ(pruner.prune(0, cuda::Scores{p.data()}, queue).code, Errc::missing_evidence);

  // Memory of the caller's.
  const std::size_t needed = *emulation::Pruner::bytes(right.limits);
  void* memory = *emulation::Queue::allocate(needed + 256);
  EXPECT_EQ(pruner.reserve(right.limits, memory, needed - 1).code, Errc::too_small);
  EXPECT_EQ(pruner.reserve(right.limits, static_cast<char*>(memory) + 8, needed).code, Errc::bad_stride);
  EXPECT_TRUE(pruner.reserve(right.limits, memory, needed));
  right.request.config.score_rows = ScoreRows::last;
  ASSERT_TRUE(pruner.plan(requests, layers, queue));
  EXPECT_TRUE(pruner.prune(0, right.evidence, queue));
  const std::size_t kept = pruner.kept(0).total;

  // Tensors to gather.
  std::vector<float> from(tokens * 4), to(tokens * 4);
  const auto gather = [&](const Rows& a, const Rows& b) {
    const std::size_t before = emulation::Queue::launches();
    const Status status = pruner.gather(0, {{a, b}}, queue);
    EXPECT_EQ(emulation::Queue::launches() - before, status ? 1u : 0u);
    return status.code;
  };
  EXPECT_EQ(gather(rows(from.data(), tokens, 4), rows(to.data(), kept, 4)), Errc::ok);
  EXPECT_EQ(gather(rows(from.data(), tokens - 1, 4), rows(to.data(), kept, 4)), Errc::bad_shape);
  EXPECT_EQ(gather(rows(from.data(), tokens, 4), rows(to.data(), kept - 1, 4)), Errc::too_small);
  EXPECT_EQ(gather(rows(from.data(), tokens, 4), rows(to.data(), kept, 3)), Errc::bad_shape);
  EXPECT_EQ(gather(rows(from.data(), tokens, 4), rows(from.data(), kept, 4)), Errc::bad_shape) << "in place";
  EXPECT_EQ(gather(rows(static_cast<float*>(nullptr), tokens, 4), rows(to.data(), kept, 4)), Errc::null_data);
  EXPECT_EQ(gather(rows(from.data(), tokens, 4, 2), rows(to.data(), kept, 4)), Errc::bad_stride);
  EXPECT_TRUE(pruner.reserve(right.limits));
  std::free(memory);
}

}  // namespace
