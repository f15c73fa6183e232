// What devices of a compute capability allow.
#ifndef JAXCONV_CUDA_DEVICE_LIMITS_H_
#define JAXCONV_CUDA_DEVICE_LIMITS_H_

#include <cstdint>

namespace jaxconv::cuda {

// The most shared memory of a block, in bytes. `compute_capability` is 10 * major + minor.
constexpr int64_t SharedMemoryOfBlock(int compute_capability) {
  switch (compute_capability) {
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

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DEVICE_LIMITS_H_
