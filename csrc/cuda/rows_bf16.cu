#include "cuda/rows.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueRows<__nv_bfloat16>(const RowsPlan&, const RowsArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
