// Whether a status is the refusal that a test expects.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "fastv/status.hpp"

// Its category, and words of its sentence.
inline testing::AssertionResult refused(const fastv::Status& status, fastv::Errc code, const char* words) {
  const std::string sentence = status.message().c_str();
  if (status.code == code && sentence.find(words) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "Errc " << static_cast<int>(status.code) << " (" << sentence << ")";
}
