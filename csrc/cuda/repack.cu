#include "cuda/repack.h"

namespace jaxconv::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kCopyThreads = 256, kCopyUnits = 4;

// What a thread needs of a RepackCopy.
struct Tiles {
  int64_t channels, plane, first, step, count;
  int bands, valid_images;
  int pixel_units;  // of 16 bytes in a pixel
};

// A warp's tile is 32 pixels by kUnits units of 16 bytes of channels. On the side of the planes a
// lane has a pixel, and neighbouring lanes neighbouring addresses; on the side of the pixels kUnits
// lanes have one pixel. In between, unit u of pixel p lies at place (p, u ^ f(p)) of shared memory,
// where f makes eight neighbours in p, or in u, use all banks.
template <int kUnits>
__device__ inline int Place(int pixel, int unit) {
  return pixel * kUnits + (unit ^ (pixel / (8 / kUnits)) % kUnits);
}

template <class E>
union Unit {
  static constexpr int kElements = 16 / sizeof(E);
  uint4 whole;
  E element[kElements];
};

struct Tile {
  int64_t planes;  // element of the tile's first pixel and channel
  int64_t pixels;  // unit of the same
  int count, units;
  int64_t place;  // of the tile's first pixel in the plane
  bool valid;
};

// Neighbouring warps have neighbouring pixels, and share sectors and pages of the planes.
template <class E, int kUnits>
__device__ inline Tile TileOf(const Tiles& t, int warp) {
  const int group = blockIdx.y, image = blockIdx.z / t.bands, band = blockIdx.z % t.bands;
  const int64_t pixel = (blockIdx.x * int64_t{kWarps} + warp) * 32;
  const int64_t channel = group * int64_t{kUnits * Unit<E>::kElements};
  Tile mine;
  mine.place = t.first + band * t.step + pixel;
  mine.planes = (image * t.channels + channel) * t.plane + mine.place;
  mine.pixels = (blockIdx.z * t.count + pixel) * t.pixel_units + group * kUnits;
  mine.count = static_cast<int>(min(t.count - pixel, int64_t{32}));
  mine.units = min(t.pixel_units - group * kUnits, kUnits);
  mine.valid = image < t.valid_images;
  return mine;
}

template <class E, int kUnits>
__global__ void __launch_bounds__(32 * kWarps)
    ToPixels(const __grid_constant__ Tiles t, const E* __restrict__ planes,
             uint4* __restrict__ pixels) {
  constexpr int kElements = Unit<E>::kElements;
  __shared__ uint4 shared[kWarps][32 * kUnits];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tile mine = TileOf<E, kUnits>(t, warp);
  const int64_t place = mine.place + lane;
  const bool inside = mine.valid && lane < mine.count && place >= 0 && place < t.plane;
  const E* from = planes + mine.planes + lane;
  constexpr int kAtOnce = kUnits * kElements > 32 ? kUnits / 2 : kUnits;  // registers
#pragma unroll
  for (int first = 0; first < kUnits; first += kAtOnce) {
    Unit<E> v[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const bool there = inside && first + u < mine.units;
        v[u].element[e] = there ? __ldcs(from + ((first + u) * kElements + e) * t.plane) : E{};
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) shared[warp][Place<kUnits>(lane, first + u)] = v[u].whole;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int pixel = i * (32 / kUnits) + lane / kUnits, unit = lane % kUnits;
    if (pixel < mine.count && unit < mine.units) {
      pixels[mine.pixels + pixel * int64_t{t.pixel_units} + unit] =
          shared[warp][Place<kUnits>(pixel, unit)];
    }
  }
}

template <class E, int kUnits>
__global__ void __launch_bounds__(32 * kWarps)
    FromPixels(const __grid_constant__ Tiles t, const uint4* __restrict__ pixels,
               E* __restrict__ planes) {
  constexpr int kElements = Unit<E>::kElements;
  __shared__ uint4 shared[kWarps][32 * kUnits];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tile mine = TileOf<E, kUnits>(t, warp);
  if (!mine.valid) return;
  uint4 v[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int pixel = i * (32 / kUnits) + lane / kUnits, unit = lane % kUnits;
    const bool there = pixel < mine.count && unit < mine.units;
    v[i] = there ? pixels[mine.pixels + pixel * int64_t{t.pixel_units} + unit] : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    shared[warp][Place<kUnits>(i * (32 / kUnits) + lane / kUnits, lane % kUnits)] = v[i];
  }
  __syncwarp();
  const int64_t place = mine.place + lane;
  if (lane >= mine.count || place < 0 || place >= t.plane) return;
  E* to = planes + mine.planes + lane;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (u >= mine.units) break;
    Unit<E> w;
    w.whole = shared[warp][Place<kUnits>(lane, u)];
#pragma unroll
    for (int e = 0; e < kElements; ++e) __stcs(to + (u * kElements + e) * t.plane, w.element[e]);
  }
}

