// The reader of GGUF files: any bytes give a decoder's shape and tensors inside the file, or a sentence. ggml's own
// parser runs underneath.
#include <gguf.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.hpp"
#include "shape.hpp"

namespace {

// Keys that a decoder needs, and more of them than their types allow.
void add_keys(fuzz::Input& in, gguf_context* gguf) {
  static const char* const architectures[] = {"llama", "qwen", "qwen2", "qwen2vl", "gpt2"};
  static const char* const keys[] = {"block_count",
                                     "embedding_length",
                                     "attention.head_count",
                                     "attention.head_count_kv",
                                     "attention.key_length",
                                     "feed_forward_length",
                                     "context_length",
                                     "rope.dimension_count",
                                     "attention.layer_norm_rms_epsilon",
                                     "rope.freq_base",
                                     "rope.scaling.factor",
                                     "rope.scaling.type",
                                     "rope.dimension_sections",
                                     "expert_count"};
  static const std::uint32_t usual[] = {4, 64, 8, 2, 16, 128, 512, 16, 1, 1, 1, 1, 1, 0};
  const std::string architecture = architectures[in.below(5)];
  if (!in.one_in(16)) gguf_set_val_str(gguf, "general.architecture", architecture.c_str());
  for (std::size_t i = 0; i < std::size(keys); ++i) {
    const std::string key = architecture + "." + keys[i];
    switch (in.below(8)) {
      case 0: gguf_set_val_i64(gguf, key.c_str(), static_cast<std::int64_t>(in.hostile())); break;
      case 1: gguf_set_val_f32(gguf, key.c_str(), static_cast<float>(in.hostile_real())); break;
      case 2: gguf_set_val_str(gguf, key.c_str(), in.chance() ? "linear" : "yarn"); break;
      case 3: {
        const std::int32_t values[] = {static_cast<std::int32_t>(in.hostile()), 4, 2, 0};
        gguf_set_arr_data(gguf, key.c_str(), GGUF_TYPE_INT32, values, in.below(5));
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
    ggml_tensor* weight = ggml_new_tensor_2d(tensors.get(), GGML_TYPE_F32, 8, 16);
    ggml_set_name(weight, "token_embd.weight");
    gguf_add_tensor(gguf.get(), weight);
    FUZZ_CHECK(gguf_write_to_file(gguf.get(), path.c_str(), false));
    // Cut short, or a byte changed.
    const auto size = static_cast<std::size_t>(lseek(file, 0, SEEK_END));
    if (in.chance()) FUZZ_CHECK(ftruncate(file, static_cast<off_t>(in.below(size))) == 0);
    const std::uint8_t byte = in.byte();
    if (in.chance()) FUZZ_CHECK(pwrite(file, &byte, 1, static_cast<off_t>(in.below(size))) == 1);
  }
  try {
    const llava::GgufFile gguf(path);
    if (gguf.has_tensor("token_embd.weight")) {
      const llava::GgufFile::Tensor tensor = gguf.tensor("token_embd.weight");
      const auto* begin = static_cast<const unsigned char*>(gguf.data());
      const auto* data = static_cast<const unsigned char*>(tensor.data);
      FUZZ_CHECK(data >= begin && tensor.bytes <= gguf.size() - static_cast<std::size_t>(data - begin));
      std::uint8_t sum = 0;
      for (std::size_t i = 0; i < tensor.bytes; ++i) sum = static_cast<std::uint8_t>(sum + data[i]);
      FUZZ_CHECK(sum == sum);
    }
    const llava::Shape shape = llava::shape_of(gguf);
    FUZZ_CHECK(shape.layers > 0 && shape.hidden > 0 && shape.ffn > 0 && shape.context > 0);
    FUZZ_CHECK(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0);
    FUZZ_CHECK(shape.head_dim > 0 && shape.head_dim % 2 == 0);
    FUZZ_CHECK(shape.rope_dims > 0 && shape.rope_dims <= shape.head_dim && shape.rope_dims % 2 == 0);
    FUZZ_CHECK(shape.rms_eps >= 0 && shape.attention_scale > 0 && shape.rope_base > 0);
    int sections = 0;
    for (const int section : shape.rope_sections) {
      FUZZ_CHECK(section >= 0);
      sections += section;
    }
    FUZZ_CHECK(shape.m_rope() == (sections > 0) && sections <= shape.head_dim / 2);
  } catch (const std::runtime_error& error) {  // what the callers catch
    FUZZ_CHECK(error.what()[0] != 0);
  }
  close(file);
}
