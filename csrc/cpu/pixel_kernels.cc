// The "pixels" kernels, compiled once for each instruction set. See pixel_plan.h for what they
// compute and phase_plan.h for why nothing here may be shared with other files.
#include <type_traits>

#include "cpu/pixel_plan.h"
#include "cpu/vec.h"

namespace jaxconv::cpu {
namespace {

// Sums in registers: kPositions times as many vectors.
#if JAXCONV_REGISTERS == 32
constexpr int kPositions = 8, kMaxVectors = 3;
#else
constexpr int kPositions = 4, kMaxVectors = 2;
#endif

// Calls body with a constant of the value of `n`, from 1 to `most`.
template <int most, class Body>
JAXCONV_INLINE void WithConstant(int64_t n, Body body) {
  if constexpr (most > 1) {
    if (n < most) return WithConstant<most - 1>(n, body);
  }
  body(std::integral_constant<int, most>{});
}

// ---------------------------------------------------------------------------------------------
// The weight

// Squares of taps x destination channels, transposed: taps are contiguous in the weight, channels
// in the packed one.
template <class T>
void PackWeight(const PixelPlan& p, const T* weight, T* packed, int64_t task, int64_t tasks) {
  constexpr int64_t kRun = 8, lanes = kLanes<T>;
  const int64_t runs = (p.k + kRun - 1) / kRun, units = p.groups * p.nblocks * runs;
  const T* end = weight + p.groups * p.wg;
  for (int64_t u = units * task / tasks; u < units * (task + 1) / tasks; ++u) {
    const int64_t run = u % runs, block = u / runs % p.nblocks, g = u / runs / p.nblocks;
    const T* w = weight + g * p.wg + block * p.mr * p.wm;
    T* to = packed + g * p.nblocks * p.mr * p.k * p.ntaps;
    for (int64_t k = run * kRun; k < Min(p.k, (run + 1) * kRun); ++k) {
      for (int64_t m = 0; m < p.mr; m += lanes) {
        const int64_t channels = Min(lanes, p.m - block * p.mr - m);
        for (int64_t t = 0; t < p.ntaps; t += lanes) {
          const int64_t some = Min(lanes, p.ntaps - t);
          Vec<T> v[lanes];
          for (int64_t l = 0; l < lanes; ++l) {
            const T* from = w + k * p.wk + (m + l) * p.wm + t;
            __builtin_prefetch(from + p.wk);  // on other pages, which nothing foresees
            v[l] = l >= channels         ? Vec<T>{}
                   : from + lanes <= end ? Load<T>(from)
                                         : LoadMasked<T>(from, MaskOf<T>(0, some));
          }
          Transpose<T>(v);
          for (int64_t l = 0; l < some; ++l) {
            const PixelTap& at = p.taps[t + l];
            T* block_at = to + (at.first * p.nblocks + block * at.count) * p.k * p.mr;
            Store<T>(block_at + (at.index * p.k + k) * p.mr + m, v[l]);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Forward and input gradient

// What some positions hear by one tap: pixels of the source, or zeros. Where all are neighbours in
// a row, only the first is listed, and the second is null.
template <class T>
struct Heard {
  int64_t tap;  // of its phase
  const T* from[kPositions];
};

// The pixels that are heard, from a channel on; neighbours are `pitch` elements apart.
template <class T>
JAXCONV_INLINE void PixelsOf(const Heard<T>& heard, int64_t pitch, int64_t channel,
                             const T** from) {
  if (heard.from[1] == nullptr) {
    from[0] = heard.from[0] + channel;
#pragma GCC unroll 8
    for (int i = 1; i < kPositions; ++i) from[i] = from[i - 1] + pitch;
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kPositions; ++i) from[i] = heard.from[i] + channel;
  }
}

// sums[position][m] (+)= sum over taps and channels of source[position][channel] * weight[m]. The
// sums stay in registers.
template <class T, int nv>
__attribute__((noinline)) void Multiply(const Heard<T>* heard, int64_t count, int64_t pitch,
                                        const T* weight, int64_t channels, int64_t offset, T* sums,
                                        bool add) {
  constexpr int lanes = kLanes<T>, mr = nv * lanes;
  Vec<T> acc[kPositions][nv];
#pragma GCC unroll 8
  for (int i = 0; i < kPositions; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) {
      acc[i][v] = add ? Load<T>(sums + i * mr + v * lanes) : Vec<T>{};
    }
  }
  for (const Heard<T>* end = heard + count; heard != end; ++heard) {
    const T* from[kPositions];
    PixelsOf(*heard, pitch, offset, from);
    const T* w = weight + heard->tap * channels * mr;
    int64_t k = 0;
    if constexpr (nv == 1) {
      // Sums of their own for odd channels: with one vector they are too few to keep the
      // multipliers busy.
      Vec<T> odd[kPositions] = {};
      for (; k + 2 <= channels; k += 2) {
        const Vec<T> w0 = Load<T>(w), w1 = Load<T>(w + mr);
#pragma GCC unroll 8
        for (int i = 0; i < kPositions; ++i) {
          acc[i][0] += Broadcast(from[i][k]) * w0;
          odd[i] += Broadcast(from[i][k + 1]) * w1;
        }
        w += 2 * mr;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kPositions; ++i) acc[i][0] += odd[i];
    }
    for (; k < channels; ++k) {
      Vec<T> wv[nv];
#pragma GCC unroll 4
      for (int v = 0; v < nv; ++v) wv[v] = Load<T>(w + v * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kPositions; ++i) {
        const Vec<T> x = Broadcast(from[i][k]);
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) acc[i][v] += x * wv[v];
      }
      w += mr;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPositions; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) Store<T>(sums + i * mr + v * lanes, acc[i][v]);
  }
}

// Depthwise: the sum over taps of source[position][m] * weight[m], plus the bias, for the first
// `positions` of a block; these go to the destination at once.
template <class T, int nv>
__attribute__((noinline)) void MultiplyLanes(const Heard<T>* heard, int64_t count, int64_t pitch,
                                             const T* weight, int64_t tap_size, int64_t offset,
                                             const T* bias, T* dst, const int64_t* to,
                                             int64_t positions) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[kPositions][nv];
#pragma GCC unroll 4
  for (int v = 0; v < nv; ++v) {
    const Vec<T> b = bias == nullptr ? Vec<T>{} : Load<T>(bias + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kPositions; ++i) acc[i][v] = b;
  }
  for (const Heard<T>* end = heard + count; heard != end; ++heard) {
    const T* from[kPositions];
    PixelsOf(*heard, pitch, offset, from);
    const T* w = weight + heard->tap * tap_size;
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) {
      const Vec<T> wv = Load<T>(w + v * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kPositions; ++i) acc[i][v] += Load<T>(from[i] + v * lanes) * wv;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPositions; ++i) {
    if (i >= positions) break;
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) Store<T>(dst + to[i] + v * lanes, acc[i][v]);
  }
}

constexpr int64_t kNear = 128;  // channels of a pixel that are asked for ahead

// Far enough outside for every tap.
constexpr int64_t kNowhere = -(int64_t{1} << 60);

// The positions of a tile that a phase has, in blocks of kPositions, and what each block hears.
template <class T>
struct PixelTile {
  const PixelPlan& p;
  const T* src;    // the image
  const T* zeros;  // a pixel of them
  // A task's memory.
  int64_t (*at)[3];  // of a position: the source's coordinates but for a tap's offset
  int64_t* to;       // and its pixel of the destination
  int64_t* first;    // of a block: where it begins in `heard`
  Heard<T>* heard;

  const AxisTap* taps[3];
  int64_t ntaps[3], newest[3];
  int64_t near, near_end;  // the channels that are asked for ahead
  int64_t positions, blocks;

  void Begin(const int64_t* phase, int64_t q_begin, int64_t q_end) {
    for (int a = 0; a < 3; ++a) {
      taps[a] = p.axis_taps[a] + p.phase_begin[a][phase[a]];
      ntaps[a] = p.phase_begin[a][phase[a] + 1] - p.phase_begin[a][phase[a]];
      newest[a] = 0;
      for (int64_t t = 0; t < ntaps[a]; ++t) {
        newest[a] = t == 0 ? taps[a][t].e : Max(newest[a], taps[a][t].e);
      }
      newest[a] -= p.src_step[a] - 1;
    }
    positions = 0;
    int64_t q[3] = {q_begin / p.grid[2] / p.grid[1], q_begin / p.grid[2] % p.grid[1],
                    q_begin % p.grid[2]};
    for (int64_t i = q_begin; i < q_end; ++i) {
      int64_t o[3];
      bool has = true;
      for (int a = 0; a < 3; ++a) {
        o[a] = q[a] * p.dst_step[a] + phase[a];
        has = has && o[a] < p.dst_size[a];
      }
      if (has) {
        for (int a = 0; a < 3; ++a) at[positions][a] = q[a] * p.src_step[a];
        to[positions++] = o[0] * p.dst_s[0] + o[1] * p.dst_s[1] + o[2] * p.dst_s[2];
      }
      if (++q[2] == p.grid[2]) {
        q[2] = 0;
        if (++q[1] == p.grid[1]) q[1] = 0, ++q[0];
      }
    }
    blocks = (positions + kPositions - 1) / kPositions;
    for (int64_t i = positions; i < blocks * kPositions; ++i) {
      at[i][0] = at[i][1] = at[i][2] = kNowhere;
    }
    first[0] = 0;
  }

  // Asks for the channels that a block writes, which takes as long as to read them.
  void AskToWrite(int64_t block, const T* dst, int64_t m0, int64_t m1) const {
    for (int64_t i = block * kPositions; i < Min((block + 1) * kPositions, positions); ++i) {
      for (int64_t m = m0; m < m1; m += kLine<T>) AskFor(dst + to[i] + m);
    }
  }

  // Asks for a pixel's channels. What a block hears for the first time is up to 512 lines with 64
  // channels and 4 x 4 x 4 taps, as many as the first-level cache has.
  void AskToRead(const T* pixel) const {
    for (int64_t k = near; k < near_end; k += kLine<T>) AskFor(pixel + k);
  }

  // Lists what a block hears; blocks come in order. The processor does not foresee where rows of
  // the source begin: rows and columns from `newest` on are heard for the first time, and their
  // channels are asked for now, as far as they are few.
  void List(int64_t block) {
    const int64_t (*const q)[3] = at + block * kPositions;
    int64_t entries = first[block];
    // Neighbours in a row hear neighbours in a row.
    const int64_t last = q[0][2] + (kPositions - 1) * p.src_step[2];
    const bool in_row = q[0][0] == q[kPositions - 1][0] && q[0][1] == q[kPositions - 1][1] &&
                        q[kPositions - 1][2] == last;
    const int64_t pitch = p.src_step[2] * p.src_s[2];
    int64_t index = 0;
    for (int64_t t0 = 0; t0 < ntaps[0]; ++t0) {
      for (int64_t t1 = 0; t1 < ntaps[1]; ++t1) {
        const T* rows[kPositions];
        bool any = false;
        for (int i = 0; i < kPositions; ++i) {
          if (in_row && i > 0) {
            rows[i] = rows[0];
            continue;
          }
          const int64_t i0 = q[i][0] + taps[0][t0].e, i1 = q[i][1] + taps[1][t1].e;
          const bool in = i0 >= 0 && i0 < p.src_size[0] && i1 >= 0 && i1 < p.src_size[1];
          rows[i] = in ? src + i0 * p.src_s[0] + i1 * p.src_s[1] : nullptr;
          any |= in;
        }
        if (!any) {
          index += ntaps[2];
          continue;
        }
        const bool ask = taps[1][t1].e >= newest[1];
        for (int64_t t2 = 0; t2 < ntaps[2]; ++t2, ++index) {
          Heard<T>& h = heard[entries];
          h.tap = index;
          const int64_t e = taps[2][t2].e;
          if (in_row && q[0][2] + e >= 0 && last + e < p.src_size[2]) {
            const T* from = rows[0] + (q[0][2] + e) * p.src_s[2];
            h.from[0] = from;
            h.from[1] = nullptr;
            ++entries;
            if (!ask || e < newest[2]) continue;
            for (int i = 0; i < kPositions; ++i, from += pitch) AskToRead(from);
            continue;
          }
          bool some = false;
          for (int i = 0; i < kPositions; ++i) {
            const int64_t i2 = q[i][2] + e;
            const bool in = rows[i] != nullptr && i2 >= 0 && i2 < p.src_size[2];
            h.from[i] = in ? rows[i] + i2 * p.src_s[2] : zeros;
            some |= in;
          }
          if (!some) continue;
          ++entries;
          if (!ask || e < newest[2]) continue;
          for (int i = 0; i < kPositions; ++i) AskToRead(h.from[i]);
        }
      }
    }
    first[block + 1] = entries;
  }
};

template <class T>
void CorrelateOf(const PixelPlan& p, const PixelOperands& ops, int64_t task, void* memory) {
  constexpr int lanes = kLanes<T>;
  const int64_t split_m = task % p.block_splits, split_r = task / p.block_splits % p.phase_splits;
  const int64_t tile_index = task / p.block_splits / p.phase_splits % p.tiles;
  const int64_t n = task / p.block_splits / p.phase_splits / p.tiles;
  const int64_t q_begin = tile_index * p.tile,
                q_end = Min(q_begin + p.tile, p.grid[0] * p.grid[1] * p.grid[2]);

  auto* zeros = static_cast<T*>(memory);
  T* sums = zeros + p.zeros;
  auto* at = reinterpret_cast<int64_t (*)[3]>(sums + p.tile * p.mr);
  int64_t* to = at[p.tile];
  int64_t* first = to + p.tile;
  int64_t* next = first + p.tile / kPositions + 1;  // where a block stands in `heard`
  auto* heard = reinterpret_cast<Heard<T>*>(next + p.tile / kPositions);
  for (int64_t i = 0; i < p.zeros; i += lanes) Store<T>(zeros + i, Vec<T>{});

  const T* src = static_cast<const T*>(ops.src) + n * p.src_n;
  PixelTile<T> tile{p, src, zeros, at, to, first, heard, {}, {}, {}, 0, 0, 0, 0};
  const int64_t units = p.groups * p.nblocks;
  const int64_t u_begin = units * split_m / p.block_splits,
                u_end = units * (split_m + 1) / p.block_splits;
  const int64_t pitch = p.src_step[2] * p.src_s[2];
  T* dst = static_cast<T*>(ops.dst) + n * p.dst_n;
  tile.near = p.depthwise != 0 ? u_begin * p.mr : 0;
  tile.near_end = p.depthwise != 0 ? u_end * p.mr : Min(p.zeros, kNear);
  for (int64_t r = p.phases * split_r / p.phase_splits;
       r < p.phases * (split_r + 1) / p.phase_splits; ++r) {
    const int64_t phase[3] = {r / p.dst_step[2] / p.dst_step[1], r / p.dst_step[2] % p.dst_step[1],
                              r % p.dst_step[2]};
    tile.Begin(phase, q_begin, q_end);
    const int64_t positions = tile.positions, blocks = tile.blocks;
    if (blocks == 0) continue;
    tile.List(0);

    const int64_t phase_taps = tile.ntaps[0] * tile.ntaps[1] * tile.ntaps[2];
    const T* phase_weight = static_cast<const T*>(ops.weight) + p.phase_first[r] * p.nblocks * p.mr;
    // Depthwise, all channels of some pixels before the next ones.
    for (int64_t b = 0; b < (p.depthwise != 0 ? blocks : 0); ++b) {
      if (b + 1 < blocks) {
        tile.List(b + 1);
        tile.AskToWrite(b + 1, dst, tile.near, tile.near_end);
      }
      for (int64_t u = u_begin; u < u_end; ++u) {
        WithConstant<kMaxVectors>(p.mr / lanes, [&](auto constant) {
          const T* bias = static_cast<const T*>(ops.other);
          MultiplyLanes<T, decltype(constant)::value>(
              heard + first[b], first[b + 1] - first[b], pitch,
              phase_weight + u * phase_taps * p.mr, p.mr, u * p.mr,
              bias == nullptr ? nullptr : bias + u * p.mr, dst + u * p.mr, to + b * kPositions,
              positions - b * kPositions);
        });
      }
    }
    if (p.depthwise != 0) continue;
    for (int64_t u = u_begin; u < u_end; ++u) {
      const int64_t g = u / p.nblocks, block = u % p.nblocks, m0 = g * p.m + block * p.mr;
      const T* weight =
          static_cast<const T*>(ops.weight) +
          (g * p.ntaps * p.nblocks + p.phase_first[r] * p.nblocks + block * phase_taps) * p.k *
              p.mr;
      for (int64_t t = 0; t == 0 || t < phase_taps; t += p.tap_chunk) {
        for (int64_t b = 0; b < blocks; ++b) {
          // One block ahead, so that what it asks for comes while this one is multiplied.
          if (u == u_begin && t == 0 && b + 1 < blocks) tile.List(b + 1);
          if (t == 0) {
            next[b] = first[b];
            tile.AskToWrite(b, dst, m0, Min(m0 + p.mr, (g + 1) * p.m));
          }
          int64_t end = next[b];
          while (end < first[b + 1] && heard[end].tap < t + p.tap_chunk) ++end;
          WithConstant<kMaxVectors>(p.mr / lanes, [&](auto constant) {
            constexpr int nv = decltype(constant)::value;
            Multiply<T, nv>(heard + next[b], end - next[b], pitch, weight, p.k, g * p.k,
                            sums + b * kPositions * p.mr, t > 0);
          });
          next[b] = end;
        }
      }
      WithElement<T>(p.out_type, [&](auto element) {
        using E = decltype(element);
        const E* bias = static_cast<const E*>(ops.other);
        E* pixels = static_cast<E*>(ops.dst) + n * p.dst_n + m0;
        for (int64_t v = 0; v * lanes < Min(p.mr, p.m - block * p.mr); ++v) {
          const int64_t channels = p.m - block * p.mr - v * lanes;
          const Vec<T> b =
              bias == nullptr ? Vec<T>{} : LoadSome<T>(bias + m0 + v * lanes, channels);
          for (int64_t i = 0; i < positions; ++i) {
            StoreSome<T>(pixels + to[i] + v * lanes, Load<T>(sums + i * p.mr + v * lanes) + b,
                         channels);
          }
        }
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Weight gradient

// Neighbours in a row: elements of the operand whose values are broadcast, and of the one whose
// vectors they meet, and how many positions.
struct Run {
  int64_t b, v, count;
};

// Which values meet a vector: neighbours, those at listed distances, or a vector's own lanes.
enum class Values { kNeighbours, kListed, kDepthwise };

// The two operands, what lies between positions of a run, and the last vector's lanes.
template <class T>
struct Joined {
  const T *b, *v;
  int64_t b_step, v_step;
  uint32_t mask;
};

// sums[i][j] += sum over positions of b[i] * v[j], for mr values and nv vectors.
template <class T, int mr, int nv, Values values>
__attribute__((noinline)) void Outer(const Run* runs, int64_t count, const Joined<T>& joined,
                                     const int64_t* listed, T* sums, int64_t pitch) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[mr][nv];
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) acc[i][v] = Load<T>(sums + i * pitch + v * lanes);
  }
  int64_t at[mr];
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i) at[i] = values == Values::kListed ? listed[i] : i;
  const uint32_t mask = joined.mask;
  const int64_t b_step = joined.b_step, v_step = joined.v_step;
  const auto add = [&](auto is_whole) {
    for (const Run* end = runs + count; runs != end; ++runs) {
      const T* bs = joined.b + runs->b;
      const T* vs = joined.v + runs->v;
      for (int64_t q = runs->count; q > 0; --q) {
        Vec<T> vv[nv];
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) {
          vv[v] = decltype(is_whole)::value || v + 1 < nv ? Load<T>(vs + v * lanes)
                                                          : LoadMasked<T>(vs + v * lanes, mask);
        }
        if constexpr (values == Values::kDepthwise) {
#pragma GCC unroll 4
          for (int v = 0; v < nv; ++v) acc[0][v] += Load<T>(bs + v * lanes) * vv[v];
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < mr; ++i) {
            const Vec<T> bv = Broadcast(bs[values == Values::kListed ? at[i] : i]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; ++v) acc[i][v] += bv * vv[v];
          }
        }
        bs += b_step;
        vs += v_step;
      }
    }
  };
  if (mask == MaskOf<T>(0, lanes)) {
    add(std::true_type{});
  } else {
    add(std::false_type{});
  }
#pragma GCC unroll 16
  for (int i = 0; i < mr; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) Store<T>(sums + i * pitch + v * lanes, acc[i][v]);
  }
}

// The same for `rows` values and `width` elements in vectors.
template <class T, Values values>
void AddProducts(const Run* runs, int64_t count, Joined<T> joined, const int64_t* listed,
                 int64_t rows, int64_t width, T* sums, int64_t pitch) {
  constexpr int lanes = kLanes<T>;
  const Joined<T> all = joined;
  for (int64_t j = 0, nv; j < width; j += nv * lanes) {
    const int64_t left = (width - j + lanes - 1) / lanes;
    nv = left == 4 ? 2 : Min(left, kMaxVectors);  // one vector alone is slow
    joined.v = all.v + j;
    joined.mask = MaskOf<T>(0, width - j - (nv - 1) * lanes);
    if (all.mask == MaskOf<T>(0, lanes)) joined.mask = all.mask;
    WithConstant<kMaxVectors>(nv, [&](auto constant) {
      constexpr int kVectors = decltype(constant)::value;
      int64_t i = 0;
      const auto run = [&](auto kernel, int64_t mr) {
        for (; i + mr <= rows; i += mr) {
          joined.b = all.b + (values == Values::kNeighbours  ? i
                              : values == Values::kDepthwise ? j
                                                             : 0);
          kernel(runs, count, joined, values == Values::kListed ? listed + i : nullptr,
                 sums + i * pitch + j, pitch);
        }
      };
      if constexpr (values == Values::kDepthwise) {
        run(Outer<T, 1, kVectors, values>, 1);
      } else {
        if constexpr (kPositions == 8 && kVectors == 1) run(Outer<T, 16, 1, values>, 16);
        if constexpr (kPositions == 8) run(Outer<T, 8, kVectors, values>, 8);
        run(Outer<T, 4, kVectors, values>, 4);
        run(Outer<T, 2, kVectors, values>, 2);
        run(Outer<T, 1, kVectors, values>, 1);
      }
    });
  }
}

// A box of pixels with some of their channels, as PackBox copies it: rows of `phases` times
// `columns` pixels, of `pitch` elements each. Column c of the box is pixel c / phases of phase
// c mod phases. Row (a, b) is the operand's row (origin[0] + a * step[0], origin[1] + b * step[1]),
// if there is one.
struct Panel {
  int64_t origin[3], count[3], step[3];
  int64_t channels, pitch, phases, columns;

