// The CUDA kernel table: host code only, so that the choice can be made and tested with no GPU.
#ifndef JAXCONV_CUDA_TABLE_H_
#define JAXCONV_CUDA_TABLE_H_

#include <cuda_runtime_api.h>

#include <vector>

#include "kernel_table.h"
#include "problem.h"

namespace jaxconv::cuda {

struct Device {
  int compute_capability;  // 10 * major + minor
  int multiprocessors;
};

// Enqueues the kernel and returns the launch's status: no allocation, no synchronisation.
using Launch = cudaError_t (*)(const Problem&, const Operands&, const Device&, cudaStream_t);
using Row = Kernel<Device, Launch>;

const std::vector<Row>& Table();

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_TABLE_H_
