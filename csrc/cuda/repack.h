// "repack": channels first by way of "dense", its kin and "across" for channels last. A chunk of
// the problem (some images, or a band of rows of them) is copied to the workspace as pixels and
// computed there, and the result is copied back. A float32 weight gradient of few images, in either
// layout, takes bands of rows for images: "dense" wants as many as 16 bytes have values.
#ifndef JAXCONV_CUDA_REPACK_H_
#define JAXCONV_CUDA_REPACK_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/table.h"

namespace jaxconv::cuda {

void AddRepack(std::vector<Row>& rows);

// One tensor of a chunk: of each of `images` images `bands` bands of `count` pixels, the b-th from
// pixel first + b * step on. Pixels outside of the tensor are zeros as a source, and are dropped as
// a result.
struct RepackCopy {
  int64_t channels, plane;  // of the tensor: pixels of a channel
  int64_t first, step, count;
  int images, bands;  // of the chunk
  int valid_images;   // that the tensor has
  int element;        // bytes
  bool last;          // the tensor's channels are last
};

// The tensor at the chunk's first image: [images][channels][plane], or [images][plane][channels];
// pixels: [images][bands][count][channels], where a pixel is a multiple of 16 bytes.
cudaError_t CopyToPixels(const RepackCopy&, const void* tensor, void* pixels, cudaStream_t);
// To channels first.
cudaError_t CopyFromPixels(const RepackCopy&, const void* pixels, void* tensor, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_REPACK_H_
