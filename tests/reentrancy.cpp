// Re-entrancy, for ThreadSanitizer: one Pruner per thread on shared evidence, a BatchPruner whose parallel_for is
// threaded, and every free function from several threads at once, each into memory of its own. And for MemorySanitizer,
// which is why this is a program of its own without gtest: scratch memory is not initialised, and no result may depend
// on what it holds. Exit status 1 where threads change a result.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "fastv/fastv.hpp"
#include "oracle.hpp"

namespace {

using namespace fastv;

// A parallel_for on threads of its own, who take the numbers as they come.
struct Threaded {
  template <class Body>
  void operator()(std::size_t count, const Body& body) const {
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
      threads.emplace_back([&] {
        for (std::size_t i; (i = next++) < count;) body(i);
      });
    for (std::thread& thread : threads) thread.join();
  }
};

constexpr std::size_t heads = 4, kv_heads = 2, dim = 40, tokens = 4500;  // keys in more than one piece
const TokenSpan visual[] = {{5, 2000, 50}, {2010, 2400}};

struct Shared {
  std::vector<float> query, many_queries, key, map, hidden, sinks;
  std::vector<half> half_key;
  std::vector<Index> positions, table;  // table: blocks of 9 tokens, the last first
  std::vector<float> frequencies;
};

Shared make_shared_tensors() {
  oracle::Rng rng(7);
  Shared s;
  const auto fill = [&](std::vector<float>& values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) values.push_back(static_cast<float>(rng.real(-1, 1)));
  };
  fill(s.query, heads * dim);
  fill(s.many_queries, 4 * heads * dim);
  s.sinks.assign(heads, 150.0f);
  fill(s.key, kv_heads * tokens * dim);
  fill(s.map, heads * tokens);
  fill(s.hidden, 60 * 8);
  fill(s.frequencies, dim / 2);
  for (const float k : s.key) s.half_key.push_back(oracle::make<half>(static_cast<double>(k)));
  for (std::size_t i = 0; i < tokens; ++i) s.positions.push_back(static_cast<Index>(i));
  for (std::size_t i = tokens / 9; i > 0; --i) s.table.push_back(static_cast<Index>(i - 1));
  return s;
}

// Everything a thread computes, as one number: which memory it lay in cannot matter.
class Sum {
 public:
  template <class T>
  void add(const T* data, std::size_t count) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < count * sizeof(T); ++i) value_ = (value_ ^ bytes[i]) * 1099511628211u;
  }
  template <class Container>
  void add(const Container& values) {
    add(values.data(), values.size());
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 14695981039346656037u;
};

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("re-entrancy: %s\n", what);
  std::exit(1);
}

template <class Evidence, class ParallelFor>
void prune(Config config, const Evidence& evidence, const ParallelFor& parallel_for, Sum& sum) {
  Pruner<float> pruner(config);
  for (int i = 0; i < 2; ++i) {
    const Kept kept = pruner.prune(evidence, visual, parallel_for);
    expect(static_cast<bool>(kept), kept.message().c_str());
    sum.add(kept.indices);
    sum.add(pruner.scores());
  }
}

