// "dense": the way of the results from the registers to the output.
#ifndef JAXCONV_CUDA_DENSE_STORE_CUH_
#define JAXCONV_CUDA_DENSE_STORE_CUH_

#include "cuda/dense_walk.cuh"

namespace jaxconv::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The 64 pixels that a group of warps multiplies at once lie in groups of eight neighbours along
// the last axis, or of eight images at a position: all of them go on along that axis, or each lies
// beyond the other along another one. A group of warps has MT of these patches, which make up its
// part of the tile.
struct DensePatch {
  int at[kAxes + 1];  // of the first pixel in the part: n, d, h, w
  __device__ DensePatch(const DenseArgs& a, int index) {
    const int part[kAxes + 1] = {a.part_n, a.axis[0].part, a.axis[1].part, a.axis[2].part};
    for (int i = kAxes; i >= 0; --i) {
      const int count = part[i] / a.patch[i];
      at[i] = index % count * a.patch[i];
      index /= count;
    }
  }
  __device__ int Place(const int (&pitch)[kAxes + 1]) const {
    return at[0] * pitch[0] + at[1] * pitch[1] + at[2] * pitch[2] + at[3] * pitch[3];
  }
};

// Blocks that share an item each add up and store some of its columns: whole stores of them, and
// whole fours of tiles.
__device__ inline bool StoresTile(const DenseArgs& a, const DenseRank& rank, int tile) {
  return tile / 4 * 32 / max(a.store_columns, 32) % a.split == rank.split;
}

// The sums of blocks that share an item, added up in the order of their ranks from the block's own
// on, so that not all read the same block's: of a block's own columns. All blocks put theirs at
// `sums` first, sixteen bytes a thread and tile.
template <int MT, int NT>
__device__ inline void AddUp(const DenseArgs& a, const DenseRank& mine, uint32_t sums,
                             float (&acc)[MT][4 * NT]) {
  constexpr int kHop = 128 * kDenseGroups * 16, kTiles = 4 / MT;
#pragma unroll
  for (int j = 0; j < NT; ++j) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      const float* v = acc[mt] + 4 * j;
      StoreShared(sums + (j * MT + mt) * kHop, make_float4(v[0], v[1], v[2], v[3]));
    }
  }
  MeetCluster();
#pragma unroll
  for (int first = 0; first < NT; first += kTiles) {
    if (!StoresTile(a, mine, first)) continue;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) acc[mt][4 * first + i] = 0;
    }
    for (int i = 0; i < a.split; ++i) {
      const int rank = mine.pair + (mine.split + i) % a.split * a.pair;
      float4 v[kTiles][MT];  // under way at once
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          v[j][mt] = LoadRemote(sums + ((first + j) * MT + mt) * kHop, rank);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          float* to = acc[mt] + 4 * (first + j);
          to[0] += v[j][mt].x;
          to[1] += v[j][mt].y;
          to[2] += v[j][mt].z;
          to[3] += v[j][mt].w;
        }
      }
    }
  }
}

// Calls body with `index` as a constant, since registers have no index: by a table of branches.
template <int kCount, class Body>
__device__ inline void WithConstant(int index, Body body) {
  static_assert(kCount <= 16);
  const auto run = [&](auto number) {
    if constexpr (kCount > decltype(number)::value) body(number);
  };
#define JAXCONV_CASE(number) \
  case number:               \
    return run(std::integral_constant<int, number>{})
#define JAXCONV_FOUR_CASES(number) \
  JAXCONV_CASE(number);            \
  JAXCONV_CASE(number + 1);        \
  JAXCONV_CASE(number + 2);        \
  JAXCONV_CASE(number + 3)
  switch (index) {
    JAXCONV_FOUR_CASES(0);
    JAXCONV_FOUR_CASES(4);
    JAXCONV_FOUR_CASES(8);
    JAXCONV_FOUR_CASES(12);
  }
#undef JAXCONV_FOUR_CASES
#undef JAXCONV_CASE
}

