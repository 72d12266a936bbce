// Holds every architecture that fastv-llava knows to llama_decode, and prints the table of examples/llava/README.md.
// Status 1 if one of them fails.
//   architectures [NAME...]     these alone
#include <algorithm>
#include <cstdio>

#include "layers.hpp"
#include "proof.hpp"

int main(int arguments, char** values) {
  std::vector<std::string> names(values + 1, values + arguments);
  if (names.empty()) {
    names = llava::architectures();
    const std::vector<std::string> ahead_alone = llava::architectures(true);
    names.insert(names.end(), ahead_alone.begin(), ahead_alone.end());
    std::sort(names.begin(), names.end());
  }
  std::puts(
      "| architecture | layers | K can be | unpruned | pruned: prefill | 16 steps | same tokens | K = 0: prefill | 16 "
      "steps |");
  std::puts("|---|---|---|---|--:|--:|--:|--:|--:|");
  int failed = 0;
  std::size_t count = 0;
  for (const std::string& name : names) {
    try {
      const proof::Proof proof = proof::prove(name);
      const std::string verdict = proof.verdict();
      failed += verdict.empty() ? 0 : 1;
      ++count;
      std::vector<std::uint32_t> ks = proof.filtering_layers;
      ks.insert(ks.begin(), 0);
      std::printf("| %s | %s | ", name.c_str(), proof.kinds.c_str());
      if (proof.filtering_layers.empty())
        std::printf("0 | | | | |");
      else
        std::printf("%s | %s | ", llava::ranges(ks).c_str(),
                    proof.whole != 0 || proof.whole_in_pieces != 0 ? "DIFFERS"
                    : proof.whole_q8                               ? "equal, Q8_0 too"
                                                                   : "equal");
      if (proof.pruned_prefill)
        std::printf("%.0e | %.0e | %zu of 16 |", std::max(*proof.pruned_prefill, *proof.pruned_in_pieces),
                    *proof.pruned_decoding, proof.same_tokens);
      else if (!proof.filtering_layers.empty())
        std::printf("recurrent | | |");
      if (proof.ahead_prefill)
        std::printf(" %.0e | %.0e |", *proof.ahead_prefill, *proof.ahead_decoding);
      else
        std::printf(" | |");
      std::printf("%s\n", verdict.empty() ? "" : (" FAILED: " + verdict).c_str());
    } catch (const std::exception& error) {
      ++failed;
      std::printf("| %s | FAILED: %s |\n", name.c_str(), error.what());
    }
    std::fflush(stdout);
  }
  std::printf("\n%zu architectures, %d failed\n", count, failed);
  return failed == 0 ? 0 : 1;
}
