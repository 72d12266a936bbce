// The eyes of a LLaVA: a CLIP vision transformer and the projector that turns its features into visual tokens.
//
// Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), with CLIP's changes (Radford et al. 2021): a norm
// before the first block, no bias in the patch embedding, quick GELU. Names are those of Hugging Face.
//
// Shapes: L patches, p pixels a patch side, S = L + 1 tokens (the class token is the first), d width, H heads,
// c = d / H, f FFN width, D width of the decoder. One row per token.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../reference/model.hpp"
#include "../reference/ops.hpp"

namespace scenes {

using reference::Matrix;
using Activation = Matrix (*)(const Matrix&);

struct VisionConfig {
  Eigen::Index side, patch;  // pixels
  Eigen::Index width, heads, ffn;
  std::size_t layers;
  std::size_t blocks;  // that run: the features are taken behind them
  float eps;
  Activation activation, projector_activation;

  Eigen::Index columns() const { return side / patch; }           // patches in a row of the picture
  Eigen::Index patches() const { return columns() * columns(); }  // L
};

namespace detail {

inline Activation activation(const std::string& name) {
  if (name == "quick_gelu") return reference::quick_gelu;
  if (name == "gelu") return reference::gelu;
  throw std::runtime_error("config: the activation is \"" + name + "\" but only gelu and quick_gelu are known");
}

}  // namespace detail

// From the config.json of a LLaVA.
inline VisionConfig vision_config(const nlohmann::json& json) {
  const nlohmann::json& vision = json.at("vision_config");
  const auto size = [&](const char* field) {
    const std::int64_t value = reference::whole_number(vision, field);
    if (value < 1 || value > (1 << 20))
      throw std::runtime_error(std::string("config: ") + field + " is " + std::to_string(value) +
                               ", which is no size of a vision transformer");
    return static_cast<Eigen::Index>(value);
  };
  VisionConfig config{};
  config.side = size("image_size");
  config.patch = size("patch_size");
  config.width = size("hidden_size");
  config.heads = size("num_attention_heads");
  config.ffn = size("intermediate_size");
  config.layers = static_cast<std::size_t>(size("num_hidden_layers"));
  config.eps = vision.value("layer_norm_eps", 1e-5f);
  config.activation = detail::activation(vision.value("hidden_act", "quick_gelu"));
  config.projector_activation = detail::activation(json.value("projector_hidden_act", "gelu"));
  if (config.side % config.patch != 0 || config.width % config.heads != 0)
    throw std::runtime_error("config: patch_size must divide image_size, and num_attention_heads hidden_size");
  if (vision.value("num_channels", 3) != 3) throw std::runtime_error("config: num_channels must be 3");

  // Hidden state 0 is the input of the first block and -1 the output of the last, so -2 leaves one block out.
  const auto states = static_cast<std::int64_t>(config.layers) + 1;
  const std::int64_t layer =
      json.contains("vision_feature_layer") ? reference::whole_number(json, "vision_feature_layer") : -2;
  if (layer < -states || layer >= states)
    throw std::runtime_error("config: vision_feature_layer is " + std::to_string(layer) + " but there are " +
                             std::to_string(states) + " hidden states");
  config.blocks = static_cast<std::size_t>(layer < 0 ? states + layer : layer);
  if (json.value("vision_feature_select_strategy", "default") != "default")
    throw std::runtime_error("config: vision_feature_select_strategy must be \"default\": no class token");
  return config;
}

// Patches in reading order, each with its channels one after the other, as a convolution's weights are stored:
// pixels [3, side, side] -> [L, 3 p p].
inline Matrix unfold(const std::vector<float>& pixels, Eigen::Index side, Eigen::Index patch) {
  const Eigen::Index columns = side / patch;
  if (static_cast<Eigen::Index>(pixels.size()) != 3 * side * side)
    throw std::invalid_argument("the picture has " + std::to_string(pixels.size()) +
                                " values but the model wants 3 x " + std::to_string(side) + " x " +
                                std::to_string(side));
  const Eigen::Map<const Matrix> picture(pixels.data(), 3 * side, side);  // channel c's row y is row c side + y
  Matrix out(columns * columns, 3 * patch * patch);
  for (Eigen::Index token = 0; token < out.rows(); ++token)
    for (Eigen::Index channel = 0; channel < 3; ++channel)
      for (Eigen::Index y = 0; y < patch; ++y)
        out.row(token).segment((channel * patch + y) * patch, patch) =
            picture.row(channel * side + token / columns * patch + y).segment(token % columns * patch, patch);
  return out;
}

class Vision {
 public:
  // decoder_width: D, which the projector ends in.
  Vision(const VisionConfig& config, const reference::Tensors& tensors, std::size_t decoder_width) : config_(config) {
    const std::string tower = "vision_tower.vision_model.";
    const Eigen::Index d = config.width, out = static_cast<Eigen::Index>(decoder_width);
    const auto affine = [&](const std::string& name, Eigen::Index rows, Eigen::Index columns) {
      return Affine{tensors.matrix(name + ".weight", rows, columns), tensors.matrix(name + ".bias", 1, rows)};
    };
    const auto norm = [&](const std::string& name) {
      return Affine{tensors.matrix(name + ".weight", 1, d), tensors.matrix(name + ".bias", 1, d)};
    };
    const std::string embeddings = tower + "embeddings.";
    patch_embedding_ = tensors.matrix(embeddings + "patch_embedding.weight", d, 3 * config.patch * config.patch);
    class_embedding_ = tensors.matrix(embeddings + "class_embedding", 1, d);
    positions_ = tensors.matrix(embeddings + "position_embedding.weight", config.patches() + 1, d);
    pre_norm_ = norm(tower + "pre_layrnorm");  // sic
    for (std::size_t i = 0; i < config.blocks; ++i) {
      const std::string block = tower + "encoder.layers." + std::to_string(i) + ".", attention = block + "self_attn.";
      blocks_.push_back({norm(block + "layer_norm1"), norm(block + "layer_norm2"), affine(attention + "q_proj", d, d),
                         affine(attention + "k_proj", d, d), affine(attention + "v_proj", d, d),
                         affine(attention + "out_proj", d, d), affine(block + "mlp.fc1", config.ffn, d),
                         affine(block + "mlp.fc2", d, config.ffn)});
    }
    linear_1_ = affine("multi_modal_projector.linear_1", out, d);
    linear_2_ = affine("multi_modal_projector.linear_2", out, out);
  }

