// The front door: evidence in, kept indices out; errors, reuse, memory, threads.
#include "fastv/pruner.hpp"

#include <gtest/gtest.h>

#include <new>
#include <thread>

#include "counted_new.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;

// ---- one prompt with all four kinds of evidence -------------------------------------------------

// Grouped attention of the last row over `tokens` tokens, as queries and keys and as probabilities.
struct Problem {
  std::size_t tokens;
  std::vector<TokenSpan> visual;
  std::vector<float> query, key, map;
  std::vector<double> scores;

  Problem(std::uint64_t seed, std::size_t length, std::vector<TokenSpan> spans)
      : tokens(length), visual(std::move(spans)) {
    oracle::Rng rng(seed);
    oracle::Attention a{8, 2, 1, tokens, 16, {}, {}, 0.25, 0, {}, true};
    for (std::size_t i = 0; i < 8 * 16; ++i)
      a.query.push_back(static_cast<double>(static_cast<float>(rng.real(-1, 1))));
    for (std::size_t i = 0; i < 2 * tokens * 16; ++i)
      a.key.push_back(static_cast<double>(static_cast<float>(rng.real(-1, 1))));
    query.assign(a.query.begin(), a.query.end());
    key.assign(a.key.begin(), a.key.end());
    const auto p = oracle::probabilities(a);
    map.assign(p.begin(), p.end());
    scores = oracle::mean_scores(p, 8, 1, tokens, {static_cast<Index>(tokens - 1)}, visual);
  }
  QueryKey<float> query_and_key() const {
    return query_key(query.data(), 8, 1, key.data(), 2, tokens, 16, 0.25f, KvLayout::head_major);
  }
  Probabilities<float> probability_map() const { return probabilities(map.data(), 8, 1, tokens); }
  Scores<double> own_scores() const { return {scores, tokens}; }
  std::vector<Index> best(std::size_t count) const {  // of one span
    return oracle::whole_prompt(tokens, visual, oracle::top(scores, count));
  }
};
const Problem& llava() {
  static const Problem problem(50, 631, {{35, 576}});
  return problem;
}

std::vector<Index> indices(const Kept& kept) {
  EXPECT_TRUE(kept) << kept.message().c_str();
  return {kept.begin(), kept.end()};
}

// ---- due ----------------------------------------------------------------------------------------

TEST(Due, IsTrueOnceWhenKLayersHaveRun) {
  for (const std::size_t k : {0u, 1u, 2u, 7u}) {
    Config config;
    config.filtering_layer = k;
    const Pruner<> pruner(config);
    for (std::size_t layers_run = 0; layers_run <= 32; ++layers_run)
      EXPECT_EQ(pruner.due(layers_run), layers_run == k) << layers_run;
  }
}

// ---- prune --------------------------------------------------------------------------------------

TEST(Prune, EveryKindOfEvidenceKeepsWhatTheOracleKeeps) {
  for (const double ratio : {0.0, 0.25, 0.5, 0.9, 1.0}) {
    Config config;
    config.filtering_ratio = ratio;
    const auto expected = llava().best(oracle::kept_of(576, ratio));
    Pruner<> pruner(config);
    EXPECT_EQ(indices(pruner.prune(llava().query_and_key(), llava().visual)), expected);
    EXPECT_EQ(indices(pruner.prune(llava().probability_map(), llava().visual)), expected);
    Pruner<double> in_double(config);
    EXPECT_EQ(indices(in_double.prune(llava().query_and_key(), llava().visual)), expected);
    EXPECT_EQ(indices(in_double.prune(llava().own_scores(), llava().visual)), expected);
  }
}

TEST(Prune, NoEvidenceIsEnoughForRulesThatLookAtNone) {
  for (const Selection rule : {Selection::random, Selection::uniform})
    for (const std::size_t layer : {0u, 2u}) {
      Config config;
      config.selection = rule;
      config.filtering_layer = layer;
      Pruner<> pruner(config);
      const auto kept = indices(pruner.prune(NoEvidence{631}, llava().visual));
      EXPECT_EQ(kept.size(), 343u);
      EXPECT_EQ(indices(pruner.prune(llava().query_and_key(), llava().visual)), kept);
      EXPECT_TRUE(pruner.scores().empty());
    }
}

