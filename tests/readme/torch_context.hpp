// What fragments of README.md on LibTorch may name.
#pragma once

#include <fastv/torch.hpp>
#include <fastv/torch_device.hpp>

#include "prompt.hpp"

extern at::Tensor q, k, x, pos;
