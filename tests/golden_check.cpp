// golden_check FILE... : holds fastv and the reference decoder to tensors exported from the authors' own PyTorch code
// (tests/golden/README.md describes the format). One line a case; exit status 1 if any case fails.
#include <cstdio>
#include <set>

#include "masked_decoder.hpp"

namespace {

using namespace reference;
using masked::Mode;
using masked::Step;

constexpr float score_tolerance = 1e-6f, value_tolerance = 1e-4f;

// Everything compared in one case: the largest difference of each kind, and what went wrong.
class Verdict {
 public:
  void near(const std::string& kind, const Matrix& ours, const Matrix& golden, float tolerance) {
    if (ours.rows() != golden.rows() || ours.cols() != golden.cols()) {
      fault(kind + " is " + std::to_string(ours.rows()) + " x " + std::to_string(ours.cols()) + ", golden " +
            std::to_string(golden.rows()) + " x " + std::to_string(golden.cols()));
      return;
    }
    const float difference = ours.size() == 0 ? 0 : (ours - golden).cwiseAbs().maxCoeff<Eigen::PropagateNaN>();
    float& most = largest_[kind];
    if (!(difference <= most)) most = difference;
    if (!(difference <= tolerance)) fault(kind + " differs by more than " + short_number(tolerance));
  }
  template <class A, class B>
  void same(const std::string& kind, const A& ours, const B& golden) {
    exact_.insert(kind);
    if (ours.size() != golden.size() || !std::equal(ours.begin(), ours.end(), golden.begin(), [](auto a, auto b) {
          return static_cast<std::int64_t>(a) == static_cast<std::int64_t>(b);
        }))
      fault(kind + " differ");
  }
  void fault(const std::string& sentence) { faults_.insert(sentence); }

  bool print(const std::string& name) const {
    std::string line = faults_.empty() ? "pass  " : "FAIL  ";
    line += name + "  max difference:";
    for (const auto& [kind, difference] : largest_) line += " " + kind + " " + short_number(difference);
    line += "; equal:";
    for (const auto& kind : exact_) line += " " + kind;
    for (const auto& sentence : faults_) line += "; FAULT: " + sentence;
    std::puts(line.c_str());
    return faults_.empty();
  }

 private:
  static std::string short_number(float value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.1e", static_cast<double>(value));
    return text;
  }
  std::map<std::string, float> largest_;
  std::set<std::string> exact_, faults_;
};

struct Case {
  explicit Case(const std::string& path) : tensors(path) {
    config.filtering_layer = std::stoul(tensors.metadata("K"));
    config.filtering_ratio = std::stod(tensors.metadata("R"));
    visual = {{std::stoul(tensors.metadata("image_start")), std::stoul(tensors.metadata("image_len"))}};
    prompt = tensors.matrix("inputs_embeds");
  }
  masked::Run run(Mode mode) const { return {{config}, visual, mode}; }
  // Some tensors of large cases are cut to their last rows and called "..._tail".
  void near_rows(Verdict& verdict, const std::string& kind, const Matrix& ours, const std::string& name) const {
    const bool tail = !tensors.has(name) && tensors.has(name + "_tail");
    const Matrix golden = tensors.matrix(tail ? name + "_tail" : name);
    verdict.near(kind, tail ? Matrix(ours.bottomRows(std::min(golden.rows(), ours.rows()))) : ours, golden,
                 value_tolerance);
  }