TEST(Prune, ResultNamesThePromptLengthAndTheNaNScores) {
  std::vector<float> scores(576, 1);
  scores[3] = scores[575] = oracle::nan_float();
  Pruner<> pruner;
  const Kept kept = pruner.prune(Scores<float>{scores, 631}, llava().visual);
  EXPECT_TRUE(kept);
  EXPECT_EQ(kept.tokens, 631u);
  EXPECT_EQ(kept.nan_scores, 2u);
  EXPECT_EQ(kept.size(), 343u);
  EXPECT_EQ(kept.size(), pruner.plan({631, 32, llava().visual})->kept());
}

TEST(Prune, ATextOnlyPromptKeepsEverything) {
  Pruner<> pruner;
  std::vector<Index> all(631);
  std::iota(all.begin(), all.end(), Index{0});
  EXPECT_EQ(indices(pruner.prune(llava().query_and_key(), {})), all);
  EXPECT_EQ(indices(pruner.prune(NoEvidence{631}, {})), all);
  EXPECT_EQ(indices(pruner.prune(Scores<float>{{}, 631}, {})), all);
  EXPECT_TRUE(pruner.scores().empty());
}

TEST(Prune, ScoresAreThoseOfTheLastPromptOneAVisualToken) {
  Pruner<> pruner;
  EXPECT_TRUE(pruner.scores().empty());
  ASSERT_TRUE(pruner.prune(llava().query_and_key(), llava().visual));
  ASSERT_EQ(pruner.scores().size(), 576u);
  for (std::size_t i = 0; i < 576; ++i) ASSERT_NEAR(static_cast<double>(pruner.scores()[i]), llava().scores[i], 1e-6);
  EXPECT_FALSE(pruner.prune(llava().query_and_key(), {{{600, 100}}}));
  EXPECT_TRUE(pruner.scores().empty()) << "a failed prune() leaves no scores of an earlier prompt";
}

TEST(Prune, OnePrunerServesPromptsOfAnySize) {
  Pruner<> pruner;
  oracle::Rng rng(51);
  for (int draw = 0; draw < 60; ++draw) {
    const std::size_t before = rng.below(20), count = rng.between(1, 200);
    const Problem problem(rng.next(), before + count + rng.between(1, 20), {{before, count}});
    EXPECT_EQ(indices(pruner.prune(problem.query_and_key(), problem.visual)),
              problem.best(oracle::kept_of(count, 0.5)));
  }
}

TEST(Prune, CompactTakesItsResultAndAFailedOneMovesNothing) {
  Pruner<> pruner;
  const Kept kept = pruner.prune(llava().query_and_key(), llava().visual);
  std::vector<Index> positions(631);
  std::iota(positions.begin(), positions.end(), Index{0});
  const auto before = positions;
  Kept failed;
  failed.status.code = Errc::all_scores_nan;
  EXPECT_EQ(compact(failed, Span<Index>(positions)).code, Errc::all_scores_nan);
  EXPECT_EQ(compact(failed, rows(positions.data(), 631)).code, Errc::all_scores_nan);
  EXPECT_EQ(positions, before);
  ASSERT_TRUE(compact(kept, Span<Index>(positions)));
  positions.resize(kept.size());
  EXPECT_EQ(positions, indices(kept));
}

// ---- errors, each through prune() ---------------------------------------------------------------

const Index row_past_end[] = {631};
const float short_bias[630] = {};

