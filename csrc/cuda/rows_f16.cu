#include "cuda/rows.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueRows<__half>(const RowsPlan&, const RowsArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
