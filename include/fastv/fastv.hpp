// fastv: FastV (Chen et al., ECCV 2024, arXiv 2403.06764) for C++ inference engines. Include this.
//
// After decoder layer K, score every visual token by the attention it receives, keep the best, and run the remaining
// layers and all of decoding on the shorter sequence. See README.md.
#pragma once

// In the order in which they include each other, so that an error's "included from" is short.
// clang-format off
#include "version.hpp"
#include "element.hpp"
#include "view.hpp"
#include "status.hpp"
#include "kept.hpp"
#include "config.hpp"
#include "plan.hpp"
#include "cost.hpp"
#include "apply.hpp"
#include "pages.hpp"
#include "evidence.hpp"
#include "features.hpp"
#include "score.hpp"
#include "logits.hpp"
#include "changes.hpp"
#include "shard.hpp"
#include "remedies.hpp"
#include "select.hpp"
#include "pruner.hpp"
#include "recipes.hpp"
#include "batch.hpp"
#include "slots.hpp"
#include "batch_plan.hpp"
// clang-format on
