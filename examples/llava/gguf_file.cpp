#include "gguf_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

namespace llava {

GgufFile::GgufFile(const std::string& path) : path_(path) {
  char magic[4] = {};
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot open the model " + path);
  if (!in.read(magic, 4) || std::memcmp(magic, "GGUF", 4) != 0)
    throw std::runtime_error(path + " is not a GGUF file: convert the model first (llama.cpp's convert_hf_to_gguf.py)");
  ggml_context* none = nullptr;
  gguf_.reset(gguf_init_from_file(path.c_str(), {true, &none}));
  if (none != nullptr) ggml_free(none);
  if (!gguf_) throw std::runtime_error(path + " is a damaged GGUF file: its header cannot be read");

  const int file = open(path.c_str(), O_RDONLY);
  struct stat info {};
  if (file < 0 || fstat(file, &info) != 0) {
    if (file >= 0) close(file);
    throw std::runtime_error("cannot open the model " + path);
  }
  size_ = static_cast<std::size_t>(info.st_size);
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw std::runtime_error("cannot map the model " + path + " into memory");
  mapped_ = static_cast<const unsigned char*>(mapped);
}

GgufFile::~GgufFile() {
  if (mapped_ != nullptr) munmap(const_cast<unsigned char*>(mapped_), size_);
}

std::runtime_error GgufFile::wrong(const std::string& what) const { return std::runtime_error(path_ + ": " + what); }

std::int64_t GgufFile::key_of(const std::string& key) const { return gguf_find_key(gguf_.get(), key.c_str()); }
bool GgufFile::has(const std::string& key) const { return key_of(key) >= 0; }

std::string GgufFile::text(const std::string& key) const {
  const std::int64_t id = key_of(key);
  if (id < 0) throw wrong("the key " + key + " is missing");
  if (gguf_get_kv_type(gguf_.get(), id) != GGUF_TYPE_STRING) throw wrong("the key " + key + " is not a string");
  return gguf_get_val_str(gguf_.get(), id);
}

std::int64_t GgufFile::whole(const std::string& key) const {
  const std::int64_t id = key_of(key);
  if (id < 0) throw wrong("the key " + key + " is missing");
  const gguf_context* gguf = gguf_.get();
  switch (gguf_get_kv_type(gguf, id)) {
    case GGUF_TYPE_UINT8: return gguf_get_val_u8(gguf, id);
    case GGUF_TYPE_INT8: return gguf_get_val_i8(gguf, id);
    case GGUF_TYPE_UINT16: return gguf_get_val_u16(gguf, id);
    case GGUF_TYPE_INT16: return gguf_get_val_i16(gguf, id);
    case GGUF_TYPE_UINT32: return gguf_get_val_u32(gguf, id);
    case GGUF_TYPE_INT32: return gguf_get_val_i32(gguf, id);
    case GGUF_TYPE_UINT64: return static_cast<std::int64_t>(gguf_get_val_u64(gguf, id));
    case GGUF_TYPE_INT64: return gguf_get_val_i64(gguf, id);
    default: throw wrong("the key " + key + " is not a whole number");
  }
}
std::int64_t GgufFile::whole(const std::string& key, std::int64_t otherwise) const {
  return has(key) ? whole(key) : otherwise;
}

double GgufFile::real(const std::string& key, double otherwise) const {
  const std::int64_t id = key_of(key);
  if (id < 0) return otherwise;
  switch (gguf_get_kv_type(gguf_.get(), id)) {
    case GGUF_TYPE_FLOAT32: return static_cast<double>(gguf_get_val_f32(gguf_.get(), id));
    case GGUF_TYPE_FLOAT64: return gguf_get_val_f64(gguf_.get(), id);
    default: throw wrong("the key " + key + " is not a number with a fraction");
  }
}

std::size_t GgufFile::entries(const std::string& key) const {
  const std::int64_t id = key_of(key);
  if (id < 0) return 0;
  if (gguf_get_kv_type(gguf_.get(), id) != GGUF_TYPE_ARRAY) throw wrong("the key " + key + " is not an array");
  return gguf_get_arr_n(gguf_.get(), id);
}

std::vector<std::int64_t> GgufFile::wholes(const std::string& key) const {
  const std::size_t n = entries(key);
  std::vector<std::int64_t> values(n);
  if (n == 0) return values;
  const std::int64_t id = key_of(key);
  const gguf_type type = gguf_get_arr_type(gguf_.get(), id);
  if (type != GGUF_TYPE_INT32 && type != GGUF_TYPE_UINT32)
    throw wrong("the key " + key + " is not an array of 32-bit whole numbers");
  const auto* data = static_cast<const std::int32_t*>(gguf_get_arr_data(gguf_.get(), id));
  for (std::size_t i = 0; i < n; ++i) values[i] = data[i];
  return values;
}

bool GgufFile::has_tensor(const std::string& name) const { return gguf_find_tensor(gguf_.get(), name.c_str()) >= 0; }

GgufFile::Tensor GgufFile::tensor(const std::string& name) const {
  const std::int64_t id = gguf_find_tensor(gguf_.get(), name.c_str());
  if (id < 0) throw wrong("the tensor " + name + " is missing");
  const std::int64_t* ne = gguf_get_tensor_ne(gguf_.get(), id);
  Tensor tensor{name,
                gguf_get_tensor_type(gguf_.get(), id),
                {ne, ne + GGML_MAX_DIMS},
                nullptr,
                gguf_get_tensor_size(gguf_.get(), id)};
  while (tensor.shape.size() > 1 && tensor.shape.back() == 1) tensor.shape.pop_back();
  const std::size_t begin = gguf_get_data_offset(gguf_.get()), offset = gguf_get_tensor_offset(gguf_.get(), id);
  if (begin > size_ || offset > size_ - begin || tensor.bytes > size_ - begin - offset)
    throw wrong("the file ends before the tensor " + name + " does: it was cut short");
  if ((begin + offset) % 32 != 0) throw wrong("the tensor " + name + " is not aligned to 32 bytes");
  tensor.data = mapped_ + begin + offset;
  return tensor;
}

}  // namespace llava