template <class Evidence>
Errc code_of(const Config& config, const Evidence& evidence, const std::vector<TokenSpan>& visual) {
  Pruner<> pruner(config);
  const Kept kept = pruner.prune(evidence, visual);
  EXPECT_EQ(kept.size(), 0u) << "a failed result holds no indices";
  return kept.code();
}
template <class Change>
Errc code_with(Change change) {
  Config config;
  auto evidence = llava().query_and_key();
  auto visual = llava().visual;
  change(config, evidence, visual);
  return code_of(config, evidence, visual);
}

TEST(PruneErrors, Settings) {
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.filtering_ratio = 1.5; }), Errc::ratio_out_of_range);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.filtering_ratio = std::nan(""); }), Errc::ratio_not_a_number);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.filtering_layer = 0; }), Errc::no_attention_yet);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.keep_count = 577; }), Errc::count_above_visual);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.score_rows = ScoreRows::listed; }), Errc::listed_rows_empty);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.score_rows = ScoreRows::all; }), Errc::row_not_in_evidence);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) {
              c.score_rows = ScoreRows::listed;
              c.listed_rows = row_past_end;
            }),
            Errc::listed_row_past_end);
}

TEST(PruneErrors, LayersAreKnownToThePlanAlone) {
  Config config;
  config.filtering_layer = 32;
  const Pruner<> pruner(config);
  EXPECT_EQ(pruner.plan({631, 32, llava().visual}).code(), Errc::filtering_layer_past_end);
  EXPECT_EQ(pruner.plan({631, 0, llava().visual}).code(), Errc::no_layers);
}

TEST(PruneErrors, Spans) {
  const auto with = [](std::vector<TokenSpan> spans) {
    return code_with([&](auto&, auto&, auto& visual) { visual = spans; });
  };
  EXPECT_EQ(with({{35, 0}}), Errc::span_empty);
  EXPECT_EQ(with({{35, 597}}), Errc::span_past_end);
  EXPECT_EQ(with({{40, 5}, {35, 5}}), Errc::spans_unsorted);
  EXPECT_EQ(with({{35, 6}, {40, 5}}), Errc::spans_overlap);
  EXPECT_EQ(with({{35, 576, 25}}), Errc::span_columns);
  EXPECT_EQ(with({{35, 596}}), Errc::last_token_visual);
  EXPECT_EQ(Pruner<>().prune(NoEvidence{9}, {nullptr, 1}).code(), Errc::null_data);
}

TEST(PruneErrors, Evidence) {
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.keys = 0; }), Errc::no_tokens);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.keys = max_tokens + 1; }), Errc::too_many_tokens);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query = nullptr; }), Errc::null_data);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key = nullptr; }), Errc::null_data);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.heads = 0; }), Errc::no_heads);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.rows = 0; }), Errc::no_rows);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.rows = 632; }), Errc::rows_above_keys);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.dim = 0; }), Errc::no_dim);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.heads = 7; }), Errc::heads_not_divisible);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key_token_stride = -16; }), Errc::negative_stride);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key_token_stride = 15; }), Errc::overlapping_stride);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.scale = 0; }), Errc::bad_scale);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.soft_cap = -1; }), Errc::bad_soft_cap);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.bias = short_bias; }), Errc::bias_size);
  EXPECT_EQ(code_of({}, NoEvidence{631}, llava().visual), Errc::evidence_missing);
  auto map = llava().probability_map();
  map.data = nullptr;
  EXPECT_EQ(code_of({}, map, llava().visual), Errc::null_data);
}

TEST(PruneErrors, ScoreValues) {
  std::vector<float> scores(575, 1);
  EXPECT_EQ(code_of({}, Scores<float>{scores, 631}, llava().visual), Errc::scores_size);
  scores.assign(576, oracle::nan_float());
  EXPECT_EQ(code_of({}, Scores<float>{scores, 631}, llava().visual), Errc::all_scores_nan);
  scores[5] = -oracle::infinity();
  EXPECT_EQ(code_of({}, Scores<float>{scores, 631}, llava().visual), Errc::infinite_score);
  EXPECT_EQ(code_of({}, Scores<float>{{nullptr, 576}, 631}, llava().visual), Errc::null_data);
}