  int64_t row() const { return phases * columns * pitch; }
  int64_t At(int64_t a, int64_t b, int64_t c) const {
    return (a * count[1] + b) * row() + (c % phases * columns + c / phases) * pitch;
  }
};

// Where an operand's pixels lie.
struct Operand {
  int64_t c, s[3], size[3];
};

// Channels last, whole pixels of a row: elements [begin, end) of `count`, zeros around them. The
// row that comes next, `ahead` elements on, is asked for.
template <class T>
void CopyRow(const T* from, int64_t begin, int64_t end, int64_t count, T* to, int64_t ahead) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    const uint32_t mask = MaskOf<T>(begin - i, end - i);
    AskFor(from + i + ahead);
    const Vec<T> v =
        i >= begin && i + lanes <= end ? Load<T>(from + i) : LoadMasked<T>(from + i, mask);
    StoreSome<T>(to + i, v, count - i);
  }
}

// Copies a box of pixels, channels last, zeros where the operand has no element. The row that comes
// next is asked for.
template <class T>
void PackBox(const Operand& at, const T* from, const Panel& panel, T* to) {
  constexpr int lanes = kLanes<T>;
  const int64_t pitch = panel.pitch, columns = panel.count[2], o2 = panel.origin[2];
  // The columns that the operand has.
  const int64_t begin = Min(Max(-o2, 0), columns), end = Max(Min(at.size[2] - o2, columns), begin);
  for (int64_t a = 0; a < panel.count[0]; ++a) {
    for (int64_t b = 0; b < panel.count[1]; ++b) {
      T* row = to + (a * panel.count[1] + b) * panel.row();
      const int64_t o0 = panel.origin[0] + a * panel.step[0];
      const int64_t o1 = panel.origin[1] + b * panel.step[1];
      if (o0 < 0 || o0 >= at.size[0] || o1 < 0 || o1 >= at.size[1]) {
        for (int64_t i = 0; i < panel.row(); i += lanes) {
          StoreSome<T>(row + i, Vec<T>{}, panel.row() - i);
        }
        continue;
      }
      const T* src = from + o0 * at.s[0] + o1 * at.s[1] + o2 * at.s[2];
      const int64_t ahead = panel.step[1] * at.s[1];
      if (panel.phases == 1 && pitch == panel.channels && at.s[2] == pitch) {
        CopyRow<T>(src, begin * pitch, end * pitch, columns * pitch, row, ahead);
        continue;
      }
      for (int64_t k = 0; k < panel.channels; k += lanes) {
        const int64_t some = Min(lanes, panel.channels - k), stored = Min(lanes, pitch - k);
        int64_t phase = 0, pixel = 0;
        const auto store = [&](Vec<T> v) {
          StoreSome<T>(row + (phase * panel.columns + pixel) * pitch + k, v, stored);
          if (++phase == panel.phases) phase = 0, ++pixel;
        };
        if (at.c == 1) {
          for (int64_t c = 0; c < columns; ++c) {
            AskFor(src + c * at.s[2] + k + ahead);
            store(c < begin || c >= end ? Vec<T>{} : LoadSome<T>(src + c * at.s[2] + k, some));
          }
          continue;
        }
        for (int64_t c = 0; c < columns; c += lanes) {
          Vec<T> v[lanes];
          const T* square = src + k * at.c + c;
          // Rows of channels; where there is one alone, the processor foresees what comes.
          for (int64_t l = 0; l < (panel.count[1] > 1 ? some : 0); ++l) {
            AskFor(square + l * at.c + ahead);
          }
          if (some == lanes && c >= begin && c + lanes <= end) {
#pragma GCC unroll 16
            for (int l = 0; l < lanes; ++l) v[l] = Load<T>(square + l * at.c);
          } else {
            const uint32_t mask = MaskOf<T>(begin - c, end - c);
            for (int64_t l = 0; l < lanes; ++l) {
              v[l] = l < some ? LoadMasked<T>(square + l * at.c, mask) : Vec<T>{};
            }
          }
          Transpose<T>(v);
#pragma GCC unroll 16
          for (int l = 0; l < lanes; ++l) {
            if (l < columns - c) store(v[l]);
          }
        }
      }
    }
  }
}

