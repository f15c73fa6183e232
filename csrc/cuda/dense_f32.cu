#include "cuda/dense.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueDense<float>(const DensePlan&, const DensePack&, const DenseArgs&,
                                         const DenseMaps&, cudaStream_t);

}  // namespace jaxconv::cuda
