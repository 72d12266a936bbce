// fastv: features, what Selection::diverse compares tokens by: the keys of layer K-1, hidden rows, or your own.
//
//   pruner.prune(fastv::with_features(evidence, keys), visual)
//
// Vectors are used at unit length, so that products of two are cosines; one of zeros resembles none. Those of the keys cost
// nothing to make; with RoPE they say also where a token stands, which unrotate() takes out.
#pragma once

#include "detail/walk.hpp"
#include "evidence.hpp"

#include "detail/begin.hpp"

namespace fastv {

// The features of every token of a prompt. vectors: Heads, paged or not, or LoadedKeys; of hidden rows, one head:
// heads(hidden, TokenMajor{n, 1, width}).
template <class Vectors>
struct Features {
  static_assert(detail::is_keys<Vectors>,
                "Features hold a view of vectors: fastv::heads(k, shape), an adaptor's heads(), or loaded_keys()");
  Vectors vectors;             // [heads, past + n, dim]
  std::size_t past = 0;        // tokens of earlier turns
  bool mean_of_heads = false;  // true: the mean of the heads, [dim]; false: all heads side by side, [heads * dim]
  std::size_t projected = 0;   // elements they are projected to, by sums of every projected-th one with fixed random
                               // signs, which keep cosines to about 1 / sqrt(projected); 0: as they are

  FASTV_INLINE std::size_t width() const noexcept {  // floats of one token
    const std::size_t all = mean_of_heads ? vectors.dim : vectors.heads * vectors.dim;
    return projected != 0 && projected < all ? projected : all;
  }
};
template <class Vectors>
Features(Vectors) -> Features<Vectors>;
template <class Vectors>
Features(Vectors, std::size_t) -> Features<Vectors>;
template <class Vectors>
Features(Vectors, std::size_t, bool) -> Features<Vectors>;
template <class Vectors>
Features(Vectors, std::size_t, bool, std::size_t) -> Features<Vectors>;

// Evidence that scores by one thing and has features beside it: with_features() makes it. Evidence of your own has features
// where it has the last four members.
template <class Evidence, class Vectors>
struct WithFeatures {
  Evidence evidence;           // what the tokens are scored by; NoEvidence where no score is looked at
  Features<Vectors> features;  // what they are compared by

  FASTV_INLINE std::size_t prompt_tokens() const noexcept { return evidence.prompt_tokens(); }       // n
  FASTV_INLINE Status check() const noexcept { return detail::check_evidence(evidence); }            // of the evidence
  FASTV_INLINE std::size_t scratch_floats() const noexcept { return detail::scratch_of(evidence); }  // of the evidence
  // That of the evidence.
  template <class Score, class ParallelFor>
  FASTV_INLINE Status score(const Scoring& scoring, Span<Score> scores,
                            const ParallelFor& parallel_for) const noexcept {
    return detail::score_by(evidence, scoring, scores, parallel_for);
  }

