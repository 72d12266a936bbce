#include "model_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace llava {

namespace {

// Bytes of the keys and tensors' names, and behind them pieces of the model's files.
struct View {
  struct Piece {
    std::uint64_t first, bytes;  // in the view
    int file;
    std::uint64_t offset;  // in the file
  };
  std::vector<char> header;
  std::vector<Piece> pieces;  // ascending; what lies between them is padding
  std::uint64_t size = 0, at = 0;

  // As many bytes as are asked for or left; -1 where a file cannot be read.
  std::int64_t read(char* to, std::size_t count) {
    const std::size_t wanted = static_cast<std::size_t>(std::min<std::uint64_t>(count, size - std::min(at, size)));
    std::size_t done = 0;
    while (done < wanted) {
      if (at < header.size()) {
        const std::size_t some = std::min<std::size_t>(wanted - done, header.size() - static_cast<std::size_t>(at));
        std::memcpy(to + done, header.data() + at, some);
        advance(some, done);
        continue;
      }
      auto piece = std::upper_bound(pieces.begin(), pieces.end(), at,
                                    [](std::uint64_t place, const Piece& p) { return place < p.first; });
      const std::uint64_t next = piece == pieces.end() ? size : piece->first;
      if (piece != pieces.begin() && at < (piece - 1)->first + (piece - 1)->bytes) {
        --piece;
        const std::uint64_t inside = at - piece->first;
        const auto some = static_cast<std::size_t>(std::min<std::uint64_t>(wanted - done, piece->bytes - inside));
        const ssize_t got = pread(piece->file, to + done, some, static_cast<off_t>(piece->offset + inside));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return -1;
        advance(static_cast<std::size_t>(got), done);
      } else {
        const auto some = static_cast<std::size_t>(std::min<std::uint64_t>(wanted - done, next - at));
        std::memset(to + done, 0, some);
        advance(some, done);
      }
    }
    return static_cast<std::int64_t>(done);
  }
  std::int64_t seek(std::int64_t offset, int whence) {
    const std::int64_t base = whence == SEEK_SET ? 0 : static_cast<std::int64_t>(whence == SEEK_CUR ? at : size);
    if (base + offset < 0) return -1;
    at = static_cast<std::uint64_t>(base + offset);
    return base + offset;
  }

 private:
  void advance(std::size_t some, std::size_t& done) {
    at += some;
    done += some;
  }
};

// A FILE* whose bytes are the view's.
File as_file(std::unique_ptr<View> view) {
#if defined(__GLIBC__)
  const cookie_io_functions_t functions{
      [](void* self, char* to, std::size_t count) -> ssize_t { return static_cast<View*>(self)->read(to, count); },
      nullptr,
      [](void* self, off64_t* offset, int whence) {
        const std::int64_t at = static_cast<View*>(self)->seek(*offset, whence);
        *offset = at;
        return at < 0 ? -1 : 0;
      },
      [](void* self) {
        delete static_cast<View*>(self);
        return 0;
      }};
  File file(fopencookie(view.get(), "rb", functions));
  if (file) static_cast<void>(view.release());
#elif defined(__APPLE__) || defined(__FreeBSD__)
  File file(funopen(
      view.get(),
      [](void* self, char* to, int count) {
        return static_cast<int>(static_cast<View*>(self)->read(to, static_cast<std::size_t>(count)));
      },
      nullptr,
      [](void* self, fpos_t offset, int whence) -> fpos_t { return static_cast<View*>(self)->seek(offset, whence); },
      [](void* self) {
        delete static_cast<View*>(self);
        return 0;
      }));
  if (file) static_cast<void>(view.release());
#else  // no way to make one up: a copy on the disk, which goes when it is closed
  File file(std::tmpfile());
  std::vector<char> some(std::size_t{1} << 24);
  for (std::int64_t count; file && (count = view->read(some.data(), some.size())) != 0;)
    if (count < 0 ||
        std::fwrite(some.data(), 1, static_cast<std::size_t>(count), file.get()) != static_cast<std::size_t>(count))
      file.reset();
  if (file) std::rewind(file.get());
#endif
  if (!file) throw std::runtime_error(std::string("cannot make a file of a model's layers: ") + std::strerror(errno));
  return file;
}

// "blk.12.attn_q.weight": 12 and where its digits end; -1 for tensors of no layer.
std::int64_t layer_of(const std::string& tensor, std::size_t& end) {
  if (tensor.rfind("blk.", 0) != 0) return -1;
  end = tensor.find_first_not_of("0123456789", 4);
  const bool digits = end != std::string::npos && tensor[end] == '.' && end > 4 && end < 10;
  if (!digits || (tensor[4] == '0' && end > 5)) return -1;
  return std::stoll(tensor.substr(4, end - 4));
}

std::optional<double> value_at(gguf_type type, const void* data) {
  switch (type) {
    case GGUF_TYPE_UINT8: return *static_cast<const std::uint8_t*>(data);
    case GGUF_TYPE_INT8: return *static_cast<const std::int8_t*>(data);
    case GGUF_TYPE_UINT16: return *static_cast<const std::uint16_t*>(data);
    case GGUF_TYPE_INT16: return *static_cast<const std::int16_t*>(data);
    case GGUF_TYPE_UINT32: return *static_cast<const std::uint32_t*>(data);
    case GGUF_TYPE_INT32: return *static_cast<const std::int32_t*>(data);
    case GGUF_TYPE_UINT64: return static_cast<double>(*static_cast<const std::uint64_t*>(data));
    case GGUF_TYPE_INT64: return static_cast<double>(*static_cast<const std::int64_t*>(data));
    case GGUF_TYPE_FLOAT32: return static_cast<double>(*static_cast<const float*>(data));
    case GGUF_TYPE_FLOAT64: return *static_cast<const double*>(data);
    case GGUF_TYPE_BOOL: return *static_cast<const std::int8_t*>(data) != 0 ? 1 : 0;
    default: return {};
  }
}
std::size_t bytes_of(gguf_type type) {
  switch (type) {
    case GGUF_TYPE_UINT8:
    case GGUF_TYPE_INT8:
    case GGUF_TYPE_BOOL: return 1;
    case GGUF_TYPE_UINT16:
    case GGUF_TYPE_INT16: return 2;
    case GGUF_TYPE_UINT32:
    case GGUF_TYPE_INT32:
    case GGUF_TYPE_FLOAT32: return 4;
    case GGUF_TYPE_UINT64:
    case GGUF_TYPE_INT64:
    case GGUF_TYPE_FLOAT64: return 8;
    default: return 0;
  }
}

}  // namespace