// A bulk copy takes a group's part of the results from one of kStores stages, in turn. Past the
// barrier all know that what left the next one has been read.
template <int kStores>
__device__ inline void SendBox(const DenseArgs& a, const CUtensorMap* map, const DenseItem& item,
                               const char* stage, int channel, int group, int thread) {
  if (thread == 0) WaitForReads<kStores - 2>();
  ProxyFence();
  SyncGroup(group);
  if (thread != 0) return;
  int q[kAxes];
#pragma unroll
  for (int i = 0; i < kAxes; ++i) {
    q[i] = item.q[i] + PartStart(a.axis[i].part, a.axis[i].box, group);
  }
  const int n = item.n + PartStart(a.part_n, a.box_n, group);
  if (a.images) {
    StoreBox(map, SharedAddress(stage), channel, n, q[2], q[1], q[0]);
  } else {
    StoreBox(map, SharedAddress(stage), channel, q[2], q[1], q[0], n);
  }
}

// Results leave by way of shared memory, `store_columns` at a time: channels last as boxes that the
// copy units write while the next tile is multiplied.
template <class T, class Out, int MT, int NT, bool kSplit>
__device__ inline void StoreDense(const DenseArgs& a, const DenseMaps& maps, const DenseRank& rank,
                                  const DenseItem& item, char* stage, const int (&place)[MT][2],
                                  int group, const float (&acc)[MT][4 * NT], int& buffer,
                                  int thread) {
  const int lane = thread % 32, quad = lane % 4;
  const int first = item.column_tile * NT * 8;
  int phase = a.program[item.program].phase, channel = item.group * a.jg + first;
  if (a.fused) {
    phase = first / a.jg;
    channel -= phase * a.jg;
  }
  const int swizzled = lane / 4 * a.store_bytes >> 3 & a.store_swizzle;
  const int columns = min(NT * 8, a.columns - first);
  // Unrolled over some tiles alone, for the sake of the instruction cache: a block runs this a few
  // times, and with the stores in every tile it waited for instructions as long as it stored.
  const auto store = [&](auto unrolled) {
    constexpr int kTiles = decltype(unrolled)::value;
#pragma unroll 1
    for (int j = 0; j * 8 < columns; j += kTiles) {
      const int at = j * 8 & (a.store_columns - 1);  // in the stage
      const bool mine = !kSplit || StoresTile(a, rank, j);
      char* to = stage + buffer * a.store_pitch;
      const auto put = [&](auto index) {
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          constexpr int kFirst = decltype(index)::value * kTiles;
          const int column = at + k * 8 + 2 * quad;
          float bias[2] = {0, 0};
          if (a.bias != nullptr) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              bias[i] = ToAccumulator(static_cast<const Out*>(a.bias)[channel + column + i]);
            }
          }
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float* v = acc[mt] + 4 * (kFirst + k) + 2 * h;
              const int bytes = column * static_cast<int>(sizeof(Out));
              struct alignas(2 * sizeof(Out)) Pair {
                Out v[2];
              };
              *reinterpret_cast<Pair*>(to + place[mt][h] + (bytes ^ swizzled)) = {
                  {FromAccumulator<Out>(v[0] + bias[0]), FromAccumulator<Out>(v[1] + bias[1])}};
            }
          }
        }
      };
      if (mine) WithConstant<NT / kTiles>(j / kTiles, put);
      if (at + kTiles * 8 < a.store_columns) continue;
      if (mine) {
        SendBox<2>(a, &maps.map[a.in_maps + (a.fused ? phase : item.program)], item, to, channel,
                   group, thread);
      }
      if (mine) buffer ^= 1;
      channel += a.store_columns;
      if (a.fused && channel == (item.group + 1) * a.jg) {
        channel -= a.jg;
        ++phase;
      }
    }
  };
  constexpr int kWide = 64 / static_cast<int>(sizeof(Out)) / 8;
  if constexpr (NT % kWide == 0) {
    if (a.store_columns >= kWide * 8) return store(std::integral_constant<int, kWide>{});
  }
  store(std::integral_constant<int, 1>{});
}

