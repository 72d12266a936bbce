// Messages, and every sentence of the core and of the C face: what raises it, its category, and the numbers, limits and remedies that it
// names. The sentences are counted against the headers, so that none is left out.
#include "fastv/status.hpp"

#include <gtest/gtest.h>

#include <climits>
#include <filesystem>
#include <set>
#include <type_traits>

#include "counted_new.hpp"
#ifndef FASTV_SINGLE_FILE  // which has no part of an adaptor
#include "fastv/detail/graph_lists.hpp"
#endif
#include "fastv/fastv.hpp"
#include "oracle.hpp"
#include "sentences.hpp"
#define FASTV_C_IMPLEMENTATION
#include "fastv/fastv_c.h"

namespace status_test {
namespace {

using namespace fastv;

std::string text_of(const Status& status) { return status.message().c_str(); }

// ---- messages -----------------------------------------------------------------------------------

TEST(Status, IsTrueWhereNothingWentWrong) {
  EXPECT_TRUE(Status{});
  EXPECT_STREQ(Status{}.message().c_str(), "no error");
  EXPECT_FALSE(fail(Errc::bad_shape, "wrong"));
  EXPECT_EQ(text_of({Errc::ok, "a sentence of no failure"}), "no error");
  EXPECT_EQ(text_of({Errc::bad_shape}), "") << "a failure without a sentence";
  static_assert(!std::is_convertible<Status, bool>::value && !std::is_convertible<Status, int>::value,
                "a status is no number by accident");
  static_assert(std::is_trivially_copyable<Status>::value, "it is handed around by value");
  static_assert(noexcept(fail(Errc::bad_shape, "{}", 1))&& noexcept(Status{}.message()), "nothing throws");
}

TEST(Result, IsTrueWhereThereIsAValue) {
  const Result<int> right{3, {}}, wrong{0, fail(Errc::bad_shape, "{} heads", 3)};
  EXPECT_TRUE(right);
  EXPECT_EQ(*right, 3);
  EXPECT_EQ(right.code(), Errc::ok);
  EXPECT_STREQ(right.message().c_str(), "no error");
  EXPECT_FALSE(wrong);
  EXPECT_EQ(wrong.code(), Errc::bad_shape);
  EXPECT_STREQ(wrong.message().c_str(), "3 heads");
  EXPECT_FALSE(Result<std::size_t>({0, fail(Errc::bad_value, "x")}).status);
  EXPECT_EQ((Result<std::string> {
              "four", {}
            } -> size()),
            4u);
}

template <class Part>
std::string part(Part value) {
  return text_of(fail(Errc::bad_shape, "{}", value));
}

TEST(Message, PutsPartsOfEveryKindInTheirPlaces) {
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "q has {} heads but {} has {}", 32, "k", 5)), "q has 32 heads but k has 5");
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "{}{}{}{}", 1, "b", 2.5, -4)), "1b2.5-4");
  EXPECT_EQ(part(static_cast<signed char>(-7)), "-7");
  EXPECT_EQ(part(static_cast<unsigned char>(200)), "200");
  EXPECT_EQ(part(static_cast<short>(-300)), "-300");
  EXPECT_EQ(part(static_cast<unsigned short>(65535)), "65535");
  EXPECT_EQ(part(INT_MIN), "-2147483648");
  EXPECT_EQ(part(UINT_MAX), "4294967295");
  EXPECT_EQ(part(-5L), "-5");
  EXPECT_EQ(part(5UL), "5");
  EXPECT_EQ(part(LLONG_MIN), "-9223372036854775808");
  EXPECT_EQ(part(LLONG_MAX), "9223372036854775807");
  EXPECT_EQ(part(ULLONG_MAX), "9223372036854775807") << "the greatest that is told";
  EXPECT_EQ(part(static_cast<unsigned long long>(LLONG_MAX)), "9223372036854775807");
  EXPECT_EQ(part(~std::size_t{0}), "9223372036854775807");
  EXPECT_EQ(part(0), "0");
  EXPECT_EQ(part(true), "1");
  EXPECT_EQ(part(0.5f), "0.5");
  EXPECT_EQ(part(-1.5e-300), "-1.5e-300");
  EXPECT_EQ(part(1e20), "1e+20");
  EXPECT_EQ(part(HUGE_VAL), "inf");
  EXPECT_NE(part(std::nan("")).find("nan"), std::string::npos);
  EXPECT_EQ(part("the bias row"), "the bias row");
  EXPECT_EQ(part(""), "");
  EXPECT_EQ(part("100 %s {}"), "100 %s {}") << "what a word holds is not read as a format, nor as a place";
  static_assert(!std::is_constructible<detail::Part, Errc>::value, "an enumerator is no number by accident");
  static_assert(!std::is_constructible<detail::Part, std::string>::value, "words are kept as pointers");
}

TEST(Message, LeavesPlacesWithoutAPartEmptyAndPartsWithoutAPlaceOut) {
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "a {} b {} c {} d", 1)), "a 1 b  c  d");
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "{}")), "");
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "{} {} {} {} {} {}", 1, 2, 3, 4)), "1 2 3 4 {} {}")
      << "there are four at most";
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "none", 1, 2)), "none");
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "{ } {x} }{ {{}}", 1)), "{ } {x} }{ {1}");
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "ends in {")), "ends in {");
  EXPECT_EQ(text_of(fail(Errc::bad_shape, "")), "");
}

TEST(Message, IsCutOffWhereItHasNoRoomAndAlwaysEnds) {
  constexpr std::size_t room = sizeof(Message::text) - 1;
  for (std::size_t length = room - 30; length < room + 60; ++length) {
    const std::string word(length, 'w'), whole = "<" + word + "> 123456";
    // In a word, in a number, in the sentence itself.
    EXPECT_EQ(text_of(fail(Errc::bad_shape, "<{}> {}", word.c_str(), 123456)), whole.substr(0, room));
    const std::string sentence = "<" + word + "> {}";
    EXPECT_EQ(text_of(fail(Errc::bad_shape, sentence.c_str(), 123456)), whole.substr(0, room));
    EXPECT_EQ(text_of(fail(Errc::bad_shape, sentence.c_str(), 123456.0)), whole.substr(0, room));
    EXPECT_EQ(text_of(fail(Errc::bad_shape, (sentence + "{}").c_str(), 123456, "!")), (whole + "!").substr(0, room));
  }
}

// ---- helpers that make one call go wrong --------------------------------------------------------

constexpr std::size_t huge = static_cast<std::size_t>(-1);
const float numbers[4096] = {};
const TokenSpan visual[] = {{1, 3}}, at_the_end[] = {{5, 3}};  // of eight tokens, or of six
const Index one_row[] = {4}, sees[] = {9, 1}, table[] = {0, 1};
const float* const blocks[] = {numbers, nullptr};

template <class T>
Span<T> nowhere(std::size_t size) {
  return {nullptr, size};
}

