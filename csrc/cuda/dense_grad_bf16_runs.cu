#include "cuda/dense_grad.cuh"

template cudaError_t
jaxconv::cuda::EnqueueDenseGrad<__nv_bfloat16, jaxconv::cuda::DenseGradFrom::kRuns>(
    const DenseGradPlan&, const DenseGradArgs&, const DenseGradMaps&, cudaStream_t);
