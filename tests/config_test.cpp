// Every Errc: the condition that raises it, and the numbers its sentence names.
#include <gtest/gtest.h>

#include <set>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;

constexpr Errc last_of_core = Errc::out_of_memory;  // those behind it are of tensors: tests/torch_test.cpp
constexpr Errc last_errc = Errc::not_in_graph;

// ---- helpers that make one call go wrong --------------------------------------------------------

Status plan_with(const Config& config, std::vector<TokenSpan> spans = {{5, 36}}, std::size_t tokens = 52,
                 std::size_t layers = 4) {
  return make_plan(config, {tokens, layers, spans}).status;
}
Config with_ratio(double ratio) {
  Config config;
  config.filtering_ratio = ratio;
  return config;
}
Config with_layer(std::size_t layer, Selection selection = Selection::top_k) {
  Config config;
  config.filtering_layer = layer;
  config.selection = selection;
  return config;
}

// A valid view of two heads, one row, eight keys of dimension four; one thing is then broken.
const float numbers[512] = {};
QueryKey<float> sound() { return query_key(numbers, 2, 1, numbers, 2, 8, 4, 0.5f, KvLayout::token_major); }
template <class Change>
Status broken(Change change) {
  auto evidence = sound();
  change(evidence);
  return check(evidence);
}

const TokenSpan visual[] = {{1, 3}};  // of eight tokens, or of six

template <class Evidence>
Status scored(const Config& config, const Evidence& evidence, std::size_t room = 3, std::size_t scratch_room = 256) {
  float scores[3], scratch[256];
  return score(config, evidence, Span<const TokenSpan>(visual), Span<float>(scores, room),
               Span<float>(scratch, scratch_room));
}
Config with_rows(Span<const Index> rows) {
  Config config;
  config.score_rows = ScoreRows::listed;
  config.listed_rows = rows;
  return config;
}
Config with_prior() {
  static const Index rows[] = {4};
  Config config;
  config.prior_rows = rows;
  return config;
}
Status selected(Span<const float> scores, std::size_t room = 8) {
  Index kept[8], quotas[1];
  std::uint32_t marks[3];
  return select<float>({}, scores, visual, 6, Span<Index>(kept, room), quotas, marks).status;
}

unsigned char bytes[64];
Status gathered(std::vector<Index> kept, Rows to) { return gather(kept, Rows{bytes, 8, 4, 4}, to); }

struct Case {
  Errc code;
  std::vector<const char*> names;  // what the sentence must contain: the offending number and its limit
  Status status;
};

