// Device part of "rows"; docs/gpu_kernels.md tells the whole story.
//
// One warp asks for the rows of the next tile, a bulk copy each; eight warps multiply. Copies move
// multiples of 16 bytes, so a row keeps in shared memory the distance that it has from one in
// device memory (its turn), and what they bring from beyond the row is put to zero by the eight
// warps. A warp owns MT tiles of 16 neighbouring pixels of a row and NC columns: a column is a tile
// of eight output channels of one output phase.
#ifndef JAXCONV_CUDA_ROWS_CUH_
#define JAXCONV_CUDA_ROWS_CUH_

#include <algorithm>

#include "cuda/dtypes.cuh"
#include "cuda/mbarrier.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/rows.h"
#include "cuda/shared_memory.h"

namespace jaxconv::cuda {

// Asking for copies is slow, one lane after another. With one column a row is worth least.
template <int NC>
inline constexpr int kAskers = NC == 1 ? 4 : 2;
template <int NC>
inline constexpr int kRowsThreads = (RowsArgs::kWarps + kAskers<NC>)*32;

// Of the eight warps that multiply.
__device__ inline void MeetMultipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(RowsArgs::kWarps * 32) : "memory");
}

template <class T>
inline constexpr int kRowsStep = 32 / sizeof(T);  // channels of a step: 8 float32, 16 of 16 bits

// A channel's place in shared memory: the channels of a fragment begin in different banks.
template <class T>
__device__ inline int ChannelPlace(const RowsArgs& a, int c) {
  return c * a.plane + ((sizeof(T) == 4 ? c & 3 : c >> 1 & 3) * a.skew & 127);
}

struct RowsOrigin {
  int n, q[kAxes], first[kAxes];
  int64_t base;  // element of the input at `first`, of the group's first channel
};

__device__ inline RowsOrigin RowsOriginOf(const RowsArgs& a, int group, int tile) {
  RowsOrigin at;
  unsigned rest = tile;
  at.base = static_cast<int64_t>(group) * a.cg * a.in_c_step;
#pragma unroll
  for (int i = kAxes - 1; i >= 0; --i) {
    const unsigned tiles = a.axis[i].tiles, up = tiles == 1 ? rest : rest / tiles;
    at.q[i] = (rest - up * tiles) * a.axis[i].box;
    at.first[i] = at.q[i] * a.axis[i].si + a.axis[i].first;
    at.base += static_cast<int64_t>(at.first[i]) * a.axis[i].in_step;
    rest = up;
  }
  at.n = rest;
  at.base += at.n * a.in_n_step;
  return at;
}

// The input lies at [begin, end) of a staged row.
struct RowsWindow {
  int begin, end;
};
__device__ inline RowsWindow WindowOf(const RowsArgs& a, const RowsOrigin& at) {
  const int first = at.first[2];
  return {max(0, -first), min(a.axis[2].length, a.axis[2].in_size - first)};
}

// A staged row: elements from the block's first source, bytes in a buffer, coordinates.
struct StagedRow {
  int distance, place, d, h;
};
struct PackedRow {
  int distance;
  uint32_t at;
};
inline constexpr int kBitsH = 11, kBitsD = 7;  // beside 14 of the place, in units of 16 bytes
__device__ inline PackedRow Pack(const StagedRow& row) {
  return {row.distance, (row.place / 16u << kBitsD | row.d) << kBitsH | row.h};
}
__device__ inline StagedRow Unpack(const PackedRow& row) {
  return {row.distance, static_cast<int>(row.at >> (kBitsD + kBitsH)) * 16,
          static_cast<int>(row.at >> kBitsH & ((1u << kBitsD) - 1)),
          static_cast<int>(row.at & ((1u << kBitsH) - 1))};
}