// A task of the weight gradient: a group's channels [x0, x0 + x_count) and [y0, y0 + y_count), and
// a part of all units.
template <class T>
struct GradTask {
  const PixelPlan& p;
  const T *x, *y;  // at the first channel
  int64_t x_count, y_count, begin, end;
  T* sums;
  int64_t pitch;
  void* memory;  // for panels and lists

  // Operands as they lie, channels last: units are pieces of rows of x. Outer's runs leave out what
  // a tap does not join.
  void JoinRows() const {
    auto* runs = static_cast<Run*>(memory);
    const int64_t row_pieces = (p.dst_size[2] + p.columns - 1) / p.columns;
    const int64_t image_pieces = p.dst_size[0] * p.dst_size[1] * row_pieces;
    for (int64_t first = begin; first < end; first += p.pieces) {
      for (int64_t t = 0; t < p.ntaps; ++t) {
        const AxisTap& t0 = p.axis_taps[0][t / p.kernel[2] / p.kernel[1]];
        const AxisTap& t1 = p.axis_taps[1][t / p.kernel[2] % p.kernel[1]];
        const AxisTap& t2 = p.axis_taps[2][t % p.kernel[2]];
        const Valid valid = ValidOf(t2.e, p.src_step[2], p.src_size[2], p.dst_size[2]);
        int64_t count = 0;
        for (int64_t piece = first; piece < Min(first + p.pieces, end); ++piece) {
          const int64_t n = piece / image_pieces, row = piece % image_pieces / row_pieces;
          const int64_t q0 = row / p.dst_size[1], q1 = row % p.dst_size[1];
          const int64_t o0 = q0 * p.src_step[0] + t0.e, o1 = q1 * p.src_step[1] + t1.e;
          const int64_t column = piece % row_pieces * p.columns;
          const int64_t q2 = Max(column, valid.begin), q2_end = Min(column + p.columns, valid.end);
          if (o0 < 0 || o0 >= p.src_size[0] || o1 < 0 || o1 >= p.src_size[1] || q2 >= q2_end) {
            continue;
          }
          runs[count++] = {n * p.dst_n + q0 * p.dst_s[0] + q1 * p.dst_s[1] + q2 * p.dst_s[2],
                           n * p.src_n + o0 * p.src_s[0] + o1 * p.src_s[1] +
                               (q2 * p.src_step[2] + t2.e) * p.src_s[2],
                           q2_end - q2};
        }
        if (count == 0) continue;
        const Joined<T> joined{x, y, p.dst_s[2], p.src_step[2] * p.src_s[2], 0};
        if (p.depthwise != 0) {
          AddProducts<T, Values::kDepthwise>(runs, count, joined, nullptr, 1, y_count,
                                             sums + t * pitch, pitch);
        } else {
          AddProducts<T, Values::kNeighbours>(runs, count, joined, nullptr, x_count, y_count,
                                              sums + t * x_count * pitch, pitch);
        }
      }
    }
  }

