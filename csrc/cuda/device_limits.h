// What devices of a compute capability allow, and what of it this library was compiled for.
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

// What the library has machine code for, and PTX, which newer devices translate.
inline constexpr int kMachineCode[] = {JAXCONV_CUDA_MACHINE_CODE}, kPtx[] = {JAXCONV_CUDA_PTX};

// The compute capability that the code which a device runs was compiled for; 0 if there is none.
constexpr int CodeFor(int compute_capability) {
  int code = 0, translated = 0;
  for (const int c : kMachineCode) {
    if (c / 10 == compute_capability / 10 && c <= compute_capability && c > code) code = c;
  }
  for (const int c : kPtx) {
    if (c <= compute_capability && c > translated) translated = c;
  }
  return code > 0 ? code : translated;
}

// Whether a device multiplies by groups of four warps: 9.0 alone, by code for 9.0a.
constexpr bool HasWgmma(int compute_capability) {
  return compute_capability == 90 && CodeFor(90) == 90;
}

// Clusters of a size that run at once, a block a multiprocessor: as H100s of 132 say.
constexpr int64_t ClustersAtOnce(int multiprocessors, int size) {
  constexpr int kOf132[] = {132, 66, 39, 30, 22, 17, 15, 15};
  return int64_t{kOf132[size - 1]} * multiprocessors / 132;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DEVICE_LIMITS_H_
