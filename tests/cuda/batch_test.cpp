// Whole batches on the device: packed and paged, ragged, with settings of their own, through two stages, and the rows
// that are moved.
#include "batches.hpp"

namespace batch_test {
namespace {

using namespace batches;

constexpr std::size_t heads = Packed::heads, kv_heads = Packed::kv_heads, dim = Packed::dim, layers = 8;

// Requests that prune at layers of their own, one of them not at all, through all the batch's stages.
void check_ragged(std::uint64_t seed) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Rng rng(seed);
  const std::size_t count = 1 + seed % 6;
  std::vector<Sequence> batch(count);
  std::vector<cuda::Request> requests;
  cuda::Limits limits;
  limits.sequences = count;
  limits.heads = heads;
  limits.stages = 3;
  limits.keys = 400;
  limits.rows = rng.between(1, 2 * count);
  std::vector<std::size_t> tokens, past;
  const bool any_past = rng.chance(0.5);
  for (std::size_t i = 0; i < count; ++i) {
    Sequence& s = batch[i];
    for (bool fits = false; !fits;) {
      s = {};
      random_prompt(rng, 3, 50, false, s);
      if (i == 3) s.visual.clear();
      std::size_t layer = 1;
      bool pooled = false;
      for (std::size_t stage = 0; stage < 1 + rng.below(2) && i != 3; ++stage) {
        Config config = random_config(rng, false, rng.chance(0.7));
        config.filtering_layer = layer += 1 + rng.below(2);
        if (layer > 4) break;
        if (stage == 0 && config.selection == Selection::top_k && rng.chance(0.3)) {
          s.listed = {0, static_cast<Index>(s.tokens - 1)};
          config.score_rows = ScoreRows::listed;
        }
        if (pooled) {
          config.quota = Quota::pooled;
          config.min_per_image = 0;
        }
        pooled = pooled || config.quota == Quota::pooled;
        s.stages.push_back(config);
      }
      if (!s.listed.empty()) s.stages[0].listed_rows = s.listed;
      fits = static_cast<bool>(make_plan(s.stages, Prompt{s.tokens, layers, s.visual}));
    }
    s.past = {any_past ? rng.below(20) : 0};
    tokens.push_back(s.tokens);
    past.push_back(s.past[0]);
    requests.push_back(request_of(s, limits.tokens));
    limits.tokens += s.tokens;
    limits.spans += s.visual.size();
  }
  machine::Queue queue(rng);
  machine::Pruner pruner;
  ASSERT_TRUE(pruner.reserve(limits));
  const Status planned = pruner.plan(requests, layers, queue);
  ASSERT_TRUE(planned) << message(planned);
  const std::size_t allocations = machine::Queue::allocations();

  std::vector<std::vector<TokenSpan>> visual;
  std::vector<std::size_t> next(count);
  for (const Sequence& s : batch) visual.push_back(s.visual);
  for (std::size_t stage = 0; stage < pruner.stages(); ++stage) {
    SCOPED_TRACE("stage " + std::to_string(stage));
    const Packed layer(rng, tokens, past);
    const Status done = pruner.prune(stage, layer.all(), queue);
    ASSERT_TRUE(done) << message(done);
    ASSERT_EQ(machine::faults(), std::set<std::string>{});
    const cuda::Kept kept = pruner.kept(stage);
    std::size_t total = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const bool prunes =
          next[i] < batch[i].stages.size() && batch[i].stages[next[i]].filtering_layer == pruner.filtering_layer(stage);
      std::vector<Index> expected = numbers_up_to(tokens[i]);
      if (prunes) {
        Pruner<> core(batch[i].stages[next[i]++]);
        const Kept own = core.prune(layer.of(i), visual[i]);
        ASSERT_TRUE(own) << own.message().c_str();
        expected.assign(own.begin(), own.end());
        std::vector<TokenSpan> left(visual[i].size());
        left.resize(*next_spans(own, visual[i], left));
        visual[i] = left;
      }
      ASSERT_EQ(pruner.kept_tokens(stage, i), expected.size());
      EXPECT_EQ(numbers(kept.rows + total, expected.size(), layer.first[i]), expected) << "sequence " << i;
      EXPECT_EQ(kept.slots[total], static_cast<std::int32_t>(past[i]));
      tokens[i] = expected.size();
      total += expected.size();
    }
    ASSERT_EQ(kept.total, total);
  }
  for (std::size_t i = 0; i < count; ++i) EXPECT_EQ(next[i], batch[i].stages.size());
  EXPECT_EQ(machine::Queue::allocations(), allocations) << "nothing is allocated after reserve()";
}

