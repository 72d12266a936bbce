// Writes GGUF files, the model files of ggml and llama.cpp: keys first, then tensors, streamed one after the other, so
// that a file may be larger than the memory. Built on ggml's own gguf.h.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace gguf {

// Told how much is written, from 0 to 1.
using Progress = std::function<void(double)>;

// LLaVA-1.5's chat template, for the key tokenizer.chat_template. It is also one of those that llama.cpp knows by heart
// (by "USER: " and "ASSISTANT: " in it), so that programs without Jinja apply it too.
inline constexpr const char* vicuna_template =
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

// Takes a tensor's bytes, in order and in pieces of any size.
using Sink = std::function<void(const void* bytes, std::size_t count)>;

class Writer {
 public:
  Writer() : context_(gguf_init_empty()) {}

  void set(const std::string& key, std::uint32_t value) { gguf_set_val_u32(context_.get(), key.c_str(), value); }
  void set(const std::string& key, float value) { gguf_set_val_f32(context_.get(), key.c_str(), value); }
  void set(const std::string& key, bool value) { gguf_set_val_bool(context_.get(), key.c_str(), value); }
  void set(const std::string& key, const char* value) { gguf_set_val_str(context_.get(), key.c_str(), value); }
  void set(const std::string& key, const std::string& value) { set(key, value.c_str()); }
  void set(const std::string& key, const std::vector<std::string>& values) {
    std::vector<const char*> pointers;
    for (const std::string& value : values) pointers.push_back(value.c_str());
    gguf_set_arr_str(context_.get(), key.c_str(), pointers.data(), pointers.size());
  }
  void set(const std::string& key, const std::vector<float>& values) { set(key, GGUF_TYPE_FLOAT32, values); }
  void set(const std::string& key, const std::vector<std::int32_t>& values) { set(key, GGUF_TYPE_INT32, values); }
  void set(const std::string& key, const std::vector<std::uint8_t>& values) { set(key, GGUF_TYPE_UINT8, values); }

  // The keys of another GGUF file that begin with `prefix`.
  void copy_keys(const std::string& path, const std::string& prefix) {
    const Context other(gguf_init_from_file(path.c_str(), {true, nullptr}));
    if (!other) throw std::runtime_error(path + " is no GGUF file, or cannot be read");
    while (true) {  // every removal renumbers the keys
      std::int64_t key = 0;
      const std::int64_t count = gguf_get_n_kv(other.get());
      while (key < count && std::string(gguf_get_key(other.get(), key)).rfind(prefix, 0) == 0) ++key;
      if (key == count) break;
      gguf_remove_key(other.get(), std::string(gguf_get_key(other.get(), key)).c_str());
    }
    gguf_set_kv(context_.get(), other.get());
  }

  // Elements of an array key.
  std::size_t array_size(const std::string& key) const {
    const std::int64_t id = gguf_find_key(context_.get(), key.c_str());
    if (id < 0) throw std::runtime_error("the file has no key " + key);
    return gguf_get_arr_n(context_.get(), id);
  }

  // A tensor; extents are innermost first, as ggml has them. `fill` is called once, when the file is written, and hands
  // over every byte of the tensor.
  void add(const std::string& name, ggml_type type, const std::vector<std::int64_t>& extents,
           std::function<void(const Sink&)> fill) {
    if (name.size() >= GGML_MAX_NAME) throw std::runtime_error("tensor name " + name + " is too long for GGUF");
    if (extents.front() % ggml_blck_size(type) != 0)
      throw std::runtime_error("tensor " + name + " has rows of " + std::to_string(extents.front()) + " but " +
                               ggml_type_name(type) + " stores blocks of " + std::to_string(ggml_blck_size(type)) +
                               ": choose a type with smaller blocks or wider rows");
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> shapes(ggml_init({ggml_tensor_overhead(), nullptr, true}),
                                                                     &ggml_free);
    ggml_tensor* tensor = ggml_new_tensor(shapes.get(), type, static_cast<int>(extents.size()), extents.data());
    ggml_set_name(tensor, name.c_str());
    gguf_add_tensor(context_.get(), tensor);
    fills_.push_back(std::move(fill));
  }

