#include "cuda/across.cuh"

template cudaError_t jaxconv::cuda::EnqueueAcross<__half>(const AcrossPlan&, const AcrossArgs&,
                                                          const AcrossMaps&, cudaStream_t);
