// The reference decoder's readers: safetensors bytes and config.json. Any bytes give tensors or a sentence.
#include <sys/mman.h>
#include <unistd.h>

#include "decoder.hpp"
#include "fuzz.hpp"

namespace {

// What can be asked of a file that opened: every tensor its header names is readable or refused with a sentence.
void read_all(const std::string& path, const std::string& bytes) {
  const reference::Tensors tensors(path);
  const std::size_t length =
      static_cast<unsigned char>(bytes[0]) | static_cast<std::size_t>(static_cast<unsigned char>(bytes[1])) << 8;
  const auto header = nlohmann::json::parse(bytes.substr(8, length), nullptr, false);
  if (!header.is_object()) return;
  for (const auto& [name, entry] : header.items()) {
    if (!tensors.has(name)) continue;
    std::size_t count = 1;
    for (const std::size_t extent : tensors.shape(name)) count *= extent;
    try {
      const reference::Matrix matrix = tensors.matrix(name);
      FUZZ_CHECK(static_cast<std::size_t>(matrix.size()) == count && count <= bytes.size());
    } catch (const std::runtime_error& error) {
      FUZZ_CHECK(std::strstr(error.what(), path.c_str()) != nullptr);
    }
    try {
      FUZZ_CHECK(tensors.integers(name).size() == count);
    } catch (const std::runtime_error&) {
    }
  }
}

}  // namespace

// First byte even: the bytes are a safetensors file; odd: a config.json.
FASTV_FUZZ_TARGET(tensors) {
  const bool json = in.chance();
  const std::string bytes(reinterpret_cast<const char*>(in.rest()), in.left());
  if (json) {
    const auto config = nlohmann::json::parse(bytes, nullptr, false);
    if (!config.is_object()) return;
    try {
      const reference::DecoderConfig decoder = reference::decoder_config(config);
      const fastv::ModelShape& s = decoder.shape;
      FUZZ_CHECK(s.layers > 0 && s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0);
      FUZZ_CHECK(s.head_dim > 0 && s.head_dim % 2 == 0 && s.intermediate > 0 && s.vocabulary > 0);
    } catch (const std::exception& error) {
      FUZZ_CHECK(error.what()[0] != 0);
    }
    return;
  }
  // A file in memory: Tensors reads by path.
  const int file = memfd_create("fuzz", 0);
  FUZZ_CHECK(file >= 0 && write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  try {
    read_all("/proc/self/fd/" + std::to_string(file), bytes);
  } catch (const std::runtime_error& error) {  // what the callers catch
    FUZZ_CHECK(error.what()[0] != 0);
  }
  close(file);
}
