// "direct": the definition, one thread an element (a block an element of dw). Takes every problem;
// float32 products are exact whatever the precision asked for.
#ifndef JAXCONV_CUDA_DIRECT_H_
#define JAXCONV_CUDA_DIRECT_H_

#include <vector>

#include "cuda/table.h"

namespace jaxconv::cuda {

void AddDirect(std::vector<Row>& rows);

cudaError_t LaunchDirectForward(const Problem&, const Operands&, const Device&, cudaStream_t);
cudaError_t LaunchDirectInputGrad(const Problem&, const Operands&, const Device&, cudaStream_t);
cudaError_t LaunchDirectWeightGrad(const Problem&, const Operands&, const Device&, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DIRECT_H_