std::vector<Case> cases() {
  const Index past_end[] = {7, 8}, early[] = {3};
  auto every_row = sound();
  every_row.rows = 8;
  Config by_count, by_all_rows;
  by_count.keep_count = 37;
  by_all_rows.score_rows = ScoreRows::all;
  const float nan = oracle::nan_float(), infinity = oracle::infinity();
  const float all_nan[] = {nan, -nan, nan}, plus_infinity[] = {0, infinity, 0}, minus_infinity[] = {0, 0, -infinity};
  const std::size_t huge = ~std::size_t{0};
  const Span<const Index> no_rows(nullptr, 2);
  const Rows room{bytes, 8, 4, 4};

  return {
      // settings
      {Errc::filtering_layer_past_end, {"is 4 ", "4 layers", "at most 3"}, plan_with(with_layer(4))},
      {Errc::filtering_layer_past_end, {"is 99 ", "4 layers"}, plan_with(with_layer(99))},
      {Errc::no_attention_yet, {"is 0"}, plan_with(with_layer(0))},
      {Errc::ratio_not_a_number, {"not a number"}, plan_with(with_ratio(std::nan("")))},
      {Errc::ratio_out_of_range, {"1.5", "0 ", "1 "}, plan_with(with_ratio(1.5))},
      {Errc::ratio_out_of_range, {"-0.25"}, plan_with(with_ratio(-0.25))},
      {Errc::ratio_out_of_range, {"inf"}, plan_with(with_ratio(HUGE_VAL))},
      {Errc::count_above_visual, {"is 37 ", "36 visual", "at most 36"}, plan_with(by_count)},
      {Errc::listed_rows_empty, {"empty"}, plan_with(with_rows({}))},
      {Errc::listed_rows_empty, {"empty"}, scored(with_rows({}), sound())},
      {Errc::listed_row_past_end, {"[1]", "is 8 ", "8 tokens"}, scored(with_rows(past_end), every_row)},
      // the prompt
      {Errc::no_layers, {"0 layers"}, plan_with({}, {}, 5, 0)},
      {Errc::no_tokens, {"0 tokens"}, plan_with({}, {}, 0)},
      {Errc::too_many_tokens, {"2147483648", "2147483647"}, plan_with({}, {}, max_tokens + 1)},
      {Errc::span_empty, {"span 1 "}, plan_with({}, {{5, 3}, {9, 0}})},
      {Errc::span_past_end, {"span 0 ", "position 53", "52 tokens"}, plan_with({}, {{5, 48}})},
      {Errc::span_past_end, {"span 0 ", "52 tokens"}, plan_with({}, {{5, huge}})},
      {Errc::span_past_end, {"span 0 ", "52 tokens"}, plan_with({}, {{huge, 2}})},
      {Errc::spans_unsorted, {"span 1 ", "position 5,", "at 20"}, plan_with({}, {{20, 3}, {5, 3}})},
      {Errc::spans_overlap, {"span 1 ", "position 7 ", "to 8"}, plan_with({}, {{5, 3}, {7, 3}})},
      {Errc::spans_overlap, {"span 1 ", "position 5 "}, plan_with({}, {{5, 3}, {5, 3}})},
      {Errc::span_columns, {"span 0 ", "7 columns", "36 tokens"}, plan_with({}, {{5, 36, 7}})},
      {Errc::last_token_visual, {"position 51", "span 0"}, plan_with({}, {{16, 36}})},
      // evidence
      {Errc::null_data, {"visual spans"}, check(Span<const TokenSpan>(nullptr, 1), 9)},
      {Errc::null_data, {"listed_rows"}, plan_with(with_rows(no_rows))},
      {Errc::null_data, {"query"}, broken([](auto& e) { e.query = nullptr; })},
      {Errc::null_data, {"key"}, broken([](auto& e) { e.key = nullptr; })},
      {Errc::null_data, {"bias"}, broken([](auto& e) { e.bias = Span<const float>(nullptr, 8); })},
      {Errc::null_data, {"probabilities"}, check(probabilities(static_cast<const float*>(nullptr), 2, 1, 8))},
      {Errc::null_data, {"scores"}, check(Scores<float>{{nullptr, 3}, 8})},
      {Errc::null_data, {"scores"}, selected({nullptr, 3})},
      {Errc::no_heads, {"query has 0 heads"}, broken([](auto& e) { e.heads = 0; })},
      {Errc::no_heads, {"key has 0 heads"}, broken([](auto& e) { e.kv_heads = 0; })},
      {Errc::no_heads, {"probabilities has 0"}, check(probabilities(numbers, 0, 1, 8))},
      {Errc::no_rows, {"query has 0 rows"}, broken([](auto& e) { e.rows = 0; })},
      {Errc::no_rows, {"probabilities has 0"}, check(probabilities(numbers, 2, 0, 8))},
      {Errc::no_tokens, {"0 tokens"}, broken([](auto& e) { e.keys = 0; })},
      {Errc::too_many_tokens, {"2147483648"}, broken([](auto& e) { e.keys = max_tokens + 1; })},
      {Errc::no_dim, {"dimension 0"}, broken([](auto& e) { e.dim = 0; })},
      {Errc::heads_not_divisible, {"3 query", "2 KV"}, broken([](auto& e) { e.heads = 3; })},
      {Errc::heads_not_divisible, {"2 query", "4 KV"}, broken([](auto& e) { e.kv_heads = 4; })},
      {Errc::negative_stride, {"token stride of key", "-8"}, broken([](auto& e) { e.key_token_stride = -8; })},
      {Errc::negative_stride, {"head stride of query", "-1"}, broken([](auto& e) { e.query_head_stride = -1; })},
      {Errc::overlapping_stride, {"head stride of query", "is 3,", "at least 4"}, broken([](auto& e) {
         e.query_head_stride = 3;
       })},
      {Errc::overlapping_stride, {"token stride of key", "is 7,", "at least 8"}, broken([](auto& e) {
         e.key_token_stride = 7;
       })},
      {Errc::row_not_in_evidence, {"position 3 ", "position 7"}, scored(with_rows(early), sound())},
      {Errc::row_not_in_evidence, {"position 0 ", "position 7"}, scored(by_all_rows, sound())},
      {Errc::rows_above_keys, {"9 rows", "8 keys"}, broken([](auto& e) { e.rows = 9; })},
      {Errc::bad_scale, {"-0.5"}, broken([](auto& e) { e.scale = -0.5f; })},
      {Errc::bad_scale, {"is 0 "}, broken([](auto& e) { e.scale = 0; })},
      {Errc::bad_scale, {"nan"}, broken([=](auto& e) { e.scale = nan; })},
      {Errc::bad_scale, {"inf"}, broken([=](auto& e) { e.scale = infinity; })},
      {Errc::bad_soft_cap, {"-30"}, broken([](auto& e) { e.soft_cap = -30; })},
      {Errc::bad_soft_cap, {"nan"}, broken([=](auto& e) { e.soft_cap = nan; })},
      {Errc::bad_soft_cap, {"inf"}, broken([=](auto& e) { e.soft_cap = infinity; })},
      {Errc::bias_size, {"7 entries", "8 keys"}, broken([](auto& e) { e.bias = Span<const float>(numbers, 7); })},
      {Errc::scores_size, {"2 scores", "3 visual"}, selected({numbers, 2})},
      {Errc::scores_size, {"4 scores", "3 visual"}, scored({}, Scores<float>{{numbers, 4}, 8})},
      {Errc::evidence_missing, {"top_k"}, Pruner<>().prune(NoEvidence{8}, visual).status},
      {Errc::all_scores_nan, {"3 visual scores"}, selected(all_nan)},
      {Errc::infinite_score, {"token 1 "}, selected(plus_infinity)},
      {Errc::infinite_score, {"token 2 "}, selected(minus_infinity)},
      // applying
      {Errc::null_data, {"rows"}, gathered({0}, {nullptr, 8, 4, 4})},
      {Errc::null_data, {"kept indices"}, gather({nullptr, 1}, room, room)},
      {Errc::index_past_end, {"index 1 ", "is 8 ", "8 rows"}, gathered({0, 8}, room)},
      {Errc::indices_unsorted, {"index 2 ", "is 3,", "it, 5"}, gathered({0, 5, 3}, room)},
      {Errc::indices_unsorted, {"index 1 ", "is 5,"}, gathered({5, 5}, room)},
      {Errc::rows_differ, {"size of a row", "4 at", "3 at"}, gathered({0}, {bytes, 8, 3, 4})},
      {Errc::rows_differ, {"planes", "1 at", "2 at"}, gathered({0}, {bytes, 8, 4, 4, 2, 32})},
      {Errc::room_too_small, {"destination", "1 ", "needs 2"}, gathered({0, 1}, {bytes, 1, 4, 4})},
      {Errc::room_too_small, {"kept indices", "2 ", "needs 5"}, selected({numbers, 3}, 2)},
      {Errc::room_too_small, {"quotas", "0 ", "needs 1"}, picture_quotas({}, visual, {})},
      {Errc::room_too_small, {"scratch", "0 ", "needs"}, scored({}, sound(), 3, 0)},
      {Errc::room_too_small, {"scores", "2 ", "needs 3"}, scored({}, sound(), 2)},
      {Errc::room_too_small, {"scores", "2 ", "needs 3"}, scored({}, probabilities(numbers, 2, 1, 8), 2)},
      {Errc::prior_without_rows,
       {"prior_rows", "prior_corrected()"},
       Pruner<>(with_prior()).prune(Scores<float>{{numbers, 3}, 8}, visual).status},
      {Errc::prior_without_rows,
       {"prior_rows"},
       Pruner<>(with_prior()).prune(KeysOnly<float>{keys_of(sound())}, visual).status},
      // memory
      {Errc::out_of_memory, {"4611686018427387904 bytes"}, Pruner<>().reserve(std::size_t{1} << 60, 1)},
      {Errc::out_of_memory, {"9223372036854775807 bytes"}, Pruner<>().reserve(huge, 1)},
  };
}

