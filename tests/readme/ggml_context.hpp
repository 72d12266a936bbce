// What fragments of README.md on ggml may name.
#pragma once

#include <ggml-backend.h>

#include <fastv/ggml.hpp>

#include "prompt.hpp"

extern ggml_context* ctx;
extern ggml_tensor *q, *k, *x, *pos;