// A store without a branch, which takes longer than a store.
template <class Unit>
__device__ inline void StoreIf(bool condition, Unit* to, const Unit& v) {
  if constexpr (sizeof(Unit) == 8) {
    uint2 bits;
    memcpy(&bits, &v, 8);
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2};}" ::"l"(to),
        "r"(bits.x), "r"(bits.y), "r"(int{condition})
        : "memory");
  } else if constexpr (sizeof(Unit) == 4) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b32 [%0], %1;}" ::"l"(to),
                 "r"(bits), "r"(int{condition})
                 : "memory");
  } else {
    uint16_t bits;
    memcpy(&bits, &v, 2);
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b16 [%0], %1;}" ::"l"(to),
                 "h"(bits), "r"(int{condition})
                 : "memory");
  }
}

// So many neighbours of a row at once.
template <class Out, int kCount>
struct alignas(kCount * sizeof(Out)) Neighbours {
  Out v[kCount];
};

// Channels first: the results of eight channels, from registers to a stage of [channel][pixel],
// where both phases of the last axis are beside each other.
template <class Out, int MT, int NT, int Phases>
__device__ inline void StageRows(const DenseArgs& a, char* stage, const int (&place)[MT][2],
                                 int first, const float (&bias)[2],
                                 const float (&acc)[Phases * MT][4 * NT], int tile, int lane) {
  if constexpr (sizeof(Out) == 2 && Phases == 1) {
    // Matrices of eight pixels by eight channels, transposed: each lane gives a channel's place.
    const int row = lane % 8, matrix = lane / 8;
    const auto matrices = [&](int patch, int mine) {
      uint32_t v[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float* sums = acc[MT > 1 ? patch + m / 2 : 0] + 4 * tile + m % 2 * 2;
        const Neighbours<Out, 2> both{
            {FromAccumulator<Out>(sums[0] + bias[0]), FromAccumulator<Out>(sums[1] + bias[1])}};
        memcpy(&v[m], &both, 4);
      }
      const int bytes = ((first + row) * a.out_channel + mine - lane / 4) * 2;
      StoreTransposed(SharedAddress(stage) + (bytes ^ (bytes >> 3 & a.store_swizzle)), v);
    };
    const bool high = matrix & 1;
    if constexpr (MT == 1) {
      matrices(0, high ? place[0][1] : place[0][0]);
    } else {
      const bool next = matrix & 2;
      matrices(0, next ? high ? place[1][1] : place[1][0] : high ? place[0][1] : place[0][0]);
      if constexpr (MT == 4) {
        matrices(2, next ? high ? place[3][1] : place[3][0] : high ? place[2][1] : place[2][0]);
      }
    }
  } else {
    // Lanes' channels are whole rows of banks apart, so half of the lanes store the other eight
    // pixels first.
    const int quad = lane % 4;
    const bool turn = quad & 1;
    Out* to = reinterpret_cast<Out*>(stage) + (first + 2 * quad) * a.out_channel;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Neighbours<Out, Phases> both;
#pragma unroll
          for (int phase = 0; phase < Phases; ++phase) {
            const float* v = acc[phase * MT + mt] + 4 * tile + i;
            both.v[phase] = FromAccumulator<Out>((turn ? v[2 - 2 * h] : v[2 * h]) + bias[i]);
          }
          const int pixel = (turn ? place[mt][1 - h] : place[mt][h]) * Phases;
          *reinterpret_cast<Neighbours<Out, Phases>*>(to + i * a.out_channel + pixel) = both;
        }
      }
    }
  }
}