// What only a serving engine can get wrong.
std::vector<Case> serving_cases() {
  Config share, half_window, window, pooled_first;
  share.uniform_share = -0.5;
  half_window.window_rows = 4;
  window.window_rows = window.window_columns = 2;
  pooled_first.quota = Quota::pooled;
  static Index quotas[4], table[] = {0, 1};
  static TokenSpan room[4];
  static std::uint32_t marks[3];
  static Index kept[8];
  static float floats[256];
  static SoftmaxPart parts[6];
  const auto schedule = [&](std::vector<Config> stages, std::vector<std::size_t> layers) {
    for (std::size_t i = 0; i < layers.size(); ++i) stages[i].filtering_layer = layers[i];
    static const TokenSpan two[] = {{1, 3}, {5, 3}};
    return make_plan(stages, {10, 16, two}, room, quotas).status;
  };
  const auto batch = [&](std::size_t second_first, std::size_t second_tokens) {
    const Request requests[] = {{Config{}, visual, 0, 6}, {Config{}, visual, second_first, 6}};
    BatchPruner<> pruner;
    const KeptBatch all = pruner.prune(requests, [&](std::size_t i) {
      return Scores<float>{{numbers, 3}, i == 0 ? 6 : second_tokens};
    });
    return all ? all.statuses[1] : all.status;
  };
  const auto paged = [&](std::size_t block_tokens, std::size_t blocks) {
    auto e = sound();
    e.pages.block_table = Span<const Index>(table, blocks);
    e.pages.block_tokens = block_tokens;
    e.pages.block_stride = 64;
    return check(e);
  };
  const auto turned = [&](std::size_t dim, std::size_t frequencies) {
    return unrotate(head_vectors(numbers, 1, 2, dim, KvLayout::head_major), Rope{{numbers, frequencies}, {quotas, 2}},
                    Span<float>(floats));
  };
  const LayerTime falling[] = {{10, 2.0}, {20, 1.0}};
  const ModelShape small{4, 8, 2, 2, 4, 16};
  return {
      {Errc::share_out_of_range, {"-0.5"}, check(share)},
      {Errc::window_incomplete, {"4 rows", "0 columns"}, check(half_window)},
      {Errc::window_needs_columns,
       {"span 0 "},
       select<float>(window, {numbers, 3}, visual, 6, kept, quotas, marks).status},
      {Errc::stages_unsorted, {"stage 1 ", "layer 2 ", "has 3"}, schedule({Config{}, Config{}}, {3, 2})},
      {Errc::too_many_stages, {"9 stages", "most 8"}, schedule(std::vector<Config>(9), {})},
      {Errc::counts_unknown, {"stage 1 "}, schedule({pooled_first, Config{}}, {1, 2})},
      {Errc::span_continues_nothing, {"span 0 "}, plan_with({}, {{5, 3, 0, true}})},
      {Errc::span_original, {"span 0 ", "2 original", "3 it"}, plan_with({}, {{5, 3, 0, false, 2}})},
      {Errc::sequences_overlap, {"sequence 1 ", "row 5 ", "to 6"}, batch(5, 6)},
      {Errc::tokens_differ, {"7 tokens", "has 6"}, batch(6, 7)},
      {Errc::heads_above_total, {"2 heads", "is 1:"}, broken([](auto& e) { e.heads_total = 1; })},
      {Errc::chunk_not_divisor, {"3 elements", "key, 4"}, broken([](auto& e) { e.pages.chunk = 3; })},
      {Errc::norms_size,
       {"5 value", "6 are"},
       [] {
         auto e = sound();
         e.value_norms = Span<const float>(numbers, 5);
         return scored({}, e);
       }()},
      {Errc::odd_dim, {"is 3 "}, turned(3, 1)},
      {Errc::rope_size, {"frequencies", "3 entries", "needs 2"}, turned(4, 3)},
      {Errc::shard_ranks,
       {"6 softmax", "rank 0 of 4"},
       merge_shards(Span<const SoftmaxPart>(parts), 4, 0, {}, Span<float>(floats, 0))},
      {Errc::no_block_tokens, {"key", "0 tokens"}, paged(0, 2)},
      {Errc::block_table_short, {"2 blocks", "3 are"}, paged(3, 2)},
      {Errc::beyond_memory, {"number of heads is 2147483648", "8 entries"}, broken([](auto& e) {
         e.heads = max_tokens + 1;
       })},
      {Errc::layers_differ,
       {"5 layers", "has 4"},
       settings_under({Budget::Of::flops, 1}, ModelShape{5, 8, 2, 1, 4, 16}, {10, 4, visual}).status},
      {Errc::bad_times,
       {"2 layer", "entry 1"},
       settings_under({Budget::Of::seconds, 1, 2, 0, falling}, small, {10, 4, visual}).status},
      {Errc::budget_too_small,
       {"is 1e-09 ", "costs "},
       settings_under({Budget::Of::flops_ratio, 1e-9}, small, {10, 4, visual}).status},
  };
}

