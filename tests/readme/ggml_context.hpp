// What fragments of README.md on ggml may name.
#pragma once

#include <fastv/ggml.hpp>

#include "context.hpp"
