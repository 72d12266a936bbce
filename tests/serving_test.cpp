// What a serving engine does with a sequence, on the reference decoder against the slow way (every token runs, dropped
// keys are hidden): chunked prefill, several turns, several stages, several questions about one image.
#include <gtest/gtest.h>

#include "masked_decoder.hpp"
#include "random_weights.hpp"
#include "serving/cached_image.hpp"

namespace serving_test {
namespace {

using namespace reference;
using masked::Mode;

constexpr float tolerance = 2e-4f;
const DecoderConfig model = {{6, 48, 4, 2, 12, 80, 3, 40}, 1e-5f, 10000};
const Decoder& decoder() {
  static const Decoder one(model, RandomWeights(11, true));
  return one;
}

Matrix random_prompt(Eigen::Index tokens, std::uint64_t seed) {
  return 7 * RandomWeights(seed).matrix("prompt", tokens, 48);
}
float difference(const Matrix& a, const Matrix& b) { return (a - b).cwiseAbs().maxCoeff<Eigen::PropagateNaN>(); }

fastv::Config config_of(std::size_t layer, double ratio) {
  fastv::Config config;
  config.filtering_layer = layer;
  config.filtering_ratio = ratio;
  return config;
}

// A turn of a conversation: its prompt, its images, its schedule.
struct Turn {
  Matrix prompt;
  std::vector<fastv::TokenSpan> visual;
  std::vector<fastv::Config> schedule;
};

struct Outcome {
  std::vector<std::vector<fastv::Index>> kept;  // of every stage of every turn
  Matrix logits;                                // behind every turn and every decoded token
  Sequence sequence;
};

// Runs the turns one behind the other, decoding the same three tokens after each.
Outcome converse(const std::vector<Turn>& turns, Mode mode, Eigen::Index chunk = 0,
                 EvidenceKind evidence = EvidenceKind::query_key) {
  Outcome outcome;
  const auto record = [&](const Matrix& row) {
    outcome.logits.conservativeResize(outcome.logits.rows() + 1, 40);
    outcome.logits.bottomRows(1) = row;
  };
  for (const Turn& turn : turns) {
    Matrix hidden;
    if (mode == Mode::once) {
      serving::Prefilled run =
          serving::prefill(decoder(), turn.prompt, outcome.sequence, {turn.schedule, turn.visual, evidence, chunk});
      hidden = std::move(run.hidden);
      for (auto& kept : run.kept) outcome.kept.push_back(std::move(kept));
    } else {
      masked::Run how{turn.schedule, turn.visual, mode, evidence};
      how.on_kept = [&](const fastv::Kept& kept, fastv::Span<const float>) {
        outcome.kept.emplace_back(kept.begin(), kept.end());
      };
      hidden = masked::prefill(decoder(), turn.prompt, outcome.sequence, how);
    }
    record(decoder().logits(hidden.bottomRows(1), outcome.sequence));
    for (const int token : {3, 17, 8}) record(decoder().decode(token, outcome.sequence));
  }
  return outcome;
}

TEST(ChunkedPrefill, EqualsThePrefillInOnePiece) {
  const Turn turn = {random_prompt(45, 1), {{4, 20, 5}, {27, 12}}, {config_of(3, 0.6)}};
  const Outcome by_queries = converse({turn}, Mode::once),
                by_keys = converse({turn}, Mode::once, 0, EvidenceKind::keys_only);
  for (const Eigen::Index chunk : {1, 7, 16, 44, 45, 100})
    for (const auto evidence : {EvidenceKind::query_key, EvidenceKind::probabilities, EvidenceKind::keys_only}) {
      SCOPED_TRACE(chunk);
      const Outcome& whole = evidence == EvidenceKind::keys_only ? by_keys : by_queries;
      const Outcome chunked = converse({turn}, Mode::once, chunk, evidence);
      EXPECT_EQ(whole.kept, chunked.kept);
      EXPECT_LT(difference(whole.logits, chunked.logits), tolerance);
      for (std::size_t layer = 0; layer < 6; ++layer)
        EXPECT_EQ(whole.sequence.layers[layer].length, chunked.sequence.layers[layer].length);
    }
}

TEST(ChunkedPrefill, OneStageIsTheReferenceLoopBitForBit) {
  const Matrix prompt = random_prompt(45, 1);
  Pruning pruning{fastv::Pruner<>(config_of(3, 0.6)), {{4, 20, 5}, {27, 12}}};
  Sequence by_decoder, by_server;
  const Matrix hidden = decoder().prefill(prompt, by_decoder, pruning);
  const serving::Prefilled run =
      serving::prefill(decoder(), prompt, by_server, {{pruning.pruner.config()}, pruning.visual});
  EXPECT_EQ(hidden, run.hidden);
  ASSERT_EQ(run.kept.size(), 1u);
  EXPECT_EQ(run.kept[0], std::vector<fastv::Index>(pruning.kept.begin(), pruning.kept.end()));
}

// Mean length of a token's keys over the two KV heads of the test model.
float key_length(const Sequence::LayerCache& cache, Eigen::Index row) {
  return (cache.keys.row(row).head(12).norm() + cache.keys.row(row).tail(12).norm()) / 2;
}

// Without the question a chunk can be pruned as soon as it is there, and go through all layers, wherever it ends.
TEST(ChunkedPrefill, KeysAlonePruneAChunkThatEndsInsideAnImage) {
  struct Chunk {
    Eigen::Index first, rows;
    std::vector<fastv::TokenSpan> visual;  // positions in the chunk
    std::size_t kept;
  };
  const Matrix prompt = random_prompt(45, 8);  // its image is tokens 5 .. 34
  const std::vector<Chunk> chunks = {{0, 16, {{5, 11}}, 5 + 4}, {16, 16, {{0, 16}}, 6}, {32, 13, {{0, 3}}, 1 + 10}};
  for (const std::size_t layer : {1u, 3u}) {
    Sequence pruned, hidden_keys;
    Matrix logits, masked_logits;
    for (const Chunk& chunk : chunks) {
      const Matrix rows = prompt.middleRows(chunk.first, chunk.rows);
      Pruning pruning{fastv::Pruner<>(config_of(layer, 0.6)), chunk.visual, EvidenceKind::keys_only};
      logits = decoder().logits(decoder().prefill(rows, pruned, pruning).bottomRows(1), pruned);
      EXPECT_EQ(pruning.kept.size(), chunk.kept);
      float longest_kept = 0, shortest_dropped = 1e9f;
      for (std::size_t i = 0, k = 0; i < static_cast<std::size_t>(chunk.rows); ++i) {
        const bool kept = k < pruning.kept.size() && pruning.kept.indices[k] == i;
        k += kept ? 1 : 0;
        const fastv::TokenSpan& image = chunk.visual[0];
        if (i < image.first || i >= image.first + image.count) continue;
        const float length = key_length(pruned.layers[layer - 1], chunk.first + static_cast<Eigen::Index>(i));
        if (kept)
          longest_kept = (std::max)(longest_kept, length);
        else
          shortest_dropped = (std::min)(shortest_dropped, length);
      }
      EXPECT_LT(longest_kept, shortest_dropped);
      masked::Run slow{{pruning.pruner.config()}, chunk.visual, Mode::mask, EvidenceKind::keys_only};
      slow.on_kept = [&](const fastv::Kept& kept, fastv::Span<const float>) {
        EXPECT_TRUE(std::equal(kept.begin(), kept.end(), pruning.kept.begin(), pruning.kept.end()));
      };
      masked_logits = decoder().logits(masked::prefill(decoder(), rows, hidden_keys, slow).bottomRows(1), hidden_keys);
    }
    EXPECT_LT(difference(logits, masked_logits), tolerance);
    for (const int token : {3, 17, 8})
      EXPECT_LT(difference(decoder().decode(token, pruned), decoder().decode(token, hidden_keys)), tolerance);
    for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(pruned.layers[i].length, i < layer ? 45 + 3 : 9 + 6 + 11 + 3) << i;
    EXPECT_EQ(pruned.next_position, 45 + 3);
  }

  // The last row of the first chunk is the image's and asks nothing, so that it cannot rank.
  Pruning by_query{fastv::Pruner<>(config_of(1, 0.6)), chunks[0].visual};
  Sequence sequence;
  try {
    (void)decoder().prefill(prompt.topRows(16), sequence, by_query);
    FAIL() << "scored by a visual token's row";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("position 15) is in visual span 0"), std::string::npos) << error.what();
  }
}

TEST(ChunkedPrefill, ChunksScoreByTheRowsTheyHave) {
  // A mean over all rows needs all query rows, which a chunked prefill no longer has: said, not guessed.
  fastv::Config config = config_of(2, 0.5);
  config.score_rows = fastv::ScoreRows::all;
  const Turn turn = {random_prompt(30, 2), {{4, 20}}, {config}};
  EXPECT_NO_THROW(converse({turn}, Mode::once));
  try {
    converse({turn}, Mode::once, 10);
    FAIL() << "scored by rows that are not there";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("evidence starts at position 20"), std::string::npos) << error.what();
  }
}