struct ModelFile::Shard {
  gguf_context_ptr gguf;
  ggml_context_ptr names;  // the tensors, without data
  int file = -1;

  explicit Shard(const std::string& path) {
    char magic[4] = {};
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("cannot open the model " + path);
    if (!in.read(magic, 4) || std::memcmp(magic, "GGUF", 4) != 0)
      throw std::runtime_error(path +
                               " is not a GGUF file: convert the model first (llama.cpp's convert_hf_to_gguf.py)");
    ggml_context* context = nullptr;
    gguf.reset(gguf_init_from_file(path.c_str(), {true, &context}));
    names.reset(context);
    if (!gguf) throw std::runtime_error(path + " is a damaged GGUF file: its header cannot be read");
    // ggml aborts where such keys are copied.
    for (std::int64_t key = 0; key < gguf_get_n_kv(gguf.get()); ++key) {
      const std::string name = gguf_get_key(gguf.get(), key);
      if (name.empty() || (name == "general.alignment" && gguf_get_kv_type(gguf.get(), key) != GGUF_TYPE_UINT32))
        throw std::runtime_error(path + " is a damaged GGUF file: its key \"" + name + "\" cannot be read");
    }
    file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw std::runtime_error("cannot open the model " + path);
  }
  ~Shard() {
    if (file >= 0) close(file);
  }
};

