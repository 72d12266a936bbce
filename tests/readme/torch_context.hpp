// What fragments of README.md on LibTorch may name.
#pragma once

#include <fastv/torch.hpp>
#include <fastv/torch_device.hpp>

#include "context.hpp"

extern const float scale;
extern at::Tensor q, k, x, pos;
