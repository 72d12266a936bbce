// What shapes show is refused in one sentence, before anything is queued. Every sentence of the headers is raised.
#include "../sentences.hpp"
#include "batches.hpp"

namespace errors_test {
namespace {

using namespace batches;

constexpr std::size_t tokens = 40, heads = 4, kv_heads = 2, dim = 16, layers = 8;

// A batch of one sequence that is right, to be spoilt.
struct Right {
  Config config;
  std::vector<TokenSpan> visual{{3, 30}};
  std::vector<float> query, key;
  cuda::Limits limits;
  cuda::Request requests[2];
  cuda::Request& request = requests[0];
  cuda::QueryKey<float> evidence;
  std::size_t sequences = 1;  // of requests

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
Status said(const Spoil& spoil) {
  Right right;
  spoil(right);
  Rng rng(1);
  emulation::Queue queue(rng);
  emulation::Pruner pruner;
  std::size_t launches = emulation::Queue::launches();
  Status status = pruner.reserve(right.limits);
  if (status) status = pruner.plan(Span<const cuda::Request>(right.requests, right.sequences), layers, queue);
  if (status) {
    launches = emulation::Queue::launches();
    status = pruner.prune(0, right.evidence, queue);
  }
  if (!status) {
    EXPECT_EQ(emulation::Queue::launches(), launches) << "something was queued";
  }
  return status;
}

// A call that fails, and what it must say.
struct Case {
  Errc code;
  std::string part;
  Status status;
};
using Cases = std::vector<Case>;
#define SAYS(code, part, ...)                             \
  Case {                                                  \
    Errc::code, part, said([](Right& r) { __VA_ARGS__; }) \
  }

Cases of_limits() {
  return {
      SAYS(bad_setting, "Limits::tokens is 0", r.limits.tokens = 0),
      SAYS(bad_setting, "Limits::sequences is 0", r.limits.sequences = 0),
      SAYS(bad_setting, "Limits::stages is 9: use 1 to 8", r.limits.stages = 9),
      SAYS(bad_setting, "65536 rows but a launch has at most 65535", r.limits.rows = 65536),
      SAYS(bad_setting, "room beyond 16777216", r.limits.keys = std::size_t{1} << 40),
      SAYS(bad_setting, "Limits::features is 1048577 but at most 1048576", r.limits.features = 1048577),
      SAYS(bad_setting, "16777216 visual tokens of which 16777216 compete, whose products take more than 128 GB",
           r.limits.visual = std::size_t{1} << 24, r.limits.features = 8),
      SAYS(too_small, "the batch has 40 rows but there is room for 39", r.limits.tokens = 39, r.limits.keys = 40),
      SAYS(too_small, "30 visual tokens but there is room for 20", r.limits.visual = 20),
      SAYS(too_small, "there is room for 4 and 39", r.limits.keys = 39),
      SAYS(too_small, "there are 4 query heads and 40 keys", r.limits.heads = 3),
  };
}

Cases of_requests() {
  static const std::vector<Index> listed{1, 39}, prior{2};
  static const std::vector<TokenSpan> two{{0, 10}, {12, 10}}, grid{{3, 30, 6}}, many{{0, 65537}};
  static const std::vector<std::size_t> past{std::size_t{0x7fffffff} - tokens};
  static std::vector<Config> pooled(1), schedule(8);
  return {
      SAYS(bad_prompt, "the batch has 0 sequences", r.sequences = 0),
      SAYS(bad_setting, "filtering_layer is 8", r.request.config.filtering_layer = 8),
      SAYS(bad_prompt, "visual span 0 ends before position 50", r.visual[0].count = 47),
      SAYS(bad_prompt, "the last prompt token", r.visual[0].count = 37),
      SAYS(bad_shape, "41 query rows at hand but 40 tokens", r.request.queries = 41),
      SAYS(bad_shape, "first_key 40 but 40 tokens", r.request.first_key = 40),
      SAYS(missing_evidence, "the row of prompt position 1", r.request.queries = 1,
           r.request.config.score_rows = ScoreRows::listed, r.request.config.listed_rows = listed),
      SAYS(missing_evidence, "the row of prompt position 2", r.request.queries = 1,
           r.request.config.prior_rows = prior),
      SAYS(not_supported, "min_per_image behind a stage that pools", r.request.visual = two, r.limits.stages = 2,
           r.request.config.quota = Quota::pooled, pooled[0] = r.request.config, pooled[0].filtering_layer = 4,
           pooled[0].min_per_image = 1, pooled[0].keep_count = 5, r.request.later = pooled),
      SAYS(too_small, "more different filtering layers than the 1", pooled[0] = {}, pooled[0].filtering_layer = 4,
           r.request.later = pooled),
      SAYS(bad_setting, "the schedule has 9 stages but at most 8", r.request.later = schedule),
      SAYS(too_small, "sequence 0 asks for Selection::diverse but Limits::features is 0",
           r.request.config.selection = Selection::diverse),
      SAYS(too_small, "30 visual tokens compete with each other under Selection::diverse but there is room for 29",
           r.request.config.selection = Selection::diverse, r.limits.features = 32, r.limits.competing = 29),
      SAYS(missing_evidence, "a request asks for Selection::diverse, which compares tokens by features",
           r.request.config.selection = Selection::diverse, r.limits.features = 32),
      SAYS(not_supported, "sequence 0 has 65537 visual tokens but at most 65536", r.request.visual = many,
           r.request.tokens = 65540, r.limits.tokens = 65540),
      SAYS(bad_shape, "with sequence 1 the batch has more keys than int32", r.sequences = r.limits.sequences = 2,
           r.limits.tokens = 2 * tokens, r.request.past = past, r.request.key_row = 0, r.requests[1] = r.request,
           r.requests[1].first = tokens),
      SAYS(bad_shape, "queries at row 4294967295 and its keys at row 0", r.request.query_row = 0xffffffffu),
      SAYS(too_small, "the batch has 2 spans but there is room for 1", r.request.visual = two, r.limits.spans = 1),
      SAYS(too_small, "raise Limits::groups (images and windows, 1 now)", r.limits.groups = 1, r.request.visual = grid,
           r.request.config.window_rows = 1, r.request.config.window_columns = 1),
  };
}

Cases of_evidence() {
  static const std::int32_t table[4] = {};
  static const unsigned char axis[8] = {};
  static const float numbers[8 * tokens] = {};
  return {
      SAYS(null_data, "the pointer to key is null", r.evidence.key.layout.data = nullptr),
      SAYS(bad_shape, "key has 39 rows but the batch reaches up to row 40", r.evidence.key.layout.tokens = 39),
      SAYS(bad_shape, "query has 1 rows", r.evidence.query.layout.tokens = 1),
      SAYS(bad_shape, "key has 0 heads", r.evidence.key.layout.heads = 0),
      SAYS(bad_shape, "key has 65536 heads", r.evidence.key.layout.heads = 65536),
      SAYS(bad_shape, "query has head dimension 0", r.evidence.query.layout.dim = 0),
      SAYS(not_supported, "head dimension 577 but at most 576", r.evidence.key.layout.dim = 577),
      SAYS(bad_shape, "chunks of 5 elements do not divide the head dimension of key, 16",
           r.evidence.key.layout.pages.chunk = 5),
      SAYS(not_supported, "query lies in pages or chunks", r.evidence.query.layout.pages.chunk = 8,
           r.evidence.query.layout.pages.chunk_stride = 8),
      SAYS(bad_shape, "the head dimension of query is 16 but that of key is 8", r.evidence.key.layout.dim = 8),
      SAYS(bad_shape, "which key's 3 KV heads do not divide",
           r.evidence.key = cuda::heads(r.key.data(), TokenMajor{tokens, 3, dim})),
      SAYS(bad_setting, "scale is -1", r.evidence.scale = -1),
      SAYS(bad_setting, "soft_cap is -1", r.evidence.soft_cap = -1),
      SAYS(bad_stride, "the token stride of key is 8 but its entries reach over",
           r.evidence.key.layout.token_stride = 8),
      SAYS(bad_shape, "heads_total is 2", r.evidence.heads_total = 2),
      SAYS(missing_evidence, "4 of 8 heads, whose scores are partial sums", r.evidence.heads_total = 8),
      SAYS(bad_shape, "key_scales has 4 heads of 1 but needs one scale for each of 2 KV heads",
           r.evidence.key_scales = cuda::heads(static_cast<const float*>(numbers), TokenMajor{tokens, 4, 1})),
      SAYS(bad_setting, "Rope has 9 pairs", r.evidence.rope.pairs = 9),
      SAYS(null_data, "Rope::frequencies", r.evidence.rope.pairs = 8),
      SAYS(null_data, "Rope::positions", r.evidence.rope.pairs = 8, r.evidence.rope.frequencies = numbers),
      SAYS(bad_setting, "Rope::axis_stride is 3 but an axis has 40 positions", r.evidence.rope.pairs = 8,
           r.evidence.rope.frequencies = numbers, r.evidence.rope.positions = table, r.evidence.rope.axis = axis,
           r.evidence.rope.axis_stride = 3),
      SAYS(bad_pages, "have 2 pages but 3 are needed",
           r.evidence.key = cuda::heads(r.key.data(), TokenMajor{16, kv_heads, dim}, table, 2)),
      SAYS(bad_pages, "hold 0 tokens",
           r.evidence.key = cuda::heads(r.key.data(), TokenMajor{0, kv_heads, dim}, table, 4)),
      SAYS(bad_pages, "key has 1099511627776 pages of 16 tokens",
           r.evidence.key = cuda::heads(r.key.data(), TokenMajor{16, kv_heads, dim}, table, std::size_t{1} << 40)),
      SAYS(null_data, "the block tables",
           r.evidence.key = cuda::heads(r.key.data(), TokenMajor{16, kv_heads, dim}, nullptr, 3)),
  };
}

// Other evidence, memory of the caller's and calls out of order, by one Pruner.
Cases of_calls() {
  Cases cases;
  Right right;
  Rng rng(1);
  emulation::Queue queue(rng);
  emulation::Pruner pruner;
  const Span<const cuda::Request> requests(&right.request, 1);
  const auto says = [&](Errc code, const char* part, const Status& status) { cases.push_back({code, part, status}); };
  says(Errc::too_small, "no memory yet: reserve() first", pruner.plan(requests, layers, queue));
  EXPECT_TRUE(pruner.reserve(right.limits));
  says(Errc::bad_setting, "no plan yet: plan() the batch first", pruner.prune(0, right.evidence, queue));
  EXPECT_TRUE(pruner.plan(requests, layers, queue));
  says(Errc::bad_setting, "stage 1 was asked for but the batch has 1", pruner.prune(1, right.evidence, queue));
  says(Errc::missing_evidence, "Selection::top_k needs scores", pruner.prune(0, cuda::NoEvidence{}, queue));
  says(Errc::null_data, "the pointer to scores", pruner.prune(0, cuda::Scores{nullptr}, queue));
  std::vector<float> p(heads * tokens * tokens, 0.5f);
  const auto map = [&](auto spoil) {
    auto attention = cuda::probabilities(p.data(), heads, tokens, tokens);
    spoil(attention);
    return pruner.prune(0, attention, queue);
  };
  says(Errc::bad_shape, "has 39 keys but the longest sequence has 40", map([](auto& a) { a.keys = 39; }));
  says(Errc::bad_shape, "has 39 query rows but a sequence has 40", map([](auto& a) { a.queries = 39; }));
  says(Errc::bad_shape, "the attention has 0 heads", map([](auto& a) { a.heads = 0; }));
  says(Errc::bad_shape, "has 4 heads but heads_total is 2", map([](auto& a) { a.heads_total = 2; }));
  says(Errc::bad_shape, "norm_heads is 3, which does not divide the 4 heads", map([&](auto& a) {
         a.value_norms = p.data();
         a.norm_heads = 3;
       }));
  right.request.config.score_rows = ScoreRows::all;
  EXPECT_TRUE(pruner.plan(requests, layers, queue));
  says(Errc::missing_evidence, "but scores have none: use ScoreRows::last",
       pruner.prune(0, cuda::Scores{p.data()}, queue));

  says(Errc::missing_evidence, "but keys alone have none", pruner.prune(0, cuda::KeysOnly{right.evidence.key}, queue));
  right.request.config.score_rows = ScoreRows::last;
  EXPECT_TRUE(pruner.plan(requests, layers, queue));
  says(Errc::null_data, "the pointer to key is null",
       pruner.prune(0, cuda::KeysOnly{cuda::heads(static_cast<const float*>(nullptr), TokenMajor{tokens, 2, 4})},
                    queue));

  // Features beside evidence that is right.
  right.request.config.selection = Selection::diverse;
  right.limits.features = kv_heads * dim;
  const std::vector<std::size_t> past{4};
  const auto compared = [&](std::size_t first_key, auto spoil) {
    right.request.past = past;
    right.request.first_key = first_key;
    EXPECT_TRUE(pruner.reserve(right.limits));
    EXPECT_TRUE(pruner.plan(requests, layers, queue));
    cuda::Features<float> features{cuda::heads(p.data(), TokenMajor{tokens + 4, kv_heads, dim})};
    spoil(features);
    const std::size_t before = emulation::Queue::launches();
    const Status status = pruner.prune(0, cuda::with_features(cuda::Scores{p.data()}, features), queue);
    EXPECT_EQ(emulation::Queue::launches() - before, status ? 4u : 0u);
    return status;
  };
  EXPECT_TRUE(compared(4, [](auto&) {}));
  says(Errc::missing_evidence, "some keys are no longer at hand", compared(5, [](auto&) {}));
  EXPECT_TRUE(compared(5, [](auto& f) { f.at = cuda::FeaturesAt::rows; }));
  says(Errc::not_supported, "features lie in pages", compared(0, [](auto& f) {
         f.at = cuda::FeaturesAt::rows;
         f.vectors.pages = 1;
       }));
  says(Errc::bad_shape, "features has 43 rows but", compared(0, [](auto& f) { f.vectors.layout.tokens = 43; }));
  says(Errc::too_small, "features have 2 heads of 17, 34 elements a token, but there is room for 32",
       compared(0, [&](auto& f) {
         f.vectors = cuda::heads(p.data(), TokenMajor{tokens + 4, kv_heads, dim + 1});
       }));
  EXPECT_TRUE(compared(0, [](auto& f) { f.projected = 31; }));
  says(Errc::bad_shape, "scales of features has 1 heads of 1 but needs one scale for each of 2",
       compared(0, [&](auto& f) {
         f.scales = cuda::heads(p.data(), TokenMajor{tokens + 4, 1, 1});
       }));
  right.request.config.selection = Selection::top_k;
  right.request.past = {};
  right.request.first_key = 0;

  const std::size_t needed = *emulation::Pruner::bytes(right.limits);
  void* memory = *emulation::Queue::allocate(needed + 256);
  says(Errc::too_small, "but these limits need", pruner.reserve(right.limits, memory, needed - 1));
  says(Errc::bad_stride, "at a multiple of 256 bytes",
       pruner.reserve(right.limits, static_cast<char*>(memory) + 8, needed));
  EXPECT_TRUE(pruner.reserve(right.limits, memory, needed));
  right.request.config.score_rows = ScoreRows::last;
  EXPECT_TRUE(pruner.plan(requests, layers, queue));
  EXPECT_TRUE(pruner.prune(0, right.evidence, queue));
  const std::size_t kept = pruner.kept(0).total;

  std::vector<float> from(tokens * 4), to(tokens * 4);
  const auto gather = [&](const Rows& a, const Rows& b) {
    const std::size_t before = emulation::Queue::launches();
    const Status status = pruner.gather(0, {{a, b}}, queue);
    EXPECT_EQ(emulation::Queue::launches() - before, status ? 1u : 0u);
    return status;
  };
  const Rows source = rows(from.data(), tokens, 4), target = rows(to.data(), kept, 4);
  EXPECT_TRUE(gather(source, target));
  says(Errc::bad_shape, "tensor 0 has 39 rows but the stage finds 40",
       gather(rows(from.data(), tokens - 1, 4), target));
  says(Errc::too_small, "the destination of tensor 0 has room", gather(source, rows(to.data(), kept - 1, 4)));
  says(Errc::bad_shape, "that its destination has not", gather(source, rows(to.data(), kept, 3)));
  says(Errc::bad_shape, "gathered in place", gather(source, rows(from.data(), kept, 4)));
  says(Errc::null_data, "a tensor to gather", gather(rows(static_cast<float*>(nullptr), tokens, 4), target));
  says(Errc::null_data, "the destination of a", gather(source, rows(static_cast<float*>(nullptr), kept, 4)));
  says(Errc::bad_stride, "the row stride of a tensor to gather", gather(rows(from.data(), tokens, 4, 2), target));
  Rows planes = source, target_planes = target;
  planes.planes = target_planes.planes = 65536;
  says(Errc::bad_shape, "65536 planes", gather(planes, target_planes));
  EXPECT_TRUE(pruner.reserve(right.limits));
  std::free(memory);
  return cases;
}

Cases all_cases() {
  Cases all;
  for (const Cases& some : {of_limits(), of_requests(), of_evidence(), of_calls()})
    all.insert(all.end(), some.begin(), some.end());
  return all;
}

TEST(CudaErrors, ARightBatchPasses) {
  EXPECT_EQ(said([](Right&) {}).code, Errc::ok);
}

TEST(CudaErrors, NameTheNumberTheLimitAndWhatToDo) {
  for (const Case& c : all_cases()) {
    const std::string sentence = message(c.status);
    EXPECT_EQ(c.status.code, c.code) << sentence;
    EXPECT_NE(sentence.find(c.part), std::string::npos) << '"' << c.part << "\" is not in: " << sentence;
    EXPECT_LT(sentence.size(), sizeof(Message::text) - 1) << "cut off: " << sentence;
  }
}

// A stream that stops after some launches.
class Stopping : public emulation::Queue {
 public:
  using emulation::Queue::Queue;
  template <class Kernel>
  Status launch(emulation::Grid grid, const Kernel& kernel) {
    if (left() == 0) return fail(Errc::device_error, "the device is gone");
    --left();
    return emulation::Queue::launch(grid, kernel);
  }
  static std::size_t& left() {
    static std::size_t count = 0;
    return count;
  }
};
TEST(CudaErrors, AnyLaunchThatFailsIsReported) {
  Right right;
  Rng rng(1);
  Stopping queue(rng);
  std::vector<float> from(tokens * 4), to(tokens * 4);
  const auto status_after = [&](std::size_t launches, const auto& evidence) {
    Stopping::left() = launches;
    cuda::BasicPruner<Stopping> pruner;
    Status status = pruner.reserve(right.limits);
    if (status) status = pruner.plan(Span<const cuda::Request>(&right.request, 1), layers, queue);
    if (status) status = pruner.prune(0, evidence, queue);
    const std::size_t kept = status ? pruner.kept(0).total : 0;
    if (status) status = pruner.gather(0, {{rows(from.data(), tokens, 4), rows(to.data(), kept, 4)}}, queue);
    return status;
  };
  const auto each_is_reported = [&](std::size_t all, const auto& evidence) {
    for (std::size_t launches = 0; launches < all; ++launches)
      EXPECT_EQ(status_after(launches, evidence).code, Errc::device_error) << launches;
    EXPECT_TRUE(status_after(all, evidence));
    EXPECT_EQ(Stopping::left(), 0u);
  };
  each_is_reported(6, right.evidence);  // three of a plan, two that score and select, one that moves
  right.request.config.selection = Selection::diverse;
  right.limits.features = kv_heads * dim;
  each_is_reported(9, cuda::with_features(right.evidence, right.evidence.key));  // three more
}

TEST(CudaErrors, EverySentenceOfTheHeadersIsRaised) {
  std::set<std::string> raised;
  for (const Case& c : all_cases())
    if (c.status.sentence != nullptr) raised.insert(c.status.sentence);
  const std::set<std::string> written =
      sentences::of_headers({"cuda_pruner.hpp", "detail/cuda_check.hpp", "detail/cuda_limits.hpp",
                             "detail/cuda_plan.hpp", "detail/cuda_words.hpp"});
  EXPECT_GT(written.size(), 40u);
  sentences::expect_raised(written, raised);
}

}  // namespace
}  // namespace errors_test