ModelFile::ModelFile(const std::string& path) : path_(path) {
  shards_.push_back(std::make_unique<Shard>(path));
  const gguf_context* keys = shards_[0]->gguf.get();
  const std::int64_t name = gguf_find_key(keys, "general.architecture");
  if (name < 0 || gguf_get_kv_type(keys, name) != GGUF_TYPE_STRING)
    throw std::runtime_error(path + " names no architecture: it holds no language model");
  architecture_ = gguf_get_val_str(keys, name);
  if (architecture_ == "clip")
    throw std::runtime_error(path + " holds a vision encoder: hand it over by --mmproj, and the language model by -m");

  const std::int64_t split = gguf_find_key(keys, "split.count");
  const int count = split >= 0 && gguf_get_kv_type(keys, split) == GGUF_TYPE_UINT16 ? gguf_get_val_u16(keys, split) : 1;
  if (count > 1) {
    const auto ending = [&](int number) {
      char text[64];
      std::snprintf(text, sizeof(text), "-%05d-of-%05d.gguf", number, count);
      return std::string(text);
    };
    const std::size_t size = ending(1).size();
    if (path.size() < size || path.compare(path.size() - size, size, ending(1)) != 0)
      throw std::runtime_error(path + " is one of " + std::to_string(count) +
                               " files of a model: name the first, which ends in " + ending(1));
    for (int i = 2; i <= count; ++i)
      shards_.push_back(std::make_unique<Shard>(path.substr(0, path.size() - size) + ending(i)));
  }
  for (std::size_t i = 0; i < shards_.size(); ++i) {
    const Shard& shard = *shards_[i];
    struct stat info {};
    const std::uint64_t size = fstat(shard.file, &info) == 0 ? static_cast<std::uint64_t>(info.st_size) : 0;
    for (std::int64_t t = 0; t < gguf_get_n_tensors(shard.gguf.get()); ++t) {
      const char* tensor = gguf_get_tensor_name(shard.gguf.get(), t);
      const Place place{i, gguf_get_data_offset(shard.gguf.get()) + gguf_get_tensor_offset(shard.gguf.get(), t),
                        gguf_get_tensor_size(shard.gguf.get(), t)};
      if (place.offset + place.bytes > size)
        throw std::runtime_error(path_ + ": the file ends before the tensor " + tensor + " does: it was cut short");
      if (has_tensor(tensor))
        throw std::runtime_error(path_ + ": the tensor " + tensor + " is there twice: its files are not of one model");
      tensors_.emplace_back(ggml_get_tensor(shard.names.get(), tensor), place);
    }
  }
}

ModelFile::~ModelFile() = default;

std::optional<double> ModelFile::number(const std::string& key) const {
  const gguf_context* gguf = shards_[0]->gguf.get();
  const std::int64_t id = gguf_find_key(gguf, full(key).c_str());
  if (id < 0) return {};
  const gguf_type type = gguf_get_kv_type(gguf, id);
  if (type == GGUF_TYPE_ARRAY || type == GGUF_TYPE_STRING) return {};
  return value_at(type, gguf_get_val_data(gguf, id));
}

std::vector<double> ModelFile::numbers(const std::string& key) const {
  const gguf_context* gguf = shards_[0]->gguf.get();
  const std::int64_t id = gguf_find_key(gguf, full(key).c_str());
  std::vector<double> values;
  if (id < 0 || gguf_get_kv_type(gguf, id) != GGUF_TYPE_ARRAY) return values;
  const gguf_type type = gguf_get_arr_type(gguf, id);
  const std::size_t size = bytes_of(type);
  if (size == 0) return values;
  const auto* data = static_cast<const char*>(gguf_get_arr_data(gguf, id));
  for (std::size_t i = 0; i < gguf_get_arr_n(gguf, id); ++i) values.push_back(*value_at(type, data + i * size));
  return values;
}

std::uint32_t ModelFile::size_of(const std::string& key, double value) const {
  if (!(value >= 0 && value <= 1e9))
    throw std::runtime_error(path_ + ": the key " + full(key) + " is " + std::to_string(value) + ", which is no size");
  return static_cast<std::uint32_t>(value);
}

std::uint32_t ModelFile::whole(const std::string& key, std::uint32_t otherwise) const {
  const std::optional<double> value = number(key);
  return value ? size_of(key, *value) : otherwise;
}

std::uint32_t ModelFile::whole_in_layer(const std::string& key, std::uint32_t layer, std::uint32_t otherwise) const {
  const std::vector<double> all = numbers(key);
  return all.empty() ? whole(key, otherwise) : size_of(key, all[std::min<std::size_t>(layer, all.size() - 1)]);
}

bool ModelFile::has_tensor(const std::string& name) const {
  return std::any_of(tensors_.begin(), tensors_.end(), [&](const auto& t) { return name == t.first->name; });
}

std::uint32_t ModelFile::vocabulary() const {
  const gguf_context* gguf = shards_[0]->gguf.get();
  const std::int64_t id = gguf_find_key(gguf, "tokenizer.ggml.tokens");
  return id < 0 ? whole("vocab_size", 0) : static_cast<std::uint32_t>(gguf_get_arr_n(gguf, id));
}

namespace {

// Declares a matrix in the fewest bits that every backend of ggml multiplies by; its bytes then mean nothing.
void shrink(ggml_tensor& matrix) {
  if (ggml_n_dims(&matrix) < 2) return;
  for (const ggml_type type : {GGML_TYPE_IQ1_S, GGML_TYPE_Q4_0}) {
    if (matrix.ne[0] % ggml_blck_size(type) != 0) continue;
    if (ggml_row_size(type, matrix.ne[0]) >= ggml_row_size(matrix.type, matrix.ne[0])) return;
    matrix.type = type;
    matrix.nb[0] = ggml_type_size(type);
    matrix.nb[1] = ggml_row_size(type, matrix.ne[0]);
    for (int i = 2; i < GGML_MAX_DIMS; ++i)
      matrix.nb[i] = matrix.nb[i - 1] * static_cast<std::size_t>(matrix.ne[i - 1]);
    return;
  }
}

}  // namespace

