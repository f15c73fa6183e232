// Device part of "across"; docs/gpu_kernels.md tells the whole story.
//
// A thread asks for bulk tensor copies of boxes of x and y, two groups of four warps multiply what
// has arrived. A block keeps the sums of its products over all of its boxes.
#ifndef JAXCONV_CUDA_ACROSS_CUH_
#define JAXCONV_CUDA_ACROSS_CUH_

#include "cuda/across.h"
#include "cuda/bulk_tensors.cuh"
#include "cuda/dense_walk.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/shared_memory.h"

namespace jaxconv::cuda {

inline constexpr int kAcrossMultipliers = 128 * kAcrossGroups;
inline constexpr int kAcrossThreads = kAcrossMultipliers + 128;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a block keeps, and its part of the tiles.
struct AcrossBlock {
  int chunk, part, rank, first, products;
  int begin, end;
  __device__ explicit AcrossBlock(const AcrossArgs& a) {
    rank = blockIdx.x % a.cluster;
    const int rest = blockIdx.x / a.cluster;
    chunk = rest % a.chunks;
    part = rest / a.chunks;
    const int64_t parts = int64_t{a.parts} * a.cluster, mine = part * a.cluster + rank;
    begin = static_cast<int>(a.tiles * mine / parts);
    end = static_cast<int>(a.tiles * (mine + 1) / parts);
    first = chunk * a.chunk_products;
    products = min(a.chunk_products, a.products - first);
  }
};

struct AcrossBarriers {
  uint32_t base;
  __device__ uint32_t Full(int i) const { return base + i * 8; }
  __device__ uint32_t Empty(int i) const { return base + 8 * (kAcrossStages + i); }
};

__device__ inline void CopyAcross(const AcrossArgs& a, const AcrossMaps& maps,
                                  const AcrossBlock& block, const AcrossBarriers& barriers,
                                  uint32_t stages) {
  const int first = a.first_box[block.chunk], end = a.first_box[block.chunk + 1];
  int bytes = 0;
  for (int i = first; i < end; ++i) bytes += a.box_bytes[a.boxes[i].map > 0];
  DenseCursor stage;
  for (int tile = block.begin; tile < block.end; ++tile) {
    int rest = tile;
    int at[kAxes];
#pragma unroll
    for (int i = kAxes - 1; i >= 0; --i) {
      const int up = rest / a.tiles_of[i];
      at[i] = (rest - up * a.tiles_of[i]) * a.box[i] - a.before[i];
      rest = up;
    }
    const uint32_t full = barriers.Full(stage.at), to = stages + stage.at * a.stage_bytes;
    WaitFor(barriers.Empty(stage.at), stage.parity ^ 1);
    ArriveAndExpect(full, bytes);
    for (int i = first; i < end; ++i) {
      const AcrossBox& box = a.boxes[i];
      CopyBox(to + box.offset, &maps.map[box.map], box.channel, at[2] + box.at[2],
              at[1] + box.at[1], at[0] + box.at[0], rest, full);
    }
    stage.Next(a.stages);
  }
}

template <int NT>
inline constexpr int kAcrossPitch = 8 * NT + 8;  // floats between rows of staged results

__device__ inline void MeetMultipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kAcrossMultipliers) : "memory");
}