TEST(Turns, SecondImageIsPrunedOnItsOwnAndEqualsTheMaskedRun) {
  for (const std::size_t layer : {1u, 2u, 5u}) {
    const std::vector<Turn> turns = {{random_prompt(30, 1), {{5, 20}}, {config_of(layer, 0.6)}},
                                     {random_prompt(9, 2), {}, {config_of(layer, 0.6)}},  // a question without an image
                                     {random_prompt(26, 3), {{0, 8, 4}, {10, 12}}, {config_of(layer, 0.75)}}};
    const Outcome pruned = converse(turns, Mode::once), masked = converse(turns, Mode::mask),
                  by_map = converse(turns, Mode::once, 0, EvidenceKind::probabilities);
    EXPECT_EQ(pruned.kept, masked.kept);
    EXPECT_EQ(pruned.kept, by_map.kept);
    EXPECT_LT(difference(pruned.logits, masked.logits), tolerance);

    // Positions go on from the original lengths; cache lengths are those of each layer group.
    EXPECT_EQ(pruned.sequence.next_position, 30 + 3 + 9 + 3 + 26 + 3);
    for (std::size_t i = 0; i < 6; ++i)
      EXPECT_EQ(pruned.sequence.layers[i].length,
                i < layer ? 30 + 3 + 9 + 3 + 26 + 3 : (30 - 12) + 3 + 9 + 3 + (26 - 6 - 9) + 3);
  }
}

