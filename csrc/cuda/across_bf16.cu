#include "cuda/across.cuh"

template cudaError_t jaxconv::cuda::EnqueueAcross<__nv_bfloat16>(const AcrossPlan&,
                                                                 const AcrossArgs&,
                                                                 const AcrossMaps&, cudaStream_t);
