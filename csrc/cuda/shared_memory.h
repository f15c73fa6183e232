// How much shared memory a launch may ask for.
#ifndef JAXCONV_CUDA_SHARED_MEMORY_H_
#define JAXCONV_CUDA_SHARED_MEMORY_H_

#include <cuda_runtime_api.h>

namespace jaxconv::cuda {

// Lets a kernel have all the shared memory that the device gives a block, beside what the kernel
// declares. Not just what one launch needs: the limit is the kernel's, and other threads may be
// about to launch it with more.
template <class Kernel>
cudaError_t AllowSharedMemory(Kernel kernel, int declared = 0) {
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, most - declared);
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_SHARED_MEMORY_H_