__device__ inline bool HasRow(const RowsArgs& a, const RowsOrigin& at, const StagedRow& row) {
  return static_cast<unsigned>(at.first[0] + row.d) < static_cast<unsigned>(a.axis[0].in_size) &&
         static_cast<unsigned>(at.first[1] + row.h) < static_cast<unsigned>(a.axis[1].in_size);
}

// Asks for a tile's rows: every asking thread for its own.
template <class T>
__device__ inline void AskForRows(const RowsArgs& a, const RowsOrigin& at, const PackedRow* table,
                                  int rows, uint32_t buffer, uint32_t full, int first, int askers) {
  constexpr int kMask = 16 / sizeof(T) - 1;
  const RowsWindow window = WindowOf(a, at);
  int bytes = 0;
  for (int r = first; r < rows; r += askers) {
    const StagedRow row = Unpack(table[r]);
    if (!HasRow(a, at, row) || window.end <= window.begin) continue;
    const int64_t start = at.base + row.distance;
    const int turn = static_cast<int>(start) & kMask;
    const int64_t from = (start + window.begin) & ~int64_t{kMask};
    const int64_t to = min((start + window.end + kMask) & ~int64_t{kMask}, a.whole);
    if (to <= from) continue;
    const int length = static_cast<int>(to - from) * static_cast<int>(sizeof(T));
    const int skipped = turn + static_cast<int>(from - start);
    CopyBulk(buffer + row.place + skipped * static_cast<int>(sizeof(T)),
             static_cast<const T*>(a.in) + from, length, full);
    bytes += length;
  }
  ArriveAndExpect(full, bytes);
}

// Zeros where the input has nothing, and the elements that no multiple of 16 bytes holds.
template <class T>
__device__ inline void MendRows(const RowsArgs& a, const RowsOrigin& at, const PackedRow* table,
                                int rows, char* buffer, int tid) {
  constexpr int kMask = 16 / sizeof(T) - 1;
  const RowsWindow window = WindowOf(a, at);
  for (int r = tid; r < rows; r += RowsArgs::kWarps * 32) {
    const StagedRow row = Unpack(table[r]);
    const int64_t start = at.base + row.distance;
    if (!HasRow(a, at, row) || window.end <= window.begin) {
      for (int i = 0; i < a.pitch; i += 16) {
        *reinterpret_cast<uint4*>(buffer + row.place + i) = make_uint4(0, 0, 0, 0);
      }
      continue;
    }
    T* to = reinterpret_cast<T*>(buffer + row.place) + (static_cast<int>(start) & kMask);
    for (int i = 0; i < window.begin; ++i) to[i] = T{};
    for (int i = window.end; i < a.axis[2].length; ++i) to[i] = T{};
    if (start + window.end > a.whole) {
      for (int64_t i = max(start + window.begin, a.whole); i < start + window.end; ++i) {
        to[i - start] = static_cast<const T*>(a.in)[i];
      }
    }
  }
  ProxyFence();
  MeetMultipliers();
}

// All weights of the group, rounded, in the order of their use and of the fragments' lanes.
template <class T>
__device__ inline void KeepWeights(const RowsArgs& a, int group, char* weights, int tid,
                                   int threads) {
  const int tile_sets = a.column_sets / a.phase_sets;
  const int all = tile_sets * a.taps * a.set_tiles * a.blocks * 32;
  const T* w = static_cast<const T*>(a.w) + group * a.w_g_step;
  for (int i = tid; i < all; i += threads) {
    const int lane = i % 32;
    int rest = i / 32;
    const int block = rest % a.blocks;
    rest /= a.blocks;
    const int tile = rest % a.set_tiles;
    rest /= a.set_tiles;
    const RowsTap tap = a.tap[rest % a.taps];
    const int tile_set = rest / a.taps;
    const int j = (tile_set * a.set_tiles + tile) * 8 + lane / 4, k = lane % 4;
    const auto weight = [&](int c) {
      c += block * kRowsStep<T>;
      return j < a.jg && c < a.cg ? w[c * a.w_c_step + j * a.w_j_step + tap.tap] : T{};
    };
    uint2 pair;
    if constexpr (sizeof(T) == 4) {
      pair = make_uint2(RoundTF32(weight(k)), RoundTF32(weight(k + 4)));
    } else {
      const T v[4] = {weight(2 * k), weight(2 * k + 1), weight(2 * k + 8), weight(2 * k + 9)};
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(v);
      pair = make_uint2(bits[0] | static_cast<uint32_t>(bits[1]) << 16,
                        bits[2] | static_cast<uint32_t>(bits[3]) << 16);
    }
    const int before = (tile_set * a.taps + a.first_tap[tap.set] + tap.first) * a.set_tiles;
    const int place = before * a.blocks + block * tap.count * a.set_tiles + tile * tap.count;
    reinterpret_cast<uint2*>(weights)[(place + tap.index) * 32 + lane] = pair;
  }
}

