// Weights of several groups as those of one, with zeros between them.
#ifndef JAXCONV_CUDA_BLOCK_DIAGONAL_H_
#define JAXCONV_CUDA_BLOCK_DIAGONAL_H_

#include <cuda_runtime_api.h>

#include "problem.h"

namespace jaxconv::cuda {

// The same problem with `merged` neighbouring groups as one, for which w has to be expanded.
Problem MergeGroups(Problem, int merged);

// w [ci, cog, k] to [ci, merged * cog, k].
cudaError_t ExpandWeights(const Problem&, int merged, const void* w, void* expanded, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_BLOCK_DIAGONAL_H_
