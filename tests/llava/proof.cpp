#include "proof.hpp"

#include "llama_oracle.hpp"
#include "prompts.hpp"

namespace proof {

namespace {

// One thread: with more, llama.cpp cuts the keys of a step among them by their number, and sums in another order.
constexpr int threads = 1;
constexpr std::size_t steps = 16, context = 512;

// Every piece, and what is kept of them, has 64 tokens or more: ggml's flash attention sums in F32 from there on, and in
// F16, to about 1e-3, below.
constexpr std::size_t micro_batch = 100;

struct Difference {
  double prefill = 0, decoding = 0, largest = 0;
  std::size_t same_tokens = 0, kept = 0;
  double most() const { return std::max(prefill, decoding); }
};

Difference compare(const llava::Halves& halves, const llava::Prompt& prompt, const fastv::Config* config,
                   std::size_t piece, ggml_type cache) {
  llava::EngineOptions options;
  options.context = context;
  options.threads = threads;
  options.micro_batch = piece;
  options.key_type = options.value_type = cache;
  llava::Engine engine(halves, options);
  const llava::Prefill prefill = engine.prefill(0, prompt, config);

  // The masks cover the whole prompt at once.
  oracle::Llama llama(halves.path(), threads, context, config == nullptr ? piece : context, config != nullptr, cache);
  if (config != nullptr) llama.hide_all_but(halves.filtering_layer(), prefill.kept, prompt.tokens());
  std::vector<float> expected = llama.prefill(prompt);
  Difference difference;
  difference.kept = prefill.kept.size();
  difference.largest = prompts::largest(expected);
  difference.prefill = prompts::largest_difference(engine.logits(0), expected);
  for (std::size_t step = 0; step < steps; ++step) {
    const llama_token token = prompts::likeliest(expected);
    expected = llama.decode(token);
    engine.decode({{0, token}});
    difference.decoding = std::max(difference.decoding, prompts::largest_difference(engine.logits(0), expected));
    const std::vector<float> ours(engine.logits(0), engine.logits(0) + expected.size());
    difference.same_tokens += prompts::likeliest(ours) == prompts::likeliest(expected) ? 1u : 0u;
  }
  return difference;
}

}  // namespace

std::string Proof::verdict() const {
  if (ahead != 0) return "at K = 0, with every token kept, its logits are not llama_decode's";
  if (!(ahead_prefill.value_or(0) <= 1e-3)) return "pruned at K = 0, its logits are not those of the masked model";
  // One row's attention is summed in F16, and here the difference goes through all layers: mixtures may choose others.
  if (!(ahead_decoding.value_or(0) <= 4e-3)) return "pruned at K = 0, it does not decode as the masked model does";
  if (filtering_layers.empty()) return "";
  if (whole != 0 || whole_in_pieces != 0 || whole_q8.value_or(0) != 0)
    return "with every token kept, its logits are not llama_decode's";
  if (kept >= tokens) return "nothing was dropped";
  if (!pruned_prefill) return "";
  if (!(*pruned_prefill <= 5e-4 && *pruned_in_pieces <= 5e-4))
    return "pruned, its logits are not those of the masked model";
  if (!(*pruned_decoding <= 1e-3)) return "pruned, it does not decode as the masked model does";
  return "";
}

namespace {

void prove_ahead(const std::string& path, Proof& proof) {
  llava::LoadOptions load;
  load.filtering_layer = 0;
  const llava::Halves whole(path, load);
  const llava::Prompt prompt = prompts::Builder(whole, 9).text(70).picture(10).text(65).picture(11).text(70).prompt;
  proof.ahead = compare(whole, prompt, nullptr, context, GGML_TYPE_F16).most();
  if (whole.recurrent()) return;
  fastv::Config config;
  config.filtering_layer = 0;
  config.filtering_ratio = 0.3;
  config.selection = fastv::Selection::random;
  const Difference pruned = compare(whole, prompt, &config, context, GGML_TYPE_F16);
  proof.ahead_prefill = pruned.prefill / pruned.largest;
  proof.ahead_decoding = pruned.decoding / pruned.largest;
}

}  // namespace

Proof prove(const std::string& architecture) {
  tiny_gguf::LanguageModel spec = tiny_gguf::tiny_model(architecture);
  spec.window = 40;  // shorter than the prompt
  const std::string& path = prompts::model_file(spec, architecture + "_proof");
  Proof proof;
  proof.architecture = architecture;
  proof.kinds = tiny_gguf::facts(architecture).kinds;
  prove_ahead(path, proof);
  const std::vector<std::string> ahead_alone = llava::architectures(true);
  if (std::find(ahead_alone.begin(), ahead_alone.end(), architecture) != ahead_alone.end()) return proof;

  const llava::Halves halves(path);
  const llava::Prompt prompt = prompts::Builder(halves, 7).text(70).picture(8).text(65).picture(9).text(70).prompt;
  proof.filtering_layers = halves.facts().filtering_layers;
  proof.filtering_layer = halves.filtering_layer();
  proof.tokens = prompt.tokens();
  proof.whole = compare(halves, prompt, nullptr, context, GGML_TYPE_F16).most();
  proof.whole_in_pieces = compare(halves, prompt, nullptr, 16, GGML_TYPE_F16).most();

  fastv::Config config;
  config.filtering_layer = proof.filtering_layer;
  const Difference pruned = compare(halves, prompt, &config, context, GGML_TYPE_F16);
  proof.kept = pruned.kept;
  if (!halves.recurrent()) {
    proof.pruned_prefill = pruned.prefill / pruned.largest;
    proof.pruned_decoding = pruned.decoding / pruned.largest;
    proof.same_tokens = pruned.same_tokens;
    const Difference in_pieces = compare(halves, prompt, &config, micro_batch, GGML_TYPE_F16);
    proof.pruned_in_pieces = in_pieces.prefill / in_pieces.largest;
  }

  // Heads wide enough for a block of Q8_0.
  spec.hidden *= 2;
  try {
    const llava::Halves wide(prompts::model_file(spec, architecture + "_wide_proof"));
    proof.whole_q8 =
        compare(wide, prompts::Builder(wide, 8).text(70).picture(8).text(70).prompt, nullptr, context, GGML_TYPE_Q8_0)
            .most();
  } catch (const std::runtime_error&) {  // libllama makes no such context
  }
  return proof;
}

}  // namespace proof