// The pixels of a step as the tensor cores take them: two rows of pixels by two halves of channels.
// SI is the stride of the input, or 0: known when it runs.
template <class T, int MT, int SI>
__device__ inline void LoadPixels(const RowsArgs& a, uint32_t (&x)[MT][4], const char* even,
                                  const char* odd, bool lone) {
  const int rows = 8 * (SI > 0 ? SI : a.axis[2].si) * static_cast<int>(sizeof(T));
  const int half = kRowsStep<T> / 2 * a.plane;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = (2 * mt + r % 2) * rows + r / 2 * half;
      if constexpr (sizeof(T) == 4) {
        x[mt][r] = RoundTF32(*reinterpret_cast<const float*>(even + at));
      } else {
        x[mt][r] = 0;
        if (r >= 2 && lone) continue;
        x[mt][r] = *reinterpret_cast<const uint16_t*>(even + at) |
                   static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(odd + at)) << 16;
      }
    }
  }
}

template <class T>
__device__ inline float RowsBias(const RowsArgs& a, int group, int j) {
  if (j >= a.jg) return 0;
  j += group * a.jg;
  return sizeof(T) == 4 || a.out_f32 ? static_cast<const float*>(a.bias)[j]
                                     : ToAccumulator(static_cast<const T*>(a.bias)[j]);
}

// Eight channels' rows of outputs, of which the first `limit` lie inside, from the warp's stage.
template <class T, class Out>
__device__ inline void StoreStaged(const RowsArgs& a, const float* stage, Out* to, int length,
                                   int limit, int channels, int lane) {
  const int pitch = length + 4;
  if (length % 32 == 0) {
    for (int x = lane; x < min(length, limit); x += 32) {
      Out* out = to + x;
      const float* from = stage + x;
#pragma unroll
      for (int c = 0; c < 8; ++c, out += a.out_c_step, from += pitch) {
        if (c < channels) *out = FromAccumulator<Out>(*from);
      }
    }
    return;
  }
  int c = lane / length, x = lane - c * length;
  while (c < channels) {
    if (x < limit) to[c * a.out_c_step + x] = FromAccumulator<Out>(stage[c * pitch + x]);
    for (x += 32; x >= length; x -= length) ++c;
  }
}

