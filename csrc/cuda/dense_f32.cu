#include "cuda/dense.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueDense<float>(const DensePlan&, const DenseLaunch&, bool, cudaStream_t);

}  // namespace jaxconv::cuda
