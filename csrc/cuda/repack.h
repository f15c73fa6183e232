// "repack": channels first by way of the kernels for channels last. A chunk of the problem (some
// images, or a band of rows of one) is copied to the workspace as pixels, computed there, and the
// result is copied back. Chunks are so small that the copies stay in the L2 cache: device memory
// sees each tensor once, as it would without them.
#ifndef JAXCONV_CUDA_REPACK_H_
#define JAXCONV_CUDA_REPACK_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/table.h"

namespace jaxconv::cuda {

void AddRepack(std::vector<Row>& rows);

// One tensor of a chunk: `count` pixels of each of `images` images, from pixel `first` on.
// Pixels outside of the tensor are zeros as a source, and are dropped as a result.
struct RepackCopy {
  int64_t channels, plane;  // of the tensor: pixels of a channel
  int64_t first, count;
  int images;        // of the chunk
  int valid_images;  // that the tensor has
  int element;       // bytes
};

// planes: [images][channels][plane] at the chunk's first image; pixels: [images][count][channels],
// where a pixel is a multiple of 16 bytes.
cudaError_t CopyToPixels(const RepackCopy&, const void* planes, void* pixels, cudaStream_t);
cudaError_t CopyFromPixels(const RepackCopy&, const void* pixels, void* planes, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_REPACK_H_