  // Copies: units are boxes of x, and every tap joins every position, some with zeros. Values of x
  // meet vectors of y, or, where y's channels are few, values of y vectors of x: a tap's channels,
  // or, if there is one alone, several taps.
  void JoinBoxes() const {
    const bool swapped = p.swapped != 0;
    T* y_panel = static_cast<T*>(memory);
    T* x_panel = y_panel + p.y_panel;
    auto* at = reinterpret_cast<int64_t*>(x_panel + p.x_panel);  // where a tap begins to hear
    auto* runs = reinterpret_cast<Run*>(at + p.ntaps);
    const Operand x_at{p.dst_c,
                       {p.dst_s[0], p.dst_s[1], p.dst_s[2]},
                       {p.dst_size[0], p.dst_size[1], p.dst_size[2]}};
    const Operand y_at{p.src_c,
                       {p.src_s[0], p.src_s[1], p.src_s[2]},
                       {p.src_size[0], p.src_size[1], p.src_size[2]}};
    for (int64_t unit = begin; unit < end; ++unit) {
      Panel xs{}, ys{};
      int64_t index = unit;
      for (int a = 2; a >= 0; --a) {
        xs.origin[a] = index % p.boxes[a] * p.box[a];
        xs.count[a] = Min(p.box[a], p.dst_size[a] - xs.origin[a]);
        index /= p.boxes[a];
        const int64_t first = p.axis_taps[a][0].e, last = p.axis_taps[a][p.kernel[a] - 1].e;
        xs.step[a] = 1;
        ys.step[a] = p.y_step[a];
        ys.origin[a] = xs.origin[a] * p.src_step[a] + first;
        ys.count[a] = ((xs.count[a] - 1) * p.src_step[a] + last - first) / p.y_step[a] + 1;
      }
      xs.channels = x_count;
      xs.pitch = p.x_pitch;
      xs.phases = 1;
      xs.columns = xs.count[2];
      ys.channels = y_count;
      ys.pitch = p.y_pitch;
      ys.phases = swapped ? 1 : p.src_step[2];
      ys.columns = (ys.count[2] + ys.phases - 1) / ys.phases;
      PackBox<T>(y_at, y + index * p.src_n, ys, y_panel);
      if (p.x_panel > 0) PackBox<T>(x_at, x + index * p.dst_n, xs, x_panel);

      int64_t count = 0;
      for (int64_t a = 0; a < xs.count[0]; ++a) {
        for (int64_t b = 0; b < xs.count[1]; ++b) {
          const int64_t x_row = p.x_panel > 0 ? xs.At(a, b, 0)
                                              : index * p.dst_n + (xs.origin[0] + a) * p.dst_s[0] +
                                                    (xs.origin[1] + b) * p.dst_s[1] +
                                                    xs.origin[2] * p.dst_s[2];
          const int64_t y_row =
              ys.At(a * p.src_step[0] / p.y_step[0], b * p.src_step[1] / p.y_step[1], 0);
          runs[count++] = swapped ? Run{y_row, x_row, xs.count[2]} : Run{x_row, y_row, xs.count[2]};
        }
      }
      for (int64_t t = 0; t < p.ntaps; ++t) {
        const int64_t t0 = t / p.kernel[2] / p.kernel[1], t1 = t / p.kernel[2] % p.kernel[1];
        const auto offset = [&](int a, int64_t tap) {
          return (p.axis_taps[a][tap].e - p.axis_taps[a][0].e) / p.y_step[a];
        };
        at[t] = ys.At(offset(0, t0), offset(1, t1), offset(2, t % p.kernel[2]));
      }
      const int64_t y_pitch = (swapped ? p.src_step[2] : 1) * ys.pitch;
      const T* x_from = p.x_panel > 0 ? x_panel : x;
      const int64_t x_step = p.x_panel > 0 ? p.x_pitch : p.dst_s[2];
      const uint32_t whole = MaskOf<T>(0, kLanes<T>);
      if (!swapped || y_count > 1) {
        // A tap at a time: its channels are neighbours.
        const int64_t rows = swapped ? y_count : x_count;
        for (int64_t t = 0; t < p.ntaps; ++t) {
          const T* y_from = y_panel + at[t];
          const Joined<T> joined =
              swapped ? Joined<T>{y_from, x_from, y_pitch, x_step, p.x_panel > 0 ? whole : 0}
                      : Joined<T>{x_from, y_from, x_step, y_pitch, whole};
          AddProducts<T, Values::kNeighbours>(runs, count, joined, nullptr, rows,
                                              swapped ? x_count : y_count, sums + t * rows * pitch,
                                              pitch);
        }
      } else {
        const Joined<T> joined{y_panel, x_from, y_pitch, x_step, p.x_panel > 0 ? whole : 0};
        AddProducts<T, Values::kListed>(runs, count, joined, at, p.ntaps, x_count, sums, pitch);
      }
    }
  }
};