// Where the results of a group of warps lie in the output.
struct DensePart {
  int n, q[kAxes], channel;
  __device__ DensePart(const DenseArgs& a, const DenseItem& item, int columns, int group)
      : n(item.n + PartStart(a.part_n, a.box_n, group)),
        channel(item.group * a.jg + item.column_tile * columns) {
#pragma unroll
    for (int i = 0; i < kAxes; ++i) {
      q[i] = item.q[i] + PartStart(a.axis[i].part, a.axis[i].box, group);
    }
  }
  template <int Phases>
  __device__ int First(const DenseArgs& a, int phase, int axis) const {
    const int up = phase / a.axis[2].so;
    const int r = axis == 2   ? phase - up * a.axis[2].so
                  : axis == 1 ? up % a.axis[1].so
                              : up / a.axis[1].so;
    return q[axis] * a.axis[axis].so + r;
  }
  // Of the index-th unit of neighbours, in elements from the first pixel; -1: outside.
  template <int Phases, int kUnit>
  __device__ int Offset(const DenseArgs& a, const int (&first)[kAxes], int index) const {
    int rest = index, at[kAxes];
    const auto take = [&](int size) {
      const int mine = rest & (size - 1);
      rest >>= 31 - __clz(size);  // a power of two
      return mine;
    };
    at[2] = take(a.axis[2].part * Phases / kUnit) * kUnit;
    at[1] = take(a.axis[1].part);
    at[0] = take(a.axis[0].part);
    int offset = static_cast<int>(rest * a.out_n_step);
    bool inside = n + rest < a.n;
#pragma unroll
    for (int x = 0; x < kAxes; ++x) {
      const int step = x == 2 && Phases > 1 ? at[x] : at[x] * a.axis[x].so;
      inside = inside && first[x] + step < a.axis[x].out_size;
      offset += static_cast<int>(step * a.axis[x].out_step);
    }
    return inside ? offset : -1;
  }
};

