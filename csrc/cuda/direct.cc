#include "cuda/direct.h"

#include <string>

namespace jaxconv::cuda {
namespace {

std::string TakesAll(const Problem&, const Device&) { return ""; }

int64_t NoWorkspace(const Problem&, const Device&) { return 0; }

// Multiply-adds at the rate at which the L1 caches feed them: about 8 a cycle and multiprocessor.
double Seconds(const Problem& p, const Device& device) {
  const double macs = static_cast<double>(p.n) * static_cast<double>(Product(p.isize)) *
                      static_cast<double>(p.WElements());
  return 4e-6 + macs / (8 * 1.5e9 * device.multiprocessors);
}

}  // namespace

void AddDirect(std::vector<Row>& rows) {
  const auto add = [&](Pass pass, Launch launch) {
    rows.push_back({"direct", pass, TakesAll, NoWorkspace, Seconds, launch});
  };
  add(Pass::kForward, LaunchDirectForward);
  add(Pass::kInputGrad, LaunchDirectInputGrad);
  add(Pass::kWeightGrad, LaunchDirectWeightGrad);
}

}  // namespace jaxconv::cuda