  Tensors tensors;
  fastv::Config config;
  std::vector<fastv::TokenSpan> visual;
  Matrix prompt;  // [n, d]
};

Matrix row_of(fastv::Span<const float> values) {
  return Eigen::Map<const Matrix>(values.data(), 1, static_cast<Eigen::Index>(values.size()));
}

Matrix row_of_matrix(const Matrix& m, std::size_t row) { return m.row(static_cast<Eigen::Index>(row)); }

// Every layer's output on the rows it runs on. Returns the last one's.
Matrix check_layers(const Case& c, const Decoder& decoder, EvidenceKind evidence, Verdict& verdict) {
  fastv::Pruner<> pruner(c.config);
  Sequence sequence;
  Matrix hidden = c.prompt;
  std::vector<std::int64_t> positions = decoder.next_positions(hidden.rows(), sequence);
  LayerRun run;
  run.keep_map = evidence == EvidenceKind::probabilities;
  for (std::size_t layer = 0; layer < decoder.shape().layers; ++layer) {
    decoder.run_layer(layer, hidden, positions, sequence, run);
    verdict.near("hidden", hidden, c.tensors.matrix("B.hidden." + std::to_string(layer)), value_tolerance);
    if (!pruner.due(layer + 1)) continue;
    const fastv::Kept kept =
        prune_by(evidence, pruner, c.visual, decoder.config(), run, hidden, sequence.layers[layer]);
    require(fastv::compact(kept, hidden));
    require(fastv::compact(kept, positions));
    positions.resize(kept.size());
  }
  return hidden;
}

// Prefill, pruned once: kept indices, scores, every layer's output, logits.
void check_prefill(const Case& c, const Decoder& decoder, EvidenceKind evidence, Verdict& verdict) {
  Pruning pruning{fastv::Pruner<>(c.config), c.visual, evidence};
  Sequence sequence;
  const Matrix hidden = decoder.prefill(c.prompt, sequence, pruning);
  verdict.same("kept", pruning.kept, c.tensors.integers("keep_indices"));
  verdict.near("score", row_of(pruning.pruner.scores()), c.tensors.matrix("score"), score_tolerance);
  verdict.near("hidden", hidden, check_layers(c, decoder, evidence, verdict), 0);
  const Matrix logits = decoder.logits(hidden, sequence);
  verdict.near("logits", logits, c.tensors.matrix("B.logits"), value_tolerance);
  c.near_rows(verdict, "logits", logits, "A.inplace.logits");

  const auto plan = pruning.pruner.plan({static_cast<std::size_t>(c.prompt.rows()), decoder.shape().layers, c.visual});
  for (std::size_t layer = 0; layer < decoder.shape().layers; ++layer)
    if (plan->kv_length(layer) != static_cast<std::size_t>(sequence.layers[layer].length))
      verdict.fault("the plan's KV length of layer " + std::to_string(layer) + " is not the cache's");
}

// The paper's wording: attention received from all rows. Not from the authors' code, but derived from its tensors.
void check_all_rows(const Case& c, const Decoder& decoder, EvidenceKind evidence, Verdict& verdict) {
  fastv::Config config = c.config;
  config.score_rows = fastv::ScoreRows::all;
  Pruning pruning{fastv::Pruner<>(config), c.visual, evidence};
  Sequence sequence;
  (void)decoder.prefill(c.prompt, sequence, pruning);
  const Matrix received = c.tensors.matrix("derived.received_mean");
  verdict.near(
      "score", row_of(pruning.pruner.scores()),
      received.middleCols(static_cast<Eigen::Index>(c.visual[0].first), static_cast<Eigen::Index>(c.visual[0].count)),
      score_tolerance);
}

// Greedy decoding on the cache: tokens, logits, KV lengths and position ids of every step.
void check_cached(const Case& c, const Decoder& decoder, Mode mode, Verdict& verdict) {
  const Matrix golden = c.tensors.matrix("B.cached.step_logits");
  const auto tokens = c.tensors.integers("B.cached.tokens"), positions = c.tensors.integers("B.cached.position_ids"),
             lengths = c.tensors.integers("B.cached.kv_len");
  const std::size_t layers = decoder.shape().layers;
  std::vector<std::int64_t> our_positions, our_lengths;
  std::size_t t = 0;
  Sequence sequence;
  const auto ours = masked::generate(decoder, c.prompt, tokens.size(), c.run(mode), sequence, [&](const Step& step) {
    verdict.near("logits", step.logits, row_of_matrix(golden, t++), value_tolerance);
    our_positions.push_back(step.sequence.next_position - 1);
    for (std::size_t layer = 0; layer < layers; ++layer) our_lengths.push_back(step.sequence.layers[layer].length);
  });
  verdict.same("tokens", ours, tokens);
  verdict.same("positions", our_positions, positions);
  if (mode == Mode::once) verdict.same("kv_lengths", our_lengths, lengths);
  if (mode == Mode::once && c.tensors.has("C.cached.tokens"))
    verdict.same("tokens", ours, c.tensors.integers("C.cached.tokens"));
}

// Greedy decoding that ranks anew at every step, against the tensors `name`.*: the set kept at each step, tokens,
// logits, and scores where there are some.
void check_ranked_anew(const Case& c, const Decoder& decoder, Mode mode, const std::string& name,
                       const std::string& logits_kind, Verdict& verdict) {
  masked::Run run = c.run(mode);
  const Matrix golden = c.tensors.matrix(name + ".step_logits");
  const auto tokens = c.tensors.integers(name + ".tokens");
  const bool scored = c.tensors.has(name + ".score");
  const Matrix scores = scored ? c.tensors.matrix(name + ".score") : Matrix();
  std::vector<std::int64_t> kept_images;
  std::size_t t = 0;
  run.on_kept = [&](const fastv::Kept& kept, fastv::Span<const float> our_scores) {
    const auto first = c.visual[0].first, end = first + c.visual[0].count;
    for (const fastv::Index index : kept)
      if (index >= first && index < end) kept_images.push_back(index);
    if (scored && t < tokens.size())
      verdict.near("score", row_of(our_scores), row_of_matrix(scores, t), score_tolerance);
  };
  Sequence sequence;
  const auto ours = masked::generate(decoder, c.prompt, tokens.size(), run, sequence, [&](const Step& step) {
    verdict.near(logits_kind, step.logits, row_of_matrix(golden, t++), value_tolerance);
  });
  verdict.same("tokens", ours, tokens);
  verdict.same("kept", kept_images, c.tensors.integers(name + ".keep_image"));
}

// Without a cache: the whole sequence runs again at every step.
void check_uncached(const Case& c, const Decoder& decoder, Verdict& verdict) {
  (void)c.tensors.matrix("B.nocache.score");  // every case has it; one without is no case
  check_ranked_anew(c, decoder, Mode::prefill_anew, "B.nocache", "logits", verdict);
}

// Mask mode: all tokens run, pruned keys hidden from layer K on. Dropped rows are meaningless; kept rows count.
void check_mask_mode(const Case& c, const Decoder& decoder, Verdict& verdict) {
  Sequence sequence;
  const Matrix hidden = masked::prefill(decoder, c.prompt, sequence, c.run(Mode::mask));
  const Matrix logits = decoder.logits(hidden, sequence);
  const bool tail = !c.tensors.has("A.mask.logits");
  const Matrix golden = c.tensors.matrix(tail ? "A.mask.logits_tail" : "A.mask.logits");
  const Eigen::Index first = logits.rows() - golden.rows();
  for (const std::int64_t index : c.tensors.integers("keep_indices"))
    if (index >= first) verdict.near("masked_logits", logits.row(index), golden.row(index - first), value_tolerance);
}

// Greedy decoding in mask mode: the whole cache stays, and every step hides what its own ranking drops.
void check_masked_anew(const Case& c, const Decoder& decoder, Verdict& verdict) {
  // With the image at position 0 nothing visible precedes its dropped rows. The authors' code lets those attend to
  // tokens of their future then; their keys return when a later step ranks them higher, and its logits are its own.
  if (c.visual[0].first == 0) return;
  check_ranked_anew(c, decoder, Mode::mask_anew, "A.mask.cached", "masked_logits", verdict);
}

void check_base(const Case& c, const Decoder& decoder, Verdict& verdict) {
  const Matrix golden = c.tensors.matrix("base.step_logits");
  const auto tokens = c.tensors.integers("base.tokens");
  const std::string last = "base.hidden." + std::to_string(decoder.shape().layers - 1);
  Sequence sequence;
  const Matrix hidden = decoder.prefill(c.prompt, sequence);
  if (c.tensors.has(last)) verdict.near("base", hidden, c.tensors.matrix(last), value_tolerance);
  c.near_rows(verdict, "base", decoder.logits(hidden, sequence), "base.logits");
  std::size_t t = 0;
  sequence = Sequence{};
  const auto ours = masked::generate(decoder, c.prompt, tokens.size(), {}, sequence, [&](const Step& step) {
    verdict.near("base", step.logits, row_of_matrix(golden, t++), value_tolerance);
  });
  verdict.same("tokens", ours, tokens);
}

bool check_file(const std::string& path) {
  Verdict verdict;
  try {
    const Case c(path);
    const Decoder decoder(decoder_config(nlohmann::json::parse(c.tensors.metadata("config"))), c.tensors);
    for (const EvidenceKind evidence : {EvidenceKind::query_key, EvidenceKind::probabilities}) {
      check_prefill(c, decoder, evidence, verdict);
      check_all_rows(c, decoder, evidence, verdict);
    }
    for (const Mode mode : {Mode::once, Mode::mask}) check_cached(c, decoder, mode, verdict);
    check_uncached(c, decoder, verdict);
    check_mask_mode(c, decoder, verdict);
    check_masked_anew(c, decoder, verdict);
    check_base(c, decoder, verdict);
  } catch (const std::exception& error) {
    verdict.fault(error.what());
  }
  return verdict.print(path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: golden_check FILE.safetensors...\n");
    return 2;
  }
  int failed = 0;
  for (int i = 1; i < argc; ++i) failed += check_file(argv[i]) ? 0 : 1;
  std::printf("%d of %d cases pass\n", argc - 1 - failed, argc - 1);
  return failed == 0 ? 0 : 1;
}
