// Reads safetensors files (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a
// JSON header, raw little-endian tensors.
#pragma once

#include <Eigen/Core>
#include <fastv/element.hpp>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace reference {

// [tokens, width] everywhere: one row per token.
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowVector = Eigen::RowVectorXf;

class Tensors {
 public:
  explicit Tensors(const std::string& path) : path_(path) {
    std::ifstream in(path, std::ios::binary | std::ios::ate);
    if (!in) throw std::runtime_error("cannot open " + path);
    bytes_.resize(static_cast<std::size_t>(in.tellg()));
    in.seekg(0);
    in.read(bytes_.data(), static_cast<std::streamsize>(bytes_.size()));
    if (!in) throw std::runtime_error("cannot read " + path);

    if (bytes_.size() < 8) throw std::runtime_error(path + " is no safetensors file: it has fewer than 8 bytes");
    std::uint64_t length = 0;
    for (std::size_t i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(bytes_[i]);
    if (length > bytes_.size() - 8)
      throw std::runtime_error(path + " is no safetensors file: its header would be longer than the file");
    data_ = 8 + static_cast<std::size_t>(length);
    const auto header =
        nlohmann::json::parse(bytes_.begin() + 8, bytes_.begin() + static_cast<std::ptrdiff_t>(data_), nullptr, false);
    if (!header.is_object()) throw std::runtime_error(path + " is no safetensors file: its header is not JSON");
    for (const auto& [name, entry] : header.items()) add(name, entry);
  }

  const std::string& path() const { return path_; }
  bool has(const std::string& name) const { return entries_.count(name) != 0; }
  const std::vector<std::size_t>& shape(const std::string& name) const { return find(name).shape; }

  // In alphabetical order.
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, entry] : entries_) all.push_back(name);
    return all;
  }

  // A string of the header's __metadata__.
  const std::string& metadata(const std::string& key) const {
    const auto found = metadata_.find(key);
    if (found == metadata_.end()) throw std::runtime_error(path_ + " has no metadata \"" + key + "\"");
    return found->second;
  }

  // F32, F16 or BF16, widened to float; I8 times the scales of its blocks, a tensor NAME_scale. [n] becomes [1, n];
  // [a, b, c, ...] becomes [a, b * c * ...].
  Matrix matrix(const std::string& name) const {
    const Entry& entry = find(name);
    const std::size_t rows = entry.shape.size() < 2 ? 1 : entry.shape.front();
    Matrix out(static_cast<Eigen::Index>(rows), static_cast<Eigen::Index>(rows == 0 ? 0 : entry.count / rows));
    if (entry.dtype == "F32")
      read<float>(entry, out.data());
    else if (entry.dtype == "F16")
      read<fastv::half>(entry, out.data());
    else if (entry.dtype == "BF16")
      read<fastv::bfloat16>(entry, out.data());
    else if (entry.dtype == "I8" && has(name + "_scale"))
      read_blocks(entry, matrix(name + "_scale", out.rows(), blocks_in_row(name, out.cols())), out);
    else
      throw std::runtime_error(path_ + ": tensor " + name + " is " + entry.dtype +
                               ", not F32, F16, BF16, or I8 with a tensor " + name + "_scale");
    return out;
  }

  // The same, and its shape must be [rows, columns] ([columns] where rows is 1).
  Matrix matrix(const std::string& name, Eigen::Index rows, Eigen::Index columns) const {
    Matrix out = matrix(name);
    if (out.rows() != rows || out.cols() != columns)
      throw std::runtime_error(path_ + ": tensor " + name + " is " + std::to_string(out.rows()) + " x " +
                               std::to_string(out.cols()) + " but config.json says " + std::to_string(rows) + " x " +
                               std::to_string(columns));
    return out;
  }

  std::vector<std::int64_t> integers(const std::string& name) const {
    const Entry& entry = find(name);
    if (entry.dtype != "I64") throw std::runtime_error(path_ + ": tensor " + name + " is " + entry.dtype + ", not I64");
    std::vector<std::int64_t> out(entry.count);
    if (!out.empty()) std::memcpy(out.data(), bytes_.data() + entry.begin, entry.count * sizeof(std::int64_t));
    return out;
  }

 private:
  struct Entry {
    std::string dtype;
    std::vector<std::size_t> shape;
    std::size_t count, begin;  // elements; byte offset in the file
  };

  void add(const std::string& name, const nlohmann::json& entry) try {
    if (name == "__metadata__") {
      metadata_ = entry.get<std::map<std::string, std::string>>();
      return;
    }
    static const std::map<std::string, std::size_t> sizes = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},
                                                             {"F64", 8}, {"I32", 4}, {"I16", 2},  {"I8", 1},
                                                             {"U8", 1},  {"BOOL", 1}};
    Entry e{entry.at("dtype"), sizes_of(entry.at("shape")), 1, 0};
    const std::size_t limit = bytes_.size() - data_;
    for (const std::size_t extent : e.shape) {
      if (extent != 0 && e.count > limit / extent) throw std::out_of_range("larger than the file");
      e.count *= extent;
    }
    const std::vector<std::size_t> offsets = sizes_of(entry.at("data_offsets"));
    const std::size_t size = sizes.at(e.dtype);
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > limit ||
        offsets[1] - offsets[0] != e.count * size)
      throw std::out_of_range("data_offsets do not fit its shape and the file");
    e.begin = data_ + offsets[0];
    entries_.emplace(name, std::move(e));
  } catch (const std::exception& error) {
    throw std::runtime_error(path_ + ": the header's entry of tensor " + name + " is malformed (" + error.what() + ")");
  }

  static std::vector<std::size_t> sizes_of(const nlohmann::json& list) {
    if (!list.is_array()) throw std::invalid_argument("no list");
    for (const auto& size : list)
      if (!size.is_number_unsigned()) throw std::invalid_argument(size.dump() + " is no size");
    return list;
  }

  const Entry& find(const std::string& name) const {
    const auto found = entries_.find(name);
    if (found == entries_.end()) throw std::runtime_error(path_ + " has no tensor " + name);
    return found->second;
  }

  // Blocks that share a scale in each row of NAME, of `columns` elements.
  Eigen::Index blocks_in_row(const std::string& name, Eigen::Index columns) const {
    const std::vector<std::size_t>& scales = shape(name + "_scale");
    const auto blocks = static_cast<Eigen::Index>(scales.empty() ? 0 : scales.back());
    if (blocks < 1 || columns % blocks != 0)
      throw std::runtime_error(path_ + ": tensor " + name + " has rows of " + std::to_string(columns) +
                               " elements, which " + std::to_string(blocks) + " scales do not divide into blocks");
    return blocks;
  }

  void read_blocks(const Entry& entry, const Matrix& scales, Matrix& out) const {
    const char* bytes = bytes_.data() + entry.begin;
    const Eigen::Index block = scales.size() == 0 ? 1 : out.size() / scales.size();
    for (Eigen::Index i = 0; i < out.size(); ++i)
      out.data()[i] = static_cast<float>(static_cast<signed char>(bytes[i])) * scales.data()[i / block];
  }

  template <class T>
  void read(const Entry& entry, float* out) const {
    for (std::size_t i = 0; i < entry.count; ++i) {
      T value;
      std::memcpy(&value, bytes_.data() + entry.begin + i * sizeof(T), sizeof(T));
      out[i] = fastv::to_float(value);
    }
  }

  std::string path_;
  std::vector<char> bytes_;
  std::size_t data_ = 0;  // where the tensors begin
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace reference