TEST(Turns, EarlierImageTakesNoPartInALaterRanking) {
  const std::vector<Turn> turns = {{random_prompt(30, 1), {{5, 20}}, {config_of(2, 0.6)}},
                                   {random_prompt(26, 3), {{2, 20}}, {config_of(2, 0.5)}}};
  const Outcome outcome = converse(turns, Mode::once);
  ASSERT_EQ(outcome.kept.size(), 2u);
  EXPECT_EQ(outcome.kept[1].size(), 16u);  // of the second turn's 26, positions within that turn
  EXPECT_LT(outcome.kept[1].back(), 26u);
}

TEST(CachedImage, EveryQuestionKeepsItsOwnTokensAsIfReadFromTheBeginning) {
  const Matrix beginning = random_prompt(36, 21);
  const std::vector<fastv::TokenSpan> visual = {{4, 20, 5}, {26, 10}};
  for (const std::size_t layer : {1u, 2u, 5u})
    for (const auto evidence : {EvidenceKind::query_key, EvidenceKind::probabilities, EvidenceKind::value_weighted}) {
      const serving::CachedImage image(decoder(), beginning, layer);
      std::vector<std::vector<fastv::Index>> kept;
      for (const std::uint64_t question : {31u, 32u, 33u}) {
        SCOPED_TRACE(testing::Message() << "K " << layer << ", question " << question);
        const Matrix words = random_prompt(5 + static_cast<Eigen::Index>(question % 3), question);
        Matrix prompt(beginning.rows() + words.rows(), beginning.cols());
        prompt << beginning, words;
        Pruning asked{fastv::Pruner<>(config_of(layer, 0.7)), visual, evidence},
            whole{fastv::Pruner<>(config_of(layer, 0.7)), visual, evidence};
        Sequence sequence, from_scratch;
        const Matrix hidden = image.ask(words, sequence, asked),
                     expected = decoder().prefill(prompt, from_scratch, whole);

        kept.emplace_back(asked.kept.begin(), asked.kept.end());
        EXPECT_EQ(kept.back(), std::vector<fastv::Index>(whole.kept.begin(), whole.kept.end()));
        ASSERT_EQ(hidden.rows(), expected.rows());
        EXPECT_LT(difference(decoder().logits(hidden, sequence), decoder().logits(expected, from_scratch)), tolerance);
        for (const int token : {3, 17, 8})
          EXPECT_LT(difference(decoder().decode(token, sequence), decoder().decode(token, from_scratch)), tolerance);
        EXPECT_EQ(sequence.next_position, from_scratch.next_position);
        for (std::size_t i = 0; i < 6; ++i)
          EXPECT_EQ(sequence.layers[i].length, from_scratch.layers[i].length) << "layer " << i;
      }
      // Questions that all kept the same would show nothing.
      EXPECT_NE(kept[0], kept[1]);
      EXPECT_NE(kept[1], kept[2]);
    }
}