TEST(PruneErrors, ANaNOrInfinityInTheTensorsMakesAllScoresNaN) {
  for (const float bad : {oracle::nan_float(), oracle::infinity()}) {
    auto query = llava().query, key = llava().key;
    auto evidence = llava().query_and_key();
    // One element of every KV head's last visual key, against queries that give +infinity there.
    for (std::size_t h = 0; h < 2; ++h) key[(h * 631 + 610) * 16 + 15] = bad;
    for (float& q : query) q = std::fabs(q) + 0.1f;
    evidence.query = query.data();
    evidence.key = key.data();
    EXPECT_EQ(code_of({}, evidence, llava().visual), Errc::all_scores_nan) << bad;
    query = llava().query;
    query[0] = oracle::nan_float();  // one head of eight
    evidence.key = llava().key.data();
    EXPECT_EQ(code_of({}, evidence, llava().visual), Errc::all_scores_nan);
  }
}

// ---- memory -------------------------------------------------------------------------------------

template <class Allocating>
std::size_t allocations_in(Allocating allocating) {
  llava();  // made once, and not while counting
  const std::size_t before = counted_new::allocations;
  allocating();
  return counted_new::allocations - before;
}

TEST(Memory, TheCounterCounts) {
  EXPECT_EQ(allocations_in([] { ::operator delete(::operator new(4)); }), 1u);
  EXPECT_EQ(allocations_in([] { ::operator delete[](::operator new[](4, std::nothrow)); }), 1u);
}

TEST(Memory, NothingIsAllocatedAfterTheFirstPruneOfASize) {
  for (const Quota quota : {Quota::per_picture, Quota::pooled}) {
    Config config;
    config.quota = quota;
    Pruner<> pruner(config);
    const std::vector<TokenSpan> visual = {{35, 300}, {335, 276}};
    ASSERT_TRUE(pruner.prune(llava().query_and_key(), visual));
    EXPECT_EQ(allocations_in([&] {
                for (int i = 0; i < 3; ++i) {
                  EXPECT_TRUE(pruner.prune(llava().query_and_key(), visual));
                  EXPECT_TRUE(pruner.prune(llava().probability_map(), visual));
                  EXPECT_TRUE(pruner.prune(llava().query_and_key(), llava().visual));
                  EXPECT_TRUE(pruner.prune(NoEvidence{20}, {}));
                }
              }),
              0u);
  }
}

TEST(Memory, NothingIsAllocatedAfterReserve) {
  for (const double ratio : {0.0, 0.5, 1.0}) {
    Config config;
    config.filtering_ratio = ratio;
    Pruner<double> pruner(config);
    ASSERT_TRUE(pruner.reserve(631, 1, 8, 16));
    EXPECT_EQ(allocations_in([&] { EXPECT_TRUE(pruner.prune(llava().query_and_key(), llava().visual)); }), 0u);
    EXPECT_EQ(allocations_in([&] { EXPECT_TRUE(pruner.prune(llava().probability_map(), llava().visual)); }), 0u);
  }
}

TEST(Memory, RulesThatLookAtNoScoreNeedNoRoomForLogits) {
  Config config;
  config.selection = Selection::uniform;
  Pruner<> pruner(config);
  ASSERT_TRUE(pruner.reserve(631, 1));
  EXPECT_EQ(allocations_in([&] { EXPECT_TRUE(pruner.prune(llava().query_and_key(), llava().visual)); }), 0u);
}

TEST(Memory, FreeFunctionsAndErrorsAllocateNothing) {
  std::vector<Index> kept(631), quotas(1), positions(631);
  std::vector<std::uint64_t> marks(576);
  EXPECT_EQ(allocations_in([&] {
              const auto selected =
                  select<double>(Config{}, {llava().scores.data(), 576}, llava().visual, 631, kept, quotas, marks);
              EXPECT_TRUE(selected);
              EXPECT_TRUE(compact({kept.data(), selected->count}, Span<Index>(positions)));
              EXPECT_FALSE(Pruner<>().prune(NoEvidence{0}, {}));
              EXPECT_STRNE(Pruner<>().prune(NoEvidence{0}, {}).message().c_str(), "");
              EXPECT_TRUE(make_plan(Config{}, {631, 32, llava().visual}));
            }),
            0u);
}

