#include "cuda/dense.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueDense<__half>(const DensePlan&, const DenseLaunch&, bool, cudaStream_t);

}  // namespace jaxconv::cuda