  const VisionConfig& config() const { return config_; }

  // Normalised pixels [3, side, side] -> features [L, d].
  Matrix features(const std::vector<float>& pixels) const {
    Matrix x(config_.patches() + 1, config_.width);  // [S, d]
    x.row(0) = class_embedding_;
    x.bottomRows(config_.patches()) =
        reference::linear(unfold(pixels, config_.side, config_.patch), patch_embedding_);  // [L, 3 p p] -> [L, d]
    x += positions_;
    x = normed(x, pre_norm_);
    for (const Block& block : blocks_) {
      x += attend(normed(x, block.norm_1), block);                                 // [S, d]
      const Matrix wide = config_.activation(block.fc1(normed(x, block.norm_2)));  // [S, f]
      x += block.fc2(wide);                                                        // [S, d]
    }
    return x.bottomRows(config_.patches());  // without the class token
  }

  // Features [L, d] -> visual tokens [L, D], the decoder's input embeddings.
  Matrix project(const Matrix& features) const { return linear_2_(config_.projector_activation(linear_1_(features))); }

 private:
  // A linear layer, or a layer norm's scale and shift.
  struct Affine {
    Matrix weight, bias;  // [out, in], [1, out]
    Matrix operator()(const Matrix& x) const { return reference::linear(x, weight).rowwise() + bias.row(0); }
  };
  struct Block {
    Affine norm_1, norm_2, query, key, value, output, fc1, fc2;
  };

  Matrix normed(const Matrix& x, const Affine& norm) const {
    return reference::layer_norm(x, norm.weight, norm.bias, config_.eps);
  }

  // softmax(q k^T / sqrt(c)) v, head by head; every patch sees every other.
  Matrix attend(const Matrix& x, const Block& block) const {
    const Eigen::Index c = config_.width / config_.heads;
    const Matrix query = block.query(x) / std::sqrt(static_cast<float>(c));  // [S, d]
    const Matrix key = block.key(x), value = block.value(x);                 // [S, d]
    Matrix out(x.rows(), x.cols());
    for (Eigen::Index head = 0; head < config_.heads; ++head) {
      Matrix p = query.middleCols(head * c, c) * key.middleCols(head * c, c).transpose();  // [S, S]
      reference::softmax_rows(p);
      out.middleCols(head * c, c) = p * value.middleCols(head * c, c);  // [S, c]
    }
    return block.output(out);
  }

  VisionConfig config_;
  Matrix patch_embedding_, class_embedding_, positions_;  // [d, 3 p p], [1, d], [S, d]
  Affine pre_norm_, linear_1_, linear_2_;
  std::vector<Block> blocks_;
};

}  // namespace scenes