std::vector<Case> all_cases() {
  std::vector<Case> all = cases();
  for (const Case& c : serving_cases()) all.push_back(c);
  return all;
}

// ---- tests --------------------------------------------------------------------------------------

TEST(Errc, EachConditionGivesItsOwnCodeAndASentenceThatNamesItsNumbers) {
  for (const Case& c : all_cases()) {
    const std::string sentence = c.status.message().c_str();
    EXPECT_FALSE(c.status);
    EXPECT_EQ(c.status.code, c.code);
    for (const char* name : c.names)
      EXPECT_NE(sentence.find(name), std::string::npos) << '"' << name << "\" is not in: " << sentence;
  }
}

TEST(Errc, TheTableAboveLeavesNoneOut) {
  std::set<int> raised;
  for (const Case& c : all_cases()) raised.insert(static_cast<int>(c.code));
  for (int code = 1; code <= static_cast<int>(last_of_core); ++code)
    EXPECT_EQ(raised.count(code), 1u) << "no test raises Errc " << code;
}

TEST(Errc, EachValueHasItsOwnSentence) {
  std::set<std::string> sentences;
  for (int code = 0; code <= static_cast<int>(last_errc); ++code) {
    Status status;
    status.code = static_cast<Errc>(code);
    const std::string sentence = status.message().c_str();
    EXPECT_FALSE(sentence.empty()) << "Errc " << code;
    EXPECT_TRUE(sentences.insert(sentence).second) << "Errc " << code << " repeats: " << sentence;
  }
  Status beyond;
  beyond.code = static_cast<Errc>(static_cast<int>(last_errc) + 1);
  EXPECT_STREQ(beyond.message().c_str(), "") << "last_errc in this file is out of date";
}