Status planned(const Config& config, std::vector<TokenSpan> spans = {{5, 36}}, std::size_t tokens = 52,
               std::size_t layers = 4) {
  return make_plan(config, {tokens, layers, spans}).status;
}
template <class Change>
Status planned_with(Change change) {
  Config config;
  change(config);
  return planned(config);
}
template <class Change>
Status span_with(Change change, const Config& config = {}) {
  TokenSpan span{5, 36};
  change(span);
  return planned(config, {span});
}
Status scheduled(std::vector<Config> stages, std::vector<std::size_t> layers) {
  for (std::size_t i = 0; i < layers.size(); ++i) stages[i].filtering_layer = layers[i];
  const std::vector<TokenSpan> two = {{1, 3}, {5, 3}};
  return make_plan(stages, {10, 16, two}).status;
}
Status planned_over(Span<const bool> full_attention, std::size_t layer, std::size_t layers = 4) {
  Config config;
  config.filtering_layer = layer;
  Prompt prompt{52, layers, visual};
  prompt.full_attention = full_attention;
  return make_plan(config, prompt).status;
}
Status planned_behind(Span<const std::size_t> past) {
  Prompt prompt{52, 4, visual};
  prompt.past = past;
  return make_plan(Config{}, prompt).status;
}
Status selected(Span<const float> scores, Span<Index> kept, Span<Mark<float>> scratch) {
  return select<float>({}, scores, visual, 6, kept, scratch).status;
}
Status selected(std::vector<float> scores) {
  Index kept[8];
  Mark<float> scratch[16];
  return selected(scores, kept, scratch);
}

// Two images, of two tokens and of three.
Status unranked(std::vector<float> scores, const Config& config) {
  Index kept[8];
  Mark<float> scratch[16];
  return select<float>(config, scores, std::vector<TokenSpan>{{0, 2}, {3, 3}}, 8, kept, scratch).status;
}

// A valid view of two heads, one row, eight keys of dimension four; one thing is then broken.
QueryKey<float> sound() {
  return query_key(heads(numbers, TokenMajor{1, 2, 4}), heads(numbers, TokenMajor{8, 2, 4}), 0.5f);
}
template <class Change>
Status broken(Change change) {
  auto evidence = sound();
  change(evidence);
  return evidence.check();
}
template <class Change>
Status broken_map(Change change) {
  auto evidence = probabilities(numbers, 2, 1, 8);
  change(evidence);
  return evidence.check();
}
template <class Evidence>
Status scored(const Config& config, const Evidence& evidence, Span<const TokenSpan> spans = visual) {
  float scores[8], scratch[1024];
  return score(config, evidence, spans, Span<float>(scores), Span<float>(scratch));
}
Config with_rows(Span<const Index> rows) {
  Config config;
  config.score_rows = ScoreRows::listed;
  config.listed_rows = rows;
  return config;
}
Config with_all_rows() {
  Config config;
  config.score_rows = ScoreRows::all;
  return config;
}
Config pooled(Config config = {}) {
  config.quota = Quota::pooled;
  return config;
}
Config windows_of(std::size_t rows, std::size_t columns) {
  Config config;
  config.window_rows = rows;
  config.window_columns = columns;
  return config;
}

unsigned char bytes[4096];
Status gathered(std::vector<Index> kept, const Rows& to) { return gather(kept, Rows{bytes, 8, 4, 4}, to); }
const Rows room{bytes, 8, 4, 4};

Kept of_prompt(std::size_t tokens, Span<const Index> indices) {
  Kept kept;
  kept.indices = indices;
  kept.prompt_tokens = tokens;
  return kept;
}

Status unrotated(std::size_t dim, const Rope& rope) {
  float out[64];
  return unrotate(heads(numbers, HeadMajor{1, 2, dim}), rope, Span<float>(out));
}
Status rated(Span<const float> hidden, Span<const TokenSpan> spans, TokenSpan text, std::size_t stride = 4) {
  Index raters[8];
  float scratch[64];
  return text_raters(hidden.data(), 8, 4, stride, spans, text, raters, Span<float>(scratch)).status;
}
template <class Change>
Status sharded(Change change) {
  auto evidence = sound();
  change(evidence);
  SoftmaxPart parts[2];
  float numerators[16], scratch[1024];
  return score_shard(evidence, visual, Span<SoftmaxPart>(parts), numerators, scratch);
}
Status merged(std::size_t parts_given, std::size_t ranks, std::size_t rank, std::size_t numerators,
              std::size_t heads_total = 0) {
  const SoftmaxPart parts[8] = {};
  float scores[4];
  return merge_shards(Span<const SoftmaxPart>(parts, parts_given), ranks, rank, {numbers, numerators},
                      Span<float>(scores), heads_total);
}
Status batched(std::size_t second_first, std::size_t second_tokens, std::size_t evidence_tokens) {
  const Request requests[] = {{Config{}, visual, 0, 6}, {Config{}, visual, second_first, second_tokens}};
  BatchPruner<> pruner;
  const float scores[] = {1, 2, 3};
  const KeptBatch all = pruner.prune(requests, [&](std::size_t i) {
    return Scores<float>{scores, i == 0 ? 6 : evidence_tokens};
  });
  return all ? all.sequences[1].status : all.status;
}
template <class Change>
Status pages_with(Change change) {
  static Index own_table[] = {0, 1, 2, 3}, other_table[] = {0, 1, 2, 3};
  std::vector<KvPages> caches(2, pages(bytes, TokenMajor{2, 1, 4}, Span<Index>(own_table), 7));
  return change(caches, Span<Index>(other_table));
}

// ---- the table ----------------------------------------------------------------------------------

struct Case {
  Errc code;
  std::vector<const char*> names;  // what the sentence must contain: the offending number, its limit, what to do
  Status status;
};
using Cases = std::vector<Case>;

