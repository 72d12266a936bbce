// One copied file, and nothing else of fastv: the front door and an adaptor.
#include <fastv.hpp>

int main() {
  Eigen::MatrixXf hidden = Eigen::MatrixXf::Random(8, 4);
  const float scores[] = {1, 3, 2, 0};
  const fastv::TokenSpan visual[] = {{2, 4}};
  fastv::Pruner<float> pruner;
  const auto kept = pruner.prune(fastv::Scores<float>{scores, 8}, visual);
  return kept && fastv::compact(kept, hidden) && hidden.rows() == 6 ? 0 : 1;
}
