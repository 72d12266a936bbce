// The reader of GGUF files: any bytes give two halves whose files ggml reads again, tensor by tensor with the bytes of the
// whole, or a sentence.
#include <gguf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "fuzz.hpp"
#include "layers.hpp"

namespace {

// Keys that a decoder needs, and more of them than their types allow.
void add_keys(fuzz::Input& in, gguf_context* gguf) {
  static const char* const architectures[] = {"llama", "gemma3", "qwen35", "qwen2vl", "gpt2"};
  static const char* const keys[] = {"block_count",
                                     "embedding_length",
                                     "attention.head_count",
                                     "attention.head_count_kv",
                                     "attention.sliding_window",
                                     "attention.sliding_window_pattern",
                                     "attention.shared_kv_layers",
                                     "full_attention_interval",
                                     "interleave_moe_layer_step",
                                     "leading_dense_block_count",
                                     "nextn_predict_layers",
                                     "n_deepstack_layers",
                                     "embedding_length_per_layer_input",
                                     "embedding_scale"};
  static const std::uint32_t usual[] = {8, 64, 8, 2, 16, 6, 0, 1, 1, 1, 0, 0, 0, 1};
  const std::string architecture = architectures[in.below(5)];
  if (!in.one_in(16)) gguf_set_val_str(gguf, "general.architecture", architecture.c_str());
  for (std::size_t i = 0; i < std::size(keys); ++i) {
    const std::string key = architecture + "." + keys[i];
    switch (in.below(8)) {
      case 0: gguf_set_val_i64(gguf, key.c_str(), static_cast<std::int64_t>(in.hostile())); break;
      case 1: gguf_set_val_f32(gguf, key.c_str(), static_cast<float>(in.hostile_real())); break;
      case 2: gguf_set_val_str(gguf, key.c_str(), in.chance() ? "linear" : "yarn"); break;
      case 3: {
        const std::int32_t values[] = {static_cast<std::int32_t>(in.hostile()), 4, 2, 0, 1, 1, 0, 1};
        gguf_set_arr_data(gguf, key.c_str(), GGUF_TYPE_INT32, values, in.below(9));
        break;
      }
      case 4: break;  // missing
      default: gguf_set_val_u32(gguf, key.c_str(), usual[i]);
    }
  }
}

}  // namespace

FASTV_FUZZ_TARGET(gguf) {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  const int file = memfd_create("fuzz", 0);
  FUZZ_CHECK(file >= 0);
  const std::string path = "/proc/self/fd/" + std::to_string(file);
  if (in.one_in(4)) {  // bytes as they come, behind the magic
    const std::string bytes = "GGUF" + std::string(reinterpret_cast<const char*>(in.rest()), in.left());
    FUZZ_CHECK(write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  } else {
    const gguf_context_ptr gguf(gguf_init_empty());
    add_keys(in, gguf.get());
    const ggml_context_ptr tensors(ggml_init({1 << 16, nullptr, false}));
    for (const char* name : {"token_embd.weight", "blk.0.attn_q.weight", "blk.3.attn_q.weight", "blk.7.attn_q.weight",
                             "blk.03.attn_q.weight", "blk.99999999999.x", "output.weight"}) {
      ggml_tensor* weight =
          ggml_new_tensor_2d(tensors.get(), GGML_TYPE_F32, 8, static_cast<std::int64_t>(1 + in.below(4)));
      std::memset(weight->data, name[4], ggml_nbytes(weight));
      ggml_set_name(weight, name);
      if (!in.one_in(8)) gguf_add_tensor(gguf.get(), weight);
    }
    FUZZ_CHECK(gguf_write_to_file(gguf.get(), path.c_str(), false));
    // Cut short, or a byte changed.
    const auto size = static_cast<std::size_t>(lseek(file, 0, SEEK_END));
    if (in.chance()) FUZZ_CHECK(ftruncate(file, static_cast<off_t>(in.below(size))) == 0);
    const std::uint8_t byte = in.byte();
    if (in.chance()) FUZZ_CHECK(pwrite(file, &byte, 1, static_cast<off_t>(in.below(size))) == 1);
  }
  try {
    const llava::ModelFile model(path);
    const llava::Layers layers = llava::layers_of(model);
    const std::vector<std::uint32_t>& can = layers.filtering_layers;
    FUZZ_CHECK(llava::filtering_layer(layers, 0u) == 0);
    FUZZ_CHECK(can.empty() == !layers.uncut.empty());
    if (can.empty()) llava::filtering_layer(layers, std::nullopt);  // throws the sentence
    FUZZ_CHECK(!can.empty() && can.front() >= 1 && can.back() < layers.all.size());
    const std::uint32_t k = can[in.below(can.size())];
    FUZZ_CHECK(llava::filtering_layer(layers, k) == k && layers.all[k - 1].attends && !layers.all[k - 1].windowed);
    const llava::Part head = head_of(model, layers, k), tail = tail_of(model, layers, k);
    FUZZ_CHECK(head.count == k + 1 && tail.first == k && tail.count >= layers.all.size() - k);
    for (const llava::Part& part : {head, tail}) {
      const llava::File file_of_part = model.open(part);
      ggml_context* read = nullptr;
      const gguf_context_ptr gguf(gguf_init_from_file_ptr(file_of_part.get(), {false, &read}));
      const ggml_context_ptr weights(read);
      if (gguf == nullptr) continue;  // a tensor's type or extents were damaged: libllama does not load it either
      for (ggml_tensor* t = ggml_get_first_tensor(read); t != nullptr; t = ggml_get_next_tensor(read, t))
        FUZZ_CHECK(t->data != nullptr || ggml_nbytes(t) == 0);
    }
  } catch (const std::runtime_error& error) {  // what the callers catch
    FUZZ_CHECK(error.what()[0] != 0);
  }
  close(file);
}
