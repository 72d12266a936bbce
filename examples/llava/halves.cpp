#include "halves.hpp"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace llava {

namespace {

// What libllama says while it loads a file is many lines; the first error among them is what the exception tells.
std::string& first_error() {
  static std::string text;
  return text;
}
void listen(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR && first_error().empty()) first_error() = text;
}

// file: null for all that is at the path.
LlamaModel load(File file, llama_model_params params, const Progress& progress, const std::string& path) {
  if (file) params.load_mode = LLAMA_LOAD_MODE_NONE;  // it is no file that could be mapped
  params.progress_callback_user_data = const_cast<Progress*>(&progress);
  params.progress_callback = [](float share, void* told) {
    const auto& tell = *static_cast<const Progress*>(told);
    if (tell) tell(static_cast<double>(share));
    return true;
  };
  first_error().clear();
  LlamaModel model(file ? llama_model_load_from_file_ptr(file.get(), params)
                        : llama_model_load_from_file(path.c_str(), params));
  if (!model) {
    std::string why = first_error();
    while (!why.empty() && why.back() == '\n') why.pop_back();
    throw std::runtime_error(path + ": libllama cannot load it" + (why.empty() ? "" : ": " + why));
  }
  return model;
}

// Whether somebody listens at HOST:PORT; ggml aborts the program where nobody does.
bool listens(const std::string& server) {
  const std::size_t colon = server.rfind(':');
  if (colon == std::string::npos) return false;
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (getaddrinfo(server.substr(0, colon).c_str(), server.substr(colon + 1).c_str(), &hints, &found) != 0) return false;
  bool connected = false;
  for (const addrinfo* at = found; at != nullptr && !connected; at = at->ai_next) {
    const int socket = ::socket(at->ai_family, at->ai_socktype, at->ai_protocol);
    if (socket < 0) continue;
    connected = connect(socket, at->ai_addr, at->ai_addrlen) == 0;
    close(socket);
  }
  freeaddrinfo(found);
  return connected;
}

// llama.cpp's RPC backend: each server is a device more. Servers that are known already stay.
void add_servers(const std::vector<std::string>& servers) {
  static std::vector<std::string> known;
  for (const std::string& server : servers) {
    if (std::find(known.begin(), known.end(), server) != known.end()) continue;
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr)
      throw std::runtime_error("this llama.cpp was built without its RPC backend: build one with GGML_RPC=ON");
    if (!listens(server))
      throw std::runtime_error("no RPC server answers at " + server + ": give HOST:PORT of a llama.cpp rpc-server");
    using Add = ggml_backend_reg_t (*)(const char*);
    const auto add = reinterpret_cast<Add>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"));
    ggml_backend_reg_t added = add == nullptr ? nullptr : add(server.c_str());
    if (added == nullptr || ggml_backend_reg_dev_count(added) == 0)
      throw std::runtime_error("the RPC server at " + server + " has no device: start it with one");
    ggml_backend_register(added);
    known.push_back(server);
  }
}

std::size_t size(std::int32_t n) { return static_cast<std::size_t>(std::max(n, 0)); }

}  // namespace

Halves::Halves(const std::string& path, const LoadOptions& options, const Progress& progress)
    : file_(path), layers_(layers_of(file_)), k_(llava::filtering_layer(layers_, options.filtering_layer)) {
  static const bool started = (llama_log_set(listen, nullptr), ggml_backend_load_all(), llama_backend_init(), true);
  static_cast<void>(started);
  add_servers(options.servers);
  const auto n = static_cast<int>(layers_.all.size()), k = static_cast<int>(k_);
  // As llama.cpp counts: layers from the last on, and one more for the output.
  const int gpu = options.gpu_layers < 0 ? n + 1 : options.gpu_layers, of_tail = std::min(gpu, n - k + 1);
  llama_model_params params = llama_model_default_params();
  const auto half = [&](const Part& part, int gpu_layers, double from, double to) {
    params.n_gpu_layers = gpu_layers;
    const Progress share = [&](double done) {
      if (progress) progress(from + done * (to - from));
    };
    try {
      return load(file_.open(part), params, share, path);
    } catch (const std::runtime_error&) {
      // Architectures whose output is never the embeddings too want a matrix for it: a second copy of one that is there.
      const auto output = part.tensors.find("output.weight");
      if (output == part.tensors.end()) throw;
      Part with_both = part;
      with_both.tensors["output.weight"] = part.first == 0 ? "token_embd.weight" : "output.weight";
      return load(file_.open(with_both), params, share, path);
    }
  };
  // Heads that predict further tokens are counted by libllama as layers behind the last.
  const auto further = static_cast<int>(file_.whole("nextn_predict_layers", 0));
  const int gpu_of_tail = gpu > n - k ? of_tail + further : of_tail;
  if (k == 0) {
    params.n_gpu_layers = gpu_of_tail;
    tail_ = load(nullptr, params, progress, path);
  } else {
    const double cut = static_cast<double>(k + 1) / static_cast<double>(n + 1);
    head_ = half(head_of(file_, layers_, k_), gpu > of_tail ? gpu - of_tail + 2 : 0, 0, cut);
    tail_ = half(tail_of(file_, layers_, k_), gpu_of_tail, cut, 1);
  }

  hidden_ = size(llama_model_n_embd(tail_.get()));
  input_ = size(llama_model_n_embd_inp(head()));
  const llama_rope_type rope = llama_model_rope_type(tail_.get());
  axes_ = rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE ? 4 : 1;

  // Of a mixture, what runs for a token.
  const auto attending = std::find_if(layers_.all.begin() + (k == 0 ? 0 : k - 1), layers_.all.end(),
                                      [](const Layer& layer) { return layer.attends; });
  const auto below = static_cast<std::uint32_t>(attending - layers_.all.begin());
  const std::size_t heads = std::size_t{file_.whole_in_layer("attention.head_count", below, 1)},
                    kv_heads = std::size_t{file_.whole_in_layer("attention.head_count_kv", below, 1)},
                    head_dim = file_.whole("attention.key_length",
                                           static_cast<std::uint32_t>(hidden_ / std::max<std::size_t>(heads, 1))),
                    expert = std::size_t{file_.whole_in_layer("expert_feed_forward_length", k_, 0)} *
                             std::size_t{file_.whole_in_layer("expert_used_count", k_, 0)};
  std::size_t ffn = expert != 0 ? expert : std::size_t{file_.whole_in_layer("feed_forward_length", k_, 1)};
  if (architecture() == "qwen") ffn /= 2;  // its key counts gate and up as one
  const bool gated = file_.has_tensor("blk.0.ffn_gate.weight") || expert != 0;
  shape_ = {layers(), hidden_, heads,           kv_heads,
            head_dim, ffn,     gated ? 3u : 2u, size(llama_vocab_n_tokens(vocabulary()))};
}

}  // namespace llava