TEST(Errc, NoSentenceIsCutOffWhateverItsNumbers) {
  for (int code = 0; code <= static_cast<int>(last_errc); ++code) {
    const long long most = -(1LL << 62);
    const Status status{static_cast<Errc>(code), "row stride of probabilities", most, most, most, -1.234567e-308};
    EXPECT_LT(std::strlen(status.message().c_str()), sizeof(Message::text) - 1) << status.message().c_str();
  }
}

TEST(Status, IsTrueWhereNothingWentWrong) {
  EXPECT_TRUE(Status{});
  EXPECT_TRUE(check(Config{}));
  EXPECT_TRUE(plan_with({}));
  EXPECT_STREQ(Status{}.message().c_str(), "no error");
}

TEST(Config, DefaultsAreThePapersK2R50OnTheLastRow) {
  const Config config;
  EXPECT_EQ(config.filtering_layer, 2u);
  EXPECT_EQ(config.filtering_ratio, 0.5);
  EXPECT_EQ(config.keep_count, by_ratio);
  EXPECT_EQ(config.score_rows, ScoreRows::last);
  EXPECT_EQ(config.selection, Selection::top_k);
  EXPECT_EQ(config.quota, Quota::per_picture);
  static_assert(std::is_aggregate<Config>::value, "designated initialisers work under C++20");
}