// Channels first: the pixels of `store_columns` channels at a time leave by a bulk copy, or by
// rows, two neighbours a lane where rows are of twos.
template <class Out, int MT, int NT, int Phases>
__device__ inline void StoreRows(const DenseArgs& a, const DenseMaps& maps, const DenseItem& item,
                                 char* stages, const int (&place)[MT][2], int group,
                                 const float (&acc)[Phases * MT][4 * NT], int& buffer, int thread) {
  constexpr int kUnits = 2 * MT * Phases * 32;  // of a channel
  const int warp = thread / 32, lane = thread % 32;
  const int columns = min(NT * 8, a.columns - item.column_tile * NT * 8);
  DensePart part(a, item, NT * 8, group);
  int first[kAxes];  // output
  Out* out = static_cast<Out*>(a.out) + part.n * a.out_n_step + part.channel * a.out_c_step;
#pragma unroll
  for (int x = 0; x < kAxes; ++x) {
    first[x] = part.First<Phases>(a, a.program[item.program].phase, x);
    out += first[x] * a.axis[x].out_step;
  }
  const auto offset_of = [&](auto unit, int run) {
    return part.Offset<Phases, decltype(unit)::value>(a, first, run * 32 + lane);
  };
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::integral_constant<int, 2> two{};
  int twos[kUnits / 64];
  if (a.twos) {
#pragma unroll
    for (int i = 0; i < kUnits / 64; ++i) twos[i] = offset_of(two, i);
  }
  const auto leave = [&](auto unit, const char* stage, auto offset) {
    constexpr int kUnit = decltype(unit)::value, kRuns = kUnits / kUnit / 32;
    constexpr int kMost = kUnit == 1 ? 2 : 4;  // under way before the first is stored
    constexpr int kBatch = kRuns < kMost ? kRuns : kMost;
    using Unit = Neighbours<Out, kUnit>;
    const int units = a.axis[0].part * a.axis[1].part * a.axis[2].part * Phases / kUnit;
    const int log_units = 31 - __clz(units);  // of an image
#pragma unroll
    for (int run = 0; run < kRuns; run += kBatch) {
      int to[kBatch], from[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = (run + i) * 32 + lane;
        to[i] = offset(run + i);
        from[i] = (at >> log_units) * a.out_image + (at & (units - 1)) * kUnit;
      }
      const Out* mine = reinterpret_cast<const Out*>(stage) + warp * a.out_channel;
      Out* row = out + warp * a.out_c_step;
      constexpr int kChannels = kBatch < 4 ? 2 : 1;  // at once: a warp has two or more
#pragma unroll 1
      for (int c = warp; c < a.store_columns; c += 4 * kChannels) {
        Unit v[kChannels][kBatch];
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            v[k][i] = *reinterpret_cast<const Unit*>(mine + k * 4 * a.out_channel + from[i]);
          }
        }
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            StoreIf(to[i] >= 0, reinterpret_cast<Unit*>(row + to[i]), v[k][i]);
          }
          row += 4 * a.out_c_step;
        }
        mine += 4 * kChannels * a.out_channel;
      }
    }
  };
  const void* bias_of = a.bias;
  const auto store = [&](auto unrolled) {
    constexpr int kTiles = decltype(unrolled)::value;
#pragma unroll 1
    for (int j = 0; j * 8 < columns; j += kTiles) {
      char* stage = stages + buffer * a.store_pitch;
      const int at = j * 8 & (a.store_columns - 1);  // in the stage
      if (a.store_stages == 1 && at == 0) {          // what it had before has left
        if (a.sends && thread == 0) WaitForReads<0>();
        SyncGroup(group);
      }
      WithConstant<NT / kTiles>(j / kTiles, [&](auto index) {
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          constexpr int kFirst = decltype(index)::value * kTiles;
          float bias[2] = {0, 0};
          if (bias_of != nullptr) {
            const int mine = item.group * a.jg + item.column_tile * NT * 8 + (j + k) * 8;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              bias[i] = ToAccumulator(static_cast<const Out*>(bias_of)[mine + 2 * (lane % 4) + i]);
            }
          }
          StageRows<Out, MT, NT, Phases>(a, stage, place, at + k * 8, bias, acc, kFirst + k, lane);
        }
      });
      if (at + kTiles * 8 < a.store_columns) continue;
      if (a.sends) {
        if (thread == 0 && a.store_stages > 1) WaitForReads<0>();  // of the other stage
        ProxyFence();
        SyncGroup(group);
        if (thread == 0) {
          StoreBox(&maps.map[a.in_maps + item.program], SharedAddress(stage), part.q[2] * Phases,
                   part.q[1], part.q[0], part.channel, part.n);
        }
      } else {
        SyncGroup(group);
        if (a.twos) {
          leave(two, stage, [&](int run) { return twos[run]; });
        } else {
          leave(one, stage, [&](int run) { return offset_of(one, run); });
        }
        out += a.store_columns * a.out_c_step;
      }
      buffer ^= a.store_stages - 1;
      part.channel += a.store_columns;
    }
  };
  // Tiles of 128 sums a thread leave few registers.
  constexpr int kWide = NT % 4 == 0 && MT * Phases * NT < 32 ? 4 : 2;
  if (a.store_columns >= kWide * 8) return store(std::integral_constant<int, kWide>{});
  store(std::integral_constant<int, 1>{});
}

