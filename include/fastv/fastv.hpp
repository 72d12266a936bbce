// fastv: FastV (Chen et al., ECCV 2024, arXiv 2403.06764) for C++ inference engines. Include this.
//
// After decoder layer K, score every visual token by the attention it receives, keep the best, and run the remaining
// layers and all of decoding on the shorter sequence. See README.md.
#pragma once

#include "apply.hpp"
#include "batch.hpp"
#include "batch_plan.hpp"
#include "config.hpp"
#include "cost.hpp"
#include "element.hpp"
#include "evidence.hpp"
#include "kept.hpp"
#include "pages.hpp"
#include "plan.hpp"
#include "pruner.hpp"
#include "remedies.hpp"
#include "score.hpp"
#include "select.hpp"
#include "shard.hpp"
#include "slots.hpp"
#include "status.hpp"
#include "version.hpp"
#include "view.hpp"
