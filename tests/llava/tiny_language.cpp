#include <map>
#include <numeric>
#include <sstream>

#include "tiny_architectures.hpp"
#include "tiny_tensors.hpp"
#include "tiny_vocabulary.hpp"

namespace tiny_gguf {
namespace {

// What every decoder has; an architecture's own value takes the place of the one here.
const char* const common_keys =
    "block_count=layers context_length=context embedding_length=d feed_forward_length=ffn attention.head_count=heads "
    "attention.head_count_kv=kv_heads attention.layer_norm_rms_epsilon=rms_eps rope.dimension_count=hd "
    "rope.freq_base=rope_base";

const std::map<std::string, std::uint32_t LanguageModel::*> limited = {{"layers", &LanguageModel::layers},
                                                                       {"heads", &LanguageModel::heads},
                                                                       {"kv_heads", &LanguageModel::kv_heads},
                                                                       {"vocabulary", &LanguageModel::vocabulary}};

const Architecture& find(const std::string& name) {
  for (const Architecture& known : table())
    if (known.name == name) return known;
  throw std::runtime_error("tiny_gguf: the architecture is \"" + name + "\", which is none of architectures()");
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

// The words of a text that count where these letters hold, with groups and conditions resolved.
std::vector<std::string> words(const std::string& text, const std::string& letters = "") {
  std::vector<std::string> all;
  for (std::string word : split(text, ' ')) {
    bool counts = true;
    for (std::size_t mark = word.find('?'); mark != std::string::npos; mark = word.find('?')) {
      counts = counts && word.substr(0, mark).find_first_of(letters) != std::string::npos;
      word.erase(0, mark + 1);
    }
    if (!counts) continue;
    if (word.front() == '@')
      for (const std::string& inner : words(groups().at(word.substr(1)), letters)) all.push_back(inner);
    else
      all.push_back(word);
  }
  return all;
}

// Formulas of whole numbers.
class Formulas {
 public:
  explicit Formulas(std::map<std::string, std::int64_t> names) : names_(std::move(names)) {}

  std::int64_t value(const std::string& formula) const {
    const std::size_t sum = formula.find_last_of("+-"), product = formula.find_last_of("*/");
    const std::size_t sign = sum != std::string::npos ? sum : product;  // the one that binds least is the last to act
    if (sign == std::string::npos) return named(formula);
    const std::int64_t left = value(formula.substr(0, sign)), right = value(formula.substr(sign + 1));
    switch (formula[sign]) {
      case '+': return left + right;
      case '-': return left - right;
      case '*': return left * right;
      default: return left / right;
    }
  }
  std::vector<std::int64_t> values(const std::string& formulas) const {
    std::vector<std::int64_t> all;
    for (const std::string& formula : split(formulas, ',')) all.push_back(value(formula));
    return all;
  }

 private:
  std::int64_t named(const std::string& word) const {
    const auto found = names_.find(word);
    return found != names_.end() ? found->second : std::stoll(word);
  }

  std::map<std::string, std::int64_t> names_;
};

// The letters of a layer: attention, feed-forward network, options.
std::string letters(const LanguageModel& m, const Architecture& a, std::size_t layer) {
  const std::size_t bar = a.feed.find('|'), lead = bar == std::string::npos ? 0 : bar;
  const std::string rest = a.feed.substr(bar == std::string::npos ? 0 : bar + 1);
  std::string all{a.layers[layer % a.layers.size()], layer < lead ? a.feed[layer] : rest[(layer - lead) % rest.size()]};
  if (m.biases) all += 'B';
  if (m.rope_factors) all += 'R';
  if (m.per_layer) all += 'P';
  return all;
}

Formulas formulas(const LanguageModel& m, const Architecture& a, std::uint32_t vocabulary) {
  const std::int64_t width = m.hidden / m.heads, half = width / 2;
  const std::size_t bar = a.feed.find('|');
  return Formulas({{"d", m.hidden},
                   {"layers", m.layers},
                   {"context", m.context},
                   {"vocabulary", vocabulary},
                   {"window", m.window},
                   {"heads", m.heads},
                   {"kv_heads", m.kv_heads},
                   {"hd", width},  // of a head
                   {"q", width * m.heads},
                   {"kv", width * m.kv_heads},
                   {"half", half},
                   {"side", half * 3 / 8},  // pairs that turn with the row; 24 of 64 as Qwen2-VL has it
                   {"ffn", m.ffn},
                   {"experts", 4},
                   {"expert", m.hidden},  // width of one
                   {"lead", bar == std::string::npos ? 0 : static_cast<std::int64_t>(bar)}});
}

// What an architecture demands of a field: a value, or at least one.
struct Limit {
  std::string field;
  bool least;
  std::int64_t value;
};

std::vector<Limit> limits(const LanguageModel& m, const Architecture& a) {
  std::vector<Limit> all;
  for (const std::string& word : words(a.limits)) {
    const std::size_t equals = word.find('=');
    const bool least = word[equals - 1] == '>';
    all.push_back({word.substr(0, equals - least), least, formulas(m, a, 0).value(word.substr(equals + 1))});
  }
  return all;
}

void check(const LanguageModel& m) {
  const Architecture& a = find(m.architecture);
  require(m.layers > 0 && m.hidden > 0 && m.heads > 0 && m.kv_heads > 0 && m.ffn > 0 && m.context > 0 && m.window > 0,
          "layers, hidden, heads, kv_heads, ffn, context and window must be at least 1");
  require(m.hidden % m.heads == 0 && m.hidden / m.heads % 2 == 0,
          "hidden is " + std::to_string(m.hidden) + " and heads " + std::to_string(m.heads) +
              ": a head's width must be a whole and even number");
  require(m.heads % m.kv_heads == 0,
          "kv_heads is " + std::to_string(m.kv_heads) + " and must divide heads, " + std::to_string(m.heads));
  for (const Limit& limit : limits(m, a)) {
    const std::int64_t is = m.*limited.at(limit.field);
    require(limit.least ? is >= limit.value : is == limit.value,
            limit.field + " is " + std::to_string(is) + " and must be " + (limit.least ? "at least " : "") +
                std::to_string(limit.value) + " in " + a.name);
  }
  for (const std::string& word : words(a.ends))
    require(word.front() != 'H' || !m.tied, a.name + " has an output head of its own: tied must be false");
  require(m.deepstack == 0 || (m.architecture.rfind("qwen3vl", 0) == 0 && m.deepstack < m.layers),
          "deepstack is " + std::to_string(m.deepstack) + " but " + m.architecture +
              " has none, or not as many layers: only qwen3vl and qwen3vlmoe have any");
  require(!m.rope_factors || a.ends.find("R?") != std::string::npos, "only llama has rope_factors");
  require(!m.per_layer || a.ends.find("P?") != std::string::npos, "only gemma4 has per_layer");
  require(!ggml_quantize_requires_imatrix(m.type),
          std::string(ggml_type_name(m.type)) + " needs an importance matrix: choose another type");
}

void set_key(const LanguageModel& m, const Architecture& a, Writer& file, const std::string& key,
             const std::string& text) {
  const Formulas known = formulas(m, a, 0);
  const std::string name = key.front() == '/' ? key.substr(1) : a.name + "." + key;
  if (text == "rms_eps" || text == "rope_base") {
    file.set(name, text == "rms_eps" ? m.rms_eps : m.rope_base);
  } else if (text == "true" || text == "false") {
    file.set(name, text == "true");
  } else if (text.front() == '[' || text.front() == '{') {
    const std::string inner = text.substr(1, text.size() - 2);
    std::vector<std::int32_t> list;
    if (text.front() == '[') {
      for (const std::int64_t value : known.values(inner)) list.push_back(static_cast<std::int32_t>(value));
    } else {
      const std::size_t times = inner.find('*');
      const auto value =
          static_cast<std::int32_t>(times == std::string::npos ? 1 : known.value(inner.substr(times + 1)));
      for (std::size_t layer = 0; layer < m.layers; ++layer)
        list.push_back(letters(m, a, layer).find(inner.front()) != std::string::npos ? value : 0);
    }
    file.set(name, list);
  } else if (text.find('.') != std::string::npos) {
    file.set(name, std::stof(text));
  } else {
    file.set(name, static_cast<std::uint32_t>(known.value(text)));
  }
}

std::uint32_t set_keys(const LanguageModel& m, const Architecture& a, Writer& file) {
  file.set("general.architecture", a.name);
  // A model that is called phi3 must have Phi-3's own tokens.
  file.set("general.name", "random " + (a.name == "phi3" ? "phi" : a.name));
  std::vector<std::pair<std::string, std::string>> keys;
  for (const std::string& word : words(std::string(common_keys) + " " + a.keys, letters(m, a, 0))) {
    const std::size_t equals = word.find('=');
    const std::pair<std::string, std::string> key(word.substr(0, equals), word.substr(equals + 1));
    const auto same =
        std::find_if(keys.begin(), keys.end(), [&](const auto& known) { return known.first == key.first; });
    if (same == keys.end())
      keys.push_back(key);
    else
      *same = key;
  }
  for (const auto& key : keys) set_key(m, a, file, key.first, key.second);
  if (m.deepstack != 0) file.set(a.name + ".n_deepstack_layers", m.deepstack);
  if (m.vocabulary_from.empty())
    return a.name == "llama" ? set_sentencepiece(file, m.vocabulary) : set_byte_pairs(file, m.vocabulary);
  file.copy_keys(m.vocabulary_from, "tokenizer.");
  return static_cast<std::uint32_t>(file.array_size("tokenizer.ggml.tokens"));
}

// kind:name/extents, as tiny_architectures.hpp has them. A name that ends in ! is the whole name.
void add(const LanguageModel& m, Tensors& tensors, const Formulas& known, const std::string& block,
         const std::string& word) {
  const std::size_t slash = word.find('/');
  const char kind = word.front();
  std::string name = block + word.substr(2, slash - 2);
  const std::vector<std::int64_t> extents = known.values(word.substr(slash + 1));
  const float root = std::sqrt(static_cast<float>(extents.front()));
  if (name.back() == '!')
    name.pop_back();
  else if (kind != 'l')
    name += kind == 'b' ? ".bias" : ".weight";
  switch (kind) {
    case 'h':  // the head, where the embeddings are not that too
    case 'H':
      if (m.tied) break;
      [[fallthrough]];
    case 'w': tensors.matrix(name, extents, m.scale / root); break;
    case 'p': tensors.matrix(name, extents, 1.5f * m.scale / root); break;  // queries and keys, for peaks
    case 'e': tensors.matrix(name, extents, m.scale); break;                // embeddings
    case 'c': tensors.table(name, extents, 0, 1 / root); break;             // kernels, whose rows are no blocks
    case 'n': tensors.table(name, extents, 1, 0.2f); break;                 // norms
    case 'k': tensors.table(name, extents, 1.5f, 0.2f); break;              // norms of queries and keys, for peaks
    case 'l': tensors.layer_norm(name, extents.front()); break;
    case 'b':
    case 'v': tensors.table(name, extents, 0, 0.2f); break;
    case 'f': tensors.table(name, extents, 2, 0.5f); break;   // what frequencies are divided by; slow ones more
    case '-': tensors.table(name, extents, -2, 0.3f); break;  // decay
    default: throw std::logic_error("tiny_gguf: no kind of tensor: " + word);
  }
}

}  // namespace

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (const Architecture& known : table()) names.push_back(known.name);
  return names;
}

ArchitectureFacts facts(const std::string& architecture) {
  const Architecture& a = find(architecture);
  const bool leading = a.feed.find('|') != std::string::npos;
  const auto period = static_cast<std::uint32_t>(std::lcm(a.layers.size(), leading ? 1 : a.feed.size()));
  ArchitectureFacts facts{a.name, a.layers, period, std::max(2 * period, (7 + period) / period * period), 1};
  for (const std::string& key : words(a.keys))
    if (key.rfind("rope.dimension_sections=", 0) == 0) facts.position_axes = 4;
  for (const Limit& limit : limits({}, a))
    if (limit.field == "layers") facts.layers = static_cast<std::uint32_t>(limit.value);
  return facts;
}

LanguageModel tiny_model(const std::string& architecture) {
  const Architecture& a = find(architecture);
  LanguageModel model;
  model.architecture = a.name;
  model.layers = facts(architecture).layers;
  model.kv_heads = model.heads / 2;
  for (const Limit& limit : limits(model, a)) model.*limited.at(limit.field) = static_cast<std::uint32_t>(limit.value);
  // Two things that would make large files: many layers, and many tokens twice.
  if (model.layers > 16) model.ffn = 32;
  model.tied = model.vocabulary > 1000;
  return model;
}

void write(const LanguageModel& m, const std::string& path, const Progress& progress) {
  check(m);
  const Architecture& a = find(m.architecture);
  Writer file;
  const Formulas known = formulas(m, a, set_keys(m, a, file));
  Tensors tensors(file, m.seed, m.type);
  for (const std::string& word : words(a.ends, letters(m, a, 0))) add(m, tensors, known, "", word);
  for (std::uint32_t layer = 0; layer < m.layers; ++layer)
    for (const std::string& word : words(a.block, letters(m, a, layer)))
      add(m, tensors, known, "blk." + std::to_string(layer) + ".", word);
  file.write(path, progress);
}

}  // namespace tiny_gguf
