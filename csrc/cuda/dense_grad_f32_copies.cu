#include "cuda/dense_grad.cuh"

template cudaError_t jaxconv::cuda::EnqueueDenseGrad<float, jaxconv::cuda::DenseGradFrom::kCopies>(
    const DenseGradPlan&, const DenseGradArgs&, const DenseGradMaps&, cudaStream_t);