// Where the taps of the last axis are columns: a group's rows of 64 sources go to shared memory one
// after the other, [source][tap][channel], and an output adds up what each tap has at its source.
// A tile's outputs are those whose sources are all in it, or outside of the tensor.
template <class Out, int MT, int NT>
__device__ inline void StoreFolded(const DenseArgs& a, const DenseItem& item, float* products,
                                   int group, const float (&acc)[MT][4 * NT], int thread) {
  constexpr int kSources = 64;
  constexpr int kPitch = NT * 8 + 8;  // keeps stores of accumulators free of bank conflicts
  const int warp = thread / 32, lane = thread % 32;
  float* to = products + (warp * 16 + lane / 4) * kPitch + lane % 4 * 2;
  const DenseAxis& w = a.axis[2];
  // A thread adds up four channels of every so manieth output of a row.
  const int fours = a.fold_channels / 4, hop = 128 / fours;
  const int mine = thread / fours, four = thread - mine * fours;
  const int channel = item.group * a.jg + item.column_tile * a.fold_channels + four * 4;
  float bias[4] = {};
  if (a.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bias[i] = ToAccumulator(static_cast<const Out*>(a.bias)[channel + i]);
  }
  const int origin = item.q[2] + a.fold_lead;  // the output whose lowest source is the first
  const int begin = item.q[2] == 0 ? 0 : origin;
  const int end = item.q[2] / w.box + 1 == w.q_tiles ? w.out_size : min(origin + w.box, w.out_size);
  const int phase = a.program[item.program].phase / w.so, up = phase / a.axis[1].so;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(to + h * 8 * kPitch + j * 8) =
            make_float2(acc[mt][4 * j + 2 * h], acc[mt][4 * j + 2 * h + 1]);
      }
    }
    SyncGroup(group);
    const DensePatch patch(a, mt);
    const int n = item.n + patch.at[0] + PartStart(a.part_n, a.box_n, group);
    int o[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const DenseAxis& x = a.axis[i];
      o[i] = (item.q[i] + patch.at[i + 1] + PartStart(x.part, x.box, group)) * x.so +
             (i == 0 ? up : phase - up * a.axis[1].so);
    }
    const bool inside = n < a.n && o[0] < a.axis[0].out_size && o[1] < a.axis[1].out_size;
    Out* out = static_cast<Out*>(a.out) + n * a.out_n_step + o[0] * a.axis[0].out_step +
               o[1] * a.axis[1].out_step + channel;
    for (int q = begin + mine; inside && mine < hop && q < end; q += hop) {
      float sum[4] = {bias[0], bias[1], bias[2], bias[3]};
      int source = q - origin + a.fold_first;
      const float* from = products + source * kPitch + four * 4;
#pragma unroll 4
      for (int t = 0; t < a.fold_taps; ++t) {
        if (static_cast<unsigned>(source) < kSources) {
          const float4 v = *reinterpret_cast<const float4*>(from);
          sum[0] += v.x;
          sum[1] += v.y;
          sum[2] += v.z;
          sum[3] += v.w;
        }
        source += a.fold_step;
        from += a.fold_step * kPitch + a.fold_channels;
      }
      struct alignas(4 * sizeof(Out)) Four {
        Out v[4];
      };
      *reinterpret_cast<Four*>(out + q * w.out_step) = {
          {FromAccumulator<Out>(sum[0]), FromAccumulator<Out>(sum[1]), FromAccumulator<Out>(sum[2]),
           FromAccumulator<Out>(sum[3])}};
    }
    SyncGroup(group);
  }
}

// Groups beside each other: each has all phases as columns, and a phase's pixels have the channels
// of all groups.
template <class Out, int Sets, int NT>
__device__ inline void StoreGrouped(const DenseArgs& a, const DenseMaps& maps,
                                    const DenseItem& item, char* stages, const int (&place)[2],
                                    int group, const float (&acc)[Sets][4 * NT], int& buffer,
                                    int thread) {
  constexpr int kStores = DenseStores(DenseMode::kGrouped);
  const int lane = thread % 32, own = lane % 4 * 2, channels = a.jg / Sets;
  const int swizzled = lane / 4 * a.store_bytes >> 3 & a.store_swizzle;
  int phase = 0, first = 0;  // of a group's channels
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    char* to = stages + buffer * a.store_pitch;
#pragma unroll
    for (int set = 0; set < Sets; ++set) {
      const int channel = set * channels + first + own;
      float bias[2] = {0, 0};
      if (a.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bias[i] = ToAccumulator(static_cast<const Out*>(a.bias)[item.group * a.jg + channel + i]);
        }
      }
      const int bytes = channel * static_cast<int>(sizeof(Out)) ^ swizzled;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* v = acc[set] + 4 * j + 2 * h;
        struct alignas(2 * sizeof(Out)) Pair {
          Out v[2];
        };
        *reinterpret_cast<Pair*>(to + place[h] + bytes) = {
            {FromAccumulator<Out>(v[0] + bias[0]), FromAccumulator<Out>(v[1] + bias[1])}};
      }
    }
    first += 8;
    if (first < channels) continue;
    SendBox<kStores>(a, &maps.map[a.in_maps + phase], item, to, item.group * a.jg, group, thread);
    buffer = (buffer + 1) % kStores;
    first = 0;
    ++phase;
  }
}

#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_STORE_CUH_