template <class T, int MT, int NC, int SI>
__global__ void __launch_bounds__(kRowsThreads<NC>, BlocksBeside(MT, NC))
    Rows(const __grid_constant__ RowsArgs a) {
  if constexpr (!kHasBulkCopies) return;
  constexpr int kMask = 16 / sizeof(T) - 1, kThreads = kRowsThreads<NC>;
  extern __shared__ __align__(128) char smem[];
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(~0u, tid / 32, 0);  // known to be the same in all lanes
  const int group = blockIdx.y;
  const uint32_t barriers = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const auto full = [&](int b) { return barriers + b * 8; };
  const auto empty = [&](int b) { return barriers + 16 + b * 8; };
  PackedRow* table = reinterpret_cast<PackedRow*>(smem + a.smem_table);
  int4* spots = reinterpret_cast<int4*>(smem + a.smem_spots);
  char* weights = smem + a.smem_weights;
  const int rows = a.cg * a.axis[0].length * a.axis[1].length;

  if (tid == 0) {
    for (int b = 0; b < 2; ++b) {
      InitBarrier(full(b), kAskers<NC> * 32);
      InitBarrier(empty(b), RowsArgs::kWarps);
    }
    FenceBarriers();
  }
  for (int r = tid; r < rows; r += kThreads) {
    const int per_channel = a.axis[0].length * a.axis[1].length, c = r / per_channel;
    const int rest = r - c * per_channel, d = rest / a.axis[1].length;
    const int h = rest - d * a.axis[1].length;
    table[r] =
        Pack({static_cast<int>(c * a.in_c_step) + d * a.axis[0].in_step + h * a.axis[1].in_step,
              ChannelPlace<T>(a, c) + rest * a.pitch, d, h});
  }
  // Where the warps' tiles of pixels lie: place in shared memory and coordinates.
  const int workers = RowsArgs::kWarps / a.wn;
  for (int i = tid; i < workers * a.rounds; i += kThreads) {
    const int across = a.axis[2].box / (16 * MT), row = i / across;
    const int d = row / a.axis[1].box, h = row - d * a.axis[1].box,
              w = (i - row * across) * 16 * MT;
    spots[i] = make_int4((d * a.axis[0].si * a.axis[1].length + h * a.axis[1].si) * a.pitch +
                             w * a.axis[2].si * static_cast<int>(sizeof(T)),
                         d, h, w);
  }
  KeepWeights<T>(a, group, weights, tid, kThreads);
  __syncthreads();

  if (warp >= RowsArgs::kWarps) {
    int it = 0;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, ++it) {
      const int b = it & 1;
      if (it >= 2) WaitFor(empty(b), (it >> 1 & 1) ^ 1);
      const uint32_t to = barriers + a.smem_in + b * a.buffer;
      AskForRows<T>(a, RowsOriginOf(a, group, tile), table, rows, to, full(b),
                    tid - RowsArgs::kWarps * 32, kAskers<NC> * 32);
    }
    return;
  }

  const int wn = warp % a.wn, wm = warp / a.wn;
  const int channel = sizeof(T) == 4 ? lane % 4 : 2 * (lane % 4);
  const int lane_place =
      ChannelPlace<T>(a, channel) + lane / 4 * a.axis[2].si * static_cast<int>(sizeof(T));
  const bool lone = sizeof(T) == 2 && a.cg == 8;
  const int columns = a.set_phases * a.set_tiles, all = (1 << columns) - 1;
  const int so = a.axis[2].so, length = 16 * MT * so, pitch = length + 4;
  float* stage = reinterpret_cast<float*>(smem + a.smem_stage) + warp * 8 * pitch;
  int it = 0;
  for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, ++it) {
    const int b = it & 1;
    const RowsOrigin at = RowsOriginOf(a, group, tile);
    char* buffer = smem + a.smem_in + b * a.buffer;
    WaitFor(full(b), it >> 1 & 1);
    bool edge = a.ragged && at.n == a.n - 1 && group == a.groups - 1;
#pragma unroll
    for (int i = 0; i < kAxes; ++i) {
      edge = edge || at.first[i] < 0 || at.first[i] + a.axis[i].length > a.axis[i].in_size;
    }
    if (edge) MendRows<T>(a, at, table, rows, buffer, tid);
    for (int round = 0; round < a.rounds; ++round) {
      const int4 spot = spots[round * workers + wm];
      const int turn = static_cast<int>(at.base + channel * a.in_c_step) +
                       spot.y * a.axis[0].si * a.axis[0].in_step +
                       spot.z * a.axis[1].si * a.axis[1].in_step;
      const int odd_turn = turn + static_cast<int>(a.in_c_step);
      const char* pixels = buffer + lane_place + spot.x;
      for (int column_set = wn; column_set < a.column_sets + wn; column_set += a.wn) {
        const bool busy = column_set < a.column_sets;
        const bool last = column_set + a.wn >= a.column_sets + wn;
        const int tile_set = a.phase_sets == 1 ? column_set : column_set / a.phase_sets;
        const int set = column_set - tile_set * a.phase_sets;
        float acc[MT][NC][4] = {};
        if (busy) {
          const uint2* w = reinterpret_cast<const uint2*>(weights) + lane +
                           (tile_set * a.taps + a.first_tap[set]) * a.set_tiles * a.blocks * 32;
          const auto step = [&](const char* even, const char* odd, int mask) {
            uint32_t x[MT][4];
            LoadPixels<T, MT, SI>(a, x, even, odd, lone);
            const auto multiply = [&](int j, uint2 v) {
#pragma unroll
              for (int mt = 0; mt < MT; ++mt) {
                if (lone) {
                  Mma<T>::Half(acc[mt][j], x[mt][0], x[mt][1], v.x);
                } else {
                  Mma<T>::Whole(acc[mt][j], x[mt], v.x, v.y);
                }
              }
            };
            if (NC == 1 || (columns == NC && mask == all)) {
#pragma unroll
              for (int j = 0; j < NC; ++j) multiply(j, w[j * 32]);
              w += NC * 32;
            } else {
#pragma unroll
              for (int j = 0; j < NC; ++j) {
                if (mask >> j & 1) {
                  multiply(j, *w);
                  w += 32;
                }
              }
            }
          };
          const auto even_of = [&](const RowsEntry& e) {
            return pixels + e.place + ((turn + e.turn) & kMask) * int{sizeof(T)};
          };
          const auto odd_of = [&](const RowsEntry& e) {
            return pixels + e.place + a.plane + ((odd_turn + e.turn) & kMask) * int{sizeof(T)};
          };
          const int end = a.first_entry[set + 1];
          if (NC == 1 && a.blocks == 1) {
            // With so little to do a step, several are under way at once.
#pragma unroll 4
            for (int e = a.first_entry[set]; e < end; ++e) {
              step(even_of(a.entry[e]), odd_of(a.entry[e]), 1);
            }
          } else {
            for (int e = a.first_entry[set]; e < end; ++e) {
              const RowsEntry entry = a.entry[e];
              const char *even = even_of(entry), *odd = odd_of(entry);
              for (int block = 0; block < a.blocks; ++block) {
                step(even, odd, entry.columns);
                even += kRowsStep<T> * a.plane;
                odd += kRowsStep<T> * a.plane;
              }
            }
          }
        }
        if (last && round + 1 == a.rounds) {
          __syncwarp();
          if (lane == 0) Arrive(empty(b));
        }
        if (!busy) continue;
        // Phases of the last axis interleave in the warp's stage, and whole rows leave it.
        int rw0 = 0, rh0 = 0, rd0 = 0;
        if (set > 0) {
          const int first_phase = set * a.set_phases, up = first_phase / so;
          rw0 = first_phase - up * so;
          rd0 = up / a.axis[1].so;
          rh0 = up - rd0 * a.axis[1].so;
        }
        int rw = rw0, rh = rh0, rd = rd0, phases = a.set_phases, j0 = tile_set * a.set_tiles * 8;
        const auto next = [&] {
          if (--phases == 0) {
            phases = a.set_phases;
            j0 += 8;
            rw = rw0, rh = rh0, rd = rd0;
          } else if (++rw == so) {
            rw = 0;
            if (++rh == a.axis[1].so) {
              rh = 0;
              ++rd;
            }
          }
        };
        const int ow = (at.q[2] + spot.w) * so, limit = a.axis[2].out_size - ow;
#pragma unroll
        for (int j = 0; j < NC; ++j, next()) {
          if (j >= columns) break;
          const int od = (at.q[0] + spot.y) * a.axis[0].so + rd;
          const int oh = (at.q[1] + spot.z) * a.axis[1].so + rh;
          if (j0 >= a.jg || rd >= a.axis[0].so || od >= a.axis[0].out_size ||
              oh >= a.axis[1].out_size || limit <= 0) {
            continue;
          }
          const int own = 2 * (lane % 4);
          float bias[2] = {};
          if (a.bias != nullptr) {
            bias[0] = RowsBias<T>(a, group, j0 + own);
            bias[1] = RowsBias<T>(a, group, j0 + own + 1);
          }
          float* to = stage + own * pitch + lane / 4 * so + rw;
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              to[(mt * 16 + r / 2 * 8) * so + r % 2 * pitch] = acc[mt][j][r] + bias[r % 2];
            }
          }
          if (rw != so - 1) continue;
          __syncwarp();
          const int64_t offset = at.n * a.out_n_step + (group * a.jg + j0) * a.out_c_step +
                                 int64_t{od} * a.axis[0].out_step +
                                 int64_t{oh} * a.axis[1].out_step + ow;
          const int channels = min(8, a.jg - j0);
          if (sizeof(T) == 4 || a.out_f32) {
            StoreStaged<T>(a, stage, static_cast<float*>(a.out) + offset, length, limit, channels,
                           lane);
          } else {
            StoreStaged<T>(a, stage, static_cast<T*>(a.out) + offset, length, limit, channels,
                           lane);
          }
          __syncwarp();
        }
      }
    }
  }
}

