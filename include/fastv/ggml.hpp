// fastv for ggml 0.25 or newer: tensors in host memory (ggml_views.hpp), pruning as nodes of a graph (ggml_graph.hpp).
#pragma once

#include "fastv.hpp"
#include "ggml_graph.hpp"
#include "ggml_views.hpp"