  FASTV_INLINE Status check_features() const noexcept;                                  // pointer, extents and strides
  FASTV_INLINE std::size_t feature_width() const noexcept { return features.width(); }  // floats of one token
  FASTV_INLINE std::size_t feature_scratch() const noexcept;  // floats that load_features() wants beside its output
  // Those of the token at a prompt position, unit length or not. Called from parallel_for's threads.
  FASTV_INLINE void load_features(std::size_t position, float* scratch, float* out) const noexcept;
};

inline namespace FASTV_KIND {

// Evidence and what its tokens are compared by: Features, or vectors to be used as they are.
template <class Evidence, class Vectors>
WithFeatures<Evidence, Vectors> with_features(const Evidence& evidence, const Features<Vectors>& features) noexcept {
  return {evidence, features};
}
template <class Evidence, class T>
WithFeatures<Evidence, Heads<T>> with_features(const Evidence& evidence, const Heads<T>& vectors) noexcept {
  return {evidence, {vectors}};
}
template <class Evidence, class Load>
WithFeatures<Evidence, LoadedKeys<Load>> with_features(const Evidence& evidence,
                                                       const LoadedKeys<Load>& vectors) noexcept {
  return {evidence, {vectors}};
}

}  // namespace FASTV_KIND

namespace detail {
inline namespace FASTV_KIND {

inline constexpr std::size_t widest_features = std::size_t{1} << 20;

template <class Vectors>
Status check_features_of(const Features<Vectors>& features, std::size_t tokens) noexcept {
  const Vectors& vectors = features.vectors;
  if (Status status = check_heads(vectors, "features"); !status) return status;
  if (features.past >= vectors.tokens || vectors.tokens - features.past != tokens)
    return fail(
        Errc::bad_shape,
        "features are of {} tokens, {} of earlier turns among them, but the prompt has {}: hand over one vector "
        "per token",
        vectors.tokens, features.past, tokens);
  if (vectors.heads > widest_features || vectors.dim > widest_features / vectors.heads)
    return fail(Errc::bad_shape,
                "features have {} heads of {} elements but at most {} elements are supported: project them first",
                vectors.heads, vectors.dim, widest_features);
  return {};
}

// +1 or -1 for each element that is projected: the top bit of a product with an odd constant, mixed.
FASTV_DEVICE inline float sign_of(std::size_t element) noexcept {
  auto bits = static_cast<std::uint32_t>(element) * 0x9e3779b9u;
  bits = (bits ^ (bits >> 15)) * 0x85ebca6bu;
  bits ^= bits >> 13;
  return bits >> 31 != 0 ? -1.0f : 1.0f;
}

// Whether vectors are folded into fewer floats, and so pass through scratch memory.
template <class Vectors>
bool folds(const Features<Vectors>& features) noexcept {
  return features.width() != features.vectors.heads * features.vectors.dim;
}

// scratch: [dim] where the features are folded.
template <class Vectors>
void load_features_of(const Features<Vectors>& features, std::size_t token, float* scratch, float* out) noexcept {
  const std::size_t heads = features.vectors.heads, dim = features.vectors.dim, count = features.width();
  if (!folds(features)) {
    for (std::size_t head = 0; head < heads; ++head) load_vector(features.vectors, head, token, out + head * dim);
    return;
  }
  for (std::size_t i = 0; i < count; ++i) out[i] = 0;
  const bool projects = count != dim || !features.mean_of_heads;
  for (std::size_t head = 0; head < heads; ++head) {
    load_vector(features.vectors, head, token, scratch);
    const std::size_t first = features.mean_of_heads ? 0 : head * dim;
    for (std::size_t d = 0; d < dim; ++d)
      out[(first + d) % count] += projects ? sign_of(first + d) * scratch[d] : scratch[d];
  }
}

// ---- whether evidence has features ----------------------------------------------------------------

template <class Evidence, class = void>
inline constexpr bool has_features = false;
template <class Evidence>
inline constexpr bool
    has_features<Evidence, decltype(static_cast<void>(made<const Evidence&>().feature_width()),
                                    static_cast<void>(made<const Evidence&>().load_features(
                                        std::size_t{0}, static_cast<float*>(nullptr), static_cast<float*>(nullptr))))> =
        true;

// Floats of one token's features; 0 where the evidence has none.
template <class Evidence>
std::size_t width_of_features(const Evidence& evidence) noexcept {
  if constexpr (has_features<Evidence>)
    return evidence.feature_width();
  else
    return 0;
}
template <class Evidence>
std::size_t scratch_of_features(const Evidence& evidence) noexcept {
  if constexpr (has_features<Evidence>)
    return evidence.feature_scratch();
  else
    return 0;
}

// What of evidence Selection::diverse is compiled for: the features alone, whatever the tokens are scored by.
template <class Evidence>
const Evidence& features_of(const Evidence& evidence) noexcept {
  return evidence;
}
template <class Evidence, class Vectors>
WithFeatures<NoEvidence, Vectors> features_of(const WithFeatures<Evidence, Vectors>& evidence) noexcept {
  return {NoEvidence{evidence.prompt_tokens()}, evidence.features};
}

// What Selection::diverse must have.
template <class Evidence>
Status check_features(const Evidence& evidence) noexcept {
  if constexpr (has_features<Evidence>)
    return evidence.check_features();
  else
    return fail(Errc::missing_evidence,
                "Selection::diverse compares tokens by features, which this evidence has not: hand over "
                "with_features(evidence, keys)");
}

}  // namespace FASTV_KIND
}  // namespace detail

template <class Evidence, class Vectors>
Status WithFeatures<Evidence, Vectors>::check_features() const noexcept {
  return detail::check_features_of(features, evidence.prompt_tokens());
}
template <class Evidence, class Vectors>
std::size_t WithFeatures<Evidence, Vectors>::feature_scratch() const noexcept {
  return detail::folds(features) ? features.vectors.dim : 0;
}
template <class Evidence, class Vectors>
void WithFeatures<Evidence, Vectors>::load_features(std::size_t position, float* scratch, float* out) const noexcept {
  detail::load_features_of(features, features.past + position, scratch, out);
}

}  // namespace fastv

#include "detail/end.hpp"