TEST(Config, TheEndsOfEveryRangeAreValid) {
  EXPECT_TRUE(plan_with(with_ratio(0)));
  EXPECT_TRUE(plan_with(with_ratio(1)));
  EXPECT_TRUE(plan_with(with_ratio(-0.0)));
  EXPECT_TRUE(plan_with(with_layer(1)));
  EXPECT_TRUE(plan_with(with_layer(3)));
  Config config;
  for (const std::size_t count : {0u, 36u}) {
    config.keep_count = count;
    EXPECT_TRUE(plan_with(config));
  }
  EXPECT_TRUE(plan_with({}, {{0, 51}})) << "from the first token up to the one before the last";
  EXPECT_TRUE(plan_with({}, {{5, 3}, {8, 3}})) << "spans may touch";
  EXPECT_TRUE(plan_with({}, {{5, 36, 6}}));
  EXPECT_TRUE(plan_with({}, {{5, 36, 36}}));
  EXPECT_TRUE(plan_with({}, {}, max_tokens));
}

TEST(Config, LayerZeroNeedsARuleThatLooksAtNoScore) {
  EXPECT_TRUE(plan_with(with_layer(0, Selection::random)));
  EXPECT_TRUE(plan_with(with_layer(0, Selection::uniform)));
}

TEST(Strides, NegativeOrOverlappingOnesAreRefusedInEveryAxisOrder) {
  auto view = probabilities(numbers, 3, 4, 5);  // [3, 4, 5]: strides 20, 5, 1
  EXPECT_TRUE(check(view));
  view = {numbers, 3, 4, 5, 1, 3, 12};  // [5, 4, 3] in memory: heads innermost
  EXPECT_TRUE(check(view));
  view = {numbers, 3, 4, 5, 20, 1, 4};  // column-major maps: rows innermost
  EXPECT_TRUE(check(view));
  view = {numbers, 3, 4, 5, 20, 1, 3};  // a key later is three rows on, but there are four
  EXPECT_EQ(check(view).code, Errc::overlapping_stride);
  view = {numbers, 3, 4, 5, 19, 5, 1};
  EXPECT_EQ(check(view).code, Errc::overlapping_stride);
  EXPECT_EQ(check(view).limit, 20);
  view = {numbers, 3, 4, 5, 20, 5, 0};
  EXPECT_EQ(check(view).code, Errc::overlapping_stride);
  view = {numbers, 3, 4, 5, 20, 5, -1};
  EXPECT_EQ(check(view).code, Errc::negative_stride);
  view = {numbers, 1, 1, 5, 0, 0, 1};  // the stride of an axis of one is never used
  EXPECT_TRUE(check(view));
}

}  // namespace
