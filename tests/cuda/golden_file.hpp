// Reads the authors' tensors (tests/golden/README.md) by the standard library alone, for machines with a GPU and nvcc and
// nothing else. examples/reference/tensors.hpp is the reader for files from elsewhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <fastv/element.hpp>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace golden {

// A value of JSON: a string without its escapes, or the text of a number, true, false or null; a list; or members.
struct Json {
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> members;

  const Json& operator[](const std::string& name) const {
    const auto found = members.find(name);
    if (found == members.end()) throw std::runtime_error("there is no \"" + name + "\"");
    return found->second;
  }
  std::size_t number() const { return std::stoul(text); }

  static Json parse(const std::string& all) {
    std::size_t at = 0;
    return value(all, at);
  }

 private:
  static char next(const std::string& all, std::size_t& at) {
    at = all.find_first_not_of(" \t\r\n", at);
    if (at >= all.size()) throw std::runtime_error("the JSON ends in the middle");
    return all[at];
  }
  static Json value(const std::string& all, std::size_t& at) {
    Json own;
    const char first = next(all, at);
    if (first == '{' || first == '[') {
      const char last = first == '{' ? '}' : ']';
      ++at;
      while (next(all, at) != last) {
        if (all[at] == ',') ++at;
        Json name = value(all, at);
        if (first == '{' && next(all, at) == ':')
          own.members[name.text] = value(all, ++at);
        else
          own.list.push_back(std::move(name));
      }
      ++at;
    } else if (first == '"') {
      for (++at; at < all.size() && all[at] != '"'; ++at) own.text += all[at] == '\\' ? all.at(++at) : all[at];
      ++at;
    } else {
      const std::size_t end = all.find_first_of(",]} \t\r\n", at);
      own.text = all.substr(at, end - at);
      if (own.text.empty()) throw std::runtime_error("the JSON has no value where there should be one");
      at = end;
    }
    return own;
  }
};

class File {
 public:
  explicit File(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(in), {});
    if (!in || bytes_.size() < 8) throw std::runtime_error("cannot read " + path);
    std::uint64_t length = 0;
    std::memcpy(&length, bytes_.data(), 8);
    if (length > bytes_.size() - 8) throw std::runtime_error(path + " ends within its header");
    header_ = Json::parse(bytes_.substr(8, length));
    data_ = 8 + length;
  }

  const std::string& metadata(const std::string& name) const { return header_["__metadata__"][name].text; }
  // F32, or BF16 widened.
  std::vector<float> floats(const std::string& name) const {
    return header_[name]["dtype"].text == "BF16" ? read<fastv::bfloat16, float>(name, "BF16")
                                                 : read<float, float>(name, "F32");
  }
  std::vector<std::int64_t> integers(const std::string& name) const {
    return read<std::int64_t, std::int64_t>(name, "I64");
  }

 private:
  static std::int64_t wide(std::int64_t value) { return value; }
  static float wide(float value) { return value; }
  static float wide(fastv::bfloat16 value) { return fastv::to_float(value); }
  template <class From, class To>
  std::vector<To> read(const std::string& name, const std::string& type) const {
    const Json& entry = header_[name];
    const std::size_t begin = entry["data_offsets"].list.at(0).number(),
                      end = entry["data_offsets"].list.at(1).number();
    if (entry["dtype"].text != type || begin > end || end > bytes_.size() - data_)
      throw std::runtime_error(name + " is no " + type + " inside the file");
    std::vector<To> out;
    for (std::size_t at = data_ + begin; at < data_ + end; at += sizeof(From)) {
      From value;
      std::memcpy(&value, bytes_.data() + at, sizeof(value));
      out.push_back(wide(value));
    }
    return out;
  }

  std::string bytes_;
  Json header_;
  std::size_t data_ = 0;
};

}  // namespace golden