File ModelFile::open(const Part& part) const {
  const gguf_context* from = shards_[0]->gguf.get();
  gguf_context_ptr to(gguf_init_empty());
  gguf_set_kv(to.get(), from);
  // Without general.alignment: tensors are laid out anew, by 32 bytes.
  for (const char* key : {"split.no", "split.count", "split.tensors.count", "general.alignment"})
    gguf_remove_key(to.get(), key);

  const std::uint32_t layers = whole("block_count", 0);
  for (std::int64_t id = 0; id < gguf_get_n_kv(from); ++id) {
    const std::string key = gguf_get_key(from, id);
    if (key.rfind(architecture_ + ".", 0) != 0 || gguf_get_kv_type(from, id) != GGUF_TYPE_ARRAY) continue;
    // An array with an entry for each layer; the pairs of M-RoPE's axes are none, whatever their number.
    const std::size_t size = bytes_of(gguf_get_arr_type(from, id));
    if (size == 0 || gguf_get_arr_n(from, id) != layers || key == full("rope.dimension_sections")) continue;
    const auto* data = static_cast<const char*>(gguf_get_arr_data(from, id));
    gguf_set_arr_data(to.get(), key.c_str(), gguf_get_arr_type(from, id), data + part.first * size, part.count);
  }
  gguf_set_val_u32(to.get(), full("block_count").c_str(), part.count);
  for (const auto& [key, value] : part.wholes) gguf_set_val_u32(to.get(), full(key).c_str(), value);
  for (const auto& [key, value] : part.reals) gguf_set_val_f32(to.get(), full(key).c_str(), value);
  for (const auto& [key, values] : part.flags) {
    const std::vector<std::int8_t> bytes(values.begin(), values.end());
    gguf_set_arr_data(to.get(), full(key).c_str(), GGUF_TYPE_BOOL, bytes.data(), bytes.size());
  }

  const auto find = [&](const std::string& name) {
    return std::find_if(tensors_.begin(), tensors_.end(), [&](const auto& t) { return name == t.first->name; });
  };
  std::vector<Place> places;
  const std::string idle = part.last_is_idle ? "blk." + std::to_string(part.count - 1) + "." : "none";
  const auto add = [&](const std::string& name, const std::pair<const ggml_tensor*, Place>& source) {
    ggml_tensor copy = *source.first;
    Place place = source.second;
    ggml_set_name(&copy, name.c_str());
    if (name.rfind(idle + "attn", 0) == 0 || name.rfind(idle + "ffn", 0) == 0) shrink(copy);
    place.bytes = std::min<std::uint64_t>(place.bytes, ggml_nbytes(&copy));
    gguf_add_tensor(to.get(), &copy);
    places.push_back(place);
  };
  for (const auto& tensor : tensors_) {
    std::string name = tensor.first->name;
    std::size_t end = 0;
    const std::int64_t layer = layer_of(name, end);
    if (layer >= 0) {
      if (layer < part.first || layer >= part.first + part.count) continue;
      name = "blk." + std::to_string(layer - part.first) + name.substr(end);
    }
    if (part.tensors.count(name) == 0) add(name, tensor);
  }
  for (const auto& [name, source] : part.tensors) {
    const auto found = source.empty() ? tensors_.end() : find(source);
    if (found != tensors_.end()) add(name, *found);
  }

  auto view = std::make_unique<View>();
  view->header.resize(gguf_get_meta_size(to.get()));
  gguf_get_meta_data(to.get(), view->header.data());
  view->size = view->header.size();
  for (std::size_t i = 0; i < places.size(); ++i) {
    const std::uint64_t first = view->header.size() + gguf_get_tensor_offset(to.get(), static_cast<std::int64_t>(i));
    view->pieces.push_back({first, places[i].bytes, shards_[places[i].shard]->file, places[i].offset});
    view->size = std::max<std::uint64_t>(view->size, first + places[i].bytes);
  }
  const std::uint64_t step = gguf_get_alignment(to.get());
  view->size = (view->size + step - 1) / step * step;
  return as_file(std::move(view));
}

}  // namespace llava
