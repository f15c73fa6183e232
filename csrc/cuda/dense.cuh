// Device part of "dense"; docs/gpu_kernels.md tells the whole story.
//
// A block has two groups of four warps that multiply and eight warps that fetch. A stage of the
// ring of inputs is a box of pixels by up to 128 bytes of channels, swizzled as bulk tensor copies
// leave it; wgmma reads it wherever a tap shifts it to. A step is 32 bytes of channels of one tap,
// a quad of steps is one slot of the ring of weights.
#ifndef JAXCONV_CUDA_DENSE_CUH_
#define JAXCONV_CUDA_DENSE_CUH_

#include "cuda/dense.h"
#include "cuda/dense_fetch.cuh"
#include "cuda/dense_pack.cuh"
#include "cuda/dense_store.cuh"
#include "cuda/dense_walk.cuh"
#include "cuda/shared_memory.h"

namespace jaxconv::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// kExact: the tensor cores cut off what they add to, so each quad starts from zero and is added to
// the sums in float32. kGrouped: MT is not of pixels, but of groups beside each other in a pixel,
// and each step is of one of them. kShare: neighbours fetch weights for each other. kSplit:
// besides, blocks of a cluster share each item's stages; a block has but one item, since sums take
// the place of what it fetched. kPaired: both phases of the last axis have sums of their own, which
// are multiplied in turn from the same stages.
template <class T, int MT, int NT, DenseMode kMode>
__device__ inline void MultiplyDense(const DenseArgs& a, const DenseMaps& maps,
                                     const DenseBarriers& barriers, uint32_t in, uint32_t ring,
                                     const int4* entries, char* stage, int group, int thread) {
  constexpr int kStepBytes = NT * 256, kQuadBytes = kDenseQuad * kStepBytes;
  constexpr bool kExact = kMode == DenseMode::kExact, kSplit = kMode == DenseMode::kSplit;
  constexpr bool kShare = kSplit || kMode == DenseMode::kShare;
  constexpr bool kGrouped = kMode == DenseMode::kGrouped, kPaired = kMode == DenseMode::kPaired;
  constexpr int kPatches = kGrouped ? 1 : MT, kPhases = kPaired ? 2 : 1;
  const int warp = thread / 32, lane = thread % 32;
  // Descriptors of a tap without a shift: what they have in common, and the addresses.
  const uint32_t pixel_high = PixelDescriptor(0, a.in_eights * a.row_bytes, a.row_bytes) >> 32;
  uint32_t pixel[kPatches];
  int place[kPatches][2];  // of this lane's pixels in the stage for results
#pragma unroll
  for (int mt = 0; mt < kPatches; ++mt) {
    DensePatch patch(a, mt);
    const int results = patch.Place(a.out_pitch) + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      place[mt][h] =
          (results + (warp * 2 + h) * a.out_eights) * (HasRows<kMode>(a) ? 1 : a.store_bytes);
    }
    patch.at[0] += PartStart(a.part_n, a.box_n, group);
#pragma unroll
    for (int i = 0; i < kAxes; ++i) {
      patch.at[i + 1] += PartStart(a.axis[i].part, a.axis[i].box, group);
    }
    pixel[mt] = static_cast<uint32_t>(
        PixelDescriptor(in + patch.Place(a.in_pitch) * a.row_bytes, 0, a.row_bytes));
  }
  const bool round = sizeof(T) == 4 && !HasRows<kMode>(a);
  float acc[MT * kPhases][4 * NT], sum[kExact ? MT : 1][kExact ? 4 * NT : 1];
  DenseCursor buffer, slot;
  int stage_buffer = 0;
  const DenseRank rank(a);
  const auto release_slot = [&](int i) {
    if constexpr (kShare) {
      if (lane < a.pair) ArriveRemote(barriers.RingEmpty(i), rank.neighbours + lane);
    } else {
      if (lane == 0) Arrive(barriers.RingEmpty(i));
    }
  };
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
#pragma unroll
    for (int mt = 0; mt < MT * kPhases; ++mt) {
#pragma unroll
      for (int i = 0; i < 4 * NT; ++i) {
        if constexpr (kExact) {
          sum[mt][i] = 0;
        } else {
          acc[mt][i] = 0;
        }
      }
    }
    if (a.resident) slot = {};
    int segment = program.first_segment, chunk = 0, left = 0, quads = program.quads;
    if constexpr (kSplit) {
      const DenseShare share(a, program);
      segment += share.first / a.chunks;
      chunk = share.first % a.chunks;
      quads = QuadsBefore(a, program, share.end) - QuadsBefore(a, program, share.first);
    }
    int member = 0, phase = 0;             // the next segment of a family; where sums go
    int used_slot = -1, used_buffer = -1;  // free once the products under way are done
    const int4* entry = entries;
    int4 shift{};
    const auto free = [&] {
      __syncwarp();
      if (used_slot >= 0 && !a.resident) release_slot(used_slot);
      if (used_buffer >= 0 && lane == 0) Arrive(barriers.InEmpty(used_buffer));
    };
    for (int quad = 0; quad < quads; ++quad) {
      if (left <= 0) {
        const DenseSegment& s = a.segment[segment + member];
        const bool last = chunk + 1 == a.chunks;
        left = s.taps * (last ? a.last_steps : a.full_steps);
        entry = entries + s.entries +
                (last ? (s.taps * a.full_steps + kDenseQuad - 1) / kDenseQuad : 0);
        shift = Uniform(*entry);
        const bool waits = !kPaired || member == 0;
        if constexpr (kPaired) phase = s.sums;
        if (!HasRows<kMode>(a) || ++member == a.members) {
          member = 0;
          if (++chunk == a.chunks) {
            chunk = 0;
            segment += HasRows<kMode>(a) ? a.members : 1;
          }
        }
        if (waits)
          WaitFor(round ? barriers.InRounded(buffer.at) : barriers.InFull(buffer.at),
                  buffer.parity);
      }
      WaitFor(barriers.RingFull(slot.at), slot.parity);
      const uint64_t first_weights = Descriptor(ring, 128, 256);
      const uint32_t weights_high = first_weights >> 32;
      uint32_t weights = static_cast<uint32_t>(first_weights) + slot.at * (kQuadBytes / 16);
      const auto multiply = [&](auto phase, int step, int shift, bool first = false) {
        const int add = !(kExact && first);
        const auto run = [&](float* sums, uint32_t at_shift) {
          GroupMma<T, NT>::Run(sums, uint64_t{pixel_high} << 32 | at_shift,
                               uint64_t{weights_high} << 32 | weights, add);
        };
        if constexpr (kGrouped) {
          run(acc[step % MT], pixel[0] + shift);
        } else {
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
            run(acc[decltype(phase)::value * MT + mt], pixel[mt] + shift);
          }
        }
        weights += kStepBytes / 16;
      };
      const int at = buffer.at * (a.stage_bytes / 16);
      const auto multiply_quad = [&](auto phase) {
        if (left >= kDenseQuad) {
          GroupFence();
          multiply(phase, 0, at + shift.x, true);
          multiply(phase, 1, at + shift.y);
          multiply(phase, 2, at + shift.z);
          multiply(phase, 3, at + shift.w);
        } else if constexpr (kGrouped) {
          GroupFence();  // a tap has four steps, or two
          multiply(phase, 0, at + shift.x);
          multiply(phase, 1, at + shift.y);
        } else {
          for (int k = 0; k < left; ++k) {
            GroupFence();
            multiply(phase, k, at + shift.x, k == 0);
            shift.x = shift.y;
            shift.y = shift.z;
          }
        }
        GroupCommit();
      };
      if (kPaired && phase == 1) {
        multiply_quad(std::integral_constant<int, kPhases - 1>{});
      } else {
        multiply_quad(std::integral_constant<int, 0>{});
      }
      left -= kDenseQuad;
      shift = Uniform(*++entry);
      if constexpr (!kExact) {
        WaitForProducts<1>();  // of the quad before
        free();
      }
      used_slot = slot.at;
      const bool read = left <= 0 && (!kPaired || member == 0);  // all of the stage
      used_buffer = read ? buffer.at : -1;
      if constexpr (kExact) {
        WaitForProducts<0>();
        free();
        used_slot = used_buffer = -1;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int i = 0; i < 4 * NT; ++i) {
            asm volatile("" : "+f"(acc[mt][i])::"memory");  // not before the wait
            sum[mt][i] += acc[mt][i];
          }
        }
      }
      slot.Next(a.ring);
      if (read) buffer.Next(a.buffers);
    }
    WaitForProducts<0>();
    free();
    if constexpr (kSplit) {
      SyncMultipliers();  // all products are done
      AddUp<MT, NT>(a, rank, in + (group * 128 + thread) * 16, acc);
    }
    const auto results = [&]() -> const float (&)[MT * kPhases][4 * NT] {
      if constexpr (kExact) {
        return sum;
      } else {
        return acc;
      }
    };
    const auto store = [&](auto out, auto rows) {
      if constexpr (decltype(rows)::value) {
        StoreRows<decltype(out), MT, NT, kPhases>(a, maps, item, stage, place, group, results(),
                                                  stage_buffer, thread);
      } else if constexpr (kGrouped) {
        StoreGrouped<decltype(out), MT, NT>(a, maps, item, stage, place[0], group, acc,
                                            stage_buffer, thread);
      } else if constexpr (kMode == DenseMode::kFold) {
        StoreFolded<decltype(out), MT, NT>(a, item, reinterpret_cast<float*>(stage), group, acc,
                                           thread);
      } else {
        StoreDense<T, decltype(out), MT, NT, kSplit>(a, maps, rank, item, stage, place, group,
                                                     results(), stage_buffer, thread);
      }
    };
    const auto store_as = [&](auto out) {
      if constexpr (kMode == DenseMode::kExact) {
        if (a.rows) return store(out, std::true_type{});
      }
      store(out, std::bool_constant < kMode == DenseMode::kRows || kPaired > {});
    };
    if (sizeof(T) == 4 || a.out_f32) {
      store_as(float{});
    } else {
      store_as(T{});
    }
    if constexpr (kSplit) break;
  }
  if constexpr (kShare) MeetCluster();  // none leaves while others use its barriers or sums
  if (thread == 0) WaitForStores();
}

