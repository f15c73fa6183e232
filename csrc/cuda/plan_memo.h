// Plans that were made before: host code.
#ifndef JAXCONV_CUDA_PLAN_MEMO_H_
#define JAXCONV_CUDA_PLAN_MEMO_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "cuda/table.h"

namespace jaxconv::cuda {

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

#endif  // JAXCONV_CUDA_PLAN_MEMO_H_
