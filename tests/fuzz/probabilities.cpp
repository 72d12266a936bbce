// score() from attention maps of every element type and stride against a plain sum.
#include "views.hpp"

namespace {

using namespace fuzz;

template <class T, class Score>
void score_once(Input& in) {
  const oracle::Layout prompt = layout(in, 3, in.one_in(4) ? 80 : 20, !in.one_in(4));
  const std::size_t total = prompt.visual_tokens(), tokens = prompt.tokens;
  const std::size_t heads = in.between(1, 6), past = in.one_in(3) ? in.below(9) : 0;
  const std::size_t first_key = in.one_in(3) ? in.below(past + tokens) : 0, keys = past + tokens - first_key;
  const std::size_t rows = in.one_in(3) ? tokens : in.between(1, (std::min)(tokens, std::size_t{4}));
  const Numbers<T> p(in, heads * rows * keys);

  // The three axes in any order, with gaps.
  std::size_t axes[] = {0, 1, 2}, strides[3] = {}, reach = 1;
  const std::size_t extents[] = {heads, rows, keys};
  const bool adjacent = in.chance();
  for (std::size_t i = 3; i-- > 1;) std::swap(axes[i], axes[in.below(i + 1)]);
  if (adjacent) std::swap(axes[0], axes[axes[1] == 2 ? 1 : axes[2] == 2 ? 2 : 0]);
  for (const std::size_t axis : axes) {
    strides[axis] = reach + (axis == 2 && adjacent ? 0 : in.below(4));
    reach += strides[axis] * (extents[axis] - 1);
  }
  const Block<T> data(reach, nan_of<T>());
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t j = 0; j < keys; ++j)
        data[h * strides[0] + r * strides[1] + j * strides[2]] = p.elements[(h * rows + r) * keys + j];
  fastv::Probabilities<T> evidence{data.data(),
                                   heads,
                                   rows,
                                   keys,
                                   static_cast<std::ptrdiff_t>(strides[0]),
                                   static_cast<std::ptrdiff_t>(strides[1]),
                                   static_cast<std::ptrdiff_t>(strides[2]),
                                   past,
                                   first_key};
  FUZZ_CHECK(evidence.prompt_tokens() == tokens);
  if (in.one_in(4)) evidence.heads_total = heads + in.below(3);
  const std::size_t group = in.one_in(2) ? heads : heads % 2 == 0 ? 2 : 1, kv_heads = heads / group;
  Block<float> norms(in.one_in(3) ? kv_heads * total : 0);
  oracle::Rng rng = in.random();
  for (float& n : norms) n = static_cast<float>(rng.real(0, 3));
  evidence.value_norms = norms.view();

  fastv::Config config;
  const RowChoice chosen(in, tokens, rows, config);
  std::vector<double> expected, largest;
  for (const TokenSpan& span : prompt.visual)
    for (std::size_t t = 0; t < span.count; ++t) {
      const std::size_t token = past + span.first + t;
      double sum = 0, size = 0;
      for (std::size_t h = 0; h < heads && token >= first_key; ++h)
        for (const Index position : chosen.positions) {
          const std::size_t r = position - (tokens - rows);
          const double norm = norms.size() == 0 ? 1 : static_cast<double>(norms[h / group * total + expected.size()]);
          const double probability = p.values[(h * rows + r) * keys + token - first_key];
          const double value = probability == 0 ? 0 : probability * norm;
          sum += value;
          size += std::fabs(value);
        }
      const auto all =
          static_cast<double>((evidence.heads_total == 0 ? heads : evidence.heads_total) * chosen.positions.size());
      expected.push_back(sum / all);
      largest.push_back(size / all);
    }
  // Whether the one row that ranks is that of a visual token.
  bool asks = true;
  for (const TokenSpan& span : prompt.visual) asks = asks && (span.count == 0 || span.first + span.count < tokens);
  const bool told_so = config.score_rows == fastv::ScoreRows::last && !asks;

  const Block<TokenSpan> visual(prompt.visual);
  const Block<Score> scores(total), again(total);
  const Status status = fastv::score<Score>(config, evidence, visual.view(), scores.span());
  check_message(status);
  FUZZ_CHECK(status.code == (told_so ? Errc::bad_prompt : Errc::ok));
  if (told_so) return;
  for (std::size_t i = 0; i < total; ++i) {
    const bool right =
        std::isinf(largest[i]) ? !std::isfinite(scores[i]) : close(scores[i], expected[i], 1e-6 + 1e-5 * largest[i]);
    FUZZ_CHECK(right);
  }
  FUZZ_CHECK(fastv::score<Score>(config, evidence, visual.view(), again.span(), {}, Backwards{}));
  FUZZ_CHECK(same_bits(scores, again));
  fastv::Pruner<Score> pruner(config);
  const fastv::Kept kept = pruner.prune(evidence, visual.view());
  if (evidence.heads_total > heads && total > 0) FUZZ_CHECK(kept.code() == fastv::Errc::missing_evidence);
  if (kept && total > 0) FUZZ_CHECK(std::memcmp(pruner.scores().data(), scores.data(), total * sizeof(Score)) == 0);

  auto bad = evidence;
  bool wrong = true;
  const std::ptrdiff_t minus = -1 - static_cast<std::ptrdiff_t>(in.below(9));
  switch (in.below(15)) {
    case 0:
      bad.heads = in.hostile();
      wrong = bad.heads == 0 || bad.heads > fastv::max_tokens;
      break;
    case 1:
      bad.queries = in.hostile();
      wrong = bad.queries == 0 || bad.queries > tokens;
      break;
    case 2:
      bad.keys = in.hostile();
      wrong = bad.keys == 0 || bad.keys > fastv::max_tokens || first_key + bad.keys <= past;
      break;
    case 3:
      bad.past = in.hostile();
      wrong = bad.past >= first_key + keys;
      break;
    case 4: bad.data = nullptr; break;
    case 5: bad.head_stride = minus; break;
    case 6: bad.query_stride = minus; break;
    case 7: bad.key_stride = minus; break;
    case 8:
      bad.key_stride = 0;
      wrong = keys > 1;
      break;
    case 9:
      bad.head_stride = static_cast<std::ptrdiff_t>((static_cast<std::size_t>(-1) >> 1) - in.below(9));
      wrong = heads > 1;
      break;
    case 10:
      bad.heads_total = in.below(heads);
      wrong = bad.heads_total != 0;
      break;
    case 11:
      bad.value_norms = {nullptr, in.hostile() | 1};
      wrong = total > 0;
      break;
    case 12:
      bad.first_key = in.hostile();
      wrong = bad.first_key > fastv::max_tokens - keys || past >= bad.first_key + keys;
      break;
    case 13:
      if constexpr (alignof(T) > 1)
        bad.data = reinterpret_cast<const T*>(reinterpret_cast<std::uintptr_t>(data.data()) + 1);
      break;
    default:
      bad.value_norms = {norms.data(), kv_heads * total + 1};
      wrong = total > 0 && (kv_heads * total + 1) % total != 0;
      break;
  }
  if (!wrong) return;
  const Status told = fastv::score<Score>({}, bad, visual.view(), again.span());
  check_message(told);
  FUZZ_CHECK(!told);
}

}  // namespace

FASTV_FUZZ_TARGET(probabilities) {
  switch (in.below(5)) {
    case 0: return score_once<float, float>(in);
    case 1: return score_once<fastv::half, float>(in);
    case 2: return score_once<fastv::bfloat16, double>(in);
    case 3: return score_once<double, double>(in);
    default: return score_once<float, double>(in);
  }
}