TEST(CudaBatch, RaggedStagesAreTheCores) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) check_ragged(seed);
}

// A batch over one paged cache, each sequence with its own row of the tables, rows of bias and of visible; padding between
// the sequences' hidden states, and one query row of each in another order.
TEST(CudaBatch, PagedCachesAndTermsByRow) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Rng rng(seed);
    const std::size_t count = 1 + seed % 5, block = 8, pages = 40;
    std::vector<Sequence> batch(count);
    std::vector<cuda::Request> requests;
    cuda::Limits limits;
    limits.sequences = count;
    limits.heads = heads;
    std::size_t bias_rows = 0, first = 0;
    for (std::size_t i = 0; i < count; ++i) {
      Sequence& s = batch[i];
      random_prompt(rng, 3, 60, false, s);
      s.past = {rng.below(20)};
      cuda::Request request{Config{}, s.visual, first, s.tokens};
      request.queries = 1;
      request.query_row = count - 1 - i;
      request.key_row = bias_rows;
      request.table_row = (i + 1) % count;
      request.past = s.past;
      requests.push_back(request);
      first += s.tokens + rng.below(4);
      limits.tokens += s.tokens;
      limits.keys = (std::max)(limits.keys, s.tokens + s.past[0]);
      bias_rows += s.tokens + s.past[0];
    }
    // Blocks of all sequences in a random order in one cache.
    std::vector<Index> blocks = numbers_up_to(count * pages);
    for (std::size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[rng.below(i)]);
    std::vector<float> cache(count * pages * block * kv_heads * dim), query(count * heads * dim);
    for (float& x : cache) x = static_cast<float>(rng.real(-1, 1));
    for (float& x : query) x = static_cast<float>(rng.real(-1, 1));
    std::vector<float> bias;
    for (std::size_t i = 0; i < bias_rows; ++i)
      bias.push_back(rng.chance(0.2) ? -HUGE_VALF : static_cast<float>(rng.real(-2, 2)));
    std::vector<Index> visible(count);
    for (std::size_t i = 0; i < count; ++i)
      visible[requests[i].query_row] = static_cast<Index>(batch[i].past[0] + batch[i].tokens - rng.below(3));

    const bool heads_first = rng.chance(0.5), by_pointers = rng.chance(0.3);
    std::vector<const float*> pointers;
    for (const Index b : blocks) pointers.push_back(cache.data() + b * block * kv_heads * dim - 3);
    const auto* tables = reinterpret_cast<const std::int32_t*>(blocks.data());
    const TokenMajor token_block{block, kv_heads, dim};
    const HeadMajor head_block{kv_heads, block, dim};
    cuda::QueryKey<float> evidence =
        cuda::query_key(cuda::heads(query.data(), TokenMajor{count, heads, dim}),
                        by_pointers   ? (heads_first ? cuda::heads(pointers.data(), head_block, pages, 3)
                                                     : cuda::heads(pointers.data(), token_block, pages, 3))
                        : heads_first ? cuda::heads(cache.data(), head_block, tables, pages)
                                      : cuda::heads(cache.data(), token_block, tables, pages),
                        0.7f);
    evidence.bias = bias.data();
    if (seed % 2 != 0) evidence.visible = reinterpret_cast<const std::int32_t*>(visible.data());

    machine::Queue queue(rng);
    machine::Pruner pruner;
    ASSERT_TRUE(pruner.reserve(limits));
    const Status planned = pruner.plan(requests, layers, queue);
    ASSERT_TRUE(planned) << message(planned);
    const Status done = pruner.prune(0, evidence, queue);
    ASSERT_TRUE(done) << message(done);
    ASSERT_EQ(machine::faults(), std::set<std::string>{});
    const cuda::Kept kept = pruner.kept(0);
    std::size_t total = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t keys = batch[i].past[0] + batch[i].tokens;
      const Span<const Index> table(blocks.data() + requests[i].table_row * pages, pages);
      const float* q = query.data() + requests[i].query_row * heads * dim;
      QueryKey<float> view = query_key(fastv::heads(q, TokenMajor{1, heads, dim}),
                                       heads_first ? fastv::heads(cache.data(), head_block, table, keys)
                                                   : fastv::heads(cache.data(), token_block, table, keys),
                                       0.7f);
      view.past = batch[i].past[0];
      view.bias = Span<const float>(bias.data() + requests[i].key_row, keys);
      if (seed % 2 != 0) view.visible = Span<const Index>(visible.data() + requests[i].query_row, 1);
      Pruner<> core;
      const Kept expected = core.prune(view, batch[i].visual);
      ASSERT_TRUE(expected) << expected.message().c_str();
      EXPECT_EQ(numbers(kept.rows + total, expected.size(), requests[i].first),
                std::vector<Index>(expected.begin(), expected.end()))
          << "sequence " << i;
      total += expected.size();
    }
  }
}