template <class T, int NT, int P>
__device__ inline void MultiplyAcross(const AcrossArgs& a, const AcrossBlock& block,
                                      const AcrossBarriers& barriers, char* shared, int group,
                                      int thread) {
  const int slot = a.split == 1 ? group * P : 0;  // of the first product
  const int first = a.split == 1 ? 0 : group;     // step
  const uint32_t stages = SharedAddress(shared) + a.smem_stages;
  const int2* steps = reinterpret_cast<const int2*>(shared + a.smem_steps);  // of rows, columns
  // The address within the block: above it is the block's place in its cluster.
  const uint32_t at_stages = (stages & 0x3ffff) / 16;
  uint32_t rows[P], columns[P];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    // Products beyond the last repeat it; nothing is stored of them.
    const AcrossProduct& product = a.product[block.first + min(slot + p, block.products - 1)];
    rows[p] = a.rows.low + at_stages + product.rows;
    columns[p] = a.columns.low + at_stages + product.columns;
  }
  float acc[P][4 * NT];
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int i = 0; i < 4 * NT; ++i) acc[p][i] = 0;
  }
  float* kept =
      a.kept + int64_t{blockIdx.x} * (P * NT * 4 * kAcrossMultipliers) + group * 128 + thread;
  const auto each = [&](auto visit) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int i = 0; i < 4 * NT; ++i) {
        visit(acc[p][i], kept[(p * 4 * NT + i) * kAcrossMultipliers]);
      }
    }
  };
  const auto descriptor = [](uint32_t high, uint32_t low) { return uint64_t{high} << 32 | low; };
  DenseCursor stage;
  int2 next = Uniform(steps[first]);
  int used = -1, until_flush = a.flush;
  bool flushed = false;
  for (int tile = block.begin; tile < block.end; ++tile) {
    WaitFor(barriers.Full(stage.at), stage.parity);
    const uint32_t at = stage.at * (a.stage_bytes / 16);
    const auto multiply = [&](int step) {
      const int2 of = next;
      next = Uniform(steps[step + a.split < a.steps ? step + a.split : first]);
      GroupFence();
#pragma unroll
      for (int p = 0; p < P; ++p) {
        GroupMmaAcross<T, NT>::Run(acc[p], descriptor(a.rows.high, rows[p] + at + of.x),
                                   descriptor(a.columns.high, columns[p] + at + of.y));
      }
    };
    multiply(first);
    GroupCommit();
    WaitForProducts<1>();  // those of the stage before
    if (used >= 0 && thread % 32 == 0) Arrive(barriers.Empty(used));
#pragma unroll 1
    for (int step = first + a.split; step < a.steps; step += a.split) multiply(step);
    GroupCommit();
    used = stage.at;
    stage.Next(a.stages);
    if (--until_flush == 0) {
      WaitForProducts<0>();
      if (flushed) {
        each([](float& sum, float& to) { to += sum; });
      } else {
        each([](float& sum, float& to) { to = sum; });
      }
      each([](float& sum, float&) { sum = 0; });
      flushed = true;
      until_flush = a.flush;
    }
  }
  WaitForProducts<0>();
  if (flushed) each([](float& sum, float& from) { sum += from; });
  // All products are done before results take the place of what they read.
  MeetMultipliers();
  const int hop = AcrossRow(64, a.row_piece, kAcrossPitch<NT>);  // to the next product
  float* results = reinterpret_cast<float*>(shared + a.smem_stages) + slot * hop +
                   AcrossRow(thread / 32 * 16, a.row_piece, kAcrossPitch<NT>) +
                   thread % 32 / 4 * kAcrossPitch<NT> + thread % 4 * 2;
  const auto store = [&](auto put) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        float* to = results + p * hop + i * 8;
        put(to, acc[p][4 * i], acc[p][4 * i + 1]);
        put(to + 8 * kAcrossPitch<NT>, acc[p][4 * i + 2], acc[p][4 * i + 3]);
      }
    }
  };
  if (first == 0) {
    store([](float* to, float v, float w) { *reinterpret_cast<float2*>(to) = make_float2(v, w); });
  }
  if (a.split == 1) return;
  MeetMultipliers();
  if (first == 1) {
    store([](float* to, float v, float w) {
      const float2 sum = *reinterpret_cast<float2*>(to);
      *reinterpret_cast<float2*>(to) = make_float2(sum.x + v, sum.y + w);
    });
  }
}

// The block's entries, behind its staged results: lanes read different ones, which constant memory
// serves one by one.
__device__ inline AcrossEntry* EntriesOf(const AcrossArgs& a, char* shared) {
  return reinterpret_cast<AcrossEntry*>(shared + a.smem_entries);
}

// The results of a cluster of blocks, added up. Each block has some of the rows of the products,
// that is channels. A warp takes some taps and channels of the columns of a row, and writes the
// taps next to each other.
template <class Out, int NT>
__device__ inline void StoreAcross(const AcrossArgs& a, const AcrossBlock& block, char* shared) {
  const int thread = threadIdx.x, lane = thread % 32;
  const int entries = a.first_entry[block.chunk + 1] - a.first_entry[block.chunk];
  const AcrossEntry* entry_of = EntriesOf(a, shared);
  const SmallDivisor by_entries = DivisorOf(entries);
  const int mine = (a.rows.channels - block.rank + a.cluster - 1) / a.cluster;  // rows
  const int channels = a.columns.group_channels, piece = 1 << a.log_piece;
  if (a.cluster > 1) {
    const uint32_t results = SharedAddress(shared) + a.smem_stages;
    // Fours of channels of a group's columns in a piece: one more where groups begin within four.
    const int fours = min(piece / 4, (channels + 3) / 4 + (channels % 4 != 0));
    const auto place = [&](int i) -> uint32_t {
      const int up = i / fours, r = up / entries;
      const AcrossEntry& entry = entry_of[up - r * entries];
      const int row = r * a.cluster + block.rank;
      const int first = row / a.rows.group_channels * channels - entry.piece * piece;
      const int column = (max(first, 0) / 4 + i - up * fours) * 4;
      if (column >= min(first + channels, piece)) return 0;
      return results + 4 * (entry.place + row * kAcrossPitch<NT> + column);
    };
    AddUpInPlace(a.cluster, block.rank, mine * entries * fours, thread, kAcrossMultipliers, place);
    MeetMultipliers();
  }
  constexpr int kBatch = 4;  // of a lane
  const float* results = reinterpret_cast<const float*>(shared + a.smem_stages);
  const int elements = channels * entries;
  const int batches = (elements + 32 * kBatch - 1) / (32 * kBatch);
  Out* out = static_cast<Out*>(a.out) + block.part * a.w_elements;
  for (int unit = thread / 32; unit < mine * batches; unit += kAcrossMultipliers / 32) {
    const int r = unit / batches, start = (unit - r * batches) * 32 * kBatch + lane;
    const int row = r * a.cluster + block.rank, group = row / a.rows.group_channels;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = start + 32 * i, c = Divide(e, by_entries), column = group * channels + c;
      if (e >= elements) continue;
      const AcrossEntry& entry = entry_of[e - c * entries];
      if (column >> a.log_piece != entry.piece) continue;
      const int ci = a.rows_x ? row : column;
      const int co = a.rows_x ? c : row - group * a.rows.group_channels;
      const float sum = results[entry.place + row * kAcrossPitch<NT> + column % piece];
      out[(ci * a.cog + co) * a.taps + entry.tap] = FromAccumulator<Out>(sum);
    }
  }
}