  // The same from floats, rounded to `type`.
  void add(const std::string& name, ggml_type type, const std::vector<std::int64_t>& extents,
           const std::vector<float>& values) {
    const std::int64_t columns = extents.front();
    std::int64_t rows = 1;
    for (std::size_t i = 1; i < extents.size(); ++i) rows *= extents[i];
    if (static_cast<std::int64_t>(values.size()) != rows * columns)
      throw std::runtime_error("tensor " + name + " has " + std::to_string(values.size()) + " values, not " +
                               std::to_string(rows * columns));
    auto rounded = std::make_shared<std::vector<char>>(ggml_row_size(type, columns) * static_cast<std::size_t>(rows));
    ggml_quantize_chunk(type, values.data(), rounded->data(), 0, rows, columns, nullptr);
    add(name, type, extents, [rounded](const Sink& sink) { sink(rounded->data(), rounded->size()); });
  }

  // Writes beside `path` and renames at the end: nobody sees half a file.
  void write(const std::string& path, const Progress& progress = {}) const {
    const std::string part = path + ".part";
    try {
      write_to(part, progress);
      if (std::rename(part.c_str(), path.c_str()) != 0) throw std::runtime_error("cannot rename " + part);
    } catch (...) {
      std::remove(part.c_str());
      throw;
    }
  }

 private:
  struct Free {
    void operator()(gguf_context* context) const { gguf_free(context); }
  };
  using Context = std::unique_ptr<gguf_context, Free>;

  template <class T>
  void set(const std::string& key, gguf_type type, const std::vector<T>& values) {
    gguf_set_arr_data(context_.get(), key.c_str(), type, values.data(), values.size());
  }

  void write_to(const std::string& path, const Progress& progress) const {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "wb"), &std::fclose);
    const auto put = [&](const void* bytes, std::size_t count) {
      if (count != 0 && std::fwrite(bytes, 1, count, file.get()) != count)
        throw std::runtime_error("cannot write " + path + ": is the disk full?");
    };
    if (!file) throw std::runtime_error("cannot open " + path + " for writing");
    std::vector<char> meta(gguf_get_meta_size(context_.get()));
    gguf_get_meta_data(context_.get(), meta.data());
    put(meta.data(), meta.size());

    const std::int64_t tensors = gguf_get_n_tensors(context_.get());
    const std::size_t alignment = gguf_get_alignment(context_.get());
    const std::size_t total = tensors == 0 ? 0 : end_of(tensors - 1);
    std::size_t written = 0;
    for (std::int64_t id = 0; id < tensors; ++id) {
      fills_[static_cast<std::size_t>(id)]([&](const void* bytes, std::size_t count) {
        put(bytes, count);
        written += count;
        if (progress) progress(static_cast<double>(written) / static_cast<double>(total));
      });
      if (written != end_of(id))
        throw std::runtime_error(std::string("tensor ") + gguf_get_tensor_name(context_.get(), id) + " got " +
                                 std::to_string(written - gguf_get_tensor_offset(context_.get(), id)) + " bytes, not " +
                                 std::to_string(gguf_get_tensor_size(context_.get(), id)));
      const std::vector<char> padding((alignment - written % alignment) % alignment);
      put(padding.data(), padding.size());
      written += padding.size();
    }
    if (std::fflush(file.get()) != 0) throw std::runtime_error("cannot write " + path + ": is the disk full?");
  }

  std::size_t end_of(std::int64_t tensor) const {
    return gguf_get_tensor_offset(context_.get(), tensor) + gguf_get_tensor_size(context_.get(), tensor);
  }

  Context context_;
  std::vector<std::function<void(const Sink&)>> fills_;
};

}  // namespace gguf
