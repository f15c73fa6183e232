// Kernels that start while the one before them in the stream still runs, from compute
// capability 9.0 on. Elsewhere they start after it.
#ifndef JAXCONV_CUDA_DEPENDENT_LAUNCH_CUH_
#define JAXCONV_CUDA_DEPENDENT_LAUNCH_CUH_

namespace jaxconv::cuda {

// The next kernel may start, where it is launched so, and waits for all writes of this one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline void LetNextStart() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void WaitForPrevious() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ inline void LetNextStart() {}
__device__ inline void WaitForPrevious() {}
#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DEPENDENT_LAUNCH_CUH_