// ---- what is moved ------------------------------------------------------------------------------

TEST(CudaGather, MovesRowsOfAnyWidthPlanesAndStrides) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Rng rng(seed);
    Sequence s;
    random_prompt(rng, 3, 60, false, s);
    cuda::Limits limits;
    limits.tokens = s.tokens;
    Config config;
    config.selection = Selection::random;
    config.seed = seed;
    const cuda::Request request{config, s.visual, 0, s.tokens};
    machine::Queue queue(rng);
    machine::Pruner pruner;
    ASSERT_TRUE(pruner.reserve(limits));
    ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), layers, queue));
    ASSERT_TRUE(pruner.prune(0, cuda::NoEvidence{}, queue));
    const cuda::Kept kept = pruner.kept(0);
    const std::vector<Index> rows = numbers(kept.rows, kept.total, 0),
                             visual = numbers(kept.visual_numbers, kept.total_visual, 0);

    // More tensors than one launch takes, each [planes, rows, width] bytes at an address of its own.
    struct Tensor {
      std::vector<unsigned char> from, to;
      std::size_t planes, width, from_row, to_row, from_offset, to_offset;
      bool by_visual;
    };
    std::vector<Tensor> tensors(rng.between(1, 20));
    std::vector<cuda::Move> moves;
    for (Tensor& t : tensors) {
      t.planes = rng.between(1, 4);
      t.width = rng.chance(0.5) ? 16 * rng.between(1, 300) : rng.between(1, 100);
      t.by_visual = rng.chance(0.3);
      t.from_row = t.width + (rng.chance(0.3) ? rng.below(40) : 0);
      t.to_row = t.width + (rng.chance(0.3) ? rng.below(40) : 0);
      t.from_offset = rng.chance(0.3) ? rng.below(20) : 0;
      t.to_offset = rng.chance(0.3) ? rng.below(20) : 0;
      const std::size_t found = t.by_visual ? visual_tokens(s.visual) : s.tokens;
      const std::size_t left = t.by_visual ? visual.size() : rows.size();
      for (std::size_t i = 0; i < t.planes * found * t.from_row + t.from_offset; ++i)
        t.from.push_back(static_cast<unsigned char>(rng.next()));
      t.to.assign(t.planes * left * t.to_row + t.to_offset, 0xA5);
      const auto view = [&](unsigned char* data, std::size_t count, std::size_t row) {
        Rows tensor = fastv::rows(data, count, t.width, static_cast<std::ptrdiff_t>(row));
        tensor.planes = t.planes;
        tensor.plane_stride = static_cast<std::ptrdiff_t>(count * row);
        return tensor;
      };
      moves.push_back({view(t.from.data() + t.from_offset, found, t.from_row),
                       view(t.to.data() + t.to_offset, left, t.to_row),
                       t.by_visual ? cuda::By::visual : cuda::By::rows});
    }
    const std::size_t before = machine::Queue::launches();
    const Status done = pruner.gather(0, Span<const cuda::Move>(moves), queue);
    ASSERT_TRUE(done) << message(done);
    EXPECT_LE(machine::Queue::launches() - before, (moves.size() + cuda::max_moves - 1) / cuda::max_moves);
    for (const Tensor& t : tensors) {
      const std::vector<Index>& list = t.by_visual ? visual : rows;
      std::vector<unsigned char> expected(t.to.size(), 0xA5);
      const std::size_t found = t.by_visual ? visual_tokens(s.visual) : s.tokens;
      for (std::size_t p = 0; p < t.planes; ++p)
        for (std::size_t i = 0; i < list.size(); ++i)
          std::memcpy(expected.data() + t.to_offset + (p * list.size() + i) * t.to_row,
                      t.from.data() + t.from_offset + (p * found + list[i]) * t.from_row, t.width);
      EXPECT_EQ(t.to, expected) << "seed " << seed;
    }
  }
}