// Channels last: pixels stay pixels.
__global__ void __launch_bounds__(kCopyThreads)
    MovePixels(const __grid_constant__ Tiles t, const uint4* __restrict__ from,
               uint4* __restrict__ to) {
  const int image = blockIdx.z / t.bands, band = blockIdx.z % t.bands;
  const int64_t size = t.count * t.pixel_units, plane = t.plane * t.pixel_units;
  const int64_t start = (t.first + band * t.step) * t.pixel_units;
  uint4 v[kCopyUnits];
#pragma unroll
  for (int i = 0; i < kCopyUnits; ++i) {
    const int64_t e = (blockIdx.x * int64_t{kCopyUnits} + i) * kCopyThreads + threadIdx.x;
    const int64_t at = start + e;
    const bool there = image < t.valid_images && e < size && at >= 0 && at < plane;
    v[i] = there ? __ldcs(from + image * plane + at) : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kCopyUnits; ++i) {
    const int64_t e = (blockIdx.x * int64_t{kCopyUnits} + i) * kCopyThreads + threadIdx.x;
    if (e < size) to[blockIdx.z * size + e] = v[i];
  }
}

Tiles TilesOf(const RepackCopy& c) {
  Tiles t{};
  t.channels = c.channels;
  t.plane = c.plane;
  t.first = c.first;
  t.step = c.step;
  t.count = c.count;
  t.bands = c.bands;
  t.valid_images = c.valid_images;
  t.pixel_units = static_cast<int>(c.channels * c.element / 16);
  return t;
}

// Calls body(E{}, units of a tile, tiles, grid) with as many units as a pixel can fill.
template <class Body>
cudaError_t WithTiles(const RepackCopy& c, Body body) {
  const Tiles t = TilesOf(c);
  const int units = t.pixel_units > 4 ? 8 : t.pixel_units > 2 ? 4 : 2;
  constexpr int kPixels = 32 * kWarps;
  const dim3 grid(static_cast<unsigned>((c.count + kPixels - 1) / kPixels),
                  static_cast<unsigned>((t.pixel_units + units - 1) / units),
                  static_cast<unsigned>(c.images * c.bands));
  const auto run = [&](auto e) {
    switch (units) {
      case 8:
        body(e, std::integral_constant<int, 8>{}, t, grid);
        break;
      case 4:
        body(e, std::integral_constant<int, 4>{}, t, grid);
        break;
      default:
        body(e, std::integral_constant<int, 2>{}, t, grid);
    }
    return cudaGetLastError();
  };
  return c.element == 4 ? run(uint32_t{}) : run(uint16_t{});
}

}  // namespace

cudaError_t CopyToPixels(const RepackCopy& c, const void* tensor, void* pixels,
                         cudaStream_t stream) {
  if (c.last) {
    const Tiles t = TilesOf(c);
    constexpr int kUnits = kCopyThreads * kCopyUnits;
    const dim3 grid(static_cast<unsigned>((t.count * t.pixel_units + kUnits - 1) / kUnits), 1,
                    static_cast<unsigned>(c.images * c.bands));
    MovePixels<<<grid, kCopyThreads, 0, stream>>>(t, static_cast<const uint4*>(tensor),
                                                  static_cast<uint4*>(pixels));
    return cudaGetLastError();
  }
  return WithTiles(c, [&](auto e, auto units, const Tiles& t, dim3 grid) {
    using E = decltype(e);
    ToPixels<E, decltype(units)::value><<<grid, 32 * kWarps, 0, stream>>>(
        t, static_cast<const E*>(tensor), static_cast<uint4*>(pixels));
  });
}

cudaError_t CopyFromPixels(const RepackCopy& c, const void* pixels, void* tensor,
                           cudaStream_t stream) {
  return WithTiles(c, [&](auto e, auto units, const Tiles& t, dim3 grid) {
    using E = decltype(e);
    FromPixels<E, decltype(units)::value><<<grid, 32 * kWarps, 0, stream>>>(
        t, static_cast<const uint4*>(pixels), static_cast<E*>(tensor));
  });
}

}  // namespace jaxconv::cuda