#endif

template <class T, int MT, int NT, DenseMode kMode>
__global__ void __launch_bounds__(kDenseThreads, 1)
    Dense(const __grid_constant__ DenseMaps maps, const __grid_constant__ DenseArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  int* sources = reinterpret_cast<int*>(shared + a.smem_sources);
  int* entries = reinterpret_cast<int*>(shared + a.smem_entries);
  const DenseBarriers barriers{SharedAddress(shared)};
  const uint32_t in = SharedAddress(shared) + a.smem_in, ring = SharedAddress(shared) + a.smem_ring;
  if (thread == 0) {
    for (int i = 0; i < a.buffers; ++i) {
      InitBarrier(barriers.InFull(i), !HasRows<kMode>(a) ? 1
                                      : a.raws > 0       ? DenseTurners(a, sizeof(T))
                                                         : kDenseLoaders);
      InitBarrier(barriers.InRounded(i), kDenseRounders);
      InitBarrier(barriers.InEmpty(i), kDenseWarps);
    }
    for (int i = 0; i < a.ring; ++i) {
      InitBarrier(barriers.RingFull(i), 1);
      InitBarrier(barriers.RingEmpty(i), kDenseWarps * a.pair);
    }
    for (int i = 0; HasRows<kMode>(a) && i < a.raws; ++i) {
      InitBarrier(barriers.RawFull(i), a.boxes ? 1 : DenseCopiers(a, sizeof(T)));
      InitBarrier(barriers.RawEmpty(i), DenseTurners(a, sizeof(T)));
    }
    FenceBarriers();
    ProxyFence();
  }
  auto* rows = reinterpret_cast<DenseRawRow*>(sources);
  const bool turns = HasRows<kMode>(a) && a.raws > 0,
             matrices = turns && sizeof(T) == 2 && a.matrices;
  if (matrices) {
    for (int i = thread; i < a.raw_rows; i += kDenseThreads) rows[i] = DenseRawRow(a, i);
  } else if (HasRows<kMode>(a)) {
    const int d = a.axis[0].length, h = a.axis[1].length, w = a.axis[2].length;
    const int piece_elements = a.raw_piece * a.chunk_channels / a.row_bytes;
    for (int p = thread; p < a.pixels; p += kDenseThreads) {
      const int row = p / w, plane = row / h, n = plane / d,
                at[kAxes] = {plane % d, row % h, p % w};
      if (turns) {
        const int element = at[2] * a.axis[2].si + a.raw_lead, piece = element / a.piece_length;
        sources[p] = n * a.raw_box + at[0] * a.raw_plane + at[1] * a.raw_row +
                     piece * piece_elements + element - piece * a.piece_length;
      } else {
        sources[p] = PackCoordinates(n, at[0], at[1], at[2]);
      }
    }
  }
  for (int s = 0; s < a.segments; ++s) {
    const DenseSegment& segment = a.segment[s];
    int* to = entries + segment.entries * kDenseQuad;
    for (const int steps : {a.full_steps, a.last_steps}) {
      const int all = segment.taps * steps;
      const int padded = (all + kDenseQuad - 1) / kDenseQuad * kDenseQuad;
      for (int i = thread; i < padded; i += kDenseThreads) {
        const int tap = i / steps;
        const int step = i - tap * steps, low = step % a.terms == 1 ? a.part_bytes : 0;
        to[i] =
            i < all
                ? (a.shift[segment.first_shift + tap] * a.row_bytes + step / a.terms * 32 + low) /
                      16
                : 0;
      }
      to += padded;
    }
  }
  constexpr bool kShare = kMode == DenseMode::kShare || kMode == DenseMode::kSplit;
  constexpr bool kPaired = kMode == DenseMode::kPaired;
  if (kShare && a.pair > 1) {
    MeetCluster();  // before others use its barriers
  } else {
    __syncthreads();
  }
  const int warp = Uniform(thread / 32);
  if (warp < 8) {
    GiveRegisters<kPaired ? 64 : 72>();
    if (warp == 0) {
      if (lane == 0) FetchWeights<kShare>(a, barriers, ring, NT * 256 * kDenseQuad);
    } else if (HasRows<kMode>(a) && !turns) {
      FetchRows<T>(a, barriers, shared + a.smem_in, sources, thread - 32);
    } else if (turns) {
      const uint32_t raw = SharedAddress(shared) + a.smem_raw;
      const int copiers = DenseCopiers(a, sizeof(T)), turner = thread - 32 - copiers;
      if (turner >= 0 && matrices) {
        TurnMatrices(a, barriers, in, raw, rows, SharedAddress(shared) + a.smem_waste,
                     Uniform(turner / 32), DenseTurners(a, sizeof(T)) / 32, lane);
      } else if (turner >= 0) {
        TurnPixels<T>(a, barriers, shared + a.smem_in, shared + a.smem_raw, sources, turner,
                      DenseTurners(a, sizeof(T)));
      } else if (!a.boxes) {
        FetchWords<T>(a, barriers, raw, thread - 32, copiers);
      } else if (thread == 32) {
        FetchRaw(a, maps, barriers, raw);
      }
    } else if (warp == 1) {
      if (lane == 0) FetchBoxes(a, maps, barriers, in);
    } else if (sizeof(T) == 4) {
      RoundBoxes(a, barriers, shared + a.smem_in, thread - 64);
    }
  } else {
    TakeRegisters<kPaired ? 192 : 184>();
    const int group = warp / 4 - 2;
    MultiplyDense<T, MT, NT, kMode>(
        a, maps, barriers, in, ring, reinterpret_cast<const int4*>(entries),
        shared + a.smem_out + group * a.store_stages * a.store_pitch, group, thread % 128);
  }
#endif
}

