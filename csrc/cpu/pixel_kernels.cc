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

// What some positions hear by one tap: pixels of the source, or zeros.
template <class T>
struct Heard {
  int64_t tap;  // of its phase
  const T* from[kPositions];
};

// sums[position][m] (+)= sum over taps and channels of source[position][channel] * weight[m]. The
// sums stay in registers.
template <class T, int nv, bool depthwise>
__attribute__((noinline)) void Multiply(const Heard<T>* heard, int64_t count, const T* weight,
                                        int64_t channels, int64_t offset, T* sums, bool add) {
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
#pragma GCC unroll 8
    for (int i = 0; i < kPositions; ++i) from[i] = heard->from[i] + offset;
    const T* w = weight + heard->tap * channels * mr;
    if constexpr (depthwise) {
#pragma GCC unroll 4
      for (int v = 0; v < nv; ++v) {
        const Vec<T> wv = Load<T>(w + v * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kPositions; ++i) acc[i][v] += Load<T>(from[i] + v * lanes) * wv;
      }
    } else {
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
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPositions; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) Store<T>(sums + i * mr + v * lanes, acc[i][v]);
  }
}

// Channels of a pixel that are asked for ahead.
constexpr int64_t kNear = 128, kNearDepthwise = 512;

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
  int64_t ntaps[3], newest[3], near;
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
    near = Min(p.zeros, p.depthwise != 0 ? kNearDepthwise : kNear);
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
          bool some = false;
          if (in_row && q[0][2] + e >= 0 && last + e < p.src_size[2]) {
            const T* from = rows[0] + (q[0][2] + e) * p.src_s[2];
            for (int i = 0; i < kPositions; ++i) h.from[i] = from + i * pitch;
            some = true;
          } else {
            for (int i = 0; i < kPositions; ++i) {
              const int64_t i2 = q[i][2] + e;
              const bool in = rows[i] != nullptr && i2 >= 0 && i2 < p.src_size[2];
              h.from[i] = in ? rows[i] + i2 * p.src_s[2] : zeros;
              some |= in;
            }
          }
          if (!some) continue;
          ++entries;
          if (!ask || e < newest[2]) continue;
          for (int i = 0; i < kPositions; ++i) {
            for (int64_t k = 0; k < near; k += kLanes<T>) __builtin_prefetch(h.from[i] + k);
          }
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
  PixelTile<T> tile{p, src, zeros, at, to, first, heard, {}, {}, {}, 0, 0, 0};
  const int64_t units = p.groups * p.nblocks;
  const int64_t u_begin = units * split_m / p.block_splits,
                u_end = units * (split_m + 1) / p.block_splits;
  for (int64_t r = p.phases * split_r / p.phase_splits;
       r < p.phases * (split_r + 1) / p.phase_splits; ++r) {
    const int64_t phase[3] = {r / p.dst_step[2] / p.dst_step[1], r / p.dst_step[2] % p.dst_step[1],
                              r % p.dst_step[2]};
    tile.Begin(phase, q_begin, q_end);
    const int64_t positions = tile.positions, blocks = tile.blocks;
    if (blocks == 0) continue;
    tile.List(0);

    const int64_t phase_taps = tile.ntaps[0] * tile.ntaps[1] * tile.ntaps[2];
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
          if (t == 0) next[b] = first[b];
          int64_t end = next[b];
          while (end < first[b + 1] && heard[end].tap < t + p.tap_chunk) ++end;
          WithConstant<kMaxVectors>(p.mr / lanes, [&](auto constant) {
            constexpr int nv = decltype(constant)::value;
            const auto run = [&](auto kernel, int64_t offset) {
              kernel(heard + next[b], end - next[b], weight, p.k, offset,
                     sums + b * kPositions * p.mr, t > 0);
            };
            if (p.depthwise != 0) {
              run(Multiply<T, nv, true>, m0);
            } else {
              run(Multiply<T, nv, false>, g * p.k);
            }
          });
          next[b] = end;
        }
      }
      WithElement<T>(p.out_type, [&](auto element) {
        using E = decltype(element);
        const E* bias = static_cast<const E*>(ops.other);
        E* dst = static_cast<E*>(ops.dst) + n * p.dst_n + m0;
        for (int64_t v = 0; v * lanes < Min(p.mr, p.m - block * p.mr); ++v) {
          const int64_t channels = p.m - block * p.mr - v * lanes;
          const Vec<T> b =
              bias == nullptr ? Vec<T>{} : LoadSome<T>(bias + m0 + v * lanes, channels);
          for (int64_t i = 0; i < positions; ++i) {
            StoreSome<T>(dst + to[i] + v * lanes, Load<T>(sums + i * p.mr + v * lanes) + b,
                         channels);
          }
        }
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Weight gradient

// Neighbours in a row that a tap joins: elements of x and y, and how many positions.
struct Run {
  int64_t x, y, count;
};

// sums[i][j] += sum over positions of x[i] * y[j], for mr values of x and nv vectors of y, whose
// last has `mask`.
template <class T, int mr, int nv, bool depthwise>
__attribute__((noinline)) void Outer(const Run* runs, int64_t count, const T* x, const T* y,
                                     int64_t x_step, int64_t y_step, uint32_t mask, T* sums,
                                     int64_t pitch) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[mr][nv];
#pragma GCC unroll 8
  for (int i = 0; i < mr; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) acc[i][v] = Load<T>(sums + i * pitch + v * lanes);
  }
  const bool whole = mask == MaskOf<T>(0, lanes);
  for (const Run* end = runs + count; runs != end; ++runs) {
    const T* xs = x + runs->x;
    const T* ys = y + runs->y;
    const auto add = [&](auto is_whole) {
      for (int64_t q = 0; q < runs->count; ++q) {
        Vec<T> yv[nv];
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) {
          yv[v] = decltype(is_whole)::value || v + 1 < nv ? Load<T>(ys + v * lanes)
                                                          : LoadMasked<T>(ys + v * lanes, mask);
        }
        if constexpr (depthwise) {
#pragma GCC unroll 4
          for (int v = 0; v < nv; ++v) acc[0][v] += Load<T>(xs + v * lanes) * yv[v];
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < mr; ++i) {
            const Vec<T> xv = Broadcast(xs[i]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; ++v) acc[i][v] += xv * yv[v];
          }
        }
        xs += x_step;
        ys += y_step;
      }
    };
    if (whole) {
      add(std::true_type{});
    } else {
      add(std::false_type{});
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < mr; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) Store<T>(sums + i * pitch + v * lanes, acc[i][v]);
  }
}

