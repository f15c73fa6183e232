// The sum of the parts of a weight gradient, in a fixed order.
#ifndef JAXCONV_CUDA_SUM_PARTS_CUH_
#define JAXCONV_CUDA_SUM_PARTS_CUH_

#include <cuda_runtime.h>

#include "problem.h"

namespace jaxconv::cuda {

// out[e] = the sum over p of from[p, e], added in double.
cudaError_t SumParts(const float* from, int parts, int64_t count, DType out_dtype, void* out,
                     cudaStream_t stream);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_SUM_PARTS_CUH_
