#include "cuda/direct.h"

#include <algorithm>
#include <string>

namespace jaxconv::cuda {
namespace {

std::string TakesAll(const Problem&, const Device&) { return ""; }

int64_t NoWorkspace(const Problem&, const Device&) { return 0; }

// Multiply-adds at the rate at which the L1 caches feed them, about 8 a cycle and multiprocessor,
// and addresses, which take some 30 instructions a tap of each result, and in the weight gradient
// twice that a multiply-add, of 64 a cycle. There a thread adds all pixels of one element, one
// after the other: 80 ns each.
double Seconds(const Problem& p, const Device& device) {
  const auto real = [](int64_t n) { return static_cast<double>(n); };
  const double macs = real(p.n) * real(Product(p.isize)) * real(p.WElements());
  const double taps = real(Product(p.k));
  const double addresses = p.pass == Pass::kForward     ? 30 * real(p.YElements()) * taps
                           : p.pass == Pass::kInputGrad ? 30 * real(p.XElements()) * taps
                                                        : 60 * macs;
  const double busy = (macs / 8 + addresses / 64) / (1.5e9 * device.multiprocessors);
  const double waits = p.pass == Pass::kWeightGrad ? 80e-9 * real(p.n) * real(Product(p.isize)) : 0;
  return 4e-6 + std::max(busy, waits);
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
