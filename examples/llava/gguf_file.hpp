// A GGUF file, mapped into memory: its keys by type, its tensors by name. What is wrong with it is one sentence in a
// std::runtime_error.
#pragma once

#include <ggml-cpp.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace llava {

class GgufFile {
 public:
  explicit GgufFile(const std::string& path);
  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& path() const { return path_; }

  bool has(const std::string& key) const;
  // Each throws where the key is missing or of another kind; the second form returns `otherwise` where it is missing.
  std::string text(const std::string& key) const;
  std::int64_t whole(const std::string& key) const;
  std::int64_t whole(const std::string& key, std::int64_t otherwise) const;
  double real(const std::string& key, double otherwise) const;
  std::vector<std::int64_t> wholes(const std::string& key) const;  // an array of int32 or uint32
  std::size_t entries(const std::string& key) const;               // length of any array, 0 where it is missing

  struct Tensor {
    std::string name;
    ggml_type type;
    std::vector<std::int64_t> shape;  // ne[0] first, without trailing ones
    const void* data;                 // in the mapped file
    std::size_t bytes;
  };
  // The whole file, mapped.
  void* data() const { return const_cast<unsigned char*>(mapped_); }
  std::size_t size() const { return size_; }

  bool has_tensor(const std::string& name) const;
  Tensor tensor(const std::string& name) const;

 private:
  std::int64_t key_of(const std::string& key) const;  // -1: missing
  std::runtime_error wrong(const std::string& what) const;

  std::string path_;
  gguf_context_ptr gguf_;
  const unsigned char* mapped_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace llava
