// The front door: evidence in, kept indices out; errors, reuse, memory, threads.
#include "fastv/pruner.hpp"

#include <gtest/gtest.h>

#include <new>
#include <thread>

#include "counted_new.hpp"
#include "oracle.hpp"
#include "refused.hpp"

namespace pruner_test {
namespace {

using namespace fastv;

// ---- one prompt with every kind of evidence -------------------------------------------------

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
    return query_key(heads(query.data(), TokenMajor{1, 8, 16}), heads(key.data(), HeadMajor{2, tokens, 16}), 0.25f);
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

TEST(Prune, ResultNamesThePromptLengthTheNaNAndTheZeroScores) {
  std::vector<float> scores(576, 1);
  scores[3] = scores[575] = oracle::nan_float();
  scores[7] = scores[8] = 0;
  scores[9] = -0.0f;
  Pruner<> pruner;
  const Kept kept = pruner.prune(Scores<float>{scores, 631}, llava().visual);
  EXPECT_TRUE(kept);
  EXPECT_EQ(kept.prompt_tokens, 631u);
  EXPECT_EQ(kept.nan_scores, 2u);
  EXPECT_EQ(kept.zero_scores, 3u);
  EXPECT_EQ(kept.size(), 343u);
  EXPECT_EQ(kept.dropped(), 288u);
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
  failed.status = fail(Errc::bad_value, "all scores are NaN");
  EXPECT_EQ(compact(failed, positions).code, Errc::bad_value);
  EXPECT_EQ(compact(failed, rows(positions.data(), 631)).code, Errc::bad_value);
  EXPECT_EQ(positions, before);
  ASSERT_TRUE(compact(kept, Span<Index>(positions)));
  positions.resize(kept.size());
  EXPECT_EQ(positions, indices(kept));
}

TEST(Prune, OtherSettingsFromTheNextOneOn) {
  Config config;
  Pruner<> pruner(config);
  EXPECT_EQ(indices(pruner.prune(llava().query_and_key(), llava().visual)), llava().best(288));
  config.keep_count = 100;
  config.filtering_layer = 5;
  pruner.set_config(config);
  EXPECT_EQ(pruner.config().keep_count, 100u);
  EXPECT_TRUE(pruner.due(5));
  EXPECT_EQ(indices(pruner.prune(llava().query_and_key(), llava().visual)), llava().best(100));
  config.filtering_ratio = 3;
  pruner.set_config(config);
  EXPECT_TRUE(refused(pruner.prune(llava().query_and_key(), llava().visual).status, Errc::bad_setting, "is 3"));
}

TEST(Prune, TakesWhatAnAdaptorCouldOrCouldNotMake) {
  Pruner<> pruner;
  const Result<QueryKey<float>> made{llava().query_and_key(), {}};
  EXPECT_EQ(indices(pruner.prune(made, llava().visual)), llava().best(288));
  const Result<Scores<float>> not_made{{}, fail(Errc::not_supported, "a tensor of {} dimensions", 7)};
  const Kept kept = pruner.prune(not_made, llava().visual);
  EXPECT_TRUE(refused(kept.status, Errc::not_supported, "7 dimensions"));
  EXPECT_EQ(kept.size(), 0u);
  EXPECT_TRUE(pruner.scores().empty());
}

// Evidence of the user's own, in the fewest lines there are.
struct Energy {
  Span<const float> values;  // [tokens]
  std::size_t prompt_tokens() const { return values.size(); }
  template <class Score>
  Status score(Span<const TokenSpan> visual, Span<Score> scores) const {
    for_each_visual(visual, [&](std::size_t i, std::size_t position) { scores[i] = Score(values[position]); });
    return {};
  }
};

TEST(Prune, TakesEvidenceOfTheUsersOwn) {
  std::vector<float> energy(631);
  for (std::size_t i = 0; i < 576; ++i) energy[35 + i] = static_cast<float>(llava().scores[i]);
  Pruner<> pruner;
  EXPECT_EQ(indices(pruner.prune(Energy{energy}, llava().visual)), llava().best(288));
  EXPECT_EQ(pruner.scores()[17], energy[52]);
}

// ---- chunks of a prompt -------------------------------------------------------------------------

// A chunk of a long prompt may end in the middle of an image. Only the last row cannot rank it then: it is dropped with it.
TEST(ChunkedPrefill, AChunkMayEndInsideAnImage) {
  const std::vector<TokenSpan> visual = {{35, 596}};
  const std::vector<float> own(596, 1.0f);
  const Index rows[] = {630, 20};
  Config listed, all, random, uniform;
  listed.score_rows = ScoreRows::listed;
  listed.listed_rows = rows;
  all.score_rows = ScoreRows::all;
  random.selection = Selection::random;
  uniform.selection = Selection::uniform;
  const auto keys = heads(llava().key.data(), HeadMajor{2, 631, 16});
  const auto whole = query_key(heads(llava().key.data(), HeadMajor{2, 631, 16}), keys, 0.25f);
  EXPECT_EQ(indices(Pruner<>(all).prune(whole, visual)).size(), 35u + 298);
  EXPECT_EQ(indices(Pruner<>(listed).prune(whole, visual)).size(), 35u + 298);
  EXPECT_EQ(indices(Pruner<>().prune(KeysOnly{keys}, visual)).size(), 35u + 298);
  EXPECT_EQ(indices(Pruner<>().prune(Scores<float>{own, 631}, visual)).size(), 35u + 298);
  EXPECT_EQ(indices(Pruner<>(random).prune(NoEvidence{631}, visual)).size(), 35u + 298);
  EXPECT_EQ(indices(Pruner<>(uniform).prune(NoEvidence{631}, visual)).size(), 35u + 298);
  const char* sentence = "the last prompt token (position 630) is in visual span 0";
  EXPECT_TRUE(refused(Pruner<>().prune(whole, visual).status, Errc::bad_prompt, sentence));
  EXPECT_TRUE(refused(Pruner<>().prune(llava().probability_map(), visual).status, Errc::bad_prompt, sentence));
}

// ---- attention that does not reach the images ---------------------------------------------------

// One head whose logits are its keys, and a prompt of ten tokens with two images of three.
struct Small {
  std::vector<float> keys = {1, 5, 3, 4, 0, 9, 7, 8, 2, 6};
  const float one[1] = {1};
  std::vector<TokenSpan> visual = {{1, 3}, {5, 3}};
  QueryKey<float> view() const {
    return query_key(heads(one, TokenMajor{1, 1, 1}), heads(keys.data(), TokenMajor{10, 1, 1}), 1.0f);
  }
};

TEST(Unseen, ImagesThatReceiveNothingAreAnErrorWhereverSomethingIsDropped) {
  const Small small;
  auto evidence = small.view();
  const char* sentence = "all 6 visual scores are 0";
  const std::vector<float> hidden = {0,
                                     -oracle::infinity(),
                                     -oracle::infinity(),
                                     -oracle::infinity(),
                                     0,
                                     -oracle::infinity(),
                                     -oracle::infinity(),
                                     -oracle::infinity(),
                                     0,
                                     0};
  evidence.window = 2;  // tokens 8 and 9
  EXPECT_TRUE(refused(Pruner<>().prune(evidence, small.visual).status, Errc::bad_value, sentence));
  EXPECT_TRUE(refused(Pruner<double>().prune(evidence, small.visual).status, Errc::bad_value, sentence));
  evidence.window = 0;
  evidence.bias = hidden;
  EXPECT_TRUE(refused(Pruner<>().prune(evidence, small.visual).status, Errc::bad_value, sentence));
  evidence.bias = {};
  const Index nothing[] = {0};
  evidence.visible = nothing;
  EXPECT_TRUE(refused(Pruner<>().prune(evidence, small.visual).status, Errc::bad_value, sentence));
  const std::vector<float> map(10);
  EXPECT_TRUE(
      refused(Pruner<>().prune(probabilities(map.data(), 1, 1, 10), small.visual).status, Errc::bad_value, sentence));
  const std::vector<float> own(6);
  EXPECT_TRUE(refused(Pruner<>().prune(Scores<float>{own, 10}, small.visual).status, Errc::bad_value, sentence));
  for (const double ratio : {0.0, 1.0}) {  // nothing to rank
    Config config;
    config.filtering_ratio = ratio;
    const Kept kept = Pruner<>(config).prune(evidence, small.visual);
    ASSERT_TRUE(kept) << kept.message().c_str();
    EXPECT_EQ(kept.size(), ratio == 0.0 ? 10u : 4u);
    EXPECT_EQ(kept.zero_scores, 6u);
  }
}

TEST(Unseen, TokensAmongOthersAreCounted) {
  const Small small;
  auto evidence = small.view();
  Config config;
  config.quota = Quota::pooled;
  Pruner<> pruner(config);
  evidence.window = 4;  // tokens 6 to 9
  Kept kept = pruner.prune(evidence, small.visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_EQ(kept.zero_scores, 4u);
  EXPECT_EQ(indices(kept), (std::vector<Index>{0, 1, 4, 6, 7, 8, 9})) << "of equal ones the earlier";
  std::vector<float> bias(10, 0.0f);
  bias[1] = bias[2] = bias[3] = -oracle::infinity();  // the first image is hidden
  evidence.window = 0;
  evidence.bias = bias;
  kept = pruner.prune(evidence, small.visual);
  ASSERT_TRUE(kept);
  EXPECT_EQ(kept.zero_scores, 3u);
  EXPECT_EQ(indices(kept), (std::vector<Index>{0, 4, 5, 6, 7, 8, 9}));
  evidence.bias = {};
  kept = pruner.prune(evidence, small.visual);
  EXPECT_EQ(kept.zero_scores, 0u);
}

// A sink far above everything leaves each token less than a float holds; they are ranked all the same.
TEST(Unseen, ASinkThatTakesItAllDoesNotDecide) {
  const Small small;
  auto evidence = small.view();
  Config config;
  config.keep_count = 2;
  config.quota = Quota::pooled;
  for (const float above : {0.0f, 20.0f, 88.0f, 100.0f, 200.0f, 5000.0f}) {
    evidence.sinks = Span<const float>(&above, 1);
    Pruner<> pruner(config);
    Pruner<double> in_double(config);
    Kept kept = pruner.prune(evidence, small.visual);
    EXPECT_EQ(indices(kept), (std::vector<Index>{0, 4, 5, 7, 8, 9})) << above << " above";
    EXPECT_EQ(kept.zero_scores, 0u);
    kept = in_double.prune(evidence, small.visual);
    EXPECT_EQ(indices(kept), (std::vector<Index>{0, 4, 5, 7, 8, 9})) << above << " above";
    EXPECT_EQ(kept.zero_scores, 0u);
  }
}

// ---- rows that evidence does not have -----------------------------------------------------------

// A KeysOnly of the user's own writes the contract anew; it is evidence as any other.
struct OwnKeys {};
}  // namespace
}  // namespace pruner_test
namespace fastv {
template <>
struct KeysOnly<pruner_test::OwnKeys> {
  std::size_t prompt_tokens() const noexcept { return 10; }
  template <class Score>
  Status score(Span<const TokenSpan>, Span<Score> scores) const noexcept {
    for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<Score>(i + 1);
    return {};
  }
};
}  // namespace fastv
namespace pruner_test {
namespace {
TEST(Contract, ASpecialisationThatMeetsItIsEvidence) {
  const TokenSpan visual[] = {{2, 6}};
  Pruner<> pruner;
  EXPECT_EQ(indices(pruner.prune(KeysOnly<OwnKeys>{}, visual)), (std::vector<Index>{0, 1, 5, 6, 7, 8, 9}));
}

// What is named as the contract has it but cannot be called so stops the compiler (tests/headers/must_not_compile.cpp);
// here is how it is told from what is not there at all.
TEST(Contract, MembersThatDoNotFitAreNotTakenForAbsentOnes) {
  struct Right {
    std::size_t prompt_tokens() const noexcept { return 1; }
    Status check() const noexcept { return {}; }
    std::size_t scratch_floats() const noexcept { return 1; }
  };
  struct NotConst {
    std::size_t prompt_tokens() noexcept { return 1; }
    Status check() noexcept { return {}; }
    std::size_t scratch_floats() noexcept { return 1; }
  };
  struct Otherwise {
    void prompt_tokens() const noexcept {}
    Status check(int) const noexcept { return {}; }
    void scratch_floats() const {}
  };
  struct Data {
    std::size_t prompt_tokens, check, scratch_floats;
  };
  EXPECT_TRUE(detail::has_prompt_tokens<Right> && detail::has_check<Right> && detail::has_scratch<Right>);
  EXPECT_FALSE(detail::has_prompt_tokens<NotConst> || detail::has_check<NotConst> || detail::has_scratch<NotConst>);
  EXPECT_FALSE(detail::has_prompt_tokens<Otherwise> || detail::has_check<Otherwise> || detail::has_scratch<Otherwise>);
  EXPECT_TRUE(detail::names_prompt_tokens<NotConst> && detail::names_check<NotConst> &&
              detail::names_scratch<NotConst>);
  EXPECT_TRUE(detail::names_prompt_tokens<Otherwise> && detail::names_check<Otherwise> &&
              detail::names_scratch<Otherwise>);
  EXPECT_FALSE(detail::names_prompt_tokens<Data> || detail::names_check<Data> || detail::names_scratch<Data>);
  EXPECT_FALSE(detail::names_prompt_tokens<int> || detail::names_check<OwnKeys> || detail::names_scratch<OwnKeys>);
}

TEST(Rows, AreRefusedByEvidenceThatHasNone) {
  const std::vector<float> own(576, 1.0f), energy(631, 1.0f);
  const Index rows[] = {630};
  Config all, listed, prior;
  all.score_rows = ScoreRows::all;
  listed.score_rows = ScoreRows::listed;
  listed.listed_rows = rows;
  prior.prior_rows = rows;
  const auto each = [&](const auto& evidence) {
    for (const Config& config : {all, listed, prior}) {
      Pruner<> pruner(config);
      EXPECT_TRUE(refused(pruner.prune(evidence, llava().visual).status, Errc::missing_evidence, "no query rows"));
      EXPECT_TRUE(pruner.scores().empty());
    }
    EXPECT_TRUE(Pruner<>().prune(evidence, llava().visual));
  };
  each(Scores<float>{own, 631});
  each(KeysOnly{heads(llava().key.data(), HeadMajor{2, 631, 16})});
  each(Energy{energy});
  for (const Config& config : {Config{}, all, listed, prior})
    EXPECT_EQ(Pruner<>(config).prune(NoEvidence{631}, llava().visual).code(), Errc::missing_evidence);
  for (Config config : {all, listed, prior}) {  // but a rule that looks at no scores needs no rows
    config.selection = Selection::uniform;
    EXPECT_TRUE(Pruner<>(config).prune(NoEvidence{631}, llava().visual));
  }
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

TEST(Pruner, PrunesAheadOfTheFirstLayerByScoresThatNeedNone) {
  Config config;
  config.filtering_layer = 0;
  config.keep_count = 2;
  Pruner<> pruner(config);
  EXPECT_TRUE(pruner.due(0));
  EXPECT_FALSE(pruner.due(1));
  const TokenSpan visual[] = {{1, 5}};
  const std::vector<float> scores = {1, 5, 2, 5, 3};
  const auto kept = pruner.prune(Scores<float>{scores, 8}, visual);
  ASSERT_TRUE(kept) << kept.message().c_str();
  EXPECT_EQ(std::vector<Index>(kept.begin(), kept.end()), (std::vector<Index>{0, 2, 4, 6, 7}));
  Slots slots;
  ASSERT_TRUE(slots.append(8));
  ASSERT_TRUE(slots.keep(0, kept));
  EXPECT_EQ(slots.length(0), 5u);
  const std::vector<float> nothing(5);
  const auto unranked = pruner.prune(Scores<float>{nothing, 8}, visual);
  EXPECT_NE(std::string(unranked.message().c_str()).find("layer 0 "), std::string::npos) << unranked.message().c_str();
}

TEST(PruneErrors, Settings) {
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.filtering_ratio = 1.5; }), Errc::bad_setting);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.filtering_ratio = std::nan(""); }), Errc::bad_setting);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.keep_count = 577; }), Errc::bad_setting);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.score_rows = ScoreRows::listed; }), Errc::bad_setting);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.score_rows = ScoreRows::all; }), Errc::missing_evidence);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) {
              c.score_rows = ScoreRows::listed;
              c.listed_rows = row_past_end;
            }),
            Errc::bad_setting);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) {
              c.score_rows = ScoreRows::listed;
              c.listed_rows = {nullptr, 1};
            }),
            Errc::null_data);
  EXPECT_EQ(code_with([](auto& c, auto&, auto&) { c.prior_rows = {nullptr, 1}; }), Errc::null_data);
}

