// What fragments of README.md on ggml may name.
#pragma once

#include <ggml-backend.h>

#include <fastv/ggml.hpp>

#include "context.hpp"

extern const float scale;
extern ggml_context* ctx;
extern ggml_tensor *q, *k, *x, *pos;