TEST(Scorers, EveryKindOfEvidenceEqualsItsMaskedRun) {
  for (const auto kind : {EvidenceKind::query_key, EvidenceKind::probabilities, EvidenceKind::rope_free,
                          EvidenceKind::value_weighted, EvidenceKind::text_raters, EvidenceKind::keys_only}) {
    SCOPED_TRACE(static_cast<int>(kind));
    const std::vector<Turn> turns = {{random_prompt(40, 6), {{4, 16, 4}, {22, 12}}, {config_of(2, 0.6)}},
                                     {random_prompt(25, 7), {{3, 15}}, {config_of(2, 0.6)}}};
    const Outcome pruned = converse(turns, Mode::once, 0, kind), masked = converse(turns, Mode::mask, 0, kind);
    EXPECT_EQ(pruned.kept, masked.kept);
    EXPECT_LT(difference(pruned.logits, masked.logits), tolerance);
  }
}

// The slow way of a schedule: each stage told its exact counts, since hidden tokens still stand in its spans.
Turn told_counts(Turn turn, const fastv::Plan& plan) {
  for (std::size_t s = 0; s < turn.schedule.size(); ++s) {
    turn.schedule[s].keep_count = plan.stage[s].kept_visual;
    turn.schedule[s].quota = fastv::Quota::pooled;
  }
  return turn;
}

TEST(Stages, ScheduleEqualsTheMaskedRunAndItsPlan) {
  for (const auto of : {fastv::RatioOf::remaining, fastv::RatioOf::original}) {
    Turn turn = {random_prompt(50, 4), {{4, 40, 8}}, {config_of(1, 0.3), config_of(3, 0.5), config_of(5, 0.7)}};
    for (fastv::Config& config : turn.schedule) config.ratio_of = of;
    const auto plan = fastv::make_plan(turn.schedule, {50, 6, turn.visual});
    ASSERT_TRUE(plan) << plan.message().c_str();
    ASSERT_EQ(plan->stages, 3u);
    EXPECT_EQ(plan->stage[0].kept_visual, 28u);
    EXPECT_EQ(plan->stage[1].kept_visual, of == fastv::RatioOf::remaining ? 14u : 20u);
    EXPECT_EQ(plan->stage[2].kept_visual, of == fastv::RatioOf::remaining ? 4u : 12u);

    const Outcome pruned = converse({turn}, Mode::once), masked = converse({told_counts(turn, *plan)}, Mode::mask);
    EXPECT_LT(difference(pruned.logits, masked.logits), tolerance);
    for (std::size_t layer = 0; layer < 6; ++layer)
      EXPECT_EQ(static_cast<std::size_t>(pruned.sequence.layers[layer].length), plan->kv_length(layer, 3)) << layer;

    std::uint64_t macs = fastv::prefill_macs(model.shape, *plan);
    for (std::size_t step = 0; step < 3; ++step) macs += fastv::decode_macs(model.shape, *plan, step);
    EXPECT_EQ(pruned.sequence.macs, macs);

    const Outcome chunked = converse({turn}, Mode::once, 9);
    EXPECT_EQ(pruned.kept, chunked.kept);
    EXPECT_LT(difference(pruned.logits, chunked.logits), tolerance);
  }
}

TEST(Stages, ImagesKeepTheirSharesThroughAllStages) {
  Turn turn = {random_prompt(60, 5), {{2, 10}, {14, 24, 6}, {40, 15}}, {config_of(2, 0.5), config_of(4, 0.5)}};
  const Outcome pruned = converse({turn}, Mode::once);
  const auto plan = fastv::make_plan(turn.schedule, {60, 6, turn.visual});
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->stage[0].kept_visual, 5u + 12u + 8u);  // 7.5 rounds to 8
  EXPECT_EQ(plan->stage[1].kept_visual, 2u + 6u + 4u);
  for (std::size_t layer = 0; layer < 6; ++layer)
    EXPECT_EQ(static_cast<std::size_t>(pruned.sequence.layers[layer].length), plan->kv_length(layer, 3)) << layer;
}

}  // namespace
}  // namespace serving_test