TEST(PruneErrors, LayersAreKnownToThePlanAlone) {
  Config config;
  config.filtering_layer = 32;
  const Pruner<> pruner(config);
  EXPECT_EQ(pruner.plan({631, 32, llava().visual}).code(), Errc::bad_setting);
  EXPECT_EQ(pruner.plan({631, 0, llava().visual}).code(), Errc::bad_setting);
}

TEST(PruneErrors, Spans) {
  const auto with = [](std::vector<TokenSpan> spans) {
    return code_with([&](auto&, auto&, auto& visual) { visual = spans; });
  };
  EXPECT_EQ(with({{35, 0}}), Errc::bad_prompt);
  EXPECT_EQ(with({{35, 597}}), Errc::bad_prompt);
  EXPECT_EQ(with({{40, 5}, {35, 5}}), Errc::bad_prompt);
  EXPECT_EQ(with({{35, 6}, {40, 5}}), Errc::bad_prompt);
  EXPECT_EQ(with({{35, 576, 25}}), Errc::bad_prompt);
  EXPECT_EQ(Pruner<>().prune(NoEvidence{9}, {nullptr, 1}).code(), Errc::null_data);
}

TEST(PruneErrors, Evidence) {
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key.tokens = 0; }), Errc::bad_shape);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key.tokens = max_tokens + 1; }), Errc::bad_shape);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query.data = nullptr; }), Errc::null_data);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key.data = nullptr; }), Errc::null_data);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query.heads = 0; }), Errc::bad_shape);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query.tokens = 0; }), Errc::bad_shape);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query.tokens = 632; }), Errc::bad_shape);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query.dim = e.key.dim = 0; }), Errc::bad_shape);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query.heads = 7; }), Errc::bad_shape);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key.token_stride = -16; }), Errc::bad_stride);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.key.token_stride = 15; }), Errc::bad_stride);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.scale = 0; }), Errc::bad_setting);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.soft_cap = -1; }), Errc::bad_setting);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.bias = short_bias; }), Errc::bad_shape);
  EXPECT_EQ(code_of({}, NoEvidence{631}, llava().visual), Errc::missing_evidence);
  auto map = llava().probability_map();
  map.data = nullptr;
  EXPECT_EQ(code_of({}, map, llava().visual), Errc::null_data);
}

