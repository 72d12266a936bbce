// The rules that the program knows by name.
#pragma once

#include <fastv/config.hpp>
#include <string>

namespace llava {

// --fastv-score.
struct Rule {
  const char* name;
  bool weighs_heads;  // by the weights of a calibration
  fastv::Config config;
};

// Throws std::invalid_argument where there is none of the name.
const Rule& rule_of(const std::string& name);

// The rule's settings in a config, whose K and R stay.
void set_rule(fastv::Config& config, const Rule& rule);

// "random, uniform, ...": those that look at no attention.
std::string rules_ahead();

}  // namespace llava
