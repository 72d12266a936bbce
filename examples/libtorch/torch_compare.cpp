// torch_compare [ROUNDS]: pruning at LLaVA-1.5-7B's shapes as the authors' code does it, written in ATen calls, beside
// fastv, in one run. Each procedure takes the layer's tensors and leaves shorter hidden states, position ids and a
// causal mask. That all leave the same is checked first; then they are timed in turn, on one thread.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fastv/torch_device.hpp>
#include <limits>
#include <vector>

#include "../common/progress.hpp"

namespace {

using at::indexing::Slice;

constexpr std::int64_t heads = 32, dim = 128, width = heads * dim, system_tokens = 35, image = 576, text = 20,
                       n = system_tokens + image + text, max_positions = 4096;
const double scale = 1 / std::sqrt(static_cast<double>(dim)), lowest = std::numeric_limits<float>::lowest();
const std::vector<fastv::TokenSpan> visual = {{system_tokens, image}};
const fastv::Config config;  // K = 2, R = 0.5

at::Tensor causal_mask(std::int64_t size) { return at::full({size, size}, lowest).triu(1).view({1, 1, size, size}); }

// What a layer leaves, and what pruning makes of it.
struct State {
  at::Tensor query, key;  // [1, heads, n, dim]
  at::Tensor attention;   // [1, heads, n, n]
  at::Tensor hidden;      // [1, n, width]
  at::Tensor positions;   // [1, n]
  at::Tensor mask;        // [1, 1, n, n]
};

State random_state() {
  at::manual_seed(1);
  State s;
  s.query = at::randn({1, n, heads, dim}).transpose(1, 2);
  s.key = at::randn({1, heads, n, dim});
  s.mask = causal_mask(n);
  s.attention = s.query.matmul(s.key.transpose(2, 3)).mul(scale).add(s.mask).softmax(-1);
  s.hidden = at::randn({1, n, width});
  s.positions = at::arange(n).unsqueeze(0);
  return s;
}

// ---- the authors' procedure ---------------------------------------------------------------------
// github.com/pkunlp-icler/FastV: mean over heads of the whole map, last row, topk, sort, index, and a new mask.

void authors_tokens(State& s) {
  const at::Tensor row = s.attention.mean(1)[0][-1].slice(0, system_tokens, system_tokens + image);
  const at::Tensor best = std::get<1>(row.topk(image / 2)) + system_tokens;
  const at::Tensor all = at::cat({at::arange(system_tokens), best, at::arange(system_tokens + image, n)});
  const at::Tensor keep = std::get<0>(all.sort());
  s.hidden = s.hidden.index({Slice(), keep, Slice()});
  s.positions = keep.unsqueeze(0);
}
// A mask of the new length (their transformers 4.31 code).
void authors(State& s) {
  authors_tokens(s);
  s.mask = causal_mask(s.hidden.size(1));
}
// The first rows and columns of a mask over max_position_embeddings, converted anew (their llava-hf code).
void authors_llava_hf(State& s) {
  static const at::Tensor buffer = at::ones({max_positions, max_positions}, at::kBool).triu(1);
  authors_tokens(s);
  const std::int64_t m = s.hidden.size(1);
  const at::Tensor mask = buffer.unsqueeze(0).unsqueeze(0).to(at::kFloat) * lowest;
  s.mask = mask.slice(2, 0, m).slice(3, 0, m);
}

// ---- fastv --------------------------------------------------------------------------------------

void require(const fastv::Status& status) {
  if (status) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

// Kept tokens stay in order, so their mask is the corner of the one there is.
void cut_mask(State& s) {
  const std::int64_t m = s.hidden.size(1);
  s.mask = s.mask.narrow(2, 0, m).narrow(3, 0, m);
}
template <class Evidence>
void by_view(State& s, const Evidence& evidence) {
  static fastv::Pruner<float> pruner(config);
  const fastv::Kept kept = pruner.prune(evidence, visual);
  require(fastv::compact(kept, s.hidden, 1));
  require(fastv::compact(kept, s.positions, 1));
  cut_mask(s);
}
void view_of_map(State& s) { by_view(s, fastv::probabilities(s.attention)); }
void view_of_query_key(State& s) { by_view(s, fastv::query_key(s.query, s.key, static_cast<float>(scale))); }

void by_indices(State& s, const fastv::Result<at::Tensor>& kept) {
  require(kept.status);
  s.hidden = s.hidden.index_select(1, *kept);
  s.positions = s.positions.index_select(1, *kept);
  cut_mask(s);
}
void device_map(State& s) { by_indices(s, fastv::device::prune(config, s.attention, visual)); }
void device_query_key(State& s) { by_indices(s, fastv::device::prune(config, s.query, s.key, scale, visual)); }

// ---- comparison ---------------------------------------------------------------------------------

struct Procedure {
  const char* name;
  void (*run)(State&);
  std::vector<double> seconds = {};
};

// Runs on copies of what is changed in place.
double timed(const State& state, const Procedure& procedure, State& out) {
  out = state;
  out.hidden = state.hidden.clone();
  out.positions = state.positions.clone();
  const auto start = std::chrono::steady_clock::now();
  procedure.run(out);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double at_share(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1))];
}

}  // namespace

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 15;
  if (rounds < 1 || rounds > 10000) {
    std::fprintf(stderr, "usage: torch_compare [ROUNDS], from 1 to 10000; 15 if left out\n");
    return 2;
  }
  at::set_num_threads(1);
  const at::NoGradGuard no_grad;
  const State state = random_state();
  Procedure procedures[] = {{"the authors, mask of the new length", authors},
                            {"the authors, mask as in llava-hf", authors_llava_hf},
                            {"fastv, view of the map", view_of_map},
                            {"fastv, view of query and keys", view_of_query_key},
                            {"fastv on the device, from the map", device_map},
                            {"fastv on the device, from query and keys", device_query_key}};
  State expected, result;
  timed(state, procedures[0], expected);
  for (const Procedure& procedure : procedures) {
    timed(state, procedure, result);
    if (!result.positions.equal(expected.positions) || !result.hidden.equal(expected.hidden) ||
        !result.mask.equal(expected.mask)) {
      std::printf("%s: NOT the result of the authors' procedure\n", procedure.name);
      return 1;
    }
  }
  std::printf("All %zu leave the same %lld of %lld tokens: equal positions, hidden states and mask.\n\n",
              std::size(procedures), static_cast<long long>(expected.hidden.size(1)), static_cast<long long>(n));

  {
    common::Progress progress("Timing", static_cast<std::size_t>(rounds));
    for (long round = 0; round < rounds; ++round) {
      for (Procedure& procedure : procedures) procedure.seconds.push_back(timed(state, procedure, result));
      progress.step();
    }
  }
  const double base = at_share(procedures[0].seconds, 0.5);
  std::printf("%-42s %10s %20s %8s\n", "", "median", "quartiles", "ratio");
  for (const Procedure& procedure : procedures) {
    const double median = at_share(procedure.seconds, 0.5);
    std::printf("%-42s %7.3f ms %7.3f to %7.3f ms %8.4f\n", procedure.name, 1e3 * median,
                1e3 * at_share(procedure.seconds, 0.25), 1e3 * at_share(procedure.seconds, 0.75), median / base);
  }
}
