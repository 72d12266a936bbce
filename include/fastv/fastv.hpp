// fastv: FastV (Chen et al., ECCV 2024, arXiv 2403.06764) for C++ inference engines. Include this.
//
// After decoder layer K, score every visual token by the attention it receives, keep the best, and run the remaining
// layers and all of decoding on the shorter sequence. See README.md.
#pragma once

#include "apply.hpp"
#include "batch.hpp"
#include "config.hpp"
#include "cost.hpp"
#include "element.hpp"
#include "error.hpp"
#include "kernel.hpp"
#include "plan.hpp"
#include "products.hpp"
#include "pruner.hpp"
#include "score.hpp"
#include "scorers.hpp"
#include "select.hpp"
#include "version.hpp"
#include "view.hpp"