// The main kernel may start while the weights are still packed: it waits before it fetches them.
// What it reads otherwise was there before they were. Where nothing is packed, that is not known.
template <class T, int MT, int NT, DenseMode kMode>
cudaError_t EnqueueDenseTile(const DensePlan& plan, const DenseLaunch& launch, bool packs,
                             cudaStream_t stream) {
  const auto kernel = Dense<T, MT, NT, kMode>;
  const cudaError_t status = AllowSharedMemory(kernel);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = packs;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = launch.args.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid);
  config.blockDim = dim3(kDenseThreads);
  config.dynamicSmemBytes = plan.smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = launch.args.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, launch.maps, launch.args);
}

template <class T>
cudaError_t EnqueueDense(const DensePlan& plan, const DenseLaunch& launch, bool packs,
                         cudaStream_t stream) {
  if (packs && launch.spread.steps > 0) {
    const SpreadPack& pack = launch.spread;
    PackSpread<T><<<dim3(pack.steps, launch.args.groups), kSpreadPackThreads, 0, stream>>>(pack);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  } else if (packs) {
    const DensePack& pack = launch.pack;
    // Taps in twos stay together, in memory and in what a block packs.
    const auto in = [&](int v) {
      return pack.taps % v == 0 && reinterpret_cast<uintptr_t>(pack.w) % (v * sizeof(T)) == 0;
    };
    const auto by_vectors = [&](auto v) {
      constexpr int kV = decltype(v)::value;
      const int units = pack.all_tiles * (pack.taps / kV);
      const dim3 grid((units + kPackUnits - 1) / kPackUnits, pack.channel_steps, pack.groups);
      PackTaps<T, kV><<<grid, 16 * kPackUnits, 0, stream>>>(pack);
    };
    constexpr int kMost = 16 / sizeof(T);
    if (in(kMost)) {
      by_vectors(std::integral_constant<int, kMost>{});
    } else if (in(4)) {
      by_vectors(std::integral_constant<int, 4>{});
    } else {
      const auto kernel = in(2) && pack.range % 2 == 0 ? PackDense<T, 2> : PackDense<T, 1>;
      const dim3 grid(plan.pack_grid[0], plan.pack_grid[1], plan.pack_grid[2]);
      kernel<<<grid, 32 * kDensePackWarps, 0, stream>>>(pack);
    }
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  const int tile = plan.mt * 1000 + plan.columns;
#define JAXCONV_TILE(MT, NT, kMode) \
  if (tile == MT * 1000 + NT * 8)   \
  return EnqueueDenseTile<T, MT, NT, kMode>(plan, launch, packs, stream)
  const DenseArgs& args = launch.args;
  if (args.split > 1) {
    constexpr auto kMode = DenseMode::kSplit;
    JAXCONV_TILE(2, 4, kMode);
    JAXCONV_TILE(2, 8, kMode);
    JAXCONV_TILE(1, 16, kMode);
    JAXCONV_TILE(2, 16, kMode);
  } else if (args.cluster > 1) {
    if constexpr (sizeof(T) == 4) {
      constexpr auto kMode = DenseMode::kShare;
      JAXCONV_TILE(1, 16, kMode);
      JAXCONV_TILE(2, 16, kMode);
    }
  } else if (args.terms > 1) {
    // Split operands have two sets of sums, which leaves no registers for large tiles.
    if constexpr (sizeof(T) == 4) {
      constexpr auto kMode = DenseMode::kExact;
      JAXCONV_TILE(2, 4, kMode);
      JAXCONV_TILE(2, 6, kMode);
      JAXCONV_TILE(2, 8, kMode);
      JAXCONV_TILE(1, 16, kMode);
    }
#define JAXCONV_TILES(kMode)  \
  JAXCONV_TILE(2, 4, kMode);  \
  JAXCONV_TILE(2, 6, kMode);  \
  JAXCONV_TILE(2, 8, kMode);  \
  JAXCONV_TILE(2, 12, kMode); \
  JAXCONV_TILE(1, 16, kMode); \
  JAXCONV_TILE(2, 16, kMode); \
  JAXCONV_TILE(4, 4, kMode);  \
  JAXCONV_TILE(4, 8, kMode)
  } else if (args.fold_taps > 0) {
    constexpr auto kMode = DenseMode::kFold;
    JAXCONV_TILE(2, 6, kMode);
    JAXCONV_TILE(2, 9, kMode);
    JAXCONV_TILE(2, 10, kMode);
    JAXCONV_TILE(2, 12, kMode);
    JAXCONV_TILE(2, 14, kMode);
  } else if (args.sets > 1) {
    constexpr auto kMode = DenseMode::kGrouped;
    JAXCONV_TILE(2, 4, kMode);
    JAXCONV_TILE(2, 8, kMode);
    JAXCONV_TILE(2, 12, kMode);
    JAXCONV_TILE(2, 16, kMode);
    JAXCONV_TILE(4, 4, kMode);
    JAXCONV_TILE(4, 8, kMode);
  } else if (args.paired) {
    constexpr auto kMode = DenseMode::kPaired;
    JAXCONV_TILE(2, 4, kMode);
    JAXCONV_TILE(2, 6, kMode);
    JAXCONV_TILE(2, 8, kMode);
    JAXCONV_TILE(1, 16, kMode);
  } else if (args.rows) {
    JAXCONV_TILES(DenseMode::kRows);
  } else {
    JAXCONV_TILES(DenseMode::kPlain);
  }
#undef JAXCONV_TILES
#undef JAXCONV_TILE
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_CUH_