template <class T, int MT, int NC, int SI>
cudaError_t EnqueueRowsTile(const RowsPlan& plan, const RowsArgs& args, cudaStream_t stream) {
  const auto kernel = Rows<T, MT, NC, SI>;
  const cudaError_t status = AllowSharedMemory(kernel);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(plan.grid_x, plan.grid_y), kRowsThreads<NC>, plan.smem, stream>>>(args);
  return cudaGetLastError();
}

template <class T, int MT, int NC>
cudaError_t EnqueueRowsStride(const RowsPlan& plan, const RowsArgs& args, cudaStream_t stream) {
  // One column and a stride of two: the input gradient of few channels. Most others have no stride.
  constexpr int kUsual = NC == 1 ? 2 : 1;
  return args.axis[2].si == kUsual ? EnqueueRowsTile<T, MT, NC, kUsual>(plan, args, stream)
                                   : EnqueueRowsTile<T, MT, NC, 0>(plan, args, stream);
}

template <class T>
cudaError_t EnqueueRows(const RowsPlan& plan, const RowsArgs& args, cudaStream_t stream) {
  if (plan.mt == 1 && plan.nc == 8) return EnqueueRowsStride<T, 1, 8>(plan, args, stream);
  if (plan.mt == 2 && plan.nc == 4) return EnqueueRowsStride<T, 2, 4>(plan, args, stream);
  if (plan.mt == 4 && plan.nc == 4) return EnqueueRowsStride<T, 4, 4>(plan, args, stream);
  if (plan.mt == 3 && plan.nc == 4) return EnqueueRowsStride<T, 3, 4>(plan, args, stream);
  if (plan.mt == 4 && plan.nc == 2) return EnqueueRowsStride<T, 4, 2>(plan, args, stream);
  if (plan.mt == 4 && plan.nc == 1) return EnqueueRowsStride<T, 4, 1>(plan, args, stream);
  if (plan.mt == 2 && plan.nc == 1) return EnqueueRowsStride<T, 2, 1>(plan, args, stream);
  if (plan.mt == 1 && plan.nc == 1) return EnqueueRowsStride<T, 1, 1>(plan, args, stream);
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_ROWS_CUH_
