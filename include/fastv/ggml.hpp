// fastv for ggml 0.25 or newer: tensors in host memory (ggml_views.hpp), its scores and its pruning as
// nodes of a graph (ggml_scores.hpp, ggml_graph.hpp).
#pragma once

#include "fastv.hpp"
#include "ggml_graph.hpp"
#include "ggml_scores.hpp"
#include "ggml_views.hpp"