#endif

template <class T, int NT, int P>
__global__ void __launch_bounds__(kAcrossThreads, 1)
    Across(const __grid_constant__ AcrossMaps maps, const __grid_constant__ AcrossArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  LetNextStart();  // SumParts
  const AcrossBlock block(a);
  const AcrossBarriers barriers{SharedAddress(shared)};
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < a.stages; ++i) {
      InitBarrier(barriers.Full(i), 1);
      InitBarrier(barriers.Empty(i), kAcrossMultipliers / 32);
    }
    FenceBarriers();
    ProxyFence();
  }
  // Where the operands of each step begin in their boxes, in units of 16 bytes.
  for (int step = thread; step < a.steps; step += kAcrossThreads) {
    const int in_row = a.box[2] / kAcrossStep, up = step / in_row;
    const int w = (step - up * in_row) * kAcrossStep, d = up / a.box[1], h = up - d * a.box[1];
    const int x = ((d * a.x_box[1] + h) * a.x_box[2] + w) * a.x_row / 16;
    const int y = ((d * a.y_box[1] + h) * a.y_box[2] + w) * a.y_row / 16;
    reinterpret_cast<int2*>(shared + a.smem_steps)[step] =
        a.rows_x ? make_int2(x, y) : make_int2(y, x);
  }
  __syncthreads();
  // None leaves the cluster while others read its results.
  if (thread >= kAcrossMultipliers) {
    GiveRegisters<40>();
    if (thread == kAcrossMultipliers) {
      CopyAcross(a, maps, block, barriers, SharedAddress(shared) + a.smem_stages);
    }
    __syncwarp();
    MeetCluster();
    MeetCluster();
    return;
  }
  TakeRegisters<232>();
  MultiplyAcross<T, NT, P>(a, block, barriers, shared, Uniform(thread / 128), thread % 128);
  const int first = a.first_entry[block.chunk], entries = a.first_entry[block.chunk + 1] - first;
  for (int i = thread; i < entries; i += kAcrossMultipliers) {
    EntriesOf(a, shared)[i] = a.entry[first + i];
  }
  MeetCluster();
  switch (static_cast<DType>(a.out_dtype)) {
    case DType::kBF16:
      StoreAcross<__nv_bfloat16, NT>(a, block, shared);
      break;
    case DType::kF16:
      StoreAcross<__half, NT>(a, block, shared);
      break;
    default:
      StoreAcross<float, NT>(a, block, shared);
  }
  MeetCluster();
#endif
}

template <class T, int NT, int P>
cudaError_t EnqueueAcrossVariant(const AcrossPlan& plan, const AcrossArgs& args,
                                 const AcrossMaps& maps, cudaStream_t stream) {
  const auto kernel = Across<T, NT, P>;
  const cudaError_t status = AllowSharedMemory(kernel);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = args.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kAcrossThreads);
  config.dynamicSmemBytes = args.smem;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, maps, args);
}

template <class T>
cudaError_t EnqueueAcross(const AcrossPlan& plan, const AcrossArgs& args, const AcrossMaps& maps,
                          cudaStream_t stream) {
#define JAXCONV_CASE(NT, P)                                          \
  if (plan.variant.tiles == NT && plan.variant.products == P) {      \
    return EnqueueAcrossVariant<T, NT, P>(plan, args, maps, stream); \
  }
  JAXCONV_ACROSS_VARIANTS(JAXCONV_CASE)
#undef JAXCONV_CASE
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_ACROSS_CUH_