// ---- probabilities ------------------------------------------------------------------------------

TEST(CudaScore, ProbabilitiesAreTheCores) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Rng rng(seed);
    const std::size_t count = 1 + seed % 3;
    std::vector<Sequence> batch(count);
    std::vector<cuda::Request> requests;
    cuda::Limits limits;
    limits.sequences = count;
    std::size_t keys = 0, visual = 0;
    for (Sequence& s : batch) {
      random_prompt(rng, 2, 70, false, s);
      s.past = {rng.below(5)};
      keys = (std::max)(keys, s.past[0] + s.tokens);
      visual += visual_tokens(s.visual);
    }
    Config config;
    if (seed % 3 == 1) config.score_rows = ScoreRows::all;
    const std::vector<Index> prior{1};
    if (seed % 4 == 1) config.prior_rows = prior;
    const bool one_row = config.score_rows == ScoreRows::last && config.prior_rows.empty();
    const std::size_t queries = one_row ? 1 : keys;
    std::vector<half> p;
    for (std::size_t i = 0; i < count * heads * queries * keys; ++i) p.push_back(oracle::make<half>(rng.real()));
    std::vector<float> norms;
    for (std::size_t i = 0; seed % 2 != 0 && i < kv_heads * visual; ++i)
      norms.push_back(static_cast<float>(rng.real(0.5, 2)));
    for (const Sequence& s : batch) {
      cuda::Request request{config, s.visual, limits.tokens, s.tokens};
      request.past = s.past;
      request.queries = one_row ? 1 : 0;
      requests.push_back(request);
      limits.tokens += s.tokens;
    }
    auto device = cuda::probabilities(p.data(), heads, queries, keys);
    device.value_norms = norms.empty() ? nullptr : norms.data();
    device.norm_heads = kv_heads;
    machine::Queue queue(rng);
    machine::Pruner pruner;
    ASSERT_TRUE(pruner.reserve(limits));
    ASSERT_TRUE(pruner.plan(requests, layers, queue));
    const Status done = pruner.prune(0, device, queue);
    ASSERT_TRUE(done) << message(done);
    ASSERT_EQ(machine::faults(), std::set<std::string>{});
    const cuda::Kept kept = pruner.kept(0);
    std::size_t numbered = 0, total = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const Sequence& s = batch[i];
      const std::size_t own = visual_tokens(s.visual);
      fastv::Probabilities<half> view = fastv::probabilities(p.data() + i * heads * queries * keys, heads,
                                                             one_row ? 1 : s.tokens, s.past[0] + s.tokens);
      view.head_stride = static_cast<std::ptrdiff_t>(queries * keys);
      view.query_stride = static_cast<std::ptrdiff_t>(keys);
      view.past = s.past[0];
      std::vector<float> own_norms;
      for (std::size_t h = 0; h < kv_heads && !norms.empty(); ++h)
        for (std::size_t v = 0; v < own; ++v) own_norms.push_back(norms[h * visual + numbered + v]);
      view.value_norms = own_norms;
      Pruner<> core(config);
      const Kept expected = core.prune(view, s.visual);
      ASSERT_TRUE(expected) << expected.message().c_str();
      ASSERT_NO_FATAL_FAILURE(expect_near(kept.scores + numbered, core.scores(), !config.prior_rows.empty()));
      EXPECT_EQ(numbers(kept.rows + total, expected.size(), requests[i].first),
                std::vector<Index>(expected.begin(), expected.end()));
      numbered += own;
      total += expected.size();
    }
  }
}