// Task (group, part, x channels, y channels): the part's share of all images.
template <class T>
void WeightGradOf(const PixelPlan& p, const PixelOperands& ops, int64_t task, void* memory) {
  constexpr int lanes = kLanes<T>;
  const int64_t yc = task % p.y_chunks, xc = task / p.y_chunks % p.x_chunks;
  const int64_t part = task / p.y_chunks / p.x_chunks % p.parts,
                g = task / p.y_chunks / p.x_chunks / p.parts;
  const bool depthwise = p.depthwise != 0, swapped = p.swapped != 0;
  const int64_t all_x = depthwise ? 1 : p.m, all_y = depthwise ? p.m : p.k;
  const int64_t x0 = xc * p.x_chunk, x_count = Min(p.x_chunk, all_x - x0);
  const int64_t y0 = yc * p.y_chunk, y_count = Min(p.y_chunk, all_y - y0);
  const int64_t pitch = ((swapped ? x_count : y_count) + lanes - 1) / lanes * lanes;
  auto* sums = static_cast<T*>(memory);
  for (int64_t i = 0; i < p.ntaps * (swapped ? y_count : x_count) * pitch; i += lanes) {
    Store<T>(sums + i, Vec<T>{});
  }
  const GradTask<T> grad{
      p,
      static_cast<const T*>(ops.other) + (depthwise ? y0 : g * p.m + x0) * p.dst_c,
      static_cast<const T*>(ops.src) + (g * p.k + y0) * p.src_c,
      x_count,
      y_count,
      p.units * part / p.parts,
      p.units * (part + 1) / p.parts,
      sums,
      pitch,
      sums + p.sums};
  if (p.boxes[0] > 0) {
    grad.JoinBoxes();
  } else {
    grad.JoinRows();
  }

  // Squares of taps x channels, transposed: taps are contiguous in dw.
  const auto square = [&](auto* to, const T* from, int64_t distance, int64_t row, int64_t rows,
                          int64_t channels, int64_t to_row) {
    Vec<T> v[lanes];
    for (int64_t l = 0; l < lanes; ++l) {
      v[l] = l < rows ? Load<T>(from + (row + l) * distance) : Vec<T>{};
    }
    Transpose<T>(v);
    for (int64_t l = 0; l < Min(lanes, channels); ++l)
      StoreSome<T>(to + l * to_row + row, v[l], rows);
  };
  const auto emit = [&](auto* dw) {
    if (swapped) {
      for (int64_t i = 0; i < x_count; i += lanes) {
        for (int64_t j = 0; j < y_count; ++j) {
          for (int64_t t = 0; t < p.ntaps; t += lanes) {
            square(dw + (x0 + i) * p.wm + (y0 + j) * p.wk, sums + j * pitch + i, y_count * pitch, t,
                   p.ntaps - t, x_count - i, p.wm);
          }
        }
      }
      return;
    }
    for (int64_t i = 0; i < x_count; ++i) {
      for (int64_t j = 0; j < y_count; j += lanes) {
        const int64_t to_row = depthwise ? p.wm : p.wk;
        for (int64_t t = 0; t < p.ntaps; t += lanes) {
          square(dw + (x0 + i) * p.wm + (y0 + j) * to_row, sums + i * pitch + j, x_count * pitch, t,
                 p.ntaps - t, y_count - j, to_row);
        }
      }
    }
  };
  if (p.parts > 1) {
    const int64_t size = p.groups * p.wg;
    emit(static_cast<T*>(ops.dst) + part * size + g * p.wg);
  } else {
    WithElement<T>(p.out_type, [&](auto element) {
      emit(static_cast<decltype(element)*>(ops.dst) + g * p.wg);
    });
  }
}

// ---------------------------------------------------------------------------------------------
// The types

void PackWeightAny(const PixelPlan& p, const void* w, void* packed, int64_t task, int64_t tasks) {
  p.in_type == DType::kF64
      ? PackWeight(p, static_cast<const double*>(w), static_cast<double*>(packed), task, tasks)
      : PackWeight(p, static_cast<const float*>(w), static_cast<float*>(packed), task, tasks);
}
void CorrelateAny(const PixelPlan& p, const PixelOperands& ops, int64_t task, void* scratch) {
  p.in_type == DType::kF64 ? CorrelateOf<double>(p, ops, task, scratch)
                           : CorrelateOf<float>(p, ops, task, scratch);
}
void WeightGradAny(const PixelPlan& p, const PixelOperands& ops, int64_t task, void* scratch) {
  p.in_type == DType::kF64 ? WeightGradOf<double>(p, ops, task, scratch)
                           : WeightGradOf<float>(p, ops, task, scratch);
}

}  // namespace

extern const PixelKernels JAXCONV_PIXELS = {kBytes,        kPositions,   kMaxVectors,
                                            PackWeightAny, CorrelateAny, WeightGradAny};

}  // namespace jaxconv::cpu