template <class ParallelFor>
std::uint64_t everything(const Shared& s, const ParallelFor& parallel_for) {
  Sum sum;
  const auto query = fastv::heads(s.query.data(), TokenMajor{1, heads, dim});
  const auto evidence = query_key(query, fastv::heads(s.key.data(), TokenMajor{tokens, kv_heads, dim}), 0.2f);
  const auto halves = query_key(query, fastv::heads(s.half_key.data(), HeadMajor{kv_heads, tokens, dim}), 0.2f);
  const auto paged =
      query_key(query, fastv::heads(s.half_key.data(), HeadMajor{kv_heads, 9, dim}, s.table, tokens), 0.2f);
  const auto rows_at_hand = [&] {  // four rows, behind a window, with a sink that takes nearly everything
    auto many = query_key(fastv::heads(s.many_queries.data(), TokenMajor{4, heads, dim}),
                          fastv::heads(s.key.data(), TokenMajor{tokens - 500, kv_heads, dim}), 0.2f);
    many.first_key = 500;
    many.window = 3000;
    many.sinks = s.sinks;
    return many;
  }();
  const auto load = [&](std::size_t head, std::size_t token, float* out) {
    std::copy_n(&s.key[(token * kv_heads + head) * dim], dim, out);
  };
  const auto loaded = query_key(query, loaded_keys(kv_heads, tokens, dim, load), 0.2f);
  Config config, pooled, random, priors;
  pooled.quota = Quota::pooled;
  pooled.uniform_share = 0.25;
  random.selection = Selection::random;
  const Index before[] = {static_cast<Index>(tokens - 3)};
  priors.prior_rows = before;
  prune(config, evidence, parallel_for, sum);
  prune(pooled, halves, parallel_for, sum);
  prune(random, NoEvidence{tokens}, parallel_for, sum);
  prune(priors, rows_at_hand, parallel_for, sum);
  prune(config, probabilities(s.map.data(), heads, 1, tokens), parallel_for, sum);
  prune(config, KeysOnly{halves.key}, parallel_for, sum);
  prune(config, KeysOnly{loaded.key}, parallel_for, sum);
  prune(config, paged, parallel_for, sum);
  prune(config, loaded, parallel_for, sum);
  Config listed;
  const Index rows_listed[] = {static_cast<Index>(tokens - 4), static_cast<Index>(tokens - 1)};
  listed.score_rows = ScoreRows::listed;
  listed.listed_rows = rows_listed;
  prune(listed, rows_at_hand, parallel_for, sum);

  // The free functions.
  std::vector<float> norms(kv_heads * visual_tokens(visual)), turned(kv_heads * tokens * dim);
  expect(static_cast<bool>(value_norms(halves.key, visual, Span<float>(norms))), "value_norms");
  expect(static_cast<bool>(unrotate(evidence.key, Rope{s.frequencies, s.positions}, Span<float>(turned), parallel_for)),
         "unrotate");
  sum.add(norms);
  sum.add(turned);
  std::vector<SoftmaxPart> parts(heads);
  std::vector<float> numerators(heads * visual_tokens(visual)), scratch(score_scratch(evidence)),
      merged(visual_tokens(visual));
  expect(static_cast<bool>(
             score_shard(evidence, visual, Span<SoftmaxPart>(parts), Span<float>(numerators), Span<float>(scratch))),
         "score_shard");
  expect(static_cast<bool>(
             merge_shards(Span<const SoftmaxPart>(parts), 1, 0, Span<const float>(numerators), Span<float>(merged))),
         "merge_shards");
  sum.add(merged);
  const TokenSpan few[] = {{2, 20}};
  std::vector<Index> rows(10);
  std::vector<float> room(20);
  const auto raters = text_raters(s.hidden.data(), 60, 8, 8, few, {40, 10}, Span<Index>(rows), Span<float>(room));
  expect(static_cast<bool>(raters), "text_raters");
  sum.add(rows.data(), *raters);

  // Applied to tensors of the thread's own.
  std::vector<float> hidden = s.hidden;
  std::vector<Index> table = {3, 0, 2, 1};
  const std::vector<Index> kept = {0, 3, 4, 17, 29, 58};
  expect(static_cast<bool>(compact(kept, fastv::rows(hidden.data(), 60, 8))), "compact");
  sum.add(hidden);
  hidden = s.hidden;
  const KvPages pages = fastv::pages(hidden.data(), TokenMajor{15, 1, 8}, Span<Index>(table), 60);
  expect(static_cast<bool>(repack_pages(kept, Span<const KvPages>(&pages, 1))), "repack_pages");
  expect(static_cast<bool>(compact_pages(kept, pages)), "compact_pages");
  sum.add(hidden);
  sum.add(table);
  return sum.value();
}

// A batch of the same sequence with different settings, one of them wrong.
template <class ParallelFor>
std::uint64_t a_batch(const Shared& s, const ParallelFor& parallel_for) {
  Sum sum;
  std::vector<Request> requests;
  for (std::size_t i = 0; i < 6; ++i) {
    Request request{{}, visual, i * tokens, tokens};
    request.config.filtering_ratio = 0.15 * static_cast<double>(i);
    request.config.quota = i % 2 == 0 ? Quota::per_image : Quota::pooled;
    if (i == 3) request.config.filtering_ratio = 2;
    requests.push_back(request);
  }
  BatchPruner<float> pruner;
  for (int round = 0; round < 2; ++round) {
    const KeptBatch batch = pruner.prune(
        requests,
        [&](std::size_t) {
          return query_key(fastv::heads(s.query.data(), TokenMajor{1, heads, dim}),
                           fastv::heads(s.key.data(), TokenMajor{tokens, kv_heads, dim}), 0.2f);
        },
        parallel_for);
    expect(batch && batch.failed == 1, batch.message().c_str());
    sum.add(batch.indices);
    sum.add(batch.cumulative);
    for (std::size_t i = 0; i < requests.size(); ++i) sum.add(pruner.scores(i));
  }
  return sum.value();
}

}  // namespace

int main() {
  const Shared shared = make_shared_tensors();
  const std::uint64_t alone = everything(shared, Serial{}), batch = a_batch(shared, Serial{});
  std::uint64_t together[3] = {};
  std::vector<std::thread> threads;
  for (std::uint64_t& result : together) threads.emplace_back([&] { result = everything(shared, Serial{}); });
  for (std::thread& thread : threads) thread.join();
  for (const std::uint64_t result : together) expect(result == alone, "threads beside each other changed a result");
  expect(everything(shared, Threaded{}) == alone, "a threaded parallel_for changed a result");
  expect(a_batch(shared, Threaded{}) == batch, "a threaded parallel_for changed a batch");
  std::puts("re-entrancy: the same bits from any number of threads");
}
