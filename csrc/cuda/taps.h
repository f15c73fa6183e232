// What the plans of the correlations share: host code.
#ifndef JAXCONV_CUDA_TAPS_H_
#define JAXCONV_CUDA_TAPS_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/table.h"

namespace jaxconv::cuda {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int SharedMemoryOf(const Device& d) {  // bytes that a block may have
  switch (d.compute_capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 103:
    case 110:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

// Where the taps of one axis reach: tap t serves the outputs of phase[t] from the source
// q * si + source[t].
struct Taps {
  std::vector<int> phase;
  std::vector<int64_t> source;
};

inline Taps TapsOf(const Problem& p, int axis) {
  Taps taps;
  for (int64_t t = 0; t < p.k[axis]; ++t) {
    const int64_t shift = t * p.dilation[axis] - p.pad[axis], s = p.stride[axis];
    if (p.pass == Pass::kForward) {
      // Output q * s + r takes tap t from input i where i * s + shift = q * s + r.
      taps.phase.push_back(static_cast<int>(shift - FloorDiv(shift, s) * s));
      taps.source.push_back(-FloorDiv(shift, s));
    } else {
      taps.phase.push_back(0);
      taps.source.push_back(shift);
    }
  }
  return taps;
}

// The plan of a problem, made once: plans cost more than a launch, and a layer asks for the same
// one at every call.
template <class Plan, class Make>
const Plan& Remember(const Problem& p, const Device& d, Make make) {
  using Key = std::array<int64_t, 31>;
  Key key{};
  size_t at = 0;
  const auto add = [&](int64_t v) { key.at(at++) = v; };
  for (int64_t v : {static_cast<int64_t>(p.pass), static_cast<int64_t>(p.in_dtype),
                    static_cast<int64_t>(p.out_dtype), static_cast<int64_t>(p.precision),
                    int64_t{p.channels_last}, int64_t{p.bias}, p.n, p.ci, p.co, p.groups,
                    int64_t{d.compute_capability}, int64_t{d.multiprocessors}}) {
    add(v);
  }
  for (const Sizes* sizes : {&p.isize, &p.osize, &p.k, &p.stride, &p.dilation, &p.pad}) {
    for (int64_t v : *sizes) add(v);
  }
  static std::mutex mutex;
  static std::map<Key, std::unique_ptr<const Plan>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[key];
  if (plan == nullptr) plan = std::make_unique<const Plan>(make());
  return *plan;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_TAPS_H_