TEST(PruneErrors, ScoreValues) {
  std::vector<float> scores(575, 1);
  EXPECT_EQ(code_of({}, Scores<float>{scores, 631}, llava().visual), Errc::bad_shape);
  scores.assign(576, oracle::nan_float());
  EXPECT_EQ(code_of({}, Scores<float>{scores, 631}, llava().visual), Errc::bad_value);
  scores[5] = -oracle::infinity();
  EXPECT_EQ(code_of({}, Scores<float>{scores, 631}, llava().visual), Errc::bad_value);
  EXPECT_EQ(code_of({}, Scores<float>{{nullptr, 576}, 631}, llava().visual), Errc::null_data);
}

TEST(PruneErrors, ANaNOrInfinityInTheTensorsMakesAllScoresNaN) {
  for (const float bad : {oracle::nan_float(), oracle::infinity()}) {
    auto query = llava().query, key = llava().key;
    auto evidence = llava().query_and_key();
    // One element of every KV head's last visual key, against queries that give +infinity there.
    for (std::size_t h = 0; h < 2; ++h) key[(h * 631 + 610) * 16 + 15] = bad;
    for (float& q : query) q = std::fabs(q) + 0.1f;
    evidence.query.data = query.data();
    evidence.key.data = key.data();
    EXPECT_EQ(code_of({}, evidence, llava().visual), Errc::bad_value) << bad;
    query = llava().query;
    query[0] = oracle::nan_float();  // one head of eight
    evidence.key.data = llava().key.data();
    EXPECT_TRUE(refused(Pruner<>().prune(evidence, llava().visual).status, Errc::bad_value, "NaN"));
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
  for (const Quota quota : {Quota::per_image, Quota::pooled}) {
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

// Evidence without queries.
TEST(Memory, NothingIsAllocatedAfterReserveForKeysAndRowsAlone) {
  const std::size_t n = 2500;
  const std::vector<float> keys(n * 2 * 16, 0.5f);
  std::vector<float> rows(n * 8);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 7);
  const std::vector<TokenSpan> visual = {{35, 2400}};
  Pruner<> of_keys, of_rows;
  ASSERT_TRUE(of_keys.reserve(n, 1, 0, 16));
  ASSERT_TRUE(of_rows.reserve(n, 1));
  EXPECT_EQ(allocations_in([&] {
              EXPECT_TRUE(of_keys.prune(KeysOnly{heads(keys.data(), TokenMajor{n, 2, 16})}, visual));
              EXPECT_TRUE(of_rows.prune(outputs(rows.data(), n, 8), visual));
              EXPECT_TRUE(of_rows.prune(changes(rows.data(), rows.data() + 1, n - 1, 8), visual));
            }),
            0u);
}

// Behind earlier turns, by all rows, by rows corrected for a prior, and with rows at hand that are not asked for.
TEST(Memory, NothingIsAllocatedAfterReserveForEarlierTurnsAndManyRows) {
  const std::size_t past = 131, n = 500;
  const std::vector<half> queries(n * 8 * 16, half{0x3400}), keys(2 * 631 * 16, half{0x3400});
  const std::vector<TokenSpan> visual = {{35, 200}, {240, 150}};
  const Index rows[] = {0, 499}, prior_rows[] = {480};
  Config all, listed, prior;
  all.score_rows = ScoreRows::all;
  listed.score_rows = ScoreRows::listed;
  listed.listed_rows = rows;
  listed.window_rows = listed.window_columns = 5;
  prior.prior_rows = prior_rows;
  for (const Config& config : {Config{}, all, listed, prior}) {
    auto evidence =
        query_key(heads(queries.data(), TokenMajor{n, 8, 16}), heads(keys.data(), HeadMajor{2, 631, 16}), 1.0f);
    evidence.past = past;
    std::vector<TokenSpan> spans = visual;
    spans[0].columns = spans[1].columns = 10;
    Pruner<> pruner;
    pruner.set_config(config);
    ASSERT_TRUE(pruner.reserve(n, 2, 8, 16, past));
    bool pruned = false;
    EXPECT_EQ(allocations_in([&] { pruned = static_cast<bool>(pruner.prune(evidence, spans)); }), 0u);
    EXPECT_TRUE(pruned);
    evidence.first_key = past;  // a window has let go of the earlier turns' keys
    evidence.key.tokens = n;
    EXPECT_EQ(allocations_in([&] { pruned = static_cast<bool>(pruner.prune(evidence, spans)); }), 0u);
    EXPECT_TRUE(pruned);
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
  std::vector<Index> kept(631), positions(631);
  std::vector<std::uint64_t> marks(select_scratch(Config{}, llava().visual));
  EXPECT_EQ(
      allocations_in([&] {
        const auto selected = select<double>(Config{}, {llava().scores.data(), 576}, llava().visual, 631, kept, marks);
        EXPECT_TRUE(selected);
        EXPECT_TRUE(compact(Span<const Index>(kept.data(), selected->count), Span<Index>(positions)));
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
  EXPECT_TRUE(refused(reserved, Errc::out_of_memory, "2524 bytes"));
  EXPECT_TRUE(pruner.prune(llava().query_and_key(), llava().visual)) << "and works again later";
}

TEST(Memory, SizesBeyondTheAddressSpaceAreAnErrorToo) {
  Pruner<> pruner;
  const std::size_t most = ~std::size_t{0};
  EXPECT_EQ(pruner.reserve(most, 1).code, Errc::bad_shape);
  EXPECT_EQ(pruner.reserve(1, most).code, Errc::bad_shape);
  EXPECT_EQ(pruner.reserve(1, most / 2).code, Errc::bad_shape);
  EXPECT_EQ(pruner.reserve(1, 1, most, 1).code, Errc::bad_shape);
  EXPECT_EQ(pruner.reserve(1, 1, 1, most).code, Errc::bad_shape);
  EXPECT_EQ(pruner.reserve(1, 1, 1, 1, most).code, Errc::bad_shape);
  EXPECT_EQ(pruner.reserve(1, 1, 1 << 24, 1 << 24, max_tokens).code, Errc::out_of_memory);
  EXPECT_EQ(code_with([](auto&, auto& e, auto&) { e.query.heads = e.key.heads = ~std::size_t{0}; }), Errc::bad_shape);
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
}  // namespace pruner_test