// Task (group, part, x channels, y channels): the part's share of all images.
template <class T>
void WeightGradOf(const PixelPlan& p, const PixelOperands& ops, int64_t task, void* memory) {
  constexpr int lanes = kLanes<T>;
  const int64_t yc = task % p.y_chunks, xc = task / p.y_chunks % p.x_chunks;
  const int64_t part = task / p.y_chunks / p.x_chunks % p.parts,
                g = task / p.y_chunks / p.x_chunks / p.parts;
  const bool depthwise = p.depthwise != 0;
  const int64_t all_x = depthwise ? 1 : p.m, all_y = depthwise ? p.m : p.k;
  const int64_t x0 = xc * p.x_chunk, x_count = Min(p.x_chunk, all_x - x0);
  const int64_t y0 = yc * p.y_chunk, y_count = Min(p.y_chunk, all_y - y0);
  const int64_t pitch = (y_count + lanes - 1) / lanes * lanes, tap_sums = x_count * pitch;
  auto* sums = static_cast<T*>(memory);
  auto* runs = reinterpret_cast<Run*>(sums + p.ntaps * p.x_chunk *
                                                 ((p.y_chunk + lanes - 1) / lanes * lanes));
  for (int64_t i = 0; i < p.ntaps * tap_sums; i += lanes) Store<T>(sums + i, Vec<T>{});

  const T* y = static_cast<const T*>(ops.src) + g * p.k + y0;
  const T* x = static_cast<const T*>(ops.other) + (depthwise ? y0 : g * p.m + x0);
  const int64_t row_pieces = (p.dst_size[2] + p.columns - 1) / p.columns;
  const int64_t image_pieces = p.dst_size[0] * p.dst_size[1] * row_pieces;
  const int64_t pieces = p.n * image_pieces, end = pieces * (part + 1) / p.parts;
  for (int64_t begin = pieces * part / p.parts; begin < end; begin += p.pieces) {
    for (int64_t t = 0; t < p.ntaps; ++t) {
      const AxisTap& t0 = p.axis_taps[0][t / p.kernel[2] / p.kernel[1]];
      const AxisTap& t1 = p.axis_taps[1][t / p.kernel[2] % p.kernel[1]];
      const AxisTap& t2 = p.axis_taps[2][t % p.kernel[2]];
      const Valid valid = ValidOf(t2.e, p.src_step[2], p.src_size[2], p.dst_size[2]);
      int64_t nruns = 0;
      for (int64_t piece = begin; piece < Min(begin + p.pieces, end); ++piece) {
        const int64_t n = piece / image_pieces, row = piece % image_pieces / row_pieces;
        const int64_t q0 = row / p.dst_size[1], q1 = row % p.dst_size[1];
        const int64_t o0 = q0 * p.src_step[0] + t0.e, o1 = q1 * p.src_step[1] + t1.e;
        const int64_t column = piece % row_pieces * p.columns;
        const int64_t q2 = Max(column, valid.begin), q2_end = Min(column + p.columns, valid.end);
        if (o0 < 0 || o0 >= p.src_size[0] || o1 < 0 || o1 >= p.src_size[1] || q2 >= q2_end)
          continue;
        runs[nruns++] = {n * p.dst_n + q0 * p.dst_s[0] + q1 * p.dst_s[1] + q2 * p.dst_s[2],
                         n * p.src_n + o0 * p.src_s[0] + o1 * p.src_s[1] +
                             (q2 * p.src_step[2] + t2.e) * p.src_s[2],
                         q2_end - q2};
      }
      if (nruns == 0) continue;
      for (int64_t j = 0, nv; j < y_count; j += nv * lanes) {
        nv = Min((y_count - j + lanes - 1) / lanes, kMaxVectors);
        const uint32_t mask = MaskOf<T>(0, y_count - j - (nv - 1) * lanes);
        WithConstant<kMaxVectors>(nv, [&](auto constant) {
          constexpr int kVectors = decltype(constant)::value;
          int64_t i = 0;
          const auto run = [&](auto kernel, int64_t mr, int64_t x_at) {
            for (; i + mr <= x_count; i += mr) {
              kernel(runs, nruns, x + x_at + i, y + j, p.dst_s[2], p.src_step[2] * p.src_s[2], mask,
                     sums + t * tap_sums + i * pitch + j, pitch);
            }
          };
          if (depthwise) return run(Outer<T, 1, kVectors, true>, 1, j);
          if constexpr (kPositions == 8) run(Outer<T, 8, kVectors, false>, 8, 0);
          run(Outer<T, 4, kVectors, false>, 4, 0);
          run(Outer<T, 2, kVectors, false>, 2, 0);
          run(Outer<T, 1, kVectors, false>, 1, 0);
        });
      }
    }
  }

  // Squares of taps x y channels, transposed: taps are contiguous in dw.
  const auto emit = [&](auto* dw) {
    for (int64_t i = 0; i < x_count; ++i) {
      for (int64_t j = 0; j < y_count; j += lanes) {
        for (int64_t t = 0; t < p.ntaps; t += lanes) {
          Vec<T> v[lanes];
          for (int64_t l = 0; l < lanes; ++l) {
            v[l] = t + l < p.ntaps ? Load<T>(sums + (t + l) * tap_sums + i * pitch + j) : Vec<T>{};
          }
          Transpose<T>(v);
          for (int64_t l = 0; l < Min(lanes, y_count - j); ++l) {
            StoreSome<T>(dw + (x0 + i) * p.wm + (y0 + j + l) * (depthwise ? p.wm : p.wk) + t, v[l],
                         p.ntaps - t);
          }
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
