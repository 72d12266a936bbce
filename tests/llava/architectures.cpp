// Holds every architecture that fastv-llava knows to llama_decode, and prints the table of examples/llava/README.md.
// Status 1 if one of them fails.
//   architectures [NAME...]     these alone
#include <cstdio>

#include "layers.hpp"
#include "proof.hpp"

int main(int arguments, char** values) {
  std::vector<std::string> names(values + 1, values + arguments);
  if (names.empty()) names = llava::architectures();
  std::puts("| architecture | layers | K can be | unpruned | pruned: prefill | 16 steps | same tokens |");
  std::puts("|---|---|---|---|--:|--:|--:|");
  int failed = 0;
  std::size_t count = 0;
  for (const std::string& name : names) {
    try {
      const proof::Proof proof = proof::prove(name);
      const std::string verdict = proof.verdict();
      failed += verdict.empty() ? 0 : 1;
      ++count;
      std::printf(
          "| %s | %s | %s | %s | ", name.c_str(), proof.kinds.c_str(), llava::ranges(proof.filtering_layers).c_str(),
          proof.whole == 0 && proof.whole_in_pieces == 0 ? (proof.whole_q8 ? "equal, Q8_0 too" : "equal") : "DIFFERS");
      if (proof.pruned_prefill)
        std::printf("%.0e | %.0e | %zu of 16 |", std::max(*proof.pruned_prefill, *proof.pruned_in_pieces),
                    *proof.pruned_decoding, proof.same_tokens);
      else
        std::printf("recurrent | | |");
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