TEST(Memory, RunningOutOfItIsAnErrorAndNotTheEnd) {
  Pruner<> pruner;
  counted_new::fail_nothrow(true);
  const Kept kept = pruner.prune(llava().query_and_key(), llava().visual);
  const Status reserved = pruner.reserve(631, 1);
  counted_new::fail_nothrow(false);
  EXPECT_EQ(kept.code(), Errc::out_of_memory);
  EXPECT_EQ(reserved.code, Errc::out_of_memory);
  EXPECT_EQ(reserved.value, 631 * 4) << "the bytes that were asked for";
  EXPECT_TRUE(pruner.prune(llava().query_and_key(), llava().visual)) << "and works again later";
}

TEST(Memory, SizesBeyondTheAddressSpaceAreAnErrorToo) {
  Pruner<> pruner;
  EXPECT_EQ(pruner.reserve(~std::size_t{0}, 1).code, Errc::out_of_memory);
  EXPECT_EQ(pruner.reserve(1, ~std::size_t{0}).code, Errc::out_of_memory);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.heads = e.kv_heads = ~std::size_t{0}; }), Errc::beyond_memory);
}

// ---- moving -------------------------------------------------------------------------------------

TEST(Moving, KeepsTheResultAliveAndLeavesAnEmptyPruner) {
  static_assert(!std::is_copy_constructible<Pruner<>>::value, "a copy would share or lose the scratch");
  static_assert(std::is_nothrow_move_constructible<Pruner<>>::value, "never throws");
  Pruner<> first;
  const Kept kept = first.prune(llava().query_and_key(), llava().visual);
  const auto expected = indices(kept);
  Pruner<> second(std::move(first));
  EXPECT_EQ(indices(kept), expected);
  EXPECT_EQ(second.scores().size(), 576u);
  EXPECT_TRUE(first.scores().empty()) << "its scores went along";
  EXPECT_EQ(indices(first.prune(llava().query_and_key(), llava().visual)), expected) << "it can be used again";
}

TEST(Moving, AssignmentTakesTheScoresAlong) {
  const Problem small(52, 20, {{4, 10}});
  Pruner<> first, second;
  ASSERT_TRUE(first.prune(llava().query_and_key(), llava().visual));
  ASSERT_TRUE(second.prune(small.query_and_key(), small.visual));
  second = std::move(first);
  EXPECT_EQ(second.scores().size(), 576u);
  for (const float score : first.scores()) EXPECT_GE(score, 0);  // whatever is left in it must be readable
  EXPECT_LE(first.scores().size(), 10u);
}

// ---- threads ------------------------------------------------------------------------------------

TEST(Threads, OnePrunerEachGivesWhatOneAloneGives) {
  const Problem problems[] = {Problem(53, 400, {{10, 350}}), Problem(54, 300, {{0, 100}, {120, 150}})};
  std::vector<Index> alone[2], together[2];
  for (std::size_t p = 0; p < 2; ++p)
    alone[p] = indices(Pruner<>().prune(problems[p].query_and_key(), problems[p].visual));
  const auto work = [&](std::size_t p) {
    Pruner<> pruner;
    for (int i = 0; i < 50; ++i) {
      const Kept kept = pruner.prune(problems[p].query_and_key(), problems[p].visual);
      together[p].assign(kept.begin(), kept.end());
      if (together[p] != alone[p]) return;
    }
  };
  std::thread first(work, 0), second(work, 1);
  first.join();
  second.join();
  EXPECT_EQ(together[0], alone[0]);
  EXPECT_EQ(together[1], alone[1]);
}

}  // namespace