Cases of_settings() {
  static const bool sliding[4] = {}, last_only[] = {false, false, false, true},
                    gemma[] = {true, false, false, false, true, false}, early[] = {true, false, false, false};
  static const std::size_t past[] = {1, 2, 3}, endless[] = {max_tokens};
  return {
      {Errc::bad_setting, {"filtering_ratio is not a number", "0 to 1"}, planned_with([](Config& c) {
         c.filtering_ratio = std::nan("");
       })},
      {Errc::bad_setting, {"is 1.5 ", "0 (drop none)", "1 (drop"}, planned_with([](Config& c) {
         c.filtering_ratio = 1.5;
       })},
      {Errc::bad_setting, {"is -0.25 "}, planned_with([](Config& c) { c.filtering_ratio = -0.25; })},
      {Errc::bad_setting, {"is inf "}, planned_with([](Config& c) { c.filtering_ratio = HUGE_VAL; })},
      {Errc::bad_setting, {"uniform_share is -0.5 ", "0 and 1"}, planned_with([](Config& c) {
         c.uniform_share = -0.5;
       })},
      {Errc::bad_setting, {"4 rows", "0 columns", "set both"}, planned(windows_of(4, 0))},
      {Errc::bad_setting,
       {"4 x 2", "Quota::pooled", "Quota::per_image", "no windows"},
       planned(pooled(windows_of(4, 2)))},
      {Errc::bad_setting, {"listed_rows is empty", "at least one"}, planned(with_rows({}))},
      {Errc::null_data, {"pointer to listed_rows", "hand over"}, planned(with_rows(nowhere<const Index>(2)))},
      {Errc::null_data, {"pointer to prior_rows"}, planned_with([](Config& c) {
         c.prior_rows = nowhere<const Index>(2);
       })},
      {Errc::bad_setting, {"is 37 ", "36 visual", "at most"}, planned_with([](Config& c) { c.keep_count = 37; })},
      {Errc::bad_setting, {"is 4 ", "4 layers", "at most 3"}, planned_with([](Config& c) { c.filtering_layer = 4; })},
      {Errc::bad_setting, {"0 layers", "at least 1"}, planned({}, {}, 5, 0)},
      {Errc::bad_setting, {"9 stages", "most 8"}, scheduled(std::vector<Config>(9), {})},
      {Errc::bad_setting, {"stage 1 ", "layer 2 ", "has 3", "sort"}, scheduled({Config{}, Config{}}, {3, 2})},
      {Errc::bad_setting, {"stage 1 ", "pool this stage too"}, scheduled({pooled(), Config{}}, {1, 2})},
      {Errc::bad_setting,
       {"stage 1 ", "min_per_image 5", "keep_count"},
       [] {
         Config least = pooled();
         least.min_per_image = 5;
         return scheduled({pooled(), least}, {1, 2});
       }()},
      {Errc::bad_shape, {"full_attention has 4", "6 layers"}, planned_over(sliding, 2, 6)},
      {Errc::null_data, {"full_attention"}, planned_over(nowhere<const bool>(4), 2)},
      {Errc::bad_setting, {"is 3 ", "layer 2 ", "use 1 or 5"}, planned_over(gemma, 3, 6)},
      {Errc::bad_setting, {"is 3 ", "layer 2 ", "use 1"}, planned_over(early, 3)},
      {Errc::bad_setting, {"is 2 ", "Selection::uniform"}, planned_over(last_only, 2)},
      {Errc::bad_setting, {"is 2 ", "Selection::uniform"}, planned_over(sliding, 2)},
      {Errc::bad_shape, {"past has 3 ", "4 layers", "one each"}, planned_behind(past)},
      {Errc::not_supported,
       {"more than 8 layers", "9 is one too many", "fewer layers"},
       [] {
         const std::size_t own[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
         return make_plan(Config{}, Prompt{52, 10, visual, own}).status;
       }()},
      {Errc::null_data, {"past"}, planned_behind(nowhere<const std::size_t>(1))},
      {Errc::bad_prompt, {"52 tokens", "2147483647 keys", "most 2147483647 "}, planned_behind(endless)},
  };
}

Cases of_prompts() {
  const auto spans = [](std::vector<TokenSpan> list) { return planned({}, list); };
  Config by_count;
  by_count.keep_count = 5;
  return {
      {Errc::bad_prompt, {"0 tokens", "at least 1"}, planned({}, {}, 0)},
      {Errc::bad_prompt, {"2147483648 tokens", "most 2147483647 "}, planned({}, {}, max_tokens + 1)},
      {Errc::null_data, {"visual spans"}, validate(nowhere<const TokenSpan>(1), 9)},
      {Errc::bad_prompt, {"span 1 ", "0 tokens", "leave it out"}, spans({{5, 3}, {9, 0}})},
      {Errc::bad_prompt, {"span 0 ", "position 53 ", "52 tokens", "shorten"}, spans({{5, 48}})},
      {Errc::bad_prompt, {"span 0 ", "52 tokens"}, spans({{5, huge}})},
      {Errc::bad_prompt, {"span 0 ", "52 tokens"}, spans({{huge, 2}})},
      {Errc::bad_prompt, {"span 1 ", "position 5,", "at 20", "sort"}, spans({{20, 3}, {5, 3}})},
      {Errc::bad_prompt, {"span 1 ", "position 7 ", "to 8", "disjoint"}, spans({{5, 3}, {7, 3}})},
      {Errc::bad_prompt, {"span 1 ", "position 5 "}, spans({{5, 3}, {5, 3}})},
      {Errc::bad_prompt, {"span 0 ", "clear its flag"}, spans({{5, 3, 0, true}})},
      {Errc::bad_prompt,
       {"span 0 ", "2147483648 original", "most 2147483647"},
       spans({{5, 3, 0, false, max_tokens + 1}})},
      {Errc::bad_prompt, {"span 0 ", "2 original", "the 3 it", "next_spans()"}, spans({{5, 3, 0, false, 2}})},
      {Errc::bad_prompt, {"span 0 ", "filtering_ratio 1.5", "0 to 1", "by_config"}, span_with([](TokenSpan& s) {
         s.filtering_ratio = 1.5;
       })},
      {Errc::bad_prompt,
       {"span 1 ", "0.25", "first span"},
       [] {
         std::vector<TokenSpan> two = {{5, 3}, {9, 3, 0, true}};
         two[1].filtering_ratio = 0.25;
         return planned({}, two);
       }()},
      {Errc::bad_prompt, {"span 0 ", "7 columns", "36 tokens", "use 0"}, spans({{5, 36, 7}})},
      {Errc::bad_prompt, {"span 0 ", "set its columns", "earlier stage"}, planned(windows_of(4, 4))},
      {Errc::bad_prompt,
       {"span 0 ", "0.25", "keep_count is 5"},
       span_with([](TokenSpan& s) { s.filtering_ratio = 0.25; }, by_count)},
      {Errc::bad_prompt,
       {"span 0 ", "0.25", "Quota::per_image"},
       span_with([](TokenSpan& s) { s.filtering_ratio = 0.25; }, pooled())},
  };
}

Cases of_selection() {
  static Index kept[8];
  static Mark<float> scratch[16];
  const float nan = oracle::nan_float(), infinity = oracle::infinity();
  return {
      {Errc::bad_shape, {"2 scores", "3 visual", "one each"}, selected({1, 2})},
      {Errc::bad_shape, {"4 scores", "3 visual"}, scored({}, Scores<float>{{numbers, 4}, 8})},
      {Errc::null_data, {"scores"}, selected(nowhere<const float>(3), kept, scratch)},
      {Errc::bad_value, {"token 1 ", "infinite"}, selected({0, infinity, 0})},
      {Errc::bad_value, {"token 2 ", "infinite"}, selected({0, nan, -infinity})},
      {Errc::bad_value, {"all 3 ", "NaN", "layer 1 "}, selected({nan, -nan, nan})},
      {Errc::bad_value, {"all 3 ", "are 0", "layer 1 ", "sliding window"}, selected({0, -0.0f, 0})},
      {Errc::bad_value,
       {"2 of 3 ", "image 1 ", "are all 0", "layer 1 ", "sliding window"},
       unranked({1, 2, 0, 0, 0}, {})},
      {Errc::bad_value,
       {"in 1 groups", "layer 1 ", "sliding window"},
       unranked({0, 0, 1, 0, 0},
                [] {
                  Config spread = pooled();  // the grid takes the only token whose score is not 0
                  spread.keep_count = 3;
                  spread.uniform_share = 1.0 / 3;
                  return spread;
                }())},
      {Errc::too_small, {"kept indices", "2 ", "needs 5"}, selected({numbers, 3}, {kept, 2}, scratch)},
      {Errc::too_small, {"scratch", "4 ", "needs 5"}, selected({numbers, 3}, kept, {scratch, 4})},
      {Errc::null_data, {"kept indices"}, selected({numbers, 3}, nowhere<Index>(8), scratch)},
      {Errc::too_small, {"quotas", "1 ", "needs 2"}, image_quotas({}, visual, {kept, 1}).status},
      {Errc::out_of_memory, {"4611686018427387904 bytes"}, detail::Buffer<float>().reserve(std::size_t{1} << 60)},
      {Errc::out_of_memory, {"9223372036854775807 bytes"}, detail::Buffer<float>().reserve(huge)},
      {Errc::bad_shape,
       {"room for 1152921504606846976 tokens", "1 spans"},
       Pruner<>().reserve(std::size_t{1} << 60, 1)},
  };
}

template <class Evidence>
Status diverse(const Diversity& diversity, const Evidence& evidence) {
  Config config;
  config.selection = Selection::diverse;
  config.diversity = diversity;
  return Pruner<>(config).prune(evidence, visual).status;
}
Cases of_diversity() {
  const Scores<float> scores{{numbers + 1, 3}, 8};
  static float ones[64], nans[64];
  std::fill(ones, ones + 64, 1.0f);
  std::fill(nans, nans + 64, oracle::nan_float());
  const Scores<float> equal{{ones, 3}, 8};
  const auto rows = heads(ones, TokenMajor{8, 1, 4});
  const Diversity half{}, of_product{Novelty::nearest, Blend::product, -1};
  const std::size_t wide = (std::size_t{1} << 20) + 1;
  const auto reserved = [](std::size_t tokens, std::size_t width) {
    Config config;
    config.selection = Selection::diverse;
    return Pruner<>(config).reserve(tokens, 1, 0, 0, 0, width);
  };
  Index kept[8];
  Mark<float> scratch[64];
  Config config;
  config.selection = Selection::diverse;
  return {
      {Errc::bad_setting, {"weight is 1.5 ", "0 (", "1 ("}, diverse({{}, {}, 1.5}, with_features(scores, rows))},
      {Errc::bad_setting, {"exponent is -1 ", "at least 0"}, diverse(of_product, with_features(scores, rows))},
      {Errc::bad_setting, {"protected_share is 2 ", "0 and 1"}, diverse({{}, {}, 1, 2}, with_features(scores, rows))},
      {Errc::missing_evidence, {"with_features(evidence, keys)"}, diverse(half, scores)},
      {Errc::not_supported,
       {"with_features()", "Pruner"},
       select<float>(config, {numbers, 3}, visual, 8, kept, scratch).status},
      {Errc::bad_shape,
       {"7 tokens", "0 of earlier", "has 8"},
       diverse(half, with_features(equal, heads(ones, TokenMajor{7, 1, 4})))},
      {Errc::bad_shape,
       {"2 heads of 1048576", "at most 1048576", "project"},
       diverse(half, with_features(equal, heads(ones, TokenMajor{8, 2, wide - 1})))},
      {Errc::bad_shape, {"1048577 elements", "at most 1048576"}, reserved(8, wide)},
      {Errc::bad_shape,
       {"2147483647 tokens of 1073741824", "any memory"},
       detail::check_greedy(max_tokens, std::size_t{1} << 30)},
      {Errc::bad_value,
       {"all 3 ", "NaN or infinite"},
       diverse(half, with_features(equal, heads(nans, TokenMajor{8, 1, 4})))},
  };
}

Cases of_rules() {
  static const float infinite[] = {1, oracle::infinity()};
  static float ones[] = {1, 1}, nothing[] = {0, 0};
  const auto keys = sound().key;
  const auto weighted = [&](Span<const float> weights) { return logits(sound().query, keys, weights).check(); };
  const auto mixed = [](Span<const float> other, double weight) {
    return mix_scores(Span<float>(ones), other, weight);
  };
  return {
      {Errc::bad_shape, {"3 head weights", "2 query heads", "one each"}, weighted({numbers, 3})},
      {Errc::bad_value, {"head 1 is inf", "finite"}, weighted(infinite)},
      {Errc::null_data, {"head weights"}, weighted(nowhere<const float>(2))},
      {Errc::bad_shape, {"are 0 ", "from 1 to 2147483647"}, outputs(numbers, 0, 4).check()},
      {Errc::bad_shape, {"0 elements", "at least 1"}, outputs(numbers, 8, 0).check()},
      {Errc::null_data,
       {"rows before", "needs both"},
       transitions(nowhere<const float>(0).data(), numbers, 8, 4).check()},
      {Errc::bad_shape, {"2 scores", "with 3", "one each"}, mixed({numbers, 3}, 0.5)},
      {Errc::bad_setting, {"mixture is 1.5 ", "0 and 1"}, mixed(ones, 1.5)},
      {Errc::bad_value, {"add up to 0 ", "positive"}, mixed(nothing, 0.5)},
  };
}

Cases of_costs() {
  static const LayerTime falling[] = {{10, 2.0}, {20, 1.0}}, one[] = {{10, 2.0}}, negative[] = {{10, 2.0}, {20, -1.0}};
  const ModelShape shape{4, 8, 2, 2, 4, 16};
  const Prompt prompt{10, 4, visual};
  const auto within = [&](const Budget& budget) { return settings_under(budget, shape, prompt).status; };
  return {
      {Errc::bad_setting,
       {"5 layers", "has 4"},
       settings_under({Budget::Of::flops, 1}, ModelShape{5, 8, 2, 1, 4, 16}, prompt).status},
      {Errc::bad_setting, {"1 entries", "at least two"}, within({Budget::Of::seconds, 1, 2, 0, one})},
      {Errc::bad_setting, {"entry 1 ", "-1 seconds"}, within({Budget::Of::seconds, 1, 2, 0, negative})},
      {Errc::bad_setting, {"entry 1 ", "20 tokens", "1 s", "sort"}, within({Budget::Of::seconds, 1, 2, 0, falling})},
      {Errc::null_data, {"layer times"}, within({Budget::Of::seconds, 1, 2, 0, nowhere<const LayerTime>(2)})},
      {Errc::over_budget, {"is 1e-09 ", "layer 2 ", "costs 0.", "raise"}, within({Budget::Of::flops_ratio, 1e-9})},
  };
}

Cases of_evidence() {
  static Index rows[16];
  static const Index past_end[] = {7, 8}, early[] = {3};
  const auto whole_map = probabilities(numbers, 2, 8, 8);
  return {
      {Errc::bad_shape, {"9 rows", "8 tokens", "last rows"}, visible_tokens(visual, 8, Span<Index>(rows, 9))},
      {Errc::bad_prompt, {"prefix has 9 ", "has 8"}, visible_tokens(visual, 8, Span<Index>(rows, 2), 9)},
      {Errc::bad_prompt,
       {"2147483647 keys", "8 tokens", "the 2147483647 "},
       visible_tokens(visual, 8, Span<Index>(rows, 2), 0, max_tokens)},
      {Errc::null_data, {"visible"}, visible_tokens(visual, 8, nowhere<Index>(2))},
      {Errc::bad_prompt, {"position 7", "span 0", "end the span", "KeysOnly"}, scored({}, sound(), at_the_end)},
      {Errc::bad_prompt, {"position 7", "span 0"}, scored({}, probabilities(numbers, 2, 1, 8), at_the_end)},
      {Errc::missing_evidence, {"position 7", "all 8 ", "score_rows"}, scored(with_all_rows(), sound())},
      {Errc::bad_setting, {"listed row 1 ", "is 8 ", "8 tokens", "below"}, scored(with_rows(past_end), whole_map)},
      {Errc::missing_evidence, {"position 3 ", "position 7", "list others"}, scored(with_rows(early), sound())},
      // evidence of the caller's own may ask for settings that nothing has validated
      {Errc::bad_setting,
       {"listed_rows is empty", "at least one"},
       QueryRows{ScoreRows::listed, {}, 8}.expect_covered(8, visual)},
      {Errc::null_data,
       {"listed_rows"},
       QueryRows{ScoreRows::listed, nowhere<const Index>(2), 8}.expect_covered(8, visual)},
      {Errc::missing_evidence,
       {"no query rows", "ScoreRows::last"},
       scored(with_all_rows(), Scores<float>{{numbers, 3}, 8})},
      {Errc::missing_evidence,
       {"no query rows", "listed_rows", "prior_rows"},
       scored(with_rows(one_row), KeysOnly<Heads<float>>{sound().key})},
      {Errc::missing_evidence,
       {"no query rows", "prior_rows"},
       [] {
         Config config;
         config.prior_rows = one_row;
         return Pruner<>(config).prune(Scores<float>{{numbers, 3}, 8}, visual).status;
       }()},
      {Errc::missing_evidence,
       {"2 of 4 heads", "partial sums", "fastv::Scores"},
       [] {
         auto evidence = sound();
         evidence.heads_total = 4;
         return Pruner<>().prune(evidence, visual).status;
       }()},
      {Errc::missing_evidence, {"Selection::top_k", "query and key"}, Pruner<>().prune(NoEvidence{8}, visual).status},
  };
}

Cases of_attention() {
  const float nan = oracle::nan_float(), infinity = oracle::infinity();
  const auto map = [](std::size_t map_heads, std::size_t queries, std::size_t keys) {
    return probabilities(numbers, map_heads, queries, keys).check();
  };
  const auto* crooked = reinterpret_cast<const float*>(bytes + 1);
  const auto no_load = [](std::size_t, std::size_t, float*) {};
  const auto loaded = [&](std::size_t kv_heads, std::size_t tokens, std::size_t dim) {
    return KeysOnly{loaded_keys(kv_heads, tokens, dim, no_load)}.check();
  };
  return {
      {Errc::bad_shape, {"attention has 0 heads", "at least 1"}, map(0, 1, 8)},
      {Errc::bad_shape, {"4 heads", "2147483647 tokens", "any memory"}, loaded(4, max_tokens, max_tokens)},
      {Errc::bad_shape, {"2147483648 heads"}, map(max_tokens + 1, 1, 8)},
      {Errc::bad_shape, {"0 query rows", "last prompt token"}, map(2, 0, 8)},
      {Errc::bad_shape, {"0 keys"}, map(2, 1, 0)},
      {Errc::bad_shape, {"2147483648 keys", "0 others", "most 2147483647"}, map(2, 1, max_tokens + 1)},
      {Errc::bad_shape, {"8 keys", "2147483647 others"}, broken([](auto& e) { e.first_key = max_tokens; })},
      {Errc::bad_shape, {"past is 8 ", "8 tokens", "without the prompt's"}, broken([](auto& e) { e.past = 8; })},
      {Errc::bad_shape, {"9 query rows", "8 tokens", "order of memory"}, map(2, 9, 8)},
      {Errc::bad_shape, {"2 heads", "is 1:", "all ranks"}, broken([](auto& e) { e.heads_total = 1; })},
      {Errc::bad_shape,
       {"5 value", "3 visual", "2 heads"},
       [] {
         auto e = sound();
         e.value_norms = Span<const float>(numbers, 5);
         return scored({}, e);
       }()},
      {Errc::null_data,
       {"value_norms"},
       [] {
         auto e = sound();
         e.value_norms = nowhere<const float>(6);
         return scored({}, e);
       }()},
      {Errc::bad_shape, {"query is 4 ", "key is 3", "same layer"}, broken([](auto& e) {
         e.key = heads(numbers, TokenMajor{8, 2, 3});
       })},
      {Errc::bad_shape, {"2 heads", "4 KV heads", "order"}, broken([](auto& e) {
         e.key = heads(numbers, TokenMajor{8, 4, 4});
       })},
      {Errc::bad_setting, {"scale is -0.5 ", "positive", "1 / sqrt"}, broken([](auto& e) { e.scale = -0.5f; })},
      {Errc::bad_setting, {"scale is 0 "}, broken([](auto& e) { e.scale = 0; })},
      {Errc::bad_setting, {"nan"}, broken([=](auto& e) { e.scale = nan; })},
      {Errc::bad_setting, {"scale is inf "}, broken([=](auto& e) { e.scale = infinity; })},
      {Errc::bad_setting, {"soft_cap is -30 ", "0 for none"}, broken([](auto& e) { e.soft_cap = -30; })},
      {Errc::bad_setting, {"nan"}, broken([=](auto& e) { e.soft_cap = nan; })},
      {Errc::bad_shape, {"bias row has 7 ", "8 keys"}, broken([](auto& e) {
         e.bias = {numbers, 7};
       })},
      {Errc::null_data, {"the bias row"}, broken([](auto& e) { e.bias = nowhere<const float>(8); })},
      {Errc::bad_shape, {"sinks has 3 ", "2 query heads"}, broken([](auto& e) {
         e.sinks = {numbers, 3};
       })},
      {Errc::bad_shape, {"alibi has 1 ", "2 query heads"}, broken([](auto& e) {
         e.alibi = {numbers, 1};
       })},
      {Errc::bad_shape, {"[2, 7, 1]", "8 of each"}, broken([](auto& e) {
         e.key_scales = heads(numbers, HeadMajor{2, 7, 1});
       })},
      {Errc::bad_shape, {"visible has 2 ", "1 query rows"}, broken([](auto& e) { e.visible = sees; })},
      {Errc::bad_shape, {"row 0 ", "9 tokens", "has 8"}, broken([](auto& e) {
         e.visible = {sees, 1};
       })},
      {Errc::null_data, {"visible"}, broken([](auto& e) { e.visible = nowhere<const Index>(1); })},
      {Errc::bad_shape,
       {"past is 8 ", "8 keys", "without the prompt's"},
       KeysOnly<Heads<float>>{sound().key, 8}.check()},
      // heads
      {Errc::bad_shape, {"query has 0 heads", "at least 1"}, broken([](auto& e) { e.query.heads = 0; })},
      {Errc::bad_shape, {"key has 0 heads"}, broken([](auto& e) { e.key.heads = 0; })},
      {Errc::bad_shape, {"key has head dimension 0", "at least 1"}, broken([](auto& e) { e.key.dim = 0; })},
      {Errc::bad_shape, {"query has 2147483648 heads"}, broken([](auto& e) { e.query.heads = max_tokens + 1; })},
      {Errc::bad_shape, {"key has 2147483648 tokens", "most 2147483647"}, broken([](auto& e) {
         e.key.tokens = max_tokens + 1;
       })},
      {Errc::bad_shape, {"3 elements", "key, 4"}, broken([](auto& e) { e.key.pages.chunk = 3; })},
      {Errc::null_data, {"pointer to query"}, broken([](auto& e) { e.query.data = nullptr; })},
      {Errc::null_data, {"pointer to key"}, broken([](auto& e) { e.key.data = nullptr; })},
      {Errc::null_data, {"pointer to probabilities"}, broken_map([](auto& e) { e.data = nullptr; })},
      {Errc::null_data, {"pointer to scores"}, Scores<float>{nowhere<const float>(3), 8}.check()},
      {Errc::bad_shape, {"key has 0 heads"}, loaded(0, 8, 4)},
      {Errc::bad_shape, {"key has head dimension 0"}, loaded(2, 8, 0)},
      {Errc::bad_shape, {"key has 2147483648 heads"}, loaded(max_tokens + 1, 8, 4)},
      {Errc::bad_shape, {"key has head dimension 2147483648"}, loaded(2, 8, max_tokens + 1)},
      {Errc::bad_shape, {"key has 2147483648 tokens"}, loaded(2, max_tokens + 1, 4)},
      // strides
      {Errc::bad_stride, {"token stride of key", "is -8 "}, broken([](auto& e) { e.key.token_stride = -8; })},
      {Errc::bad_stride, {"head stride of query", "is -1 "}, broken([](auto& e) { e.query.head_stride = -1; })},
      {Errc::bad_stride, {"head stride of query", "is 3 ", "over 4:"}, broken([](auto& e) {
         e.query.head_stride = 3;
       })},
      {Errc::bad_stride, {"token stride of key", "is 7 ", "over 8:", "order"}, broken([](auto& e) {
         e.key.token_stride = 7;
       })},
      {Errc::bad_stride, {"entry of key", "has 1152921504606846976 "}, broken([](auto& e) {
         e.key = heads(numbers, TokenMajor{8, 1, std::size_t{1} << 60});
       })},
      {Errc::bad_stride, {"head stride of key", "4611686018427387904", "2 entries"}, broken([](auto& e) {
         e.key.head_stride = std::ptrdiff_t{1} << 62;
       })},
      {Errc::bad_stride, {"address of key", "multiple of 4", "aligned"}, broken([=](auto& e) {
         e.key.data = crooked;
       })},
      {Errc::bad_stride, {"address of query", "multiple of 4"}, broken([=](auto& e) { e.query.data = crooked; })},
      {Errc::bad_stride, {"address of probabilities"}, broken_map([=](auto& e) { e.data = crooked; })},
      {Errc::bad_stride, {"address of scores"}, Scores<float>{{crooked, 3}, 8}.check()},
      // pages of keys
      {Errc::bad_pages, {"blocks of key", "0 tokens", "at least 1"}, broken([](auto& e) {
         e.key = heads(numbers, TokenMajor{0, 2, 4}, table, 8);
       })},
      {Errc::bad_pages, {"table of key", "2 blocks", "3 are", "whole table"}, broken([](auto& e) {
         e.key = heads(numbers, TokenMajor{3, 2, 4}, table, 8);
       })},
      {Errc::bad_pages, {"block 1 of key", "4294967295", "negative int32", "its number"}, broken([](auto& e) {
         static const Index hole[] = {0, 0xffffffffu};
         e.key = heads(numbers, TokenMajor{4, 2, 4}, hole, 8);
       })},
      {Errc::null_data, {"the block table"}, broken([](auto& e) {
         e.key = heads(numbers, TokenMajor{3, 2, 4}, nowhere<const Index>(3), 8);
       })},
      {Errc::null_data, {"block 1 of key"}, broken([](auto& e) {
         e.key = heads(Span<const float* const>(blocks), TokenMajor{4, 2, 4}, 8);
       })},
  };
}

Cases of_applying() {
  static const Index two[] = {0, 2}, past_end[] = {0, 6};
  static Index list[2];
  static float bias[8];
  return {
      {Errc::bad_index, {"index 2 ", "is 3,", "one, 5", "ascending"}, gathered({0, 5, 3}, room)},
      {Errc::bad_index, {"index 1 ", "is 5,", "one, 5"}, gathered({5, 5}, room)},
      {Errc::bad_index, {"index 1 ", "is 8 ", "8 rows"}, gathered({0, 8}, room)},
      {Errc::bad_shape, {"8 rows", "6 tokens", "data, 6, width"}, compact(of_prompt(6, two), room)},
      {Errc::bad_shape, {"unknown", "KeptRows(indices, tokens)"}, keep_bias(two, bias, -1)},
      {Errc::bad_index, {"index 1 ", "is 6 ", "6 rows"}, keep_bias(of_prompt(6, past_end), bias, -1)},
      {Errc::null_data, {"pointer to rows"}, gathered({0}, {nullptr, 8, 4, 4})},
      {Errc::null_data, {"kept indices"}, gather(nowhere<const Index>(1), room, room)},
      {Errc::bad_stride, {"is 12 ", "4 bytes"}, compact(two, Rows{bytes, 8, 4, 12, 2, 96, true})},
      {Errc::bad_shape, {"4 bytes", "3 at", "equal"}, gathered({0}, {bytes, 8, 3, 4})},
      {Errc::bad_shape, {"1 planes", "destination 2", "equal"}, gathered({0}, {bytes, 8, 4, 4, 2, 32})},
      {Errc::too_small, {"destination", "1 rows", "needs 2"}, gathered({0, 1}, {bytes, 1, 4, 4})},
      {Errc::bad_shape, {"8 rows", "4 bytes", "1 planes", "rows(mask, n, n)"}, compact_mask(two, room)},
      {Errc::too_small, {"list of numbers", "0 entries"}, kept_visual_numbers(two, visual, {}).status},
      {Errc::too_small, {"list of indices", "1 ", "needs 2"}, write_indices(two, Span<Index>(list, 1))},
      {Errc::bad_index,
       {"index 2 ", "offset 4294967295", "32 bits", "wider"},
       write_indices(two, Span<Index>(list, 2), 0xffffffffu)},
  };
}

Cases of_remedies() {
  static const Index positions[8] = {};
  static const unsigned char axis[] = {0, 1};
  static std::vector<float> overflowing(32, 3e38f);
  static float some[3] = {1, 2, 3}, none[3] = {};
  const Rope rope{{numbers, 2}, positions};
  const auto rope_with = [&](auto change) {
    Rope wrong = rope;
    change(wrong);
    return wrong;
  };
  float norms[8];
  return {
      {Errc::bad_setting, {"frequencies has 3 ", "is 4:", "most 2"}, unrotated(4, {{numbers, 3}, positions})},
      {Errc::bad_setting, {"axis has 1 ", "2 pairs"}, unrotated(4, rope_with([](Rope& r) {
                                                                  r.axis = {axis, 1};
                                                                }))},
      {Errc::bad_setting, {"positions has 3 ", "2 axes", "2 tokens"}, unrotated(4, rope_with([](Rope& r) {
                                                                                  r.axis = axis;
                                                                                  r.positions = {positions, 3};
                                                                                }))},
      {Errc::bad_setting, {"positions has 5 ", "over 4,"}, unrotated(4, rope_with([](Rope& r) {
                                                                       r.axis = axis;
                                                                       r.positions = {positions, 5};
                                                                     }))},
      {Errc::null_data, {"Rope::frequencies"}, unrotated(4, {nowhere<const float>(2), positions})},
      {Errc::null_data, {"Rope::positions"}, unrotated(4, {{numbers, 2}, nowhere<const Index>(2)})},
      {Errc::null_data, {"Rope::axis"}, unrotated(4, rope_with([](Rope& r) {
                                                    r.axis = nowhere<const unsigned char>(2);
                                                  }))},
      {Errc::bad_shape,
       {"past is 8 ", "8 values"},
       value_norms(heads(numbers, TokenMajor{8, 2, 4}), visual, Span<float>(norms), 8)},
      {Errc::not_supported,
       {"1025 ", "most 1024"},
       value_norms(heads(numbers, TokenMajor{3, 1, 1025}), Span<const TokenSpan>(), Span<float>(norms))},
      {Errc::bad_prompt, {"all 2 tokens", "position 2", "visual", "behind"}, rated(numbers, visual, {2, 2})},
      {Errc::bad_prompt, {"no visual tokens"}, rated(numbers, {}, {5, 3})},
      {Errc::bad_prompt, {"text has 0 tokens", "name those"}, rated(numbers, visual, {5, 0})},
      {Errc::bad_prompt, {"position 5 ", "4 tokens", "has 8"}, rated(numbers, visual, {5, 4})},
      {Errc::bad_stride, {"stride", "is 3 ", "4 elements"}, rated(numbers, visual, {5, 3}, 3)},
      {Errc::bad_stride, {"stride", "8 tokens", "any memory"}, rated(numbers, visual, {5, 3}, huge / 4)},
      {Errc::bad_value, {"position 1 ", "hidden states"}, rated(overflowing, visual, {5, 3})},
      {Errc::bad_shape, {"prior has 2 ", "3 visual"}, correct_by_prior(Span<float>(some), {numbers, 2})},
      {Errc::bad_value, {"all 3 ", "of the prior rows"}, correct_by_prior(Span<float>(some), Span<const float>(none))},
      {Errc::bad_value, {"of the question"}, correct_by_prior(Span<float>(none), Span<const float>(some))},
  };
}

Cases of_shards() {
  return {
      {Errc::bad_shape, {"2 rows", "last prompt row"}, sharded([](auto& e) {
         e.query = heads(numbers, TokenMajor{2, 2, 4});
       })},
      {Errc::bad_setting, {"is 4 ", "merge_shards()"}, sharded([](auto& e) { e.heads_total = 4; })},
      {Errc::not_supported, {"windows", "bias row"}, sharded([](auto& e) { e.window = 4; })},
      {Errc::not_supported, {"windows", "bias row"}, sharded([](auto& e) { e.first_key = 4; })},
      {Errc::bad_shape, {"6 softmax", "rank 0 of 4"}, merged(6, 4, 0, 0)},
      {Errc::bad_shape, {"6 softmax", "rank 3 of 3"}, merged(6, 3, 3, 0)},
      {Errc::bad_shape, {"2 heads", "is 1:", "all ranks"}, merged(4, 2, 0, 8, 1)},
      {Errc::bad_shape, {"7 numerators", "2 heads", "4 visual"}, merged(4, 2, 0, 7)},
  };
}

Cases of_batches() {
  return {
      {Errc::bad_prompt, {"sequence 1 ", "row 5 ", "to 6", "sort"}, batched(5, 6, 6)},
      {Errc::bad_prompt, {"sequence 1 ", "6 tokens", "row 2147483647 ", "most 2147483647"}, batched(max_tokens, 6, 6)},
      {Errc::bad_shape, {"7 tokens", "has 6", "its own"}, batched(6, 6, 7)},
      {Errc::bad_prompt,
       {"0 tokens", "at least 1"},
       [] {
         const Request empty[] = {{Config{}, {}, 0, 0}};
         BatchPruner<> pruner;
         return pruner.prune(empty, [](std::size_t) { return NoEvidence{0}; }).sequences[0].status;
       }()},
  };
}

Cases of_pages() {
  static const Index two[] = {0, 2};
  static Index twice[] = {0, 1, 1, 3};
  static void* const pointers[] = {bytes, bytes + 64, bytes + 128, bytes + 192};
  using Caches = std::vector<KvPages>;
  return {
      {Errc::bad_pages, {"block 2 ", "earlier", "own memory"}, pages_with([](Caches& c, Span<Index>) {
         c[0].block_table = twice;
         return compact_pages(two, c).status;
       })},
      {Errc::bad_pages, {"of 2 ", "of 3 ", "apart"}, pages_with([](Caches& c, Span<Index>) {
         c[1] = pages(bytes, TokenMajor{3, 1, 4}, c[0].block_table, 7);
         return compact_pages(two, c).status;
       })},
      {Errc::not_supported, {"cache 1 ", "compact_pages()"}, pages_with([](Caches& c, Span<Index>) {
         c[1] = pages<unsigned char>(Span<void* const>(pointers), TokenMajor{2, 1, 4}, 7);
         return repack_pages(two, c).status;
       })},
      {Errc::bad_pages, {"cache 1 ", "another block table", "apart"}, pages_with([](Caches& c, Span<Index> other) {
         c[1].block_table = other;
         return repack_pages(two, c).status;
       })},
      {Errc::bad_pages, {"cache 1 ", "6 tokens", "blocks of 2"}, pages_with([](Caches& c, Span<Index>) {
         c[1].count = 6;
         return repack_pages(two, c).status;
       })},
      {Errc::bad_shape, {"1 planes of 4 bytes", "1 of 8 ", "equal"}, pages_with([](Caches& c, Span<Index> other) {
         return gather_pages(two, c[0], pages(bytes + 256, TokenMajor{2, 1, 8}, other, 7));
       })},
      {Errc::too_small, {"1 tokens", "needs 2"}, pages_with([](Caches& c, Span<Index> other) {
         return gather_pages(two, c[0], pages(bytes + 256, TokenMajor{2, 1, 4}, other, 1));
       })},
      {Errc::null_data, {"the cache"}, pages_with([](Caches& c, Span<Index>) {
         c[0].data = nullptr;
         return compact_pages(two, c).status;
       })},
      {Errc::bad_pages, {"blocks of the cache", "0 tokens"}, pages_with([](Caches& c, Span<Index>) {
         c[0].block_tokens = 0;
         return compact_pages(two, c).status;
       })},
  };
}

Cases of_slots() {
  static Slots slots;
  static const Index two[] = {0, 2}, one[] = {0};
  slots.clear();
  EXPECT_TRUE(slots.append(4));
  EXPECT_TRUE(slots.append(6));
  EXPECT_TRUE(slots.keep(3, KeptRows(two, 6)));
  static Index few[2];
  return {
      {Errc::bad_prompt, {"10 tokens", "2147483647 more", "most 2147483647 "}, slots.append(max_tokens)},
      {Errc::bad_setting, {"is 2147483648,"}, slots.keep(max_tokens + 1, KeptRows(two, 6))},
      {Errc::bad_shape, {"5 tokens", "below 2 hold 6 ", "append_chunk()"}, slots.keep(2, KeptRows(two, 5))},
      {Errc::bad_shape, {"from 3 on hold 2 ", "last 6 ", "pruned already"}, slots.keep(3, KeptRows(two, 6))},
      {Errc::bad_prompt, {"10 tokens", "back to 11"}, slots.rollback(11)},
      {Errc::bad_index, {"2 slots from 5 ", "layer 3 holds 6"}, slots.write_positions(3, 5, Span<Index>(few))},
      {Errc::not_supported, {"10 groups", "most 9 "}, slots.reserve(10, 1)},
      {Errc::not_supported,
       {"10 groups", "most 9 "},
       [] {
         Slots full;
         Status status;
         for (std::size_t k = 1; k <= Slots::max_groups && status; ++k) {
           EXPECT_TRUE(full.append(2));
           status = full.keep(k, KeptRows(one, 2));
         }
         return status;
       }()},
  };
}

Cases of_batch_plans() {
  static const Plan plan = *make_plan(Config{2, 0.5}, {10, 4, visual});
  static Slots deep;
  deep.clear();
  EXPECT_TRUE(deep.append(3));
  EXPECT_TRUE(deep.keep(3, KeptRows(Span<const Index>(table), 3)));
  const auto with = [](const SequenceStep& step, std::size_t layers = 4, std::size_t most = 4) {
    BatchGroup groups[4];
    std::int32_t lengths[32];
    return plan_batch(Span<const SequenceStep>(&step, 1), layers, 16, Span<BatchGroup>(groups, most), lengths).status;
  };
  const auto planned_by = [&](auto change) {
    Plan wrong = plan;
    change(wrong);
    return with({&wrong});
  };
  return {
      {Errc::bad_setting, {"0 layers", "at least 1"}, with({&plan}, 0)},
      {Errc::bad_setting, {"2147483648 layers"}, with({&plan}, max_tokens + 1)},
      {Errc::bad_shape, {"slots of sequence 0 ", "layer 3 ", "3 layers"}, with({nullptr, &deep}, 3)},
      {Errc::bad_shape, {"plan of sequence 0 ", "4 layers", "has 5"}, with({&plan}, 5)},
      {Errc::bad_setting, {"sequence 0 ", "9 stages", "most 8 "}, planned_by([](Plan& p) { p.stages = 9; })},
      {Errc::bad_setting, {"sequence 0 ", "make_plan()"}, planned_by([](Plan& p) { p.visual = 11; })},
      {Errc::bad_shape,
       {"sequence 0 ", "0 keys", "2147483648 more", "layer 0", "int32"},
       with({nullptr, nullptr, max_tokens + 1})},
      {Errc::bad_shape,
       {"2147483648 sequences", "most 2147483647 "},
       [] {
         BatchGroup groups[1];
         std::int32_t lengths[1];
         return plan_batch(nowhere<const SequenceStep>(max_tokens + 1), 4, 16, groups, lengths).status;
       }()},
      {Errc::too_small, {"groups than the 1 ", "one a layer"}, with({&plan}, 4, 1)},
      {Errc::too_small, {"list of layer groups", "0 entries", "needs 1"}, with({&plan}, 4, 0)},
  };
}

Cases of_the_c_face() {
  const auto config_with = [](auto change) {
    fastv_config config = fastv_default_config();
    change(config);
    return detail::read_config(config).status;
  };
  static fastv_message why;
  counted_new::fail_nothrow(true);
  const fastv_config config = fastv_default_config();
  EXPECT_EQ(fastv_pruner_create(&config, &why), nullptr);
  counted_new::fail_nothrow(false);
  return {
      {Errc::bad_setting, {"quota is 2 ", "0 and 1"}, config_with([](fastv_config& c) { c.quota = 2; })},
      {Errc::bad_setting, {"selection is -1 ", "0 and 3"}, config_with([](fastv_config& c) { c.selection = -1; })},
      {Errc::not_supported,
       {"k has element type 3", "FASTV_HALF"},
       detail::with_elements(numbers, 3, "k", [](const auto*) { return Status{}; })},
      {Errc::not_supported, {"features have element type 3", "FASTV_HALF"}, detail::LoadVector{{}, {}, {}, 3}.sound()},
      {Errc::bad_prompt, {"0 tokens", "FASTV_OK"}, detail::read_kept(fastv_kept{}).status},
      {Errc::bad_setting, {"keep_count is 0", "0.25", "fastv_default_config()"}, config_with([](fastv_config& c) {
         c.filtering_ratio = 0.25;
         c.keep_count = 0;
       })},
      {Errc::out_of_memory, {"pruner"}, {Errc::out_of_memory, static_cast<const char*>(why.text)}},
  };
}

#ifdef FASTV_SINGLE_FILE
Cases of_graph_lists() { return {}; }
#else
Cases of_graph_lists() {
  static const Index rows[] = {4};
  static const TokenSpan two[] = {{1, 3}, {5, 3}}, nothing_else[] = {{0, 4}};
  const auto listed = [](Span<const Config> schedule, Span<const TokenSpan> spans, std::size_t tokens) {
    return detail::ScheduleLists(schedule).begin({tokens, 16, spans});
  };
  Config least = pooled(), none;
  least.keep_count = 5;
  least.min_per_image = 1;
  none.selection = Selection::uniform;
  none.filtering_ratio = 1;
  std::vector<Config> twice(2, least);
  twice[1].filtering_layer = 4;
  const auto one = [&](const Config& config, Span<const TokenSpan> spans = visual, std::size_t tokens = 8) {
    return listed(Span<const Config>(&config, 1), spans, tokens);
  };
  return {
      {Errc::not_supported, {"8388609 tokens", "most 8388608:", "two graphs"}, one({}, visual, 8388609)},
      {Errc::bad_setting, {"stage 0 ", "none of 4 "}, one(none, nothing_else, 4)},
      {Errc::not_supported, {"stage 1 ", "min_per_image 1 ", "no minimum"}, listed(twice, two, 10)},
      {Errc::not_supported, {"stage 0 ", "ScoreRows::last", "two graphs"}, one(with_rows(rows))},
      {Errc::not_supported, {"stage 0 ", "prior_rows"}, one([] {
         Config config;
         config.prior_rows = rows;
         return config;
       }())},
  };
}
#endif

Cases all_cases() {
  Cases all;
  for (const Cases& some : {of_settings(), of_prompts(), of_selection(), of_diversity(), of_rules(), of_costs(),
                            of_evidence(), of_attention(), of_applying(), of_remedies(), of_shards(), of_batches(),
                            of_pages(), of_slots(), of_batch_plans(), of_the_c_face(), of_graph_lists()})
    all.insert(all.end(), some.begin(), some.end());
  return all;
}

// ---- the sentences of the headers ---------------------------------------------------------------

// Every header but those of adaptors, whose engines the tests of them have: a new one is here by itself.
std::set<std::string> sentences_of_the_core() {
  std::vector<std::string> names = {"fastv_c.h"};
  for (const char* part : {"", "detail/"})
    for (const auto& entry : std::filesystem::directory_iterator(sentences::folder() + part)) {
      const std::string name = entry.path().filename().string();
      const bool adaptor =
          name.compare(0, 4, "ggml") == 0 || name.compare(0, 5, "torch") == 0 || name.compare(0, 4, "cuda") == 0;
#ifdef FASTV_SINGLE_FILE
      if (name == "graph_lists.hpp") continue;
#endif
      if (entry.path().extension() == ".hpp" && !adaptor) names.push_back(part + name);
    }
  EXPECT_GT(names.size(), 30u);
  return sentences::of_headers(names);
}

TEST(Sentences, AreFoundInCode) {
  EXPECT_EQ(
      sentences::of_text("return fail(Errc::a, \"one {} \"\n  \"two\", f(x, \"word\"), \"word\");\n fail_null(\"x\");"
                         "{fail(Errc::b, flag ? \"three\" : \"four \\\"4\\\"\")}; fail(status, \"no\")"),
      (std::set<std::string>{"one {} two", "three", "four \"4\""}));
}

TEST(Sentences, NameTheNumberTheLimitAndWhatToDo) {
  for (const Case& c : all_cases()) {
    const std::string sentence = text_of(c.status);
    EXPECT_FALSE(c.status) << "of the case with: " << c.names[0];
    EXPECT_EQ(c.status.code, c.code) << sentence;
    for (const char* name : c.names)
      EXPECT_NE(sentence.find(name), std::string::npos) << '"' << name << "\" is not in: " << sentence;
  }
}

TEST(Sentences, EveryOneOfTheHeadersIsRaised) {
  std::set<std::string> raised;
  for (const Case& c : all_cases())
    if (c.status.sentence != nullptr) raised.insert(c.status.sentence);
  const std::set<std::string> written = sentences_of_the_core();
  EXPECT_GT(written.size(), 150u);
  sentences::expect_raised(written, raised);
  for (const std::string& sentence : raised) EXPECT_EQ(written.count(sentence), 1u) << "not found: " << sentence;
}

TEST(Sentences, EveryCategoryIsRaised) {
  std::set<Errc> raised;
  for (const Case& c : all_cases()) raised.insert(c.status.code);
  for (int code = 1; code <= static_cast<int>(Errc::out_of_memory); ++code)
    EXPECT_EQ(raised.count(static_cast<Errc>(code)), 1u) << "no case raises " << testing::PrintToString(Errc(code));
}

TEST(Sentences, HaveAPartForEachPlaceAndReadWell) {
  for (const Case& c : all_cases()) {
    const std::string sentence = c.status.sentence;
    std::size_t places = 0, parts = 0;
    for (std::size_t at = sentence.find("{}"); at != std::string::npos; at = sentence.find("{}", at + 2)) ++places;
    for (const detail::Part& p : c.status.parts) parts += p.kind != detail::Part::Kind::none ? 1u : 0u;
    EXPECT_EQ(places, parts) << sentence;
    EXPECT_EQ(sentence.find("  "), std::string::npos) << sentence;
    EXPECT_EQ(sentence.find(" :"), std::string::npos) << sentence;
    EXPECT_NE(sentence.back(), '.') << "it goes on behind a colon of the caller's: " << sentence;
    EXPECT_NE(sentence.back(), ' ') << sentence;
  }
}

TEST(Sentences, AreNeverCutOffWhateverTheirNumbers) {
  for (const Case& c : all_cases()) {
    Status status = c.status;
    for (detail::Part& p : status.parts) {
      if (p.kind == detail::Part::Kind::whole) p = LLONG_MIN;
      if (p.kind == detail::Part::Kind::real) p = -1.23457e-308;
      if (p.kind == detail::Part::Kind::word) p = "row stride of probabilities";
    }
    EXPECT_LT(text_of(status).size(), sizeof(Message::text) - 1) << text_of(status);
  }
}

}  // namespace
}  // namespace status_test
