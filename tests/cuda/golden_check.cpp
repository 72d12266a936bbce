// cuda_golden_check FILE... : the kernels of fastv/cuda.cuh, run on the host, against tensors exported from the authors'
// own PyTorch code (tests/golden/README.md): kept indices, scores, and the hidden states of the layers behind. One line a
// case; exit status 1 if any case fails.
#include <cstdio>

#include "../masked_decoder.hpp"
#include "emulation.hpp"

namespace {

using namespace reference;

bool check_file(const std::string& path) {
  const Tensors tensors(path);
  const Decoder decoder(decoder_config(nlohmann::json::parse(tensors.metadata("config"))), tensors);
  const auto& shape = decoder.config().shape;
  fastv::Config config;
  config.filtering_layer = std::stoul(tensors.metadata("K"));
  config.filtering_ratio = std::stod(tensors.metadata("R"));
  const std::vector<fastv::TokenSpan> visual = {
      {std::stoul(tensors.metadata("image_start")), std::stoul(tensors.metadata("image_len"))}};

  Matrix hidden = tensors.matrix("inputs_embeds");
  const auto tokens = static_cast<std::size_t>(hidden.rows()), width = static_cast<std::size_t>(hidden.cols());
  oracle::Rng rng(tokens);
  emulation::Queue queue(rng);
  emulation::Pruner pruner;
  fastv::cuda::Limits limits;
  limits.tokens = tokens;
  limits.heads = shape.heads;
  require(pruner.reserve(limits));
  const fastv::cuda::Request request{config, visual, 0, tokens};
  require(pruner.plan(fastv::Span<const fastv::cuda::Request>(&request, 1), shape.layers, queue));

  Sequence sequence;
  std::vector<std::int64_t> positions = decoder.next_positions(hidden.rows(), sequence);
  LayerRun run;
  std::string wrong;
  float most = 0, layers_most = 0;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    decoder.run_layer(layer, hidden, positions, sequence, run);
    const Matrix layers_golden = tensors.matrix("B.hidden." + std::to_string(layer));
    if (layers_golden.rows() != hidden.rows())
      wrong += " hidden states of layer " + std::to_string(layer) + " have another shape;";
    else
      layers_most = (std::max)(layers_most, (layers_golden - hidden).cwiseAbs().maxCoeff<Eigen::PropagateNaN>());
    if (layer + 1 == config.filtering_layer) {
      using fastv::TokenMajor;
      const auto query = fastv::cuda::heads(run.query.data(), TokenMajor{tokens, shape.heads, shape.head_dim});
      const auto key =
          fastv::cuda::heads(sequence.layers[layer].keys.data(), TokenMajor{tokens, shape.kv_heads, shape.head_dim});
      require(pruner.prune(0, fastv::cuda::query_key(query, key, scale_of(decoder.config())), queue));
      const fastv::cuda::Kept kept = pruner.kept(0);
      const auto golden = tensors.integers("keep_indices");
      if (golden.size() != kept.total || !std::equal(golden.begin(), golden.end(), kept.rows)) wrong += " kept differ;";
      const Matrix scores = tensors.matrix("score");
      for (Eigen::Index i = 0; i < scores.size(); ++i)
        most = (std::max)(most, std::fabs(scores.data()[i] - kept.scores[i]));
      if (!(most <= 1e-6f)) wrong += " scores differ;";

      Matrix shorter(static_cast<Eigen::Index>(kept.total), hidden.cols());
      std::vector<std::int64_t> ids(kept.total);
      require(
          pruner.gather(0,
                        {{fastv::rows(hidden.data(), tokens, width), fastv::rows(shorter.data(), kept.total, width)},
                         {fastv::rows(positions.data(), tokens), fastv::rows(ids.data(), kept.total)}},
                        queue));
      hidden = shorter;
      positions = ids;
    }
  }
  if (!(layers_most <= 1e-4f)) wrong += " hidden states differ;";
  for (const std::string& fault : emulation::faults()) wrong += " " + fault + ";";
  std::printf("%s  %s  max difference: score %.1e hidden %.1e; equal: kept%s\n", wrong.empty() ? "pass" : "FAIL",
              path.c_str(), static_cast<double>(most), static_cast<double>(layers_most), wrong.c_str());
  return wrong.empty();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: cuda_golden_check FILE.safetensors...\n");
    return 2;
  }
  int failed = 0;
  for (int i = 1; i < argc; ++i) try {
      failed += check_file(argv[i]) ? 0 : 1;
    } catch (const std::exception& error) {
      std::printf("FAIL  %s  %s\n", argv[i], error.what());
      ++failed;
    }
  std::printf("%d of %d cases pass\n", argc - 1 - failed, argc - 1);
  return failed == 0 ? 0 : 1;
}
