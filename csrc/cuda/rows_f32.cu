#include "cuda/rows.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueRows<float>(const RowsPlan&, const RowsArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
