// The sizes of a decoder, as a Hugging Face config.json states them.
#pragma once

#include <fastv/cost.hpp>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace reference {

// The whole number `field` of a JSON object. nlohmann's own conversion takes 1e99 too, which is undefined.
inline std::int64_t whole_number(const nlohmann::json& json, const char* field) {
  const nlohmann::json& value = json.at(field);
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() >> 63 != 0))
    throw std::runtime_error(std::string(field) + " is " + value.dump() + " but must be a whole number");
  return value.get<std::int64_t>();
}

struct DecoderConfig {
  fastv::ModelShape shape;
  float rms_norm_eps = 1e-6f;
  float rope_theta = 10000;
};

// The fields of a Hugging Face config.json (of its text_config, in a LLaVA).
inline DecoderConfig decoder_config(const nlohmann::json& json) {
  const auto positive = [&](const char* field) {
    const std::int64_t value = whole_number(json, field);
    if (value <= 0 || value > (1 << 24))
      throw std::runtime_error(std::string("config: ") + field + " is " + std::to_string(value) +
                               ", which is no size of a decoder");
    return static_cast<std::size_t>(value);
  };
  const auto optional = [&](const char* field, std::size_t otherwise) {
    return json.contains(field) && !json[field].is_null() ? positive(field) : otherwise;
  };
  DecoderConfig config;
  fastv::ModelShape& s = config.shape;
  s = {positive("num_hidden_layers"),
       positive("hidden_size"),
       positive("num_attention_heads"),
       0,
       0,
       positive("intermediate_size"),
       3,
       positive("vocab_size")};
  s.kv_heads = optional("num_key_value_heads", s.heads);
  s.head_dim = optional("head_dim", s.hidden / s.heads);
  if (s.heads % s.kv_heads != 0 || s.head_dim == 0 || s.head_dim % 2 != 0)
    throw std::runtime_error("config: " + std::to_string(s.heads) + " heads of dimension " +
                             std::to_string(s.head_dim) + " with " + std::to_string(s.kv_heads) +
                             " KV heads: heads must be a multiple of KV heads, and the dimension even");
  if (json.value("hidden_act", "silu") != "silu")
    throw std::runtime_error("config: hidden_act is " + json["hidden_act"].dump() + " but only \"silu\" is known");
  if (json.contains("rope_scaling") && !json["rope_scaling"].is_null())
    throw std::runtime_error("config: rope_scaling is set but not supported");
  config.rms_norm_eps = json.value("rms_norm_eps", 1e-6f);
  config.rope_theta = json.value("rope_theta", 10000.0f);
  return config;
}

}  // namespace reference
