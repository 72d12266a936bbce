// mpirun -n RANKS sharded : one prompt scored by several ranks, as tensor parallel engines (heads sharded) and context
// parallel ones (keys sharded) hold it. Every rank must end with the indices of one rank alone, bit for bit.
#include <mpi.h>

#include <cstdio>
#include <fastv/fastv.hpp>
#include <vector>

namespace {

constexpr std::size_t heads = 32, kv_heads = 8, dim = 128, tokens = 631;
const std::vector<fastv::TokenSpan> visual = {{35, 576, 24}};
constexpr std::size_t visual_count = 576;
const float scale = 0.0883883f;  // 1 / sqrt(128)

struct Model {
  std::vector<float> query, key;  // [heads, dim], [kv_heads, tokens, dim]
};

Model make_model() {
  std::uint32_t state = 1;
  const auto number = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
  };
  Model model;
  for (std::size_t i = 0; i < heads * dim; ++i) model.query.push_back(2 * number());
  for (std::size_t i = 0; i < kv_heads * tokens * dim; ++i) model.key.push_back(number());
  return model;
}

int fail(const char* step, const fastv::Status& status) {
  std::fprintf(stderr, "%s: %s\n", step, status.message().c_str());
  MPI_Abort(MPI_COMM_WORLD, 1);
  return 1;
}

std::vector<fastv::Index> indices(const fastv::Kept& kept) {
  if (!kept) fail("prune", kept.status);
  return {kept.begin(), kept.end()};
}

// Heads sharded: each rank scores its heads, one all-reduce of a float per visual token adds them up.
std::vector<fastv::Index> by_heads(const Model& model, std::size_t rank, std::size_t ranks) {
  const std::size_t own_heads = heads / ranks, own_kv = kv_heads / ranks;
  auto evidence = fastv::query_key(
      fastv::heads(model.query.data() + rank * own_heads * dim, fastv::TokenMajor{1, own_heads, dim}),
      fastv::heads(model.key.data() + rank * own_kv * tokens * dim, fastv::HeadMajor{own_kv, tokens, dim}), scale);
  evidence.heads_total = heads;
  std::vector<float> scores(visual_count), scratch(fastv::score_scratch(evidence));
  const fastv::Status status = fastv::score<float>(fastv::Config{}, evidence, visual, scores, scratch);
  if (!status) fail("score", status);
  MPI_Allreduce(MPI_IN_PLACE, scores.data(), static_cast<int>(scores.size()), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  fastv::Pruner<> pruner;
  return indices(pruner.prune(fastv::Scores<float>{scores, tokens}, visual));
}

// Keys sharded: each rank scores its stretch of keys, the ranks exchange a maximum and a sum per head, then the scores.
std::vector<fastv::Index> by_keys(const Model& model, std::size_t rank, std::size_t ranks) {
  const auto cut = [&](std::size_t r) { return tokens * r / ranks; };
  const auto visual_before = [&](std::size_t r) {  // visual tokens ahead of a rank's keys
    const std::size_t begin = cut(r), first = visual[0].first;
    return begin <= first ? 0 : begin - first < visual_count ? begin - first : visual_count;
  };
  const std::size_t begin = cut(rank), own = visual_before(rank + 1) - visual_before(rank);
  const fastv::TokenSpan here{visual[0].first > begin ? visual[0].first - begin : 0, own};

  const auto evidence = fastv::query_key(
      fastv::heads(model.query.data(), fastv::TokenMajor{1, heads, dim}),
      fastv::heads(model.key.data() + begin * dim, fastv::HeadMajor{kv_heads, cut(rank + 1) - begin, dim, tokens}),
      scale);
  std::vector<fastv::SoftmaxPart> parts(ranks * heads);
  std::vector<float> numerators(heads * own), scratch(fastv::score_scratch(evidence)), scores(own);
  fastv::Status status = fastv::score_shard(
      evidence, own > 0 ? fastv::Span<const fastv::TokenSpan>(&here, 1) : fastv::Span<const fastv::TokenSpan>(),
      {parts.data() + rank * heads, heads}, numerators, scratch);
  if (!status) fail("score_shard", status);
  static_assert(sizeof(fastv::SoftmaxPart) == 2 * sizeof(float), "parts travel as floats");
  MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, parts.data(), static_cast<int>(2 * heads), MPI_FLOAT,
                MPI_COMM_WORLD);
  status = fastv::merge_shards<float>(parts, ranks, rank, numerators, scores);
  if (!status) fail("merge_shards", status);

  std::vector<float> all(visual_count);
  std::vector<int> counts, places;
  for (std::size_t r = 0; r < ranks; ++r) {
    counts.push_back(static_cast<int>(visual_before(r + 1) - visual_before(r)));
    places.push_back(static_cast<int>(visual_before(r)));
  }
  MPI_Allgatherv(scores.data(), static_cast<int>(own), MPI_FLOAT, all.data(), counts.data(), places.data(), MPI_FLOAT,
                 MPI_COMM_WORLD);
  fastv::Pruner<> pruner;
  return indices(pruner.prune(fastv::Scores<float>{all, tokens}, visual));
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (kv_heads % static_cast<std::size_t>(ranks) != 0) {
    if (rank == 0)
      std::fprintf(stderr, "%d ranks cannot share %zu KV heads evenly: use 1, 2, 4 or 8\n", ranks, kv_heads);
    MPI_Finalize();
    return 2;
  }
  const Model model = make_model();
  fastv::Pruner<> alone;
  const std::vector<fastv::Index> expected = indices(
      alone.prune(fastv::query_key(fastv::heads(model.query.data(), fastv::TokenMajor{1, heads, dim}),
                                   fastv::heads(model.key.data(), fastv::HeadMajor{kv_heads, tokens, dim}), scale),
                  visual));
  const auto r = static_cast<std::size_t>(rank), n = static_cast<std::size_t>(ranks);
  int wrong[2] = {by_heads(model, r, n) != expected ? 1 : 0, by_keys(model, r, n) != expected ? 1 : 0};
  MPI_Allreduce(MPI_IN_PLACE, wrong, 2, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  if (rank == 0)
    std::printf("%d ranks, %zu of %zu tokens kept: heads sharded %s, keys sharded %s\n", ranks, expected.size(), tokens,
                wrong[0] == 0 ? "as one rank" : "DIFFERENT", wrong[1] == 0 ? "as one rank" : "DIFFERENT");
  MPI_Finalize();
  return wrong[0] + wrong[1] == 0 ? 0 : 1;
}
