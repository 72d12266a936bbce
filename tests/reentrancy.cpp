// Re-entrancy, for ThreadSanitizer: one Pruner per thread on shared evidence, a BatchPruner whose parallel_for is
// threaded, and every free function from several threads at once, each into memory of its own. And for MemorySanitizer,
// which is why this is a program of its own without gtest: scratch memory is not initialised, and no result may depend
// on what it holds. Exit status 1 where threads change a result.
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
  std::vector<float> query, key, map, hidden;
  std::vector<half> half_key;
  std::vector<Index> positions;
  std::vector<float> frequencies;
};

Shared make_shared_tensors() {
  oracle::Rng rng(7);
  Shared s;
  const auto fill = [&](std::vector<float>& values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) values.push_back(static_cast<float>(rng.real(-1, 1)));
  };
  fill(s.query, heads * dim);
  fill(s.key, kv_heads * tokens * dim);
  fill(s.map, heads * tokens);
  fill(s.hidden, 60 * 8);
  fill(s.frequencies, dim / 2);
  for (const float k : s.key) s.half_key.push_back(oracle::make<half>(static_cast<double>(k)));
  for (std::size_t i = 0; i < tokens; ++i) s.positions.push_back(static_cast<Index>(i));
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
  const auto evidence =
      query_key(s.query.data(), heads, 1, s.key.data(), kv_heads, tokens, dim, 0.2f, KvLayout::token_major);
  const auto halves =
      query_key(s.query.data(), heads, 1, s.half_key.data(), kv_heads, tokens, dim, 0.2f, KvLayout::head_major);
  Config config, pooled, random, priors;
  pooled.quota = Quota::pooled;
  pooled.uniform_share = 0.25;
  random.selection = Selection::random;
  const Index last[] = {static_cast<Index>(tokens - 1)};
  priors.prior_rows = last;
  prune(config, evidence, parallel_for, sum);
  prune(pooled, halves, parallel_for, sum);
  prune(random, NoEvidence{tokens}, parallel_for, sum);
  prune(priors, evidence, parallel_for, sum);
  prune(config, probabilities(s.map.data(), heads, 1, tokens), parallel_for, sum);
  prune(config, KeysOnly<half>{keys_of(halves)}, parallel_for, sum);

  // The free functions.
  std::vector<float> norms(kv_heads * visual_tokens(visual)), turned(kv_heads * tokens * dim);
  expect(static_cast<bool>(value_norms(keys_of(halves), visual, Span<float>(norms))), "value_norms");
  expect(static_cast<bool>(
             unrotate(keys_of(evidence), Rope{s.frequencies, s.positions}, Span<float>(turned), parallel_for)),
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
  expect(static_cast<bool>(compact(Span<const Index>(kept), fastv::rows(hidden.data(), 60, 8))), "compact");
  sum.add(hidden);
  hidden = s.hidden;
  const PagedRows pages{hidden.data(), Span<Index>(table), 15, 15 * 32, 60, 32, 32};
  expect(static_cast<bool>(compact(Span<const Index>(kept), Span<const PagedRows>(&pages, 1))), "compact of pages");
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
    request.config.quota = i % 2 == 0 ? Quota::per_picture : Quota::pooled;
    if (i == 3) request.config.filtering_ratio = 2;
    requests.push_back(request);
  }
  BatchPruner<float> pruner;
  for (int round = 0; round < 2; ++round) {
    const KeptBatch batch = pruner.prune(
        requests,
        [&](std::size_t) {
          return query_key(s.query.data(), heads, 1, s.key.data(), kv_heads, tokens, dim, 0.2f, KvLayout::token_major);
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
