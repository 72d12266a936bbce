// A GGUF file: its keys, its tensors, and any run of its layers as a file of its own, without a copy of the weights.
#pragma once

#include <ggml-cpp.h>
#include <gguf.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace llava {

struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, FileCloser>;

// A run of layers, and how its file differs from the whole one besides.
struct Part {
  std::uint32_t first = 0, count = 0;              // layers
  std::map<std::string, std::uint32_t> wholes;     // keys, without "<architecture>.", that become this
  std::map<std::string, float> reals;              // the same
  std::map<std::string, std::vector<bool>> flags;  // the same, an entry for each of the layers
  std::map<std::string, std::string> tensors;      // tensors that have the bytes of another; "": left out
  bool last_is_idle = false;                       // its last layer never runs: its matrices take as few bits as can be
};

class ModelFile {
 public:
  // path: a GGUF file, or the first of those that it is split into. Throws std::runtime_error with one sentence.
  explicit ModelFile(const std::string& path);
  ~ModelFile();
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  const std::string& path() const { return path_; }
  const std::string& architecture() const { return architecture_; }

  // Keys of the architecture, named without "<architecture>."; nothing where they are missing or no numbers.
  std::optional<double> number(const std::string& key) const;
  std::vector<double> numbers(const std::string& key) const;  // of an array
  // Sizes: throw where the key is no whole number of a size.
  std::uint32_t whole(const std::string& key, std::uint32_t otherwise) const;
  // An array's entry for a layer, or the one number for all.
  std::uint32_t whole_in_layer(const std::string& key, std::uint32_t layer, std::uint32_t otherwise) const;

  bool has_tensor(const std::string& name) const;
  std::uint32_t vocabulary() const;

  // The part as libllama reads it: layers are renumbered from 0, arrays of one entry a layer are cut, and the weights
  // are read from where they lie. The file refers to this object.
  File open(const Part& part) const;

 private:
  struct Shard;
  struct Place {
    std::size_t shard;
    std::uint64_t offset, bytes;
  };
  std::uint32_t size_of(const std::string& key, double value) const;
  std::string full(const std::string& key) const { return architecture_ + "." + key; }

  std::string path_, architecture_;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::vector<std::pair<const ggml_tensor*, Place>> tensors_;  // in the file's order
};

}  // namespace llava