// ---- queries that are not yet rotated -----------------------------------------------------------

TEST(CudaScore, QueriesAreBiasedAndRotated) {
  for (std::uint64_t seed = 0; seed < 24; ++seed) {
    Rng rng(seed);
    Sequence s;
    random_prompt(rng, 2, 60, false, s);
    const std::size_t axes = seed % 2 == 0 ? 1 : 3, pairs = seed % 3 == 0 ? dim / 4 : dim / 2;
    const bool halves = seed % 4 < 2, biased = seed % 5 != 0;
    const Packed layer(rng, {s.tokens}, {0});
    std::vector<float> frequencies, bias;
    std::vector<std::int32_t> positions;
    std::vector<unsigned char> axis;
    for (std::size_t i = 0; i < pairs; ++i) {
      frequencies.push_back(
          static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(pairs))));
      axis.push_back(static_cast<unsigned char>(rng.below(axes)));
    }
    for (std::size_t i = 0; i < axes * s.tokens; ++i) positions.push_back(static_cast<std::int32_t>(rng.below(5000)));
    for (std::size_t i = 0; i < heads * dim; ++i) bias.push_back(static_cast<float>(rng.real(-1, 1)));

    // The same by hand, in double.
    std::vector<float> rotated = layer.query;
    for (std::size_t t = 0; t < s.tokens; ++t)
      for (std::size_t h = 0; h < heads; ++h) {
        float* q = rotated.data() + (t * heads + h) * dim;
        for (std::size_t d = 0; d < dim && biased; ++d) q[d] += bias[h * dim + d];
        for (std::size_t i = 0; i < pairs; ++i) {
          const std::size_t a = halves ? i : 2 * i, b = halves ? i + pairs : 2 * i + 1;
          const float angle = static_cast<float>(positions[(axes == 1 ? 0 : axis[i]) * s.tokens + t]) * frequencies[i];
          const double c = std::cos(static_cast<double>(angle)), sine = std::sin(static_cast<double>(angle));
          const double x = static_cast<double>(q[a]), y = static_cast<double>(q[b]);
          q[a] = static_cast<float>(x * c - y * sine);
          q[b] = static_cast<float>(y * c + x * sine);
        }
      }
    QueryKey<float> view = layer.of(0);
    view.query.data = rotated.data();
    Pruner<> core;
    const Kept expected = core.prune(view, s.visual);
    ASSERT_TRUE(expected) << expected.message().c_str();

    cuda::QueryKey<float> device = layer.all();
    device.query_bias = biased ? bias.data() : nullptr;
    device.rope = {frequencies.data(),
                   pairs,
                   positions.data(),
                   s.tokens,
                   axes == 1 ? nullptr : axis.data(),
                   halves ? RopeLayout::half : RopeLayout::interleaved};
    cuda::Limits limits;
    limits.tokens = s.tokens;
    limits.heads = heads;
    const cuda::Request request{Config{}, s.visual, 0, s.tokens};
    machine::Queue queue(rng);
    machine::Pruner pruner;
    ASSERT_TRUE(pruner.reserve(limits));
    ASSERT_TRUE(pruner.plan(Span<const cuda::Request>(&request, 1), layers, queue));
    const Status done = pruner.prune(0, device, queue);
    ASSERT_TRUE(done) << message(done);
    const cuda::Kept kept = pruner.kept(0);
    ASSERT_NO_FATAL_FAILURE(expect_near(kept.scores, core.scores(), false));
    EXPECT_EQ(numbers(kept.rows, kept.total, 0), std::vector<Index>(expected.begin(), expected.end()));
  }
  EXPECT_EQ(machine::faults(), std::set<std::string>{});
}

}  // namespace
}  // namespace batch_test
