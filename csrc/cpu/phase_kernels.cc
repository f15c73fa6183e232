// The "phases" kernels, compiled once for each instruction set. See phase_plan.h for what they
// compute and why nothing here may be shared with other files.
#include <type_traits>

#include "cpu/phase_plan.h"
#include "cpu/vec.h"

namespace jaxconv::cpu {
namespace {

// ---------------------------------------------------------------------------------------------
// Tiles

struct Tile {
  int64_t begin[3], size[3];
};

Tile TileAt(const PhasePlan& p, int64_t index) {
  Tile tile;
  for (int a = 2; a >= 0; --a) {
    tile.begin[a] = index % p.tiles[a] * p.tile[a];
    index /= p.tiles[a];
    const int64_t grid = (p.dst_size[a] + p.dst_step[a] - 1) / p.dst_step[a];
    tile.size[a] = Min(p.tile[a], grid - tile.begin[a]);
  }
  return tile;
}

// Positions of a segment, from its first to its last, those between rows included.
int64_t SpanOf(const PhasePlan& p, const Tile& tile) {
  const int64_t plane = (tile.size[1] - 1) * p.box[2] + tile.size[2];
  return p.segments == 1 ? (tile.size[0] - 1) * p.box[1] * p.box[2] + plane : plane;
}

// ---------------------------------------------------------------------------------------------
// Packing: from an operand to planes

// Rows of an operand and the grid positions wanted of each: position c of phase r2 is element
// first + c * step + r2, where 0 <= element < size, and zero elsewhere. The size is cut so that
// positions from `count` on are zero.
struct Row {
  int64_t first, step, size, count;
};

constexpr int64_t kMaxMasks = 16384;  // a row's positions are fewer: see Refuse in phases.cc

// What lies in the operand of each vector that is read of a row, from element `first` on.
template <class T>
void SetMasks(const Row& row, uint32_t* masks) {
  constexpr int lanes = kLanes<T>;
  const int64_t vectors = (row.count + lanes - 1) / lanes * row.step;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t e = row.first + v * lanes;
    masks[v] = MaskOf<T>(-e, row.size - e);
  }
}

// `inside`: whole vectors lie in the operand's memory, if not in the row.
template <class T, bool inside, class E>
JAXCONV_INLINE Vec<T> LoadOfRow(const E* from, uint32_t mask) {
  return inside ? Masked<T>(Load<T>(from), mask) : LoadMasked<T>(from, mask);
}

// Rows of a plane: the distance between them in the operand, and in the panel, which they fill.
struct Rows {
  int64_t count, pitch, width;
};

// to[slot][row][c] for `slots` consecutive phases from r2 on, of a step that is a power of two.
// Whole vectors are written, so what comes after a row must be written later. The same row of the
// next channel, `ahead` elements on, is asked for: it lies on another page, which the processor
// does not foresee.
template <class T, int step, bool inside, class E>
__attribute__((noinline)) void PackRows(const E* from, const Rows& rows, int64_t count,
                                        const uint32_t* masks, int64_t r2, int64_t slots, T* to,
                                        int64_t slot_size, int64_t ahead) {
  constexpr int lanes = kLanes<T>;
  for (int64_t b = 0; b < rows.count; ++b, from += rows.pitch, to += rows.width) {
    const uint32_t* mask = masks;
    int64_t c = 0;
    for (; c < count; c += lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < step; ++i) AskFor(from + c * step + i * lanes + ahead);
      Vec<T> in[step], out[step];
#pragma GCC unroll 16
      for (int i = 0; i < step; ++i) {
        in[i] = LoadOfRow<T, inside>(from + c * step + i * lanes, *mask++);
      }
      Deinterleave<T, step>(in, out);
#pragma GCC unroll 16
      for (int r = 0; r < step; ++r) {
        if (r >= r2 && r - r2 < slots) Store<T>(to + (r - r2) * slot_size + c, out[r]);
      }
    }
    for (; c < rows.width; c += lanes) {
      for (int64_t i = 0; i < slots; ++i) Store<T>(to + i * slot_size + c, Vec<T>{});
    }
  }
}

// The same for any step and `slots` consecutive phases from r2 on, of one row: phases are to a row
// what channels are to pixels, and squares of positions x phases are transposed.
template <class T, bool inside, class E>
__attribute__((noinline)) void PackRowN(const Row& row, const E* from, int64_t r2, int64_t slots,
                                        T* to, int64_t slot_size, int64_t width) {
  constexpr int lanes = kLanes<T>;
  for (int64_t s = 0; s < slots; s += lanes) {
    const int64_t some = Min(lanes, slots - s);
    int64_t c = 0;
    for (; c < row.count; c += lanes) {
      Vec<T> v[lanes];
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t e = row.first + (c + l) * row.step + r2 + s;
        const uint32_t mask = MaskOf<T>(-e, Min(row.size - e, some));
        v[l] = LoadOfRow<T, inside>(from + e, mask);
      }
      Transpose<T>(v);
      for (int64_t l = 0; l < some; ++l) Store<T>(to + (s + l) * slot_size + c, v[l]);
    }
    for (; c < width; c += lanes) {
      for (int64_t l = 0; l < some; ++l) Store<T>(to + (s + l) * slot_size + c, Vec<T>{});
    }
  }
}

// to[channel][c] for channels that are neighbours, `pixel` elements from one pixel to the next. The
// row that comes next, `ahead` elements on, is asked for.
template <class T, class E>
__attribute__((noinline)) void PackPixels(const Row& row, const E* from, int64_t pixel, int64_t r2,
                                          int64_t channels, T* to, int64_t plane, int64_t ahead) {
  constexpr int lanes = kLanes<T>;
  for (int64_t k = 0; k < channels; k += lanes) {
    const int64_t some = Min(lanes, channels - k);
    for (int64_t c = 0; c < row.count; c += lanes) {
      const int64_t first = row.first + c * row.step + r2;
      const int64_t last = first + (lanes - 1) * row.step;
      T* planes = to + k * plane + c;
      if (some < lanes) {
        Vec<T> v[lanes];
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t e = first + l * row.step;
          v[l] = e < 0 || e >= row.size ? Vec<T>{} : LoadSome<T>(from + e * pixel + k, some);
        }
        Transpose<T>(v);
        for (int64_t l = 0; l < some; ++l) Store<T>(planes + l * plane, v[l]);
        continue;
      }
      // Apart for squares inside the row, or vectors would go through memory on their way.
      const auto square = [&](auto is_inside) {
        Vec<T> v[lanes];
        const E* at = from + first * pixel + k;
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l, at += row.step * pixel) {
          const int64_t e = first + l * row.step;
          v[l] = Vec<T>{};
          if (!decltype(is_inside)::value && (e < 0 || e >= row.size)) continue;
          AskFor(at + ahead);
          v[l] = Load<T>(at);
        }
        Transpose<T>(v);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) Store<T>(planes + l * plane, v[l]);
      };
      if (first >= 0 && last < row.size) {
        square(std::true_type{});
      } else {
        square(std::false_type{});
      }
    }
  }
}

struct Source {
  const Distances& at;
  const int64_t* size;
  const int64_t* step;
  const int64_t* origin;
  int64_t elements;
};

// Some channels of the phases [s0, s1) of an operand, a plane each: the grid positions from `begin`
// on, `count` of them along each axis, in rows of a box; zero outside the operand and between these
// positions. The operand is read in the order in which it lies in memory, as far as possible.
template <class T, class E>
void PackPlanes(const Source& source, bool channels_last, const E* from, int64_t n, int64_t channel,
                int64_t channels, const Slot* slots, int64_t s0, int64_t s1, const int64_t* begin,
                const int64_t* count, const int64_t* box, int64_t tail, T* to, int64_t plane) {
  constexpr int lanes = kLanes<T>;
  const Distances& at = source.at;
  const int64_t slot_size = channels * plane;
  const E* base = from + n * at.n + channel * at.c;
  const int64_t step = source.step[2], first = begin[2] * step - source.origin[2];
  // Columns that the next row begins with are its own, and past the operand there are zeros.
  const int64_t columns =
      Max(Min(Min(count[2], box[2]), (source.size[2] - first + step - 1) / step), 0);
  const Row row{first, step, Min(source.size[2], first + columns * step), columns};
  // What is read of a row in whole vectors, or squares of them.
  const int64_t read = (row.count + lanes - 1) / lanes * lanes * step + lanes;
  uint32_t masks[kMaxMasks];
  if (!channels_last && step <= 16) SetMasks<T>(row, masks);
  // Channels first, one channel after the other; channels last, all channels of a pixel at once.
  const int64_t outer = channels_last ? 1 : channels, inner = channels_last ? channels : 1;

  // Rows [b0, b1) of one plane, of slots that interleave in a row.
  const auto pack_rows = [&](int64_t k, int64_t a, int64_t b0, int64_t b1, int64_t s,
                             int64_t s_end) {
    const int64_t *phase = slots[s].phase, some = s_end - s;
    T* to_plane = to + (s - s0) * slot_size + k * plane + a * box[1] * box[2];
    const auto zero = [&](int64_t begin_at, int64_t end_at) {
      if (begin_at >= end_at) return;  // mostly, and there may be many planes
      for (int64_t i = 0; i < some; ++i) {
        for (int64_t j = 0; j < inner; ++j) {
          T* zeros = to_plane + i * slot_size + j * plane;
          for (int64_t c = begin_at; c < end_at; c += lanes) Store<T>(zeros + c, Vec<T>{});
        }
      }
    };
    const int64_t e0 = (begin[0] + a) * source.step[0] + phase[0] - source.origin[0];
    const int64_t e1 = begin[1] * source.step[1] + phase[1] - source.origin[1];
    const bool live = e0 >= 0 && e0 < source.size[0];
    const Valid valid = ValidOf(e1, source.step[1], source.size[1], live ? count[1] : 0);
    const int64_t v0 = Min(Max(valid.begin, b0), b1), v1 = Max(Min(valid.end, b1), v0);
    const Rows rows{v1 - v0, source.step[1] * at.s[1], box[2]};
    const E* from_row = base + k * at.c + e0 * at.s[0] + (e1 + v0 * source.step[1]) * at.s[1];
    T* to_row = to_plane + v0 * box[2];
    zero(b0 * box[2], v0 * box[2]);
    if (channels_last) {
      for (int64_t b = v0; b < v1; ++b, from_row += rows.pitch, to_row += box[2]) {
        for (int64_t i = 0; i < some; ++i) {
          PackPixels(row, from_row, at.s[2], phase[2] + i, channels, to_row + i * slot_size, plane,
                     rows.pitch);
        }
        zero(b * box[2] + (columns + lanes - 1) / lanes * lanes, (b + 1) * box[2]);
      }
    } else if (rows.count > 0) {
      const int64_t r2 = phase[2];
      const E* begins = from_row + first;
      const auto pack = [&](auto is_inside, const Rows& some_rows) {
        constexpr bool kInside = decltype(is_inside)::value;
        const auto run = [&](auto kernel) {
          kernel(begins, some_rows, columns, masks, r2, some, to_row, slot_size, at.c);
        };
        switch (step) {
          case 1:
            return run(PackRows<T, 1, kInside, E>);
          case 2:
            return run(PackRows<T, 2, kInside, E>);
          case 4:
            return run(PackRows<T, 4, kInside, E>);
          case 8:
            return run(PackRows<T, 8, kInside, E>);
          case 16:
            return run(PackRows<T, 16, kInside, E>);
          default:
            for (int64_t b = 0; b < some_rows.count; ++b) {
              PackRowN<T, kInside>(row, from_row + b * rows.pitch, r2, some, to_row + b * box[2],
                                   slot_size, box[2]);
            }
        }
      };
      const auto inside = [&](const E* last) {
        return begins >= from && last + read <= from + source.elements;
      };
      if (inside(begins + (rows.count - 1) * rows.pitch)) {
        pack(std::true_type{}, rows);
      } else {
        Rows one = rows;
        one.count = 1;
        for (int64_t b = v0; b < v1; ++b) {
          if (inside(begins)) {
            pack(std::true_type{}, one);
          } else {
            pack(std::false_type{}, one);
          }
          begins += rows.pitch;
          from_row += rows.pitch;
          to_row += box[2];
        }
      }
    }
    zero(v1 * box[2], b1 * box[2]);
  };
  // Channels first, all rows of a plane at once; channels last, in the order of memory.
  const int64_t at_once = channels_last ? 1 : box[1];
  for (int64_t k = 0; k < outer; ++k) {
    for (int64_t a = 0; a < count[0]; ++a) {
      for (int64_t p0 = s0, p1; p0 < s1; p0 = p1) {
        p1 = Min(slots[p0].plane_end, s1);
        for (int64_t b = 0; b < box[1]; b += at_once) {
          for (int64_t s = p0, s_end; s < p1; s = s_end) {
            s_end = Min(slots[s].row_end, s1);
            pack_rows(k, a, b, b + at_once, s, s_end);
          }
        }
      }
    }
  }
  // What is read past the last position must be finite, too.
  for (int64_t k = 0; k < (s1 - s0) * channels; ++k) {
    for (int64_t c = 0; c < tail; c += lanes) {
      Store<T>(to + k * plane + count[0] * box[1] * box[2] + c, Vec<T>{});
    }
  }
}

// The source's channels [k0, k0 + ks) of `groups` groups, in slots [s0, s1).
template <class T>
void PackPanel(const PhasePlan& p, const void* src, int64_t n, int64_t group, int64_t groups,
               const Tile& tile, int64_t k0, int64_t ks, int64_t s0, int64_t s1, T* panel) {
  int64_t begin[3], count[3];
  for (int a = 0; a < 3; ++a) {
    begin[a] = tile.begin[a] + p.lo[a];
    count[a] = p.span[a] + tile.size[a];
  }
  // All channels of the groups are neighbours, as there is one group or all of their channels.
  const int64_t channels = groups * ks;
  const Source source{p.src, p.src_size, p.src_step, p.src_origin, p.n * p.src.n};
  WithElement<T>(p.in_type, [&](auto element) {
    using E = decltype(element);
    PackPlanes<T>(source, p.src_last != 0, static_cast<const E*>(src), n, group * p.k + k0,
                  channels, p.slots, s0, s1, begin, count, p.box, p.tail, panel, p.plane);
  });
}

// A square of taps x (source channel, channel of a block) at a time, transposed: a row of it is
// contiguous in the weight, a column in the packed one.
template <class T>
void PackWeight(const PhasePlan& p, const void* weight, void* packed, int64_t task, int64_t tasks) {
  constexpr int64_t kRun = 32, lanes = kLanes<T>;
  const int64_t runs = (p.k + kRun - 1) / kRun, units = p.groups * p.nblocks * runs;
  WithElement<T>(p.in_type, [&](auto element) {
    using E = decltype(element);
    const E* end = static_cast<const E*>(weight) + p.groups * p.wg;
    for (int64_t u = units * task / tasks; u < units * (task + 1) / tasks; ++u) {
      const int64_t run = u % runs, g = u / runs / p.nblocks;
      const Block block = p.blocks[u / runs % p.nblocks];
      const int64_t mr = block.mr, k_end = Min(p.k, (run + 1) * kRun);
      const E* w = static_cast<const E*>(weight) + g * p.wg + block.m0 * p.wm;
      T* to = static_cast<T*>(packed) + g * p.k * p.m * p.ntaps;
      for (int64_t k = run * kRun, ks; k < k_end; k += ks) {
        const int64_t chunk = k / p.k_chunk * p.k_chunk, chunk_size = Min(p.k_chunk, p.k - chunk);
        ks = Min(Min(Max(lanes / mr, 1), k_end - k), chunk + chunk_size - k);
        const int64_t ms = Min(mr, lanes);  // of a square, which has ks * ms rows
        if (ks * ms == 1) {
          for (int64_t t = 0; t < p.ntaps; ++t) {
            const Place& at = p.places[t];
            to[p.k * (at.first * p.m + block.m0 * at.taps) + chunk * at.taps +
               at.index * chunk_size + k - chunk] = LoadSome<T>(w + k * p.wk + t, 1)[0];
          }
          continue;
        }
        for (int64_t t = 0; t < p.ntaps; t += lanes) {
          const int64_t some = Min(lanes, p.ntaps - t);
          for (int64_t m = 0; m < mr; m += ms) {
            Vec<T> v[lanes];
            for (int64_t l = 0; l < lanes; ++l) {
              const E* from = w + (k + l / ms) * p.wk + (m + l % ms) * p.wm + t;
              __builtin_prefetch(from + 2 * ks * p.wk);  // on other pages: see PackRows
              v[l] = l >= ks * ms          ? Vec<T>{}
                     : from + lanes <= end ? Load<T>(from)
                                           : LoadMasked<T>(from, MaskOf<T>(0, some));
            }
            Transpose<T>(v);
            for (int64_t l = 0; l < some; ++l) {
              const Place& at = p.places[t + l];
              T* row = to + p.k * (at.first * p.m + block.m0 * at.taps) +
                       (chunk * at.taps + at.index * chunk_size + k - chunk) * mr + m;
              StoreSome<T>(row, v[l], ks * ms);
            }
          }
        }
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Forward and input gradient

// What the next panel reads, line by line. It is asked for into the second-level cache while this
// one is multiplied, or memory would be idle meanwhile: a core has few requests under way, and
// packing alone waits for them. Runs of `bytes`, [2] after [1] after [0].
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t each = 0;  // lines at a time
  int64_t bytes = 0;
  const char* begin[3] = {};
  int64_t count[3] = {}, stride[3] = {}, left[3] = {};

  JAXCONV_INLINE void Ask() {
    for (int64_t i = 0; i < each; ++i) {
      AskFor(at);
      at += kLine<char>;
      if (at >= end) Next();
    }
  }

  __attribute__((noinline)) void Next() {
    int level = 2;
    while (--left[level] == 0) {
      if (--level < 0) {
        each = 0;
        return;
      }
    }
    begin[level] += stride[level];
    for (; level < 2; ++level) {
      begin[level + 1] = begin[level];
      left[level + 1] = count[level + 1];
    }
    at = begin[2];
    end = at + bytes;
  }
};

// What one panel is multiplied by: taps, each of `channels` rows of the weight.
struct Factors {
  const Tap* taps;
  int64_t ntaps, channels;
  int64_t plane, slot_size;
};

// The rows of a panel's planes that are not all zero: so many come before row r. Null: unknown.
struct LiveRows {
  const int32_t* before;
  int64_t pitch;  // P2

  int64_t RowOf(int64_t row, int64_t column) const {
    return column < pitch ? row : row + column / pitch;
  }
};
constexpr int64_t kMaxLiveRows = 1024, kMaxListed = 512;

// sums[m][q] (+)= sum over taps and channels of weight[m] * panel[channel][q + rel], for mr
// channels and nr vectors of positions. The weight is one value a lane-wide multiply-add, the
// panel's vectors are used mr times, the sums stay in registers. They follow each other, or have
// `distances` from the first, and so has the second half of the last one if it is `split`.
// `listed`: the taps to take; null: all of them.
enum class Vectors { kNeighbours, kApart, kSplit };
template <class T, int mr, int nr, Vectors vectors>
__attribute__((noinline)) void Multiply(const T* weight, const T* panel, const Factors& f,
                                        const int64_t* distances, const int32_t* listed,
                                        int64_t count, T* sums, int64_t row, bool add,
                                        Ahead& ahead) {
  constexpr int lanes = kLanes<T>;
  int64_t at[nr];
#pragma GCC unroll 8
  for (int v = 0; v < nr; ++v) {
    at[v] = vectors == Vectors::kNeighbours ? v * lanes : distances[v];
  }
  const int64_t second = vectors == Vectors::kSplit ? distances[nr] : 0;
  const auto load = [&](const T* from, int v) {
    if (vectors == Vectors::kSplit && v == nr - 1)
      return LoadHalves<T>(from + at[v], from + second);
    return Load<T>(from + at[v]);
  };
  Vec<T> acc[mr][nr];
#pragma GCC unroll 8
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < nr; ++v) {
      acc[m][v] = add ? load(sums + m * row, v) : Vec<T>{};
    }
  }
  const int64_t channels = f.channels, plane = f.plane;
  const auto multiply = [&](int64_t k0, int64_t k1) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = listed != nullptr ? listed[i] : i;
      ahead.Ask();
      const T* from = panel + f.taps[t].slot * f.slot_size + f.taps[t].rel + k0 * plane;
      const T* w_row = weight + (t * channels + k0) * mr;
      for (int64_t k = k0; k < k1; ++k) {
        Vec<T> x[nr];
#pragma GCC unroll 8
        for (int v = 0; v < nr; ++v) x[v] = load(from, v);
#pragma GCC unroll 8
        for (int m = 0; m < mr; ++m) {
          const Vec<T> w = Broadcast(w_row[m]);
#pragma GCC unroll 8
          for (int v = 0; v < nr; ++v) acc[m][v] += w * x[v];
        }
        w_row += mr;
        from += plane;
      }
    }
  };
  if constexpr (mr > 2) {
    multiply(0, channels);
  } else {
    // With few products a load, so many channels at a time that what a tap reads is still in the
    // first-level cache when the next one reads nearly the same.
    constexpr int64_t kAtOnce = 16384 / (int64_t{nr + 1} * kBytes);
    for (int64_t k = 0; k < channels; k += kAtOnce) multiply(k, Min(channels, k + kAtOnce));
  }
#pragma GCC unroll 8
  for (int m = 0; m < mr; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < nr; ++v) {
      T* to = sums + m * row;
      if (vectors == Vectors::kSplit && v == nr - 1) {
        StoreHalves<T>(to + at[v], to + second, acc[m][v]);
      } else {
        Store<T>(to + at[v], acc[m][v]);
      }
    }
  }
}

#if JAXCONV_REGISTERS == 32
constexpr int kMaxMr = 8;
constexpr int MaxNr(int mr) { return mr == 8 ? 3 : mr == 4 ? 6 : 8; }
#else
constexpr int kMaxMr = 4;
constexpr int MaxNr(int mr) { return mr == 4 ? 3 : mr == 2 ? 4 : 6; }
#endif

// Rows of a tile that are whole vectors, so that no position between them need be computed; or, if
// `halves`, whole vectors and a half, and the halves of two rows are one vector.
struct WholeRows {
  int64_t vectors = 0;  // of a row; 0: rows are not
  bool halves = false;
  int64_t rows = 0, planes = 0, pitch = 0, plane = 0;

  int64_t PositionOf(int64_t row) const { return row / rows * plane + row % rows * pitch; }
};

// Positions [begin, begin + span) of one block, or those of whole rows. Taps that hear nothing but
// zeros are left out.
template <class T, int mr, bool apart>
void MultiplySpan(const T* weight, const T* panel, const Factors& f, const LiveRows& live,
                  const WholeRows& whole, int64_t begin, int64_t span, T* sums, int64_t row,
                  bool add, Ahead& ahead) {
  constexpr int lanes = kLanes<T>, max_nr = MaxNr(mr);
  // `count` vectors from q on, the last position of which is `last`.
  const auto multiply = [&](auto vectors, int64_t count, int64_t q, int64_t last,
                            const int64_t* distances) {
    constexpr Vectors kVectors = decltype(vectors)::value;
    int32_t listed[kMaxListed];
    int64_t taps = f.ntaps;
    if (live.before != nullptr) {
      const int64_t row0 = q / live.pitch, column0 = q % live.pitch;
      const int64_t row1 = last / live.pitch, column1 = last % live.pitch;
      taps = 0;
      for (int64_t t = 0; t < f.ntaps; ++t) {
        const Tap& tap = f.taps[t];
        const int64_t first_heard = live.RowOf(row0 + tap.row, column0 + tap.column);
        const int64_t last_heard = live.RowOf(row1 + tap.row, column1 + tap.column);
        listed[taps] = static_cast<int32_t>(t);
        taps += live.before[last_heard + 1] > live.before[first_heard] ? 1 : 0;
      }
    }
    const auto run = [&](auto nr) {
      constexpr int kNr = decltype(nr)::value;
      if constexpr (kNr <= max_nr) {
        Multiply<T, mr, kNr, kVectors>(weight, panel + q, f, distances,
                                       live.before != nullptr ? listed : nullptr, taps, sums + q,
                                       row, add, ahead);
      }
    };
    switch (count) {
      case 1:
        return run(std::integral_constant<int, 1>{});
      case 2:
        return run(std::integral_constant<int, 2>{});
      case 3:
        return run(std::integral_constant<int, 3>{});
      case 4:
        return run(std::integral_constant<int, 4>{});
      case 5:
        return run(std::integral_constant<int, 5>{});
      case 6:
        return run(std::integral_constant<int, 6>{});
      case 7:
        return run(std::integral_constant<int, 7>{});
      case 8:
        return run(std::integral_constant<int, 8>{});
    }
  };
  // Runs of nearly equal length.
  const auto runs = [&](int64_t vectors, auto body) {
    const int64_t count = (vectors + max_nr - 1) / max_nr;
    for (int64_t r = 0; r < count; ++r) body(vectors * r / count, vectors * (r + 1) / count);
  };
  if constexpr (!apart) {
    runs((span + lanes - 1) / lanes, [&](int64_t v, int64_t v_end) {
      multiply(std::integral_constant<Vectors, Vectors::kNeighbours>{}, v_end - v,
               begin + v * lanes, begin + Min(v_end * lanes, span) - 1, nullptr);
    });
  } else {
    // Vectors [v, v_end) of rows from `first` on, and the halves behind two rows, if they are.
    int64_t distances[max_nr + 1];
    const auto of_rows = [&](int64_t first, int64_t of_row, int64_t v, int64_t v_end) {
      const auto at = [&](int64_t i) {
        return whole.PositionOf(first + i / of_row) + i % of_row * lanes;
      };
      const int64_t q = at(v);
      for (int64_t i = v; i < v_end; ++i) distances[i - v] = at(i) - q;
      multiply(std::integral_constant<Vectors, Vectors::kApart>{}, v_end - v, q,
               at(v_end - 1) + lanes - 1, distances);
    };
    const int64_t rows = whole.rows * whole.planes, of_row = whole.vectors;
    if (!whole.halves) {
      runs(of_row * rows, [&](int64_t v, int64_t v_end) { of_rows(0, of_row, v, v_end); });
      return;
    }
    for (int64_t r = 0; r + 1 < rows; r += 2) {
      const int64_t q = whole.PositionOf(r), next = whole.PositionOf(r + 1) - q;
      const int64_t with = Min(2 * of_row, max_nr - 1);  // whole vectors beside the halves
      for (int64_t i = 0; i < with; ++i) {
        distances[i] = i / of_row * next + i % of_row * lanes;
      }
      distances[with] = of_row * lanes;
      distances[with + 1] = next + of_row * lanes;
      multiply(std::integral_constant<Vectors, Vectors::kSplit>{}, with + 1, q,
               q + distances[with + 1] + lanes / 2 - 1, distances);
      runs(2 * of_row - with,
           [&](int64_t v, int64_t v_end) { of_rows(r, of_row, with + v, with + v_end); });
    }
    // What is written behind the last row is thrown away.
    if (rows % 2 != 0) {
      runs(of_row + 1, [&](int64_t v, int64_t v_end) { of_rows(rows - 1, of_row + 1, v, v_end); });
    }
  }
}

// to[i * pixel + c] = sums of channel c at position i, plus bias(c), a vector of channels from c
// on. The memory `ahead` elements on is written next. Sums may be read past the last position.
template <class T, class E, class Bias>
JAXCONV_INLINE void StorePixels(E* to, int64_t pixel, const T* sums, int64_t row, int64_t count,
                                int64_t channels, int64_t ahead, Bias bias) {
  constexpr int lanes = kLanes<T>;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t cs = Min(lanes, channels - c);
    const Vec<T> b = bias(c);
    for (int64_t i = 0; i < count; i += lanes) {
      const int64_t is = Min(lanes, count - i);
      Vec<T> v[lanes];
      if (cs == lanes) {
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) v[l] = Load<T>(sums + (c + l) * row + i);
        Transpose<T>(v);
#pragma GCC unroll 16
        for (int l = 0; l < lanes; ++l) {
          if (l == is) break;
          E* at = to + (i + l) * pixel + c;
          AskFor(at + ahead);
          Store<T>(at, v[l] + b);
        }
      } else {
        for (int l = 0; l < lanes; ++l) {
          v[l] = l < cs ? Load<T>(sums + (c + l) * row + i) : Vec<T>{};
        }
        Transpose<T>(v);
        for (int64_t l = 0; l < is; ++l) StoreSome<T>(to + (i + l) * pixel + c, v[l] + b, cs);
      }
    }
  }
}

// to[i] = sums of phase i mod step at position i / step, plus the bias, for i < count. The memory
// `ahead` elements on is written next.
template <class T, class E>
JAXCONV_INLINE void StoreRow(E* to, const T* sums, int64_t row, int64_t step, int64_t count,
                             Vec<T> bias, int64_t ahead) {
  constexpr int lanes = kLanes<T>;
  const auto interleaved = [&](auto constant) {
    constexpr int n = decltype(constant)::value;
    for (int64_t i = 0; i < count; i += n * lanes) {
      Vec<T> in[n], out[n];
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) AskFor(to + i + r * lanes + ahead);
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) in[r] = Load<T>(sums + r * row + i / n) + bias;
      Interleave<T, n>(in, out);
      if (i + n * lanes <= count) {
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r) Store<T>(to + i + r * lanes, out[r]);
      } else {
        for (int r = 0; r < n; ++r) StoreSome<T>(to + i + r * lanes, out[r], count - i - r * lanes);
      }
    }
  };
  switch (step) {
    case 1:
      return interleaved(std::integral_constant<int, 1>{});
    case 2:
      return interleaved(std::integral_constant<int, 2>{});
    case 4:
      return interleaved(std::integral_constant<int, 4>{});
    case 8:
      return interleaved(std::integral_constant<int, 8>{});
    case 16:
      return interleaved(std::integral_constant<int, 16>{});
    default:
      break;
  }
  // Phases are to a row what channels are to pixels.
  const int64_t whole = count / step;
  StorePixels<T>(to, step, sums, row, whole, step, ahead, [&](int64_t) { return bias; });
  for (int64_t i = whole * step; i < count; ++i) {
    StoreSome<T>(to + i, Load<T>(sums + i % step * row + whole) + bias, 1);
  }
}

// Stores the sums of destination phases (r0, r1, all) of neighbouring channels.
// sums[(channel * phases along axis 2 + r2) * row + q]
template <class T, class E>
void StoreSums(const PhasePlan& p, const Tile& tile, int64_t n, int64_t channel, int64_t channels,
               int64_t r0, int64_t r1, const T* sums, const E* bias, E* dst) {
  const Distances& at = p.dst;
  const int64_t step = p.dst_step[2], o2 = tile.begin[2] * step;
  const int64_t count = Min(tile.size[2] * step, p.dst_size[2] - o2);
  const Valid v0 =
      ValidOf(tile.begin[0] * p.dst_step[0] + r0, p.dst_step[0], p.dst_size[0], tile.size[0]);
  const Valid v1 =
      ValidOf(tile.begin[1] * p.dst_step[1] + r1, p.dst_step[1], p.dst_size[1], tile.size[1]);
  const auto row_of = [&](int64_t a, int64_t b) {
    return dst + n * at.n + channel * at.c + ((tile.begin[0] + a) * p.dst_step[0] + r0) * at.s[0] +
           ((tile.begin[1] + b) * p.dst_step[1] + r1) * at.s[1] + o2 * at.s[2];
  };
  const auto position = [&](int64_t a, int64_t b) { return (a * p.box[1] + b) * p.box[2]; };
  if (p.dst_last != 0) {
    for (int64_t a = 0; a < v0.end; ++a) {
      for (int64_t b = 0; b < v1.end; ++b) {
        for (int64_t r2 = 0; r2 < Min(step, count); ++r2) {
          StorePixels<T>(
              row_of(a, b) + r2 * at.s[2], step * at.s[2], sums + r2 * p.row + position(a, b),
              step * p.row, (count - r2 + step - 1) / step, channels, p.dst_step[1] * at.s[1],
              [&](int64_t c) {
                return bias == nullptr ? Vec<T>{} : LoadSome<T>(bias + channel + c, channels - c);
              });
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<T> b = bias != nullptr ? Broadcast(LoadSome<T>(bias + channel + c, 1)[0]) : Vec<T>{};
    for (int64_t a0 = 0; a0 < v0.end; ++a0) {
      for (int64_t a1 = 0; a1 < v1.end; ++a1) {
        StoreRow<T>(row_of(a0, a1) + c * at.c, sums + c * step * p.row + position(a0, a1), p.row,
                    step, count, b, at.c);
      }
    }
  }
}

// The taps of a destination phase whose source phases are in [s0, s1).
struct TapRange {
  int64_t begin, end;
};
TapRange TapsOf(const PhasePlan& p, int64_t phase, int64_t s0, int64_t s1) {
  TapRange t{p.phase_begin[phase], p.phase_begin[phase + 1]};
  while (t.begin < t.end && p.taps[t.begin].slot < s0) ++t.begin;
  while (t.begin < t.end && p.taps[t.end - 1].slot >= s1) --t.end;
  return t;
}

// Fills in LiveRows::before for the one slot of a tile's panel, and returns the last of it.
int64_t CountLive(const PhasePlan& p, const Tile& tile, int64_t rows, int32_t* before) {
  int32_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    before[r] = count;
    const int64_t a = r / p.box[1], b = r % p.box[1];
    const int64_t* phase = p.slots[0].phase;
    const int64_t e0 = (tile.begin[0] + p.lo[0] + a) * p.src_step[0] + phase[0] - p.src_origin[0];
    const int64_t e1 = (tile.begin[1] + p.lo[1] + b) * p.src_step[1] + phase[1] - p.src_origin[1];
    if (a < tile.size[0] + p.span[0] && e0 >= 0 && e0 < p.src_size[0] && e1 >= 0 &&
        e1 < p.src_size[1]) {
      ++count;
    }
  }
  before[rows] = count;
  return count;
}

// A task of forward or input gradient.
struct Part {
  int64_t split, group, groups, n;
  Tile tile;
};
Part PartAt(const PhasePlan& p, int64_t task) {
  const int64_t tiles = p.tiles[0] * p.tiles[1] * p.tiles[2];
  const int64_t group_chunks = (p.groups + p.group_chunk - 1) / p.group_chunk;
  Part part;
  part.split = task % p.splits;
  part.group = task / p.splits % group_chunks * p.group_chunk;
  part.groups = Min(p.group_chunk, p.groups - part.group);
  part.tile = TileAt(p, task / p.splits / group_chunks % tiles);
  part.n = task / p.splits / tiles / group_chunks;
  return part;
}

// What PackPanel reads, to be asked for in `times` steps.
template <class T>
Ahead AheadOf(const PhasePlan& p, const void* src, const Part& part, int64_t k0, int64_t ks,
              int64_t s0, int64_t s1, int64_t times) {
  Ahead ahead;
  // Parts of rows, or residues that no tap reads, would make it more than is read.
  const bool rows = p.tiles[2] == 1 || p.src_size[0] * p.src_size[1] == 1;
  const int64_t residues = p.src_step[0] * p.src_step[1] * p.src_step[2];
  if (p.src_last != 0 || !rows || p.nslots < residues || part.n >= p.n || times == 0) return ahead;
  // Where each value meets so many of the weight, memory is a small part of the time, and what is
  // asked for drives out of the cache what is multiplied and, with several panels, all sums.
  const int64_t many = p.one_panel() ? 512 : 128;
  if (p.m * p.ntaps >= many * p.nslots) return ahead;
  int64_t first[3], count[3], step[3];
  bool same = true;  // all slots have the residue of the first
  for (int a = 0; a < 3; ++a) {
    const int64_t r0 = p.slots[s0].phase[a], r1 = p.slots[s1 - 1].phase[a];
    const int64_t origin = (part.tile.begin[a] + p.lo[a]) * p.src_step[a] - p.src_origin[a];
    const int64_t size = (part.tile.size[a] + p.span[a]) * p.src_step[a];
    same = same && r0 == r1;
    step[a] = same ? p.src_step[a] : 1;
    const Valid valid =
        ValidOf(same ? origin + r0 : origin, step[a], p.src_size[a], size / step[a]);
    if (valid.end <= valid.begin) return ahead;
    first[a] = origin + (same ? r0 : 0) + valid.begin * step[a];
    count[a] = valid.end - valid.begin;
  }
  WithElement<T>(p.in_type, [&](auto element) {
    constexpr int64_t size = sizeof element;
    const int64_t offset = part.n * p.src.n + (part.group * p.k + k0) * p.src.c +
                           first[0] * p.src.s[0] + first[1] * p.src.s[1] + first[2];
    ahead.at = static_cast<const char*>(src) + offset * size;
    ahead.bytes = ((count[2] - 1) * step[2] + 1) * size;
    ahead.stride[0] = p.src.c * size;
    ahead.stride[1] = step[0] * p.src.s[0] * size;
    ahead.stride[2] = step[1] * p.src.s[1] * size;
  });
  ahead.count[0] = part.groups * ks;
  ahead.count[1] = count[0];
  ahead.count[2] = count[1];
  for (int level = 2; level > 0; --level) {
    if (ahead.stride[level] > ahead.bytes + kLine<char>) break;
    ahead.bytes += (ahead.count[level] - 1) * ahead.stride[level];
    ahead.count[level] = 1;
  }
  for (int level = 0; level < 3; ++level) {
    ahead.begin[level] = ahead.at;
    ahead.left[level] = ahead.count[level];
  }
  ahead.end = ahead.at + ahead.bytes;
  const int64_t runs = ahead.count[0] * ahead.count[1] * ahead.count[2];
  ahead.each = (runs * (ahead.bytes / kLine<char> + 1) + times - 1) / times;
  return ahead;
}

template <class T>
void Correlate(const PhasePlan& p, const PhaseOperands& ops, int64_t task, void* scratch) {
  T* panel = static_cast<T*>(scratch);
  T* sums = panel + p.panel_size;
  const Part part = PartAt(p, task);
  const Tile& tile = part.tile;
  const int64_t split = part.split, group = part.group, groups = part.groups, n = part.n;

  // The blocks of all groups of the task, one after the other.
  const int64_t first_block = p.nblocks * split / p.splits;
  const int64_t blocks = p.nblocks * (split + 1) / p.splits - first_block;
  const int64_t segments = p.segments == 1 ? 1 : tile.size[0], step = p.dst_step[2];
  const int64_t span = SpanOf(p, tile);
  WholeRows whole;
  const int64_t rest = tile.size[2] % kLanes<T>;
  if ((rest == 0 || rest == kLanes<T> / 2) && (p.box[2] > tile.size[2] || segments > 1)) {
    whole = {tile.size[2] / kLanes<T>, rest > 0, tile.size[1], tile.size[0], p.box[2],
             p.box[1] * p.box[2]};
  }
  int32_t live_before[kMaxLiveRows + 1];
  LiveRows live{nullptr, p.box[2]};
  if (p.one_panel()) {
    PackPanel<T>(p, ops.src, n, group, groups, tile, 0, p.k, 0, p.nslots, panel);
    const int64_t rows = ((tile.size[0] + p.span[0]) * p.box[1] * p.box[2] + p.tail) / p.box[2] + 1;
    if (p.nslots == 1 && p.ntaps <= kMaxListed && rows <= kMaxLiveRows && p.k >= 8 &&
        CountLive(p, tile, rows, live_before) < (tile.size[0] + p.span[0]) * p.box[1]) {
      live.before = live_before;
    }
  }
  // A panel is asked for while the one before it is multiplied, in so many steps a tap.
  const Part next = PartAt(p, task + 1);
  const int64_t vectors = (span + kLanes<T> - 1) / kLanes<T>;
  const int64_t runs = vectors / MaxNr(static_cast<int>(p.blocks[0].mr)) + 1;
  const int64_t steps = groups * blocks * segments * runs;
  Ahead ahead;
  if (p.one_panel() && next.split == 0) {
    ahead = AheadOf<T>(p, ops.src, next, 0, p.k, 0, p.nslots, steps * p.ntaps);
  }
  for (int64_t r01 = 0; r01 < p.dst_step[0] * p.dst_step[1]; ++r01) {
    for (int64_t b0 = 0; b0 < groups * blocks; b0 += p.acc_blocks) {
      const int64_t b1 = Min(b0 + p.acc_blocks, groups * blocks);
      int64_t channels = 0;
      for (int64_t k0 = 0; k0 < p.k; k0 += p.k_chunk) {
        const int64_t ks = Min(p.k_chunk, p.k - k0);
        for (int64_t s0 = 0; s0 < Max(p.nslots, 1); s0 += p.slot_chunk) {
          const int64_t s1 = Min(s0 + p.slot_chunk, p.nslots);
          if (!p.one_panel()) {
            PackPanel<T>(p, ops.src, n, group, groups, tile, k0, ks, s0, s1, panel);
            int64_t s_next = s1 < p.nslots ? s1 : 0, k_next = s1 < p.nslots ? k0 : k0 + ks;
            const bool last = k_next >= p.k;
            if (last) k_next = 0;
            ahead = AheadOf<T>(p, ops.src, last && b1 == groups * blocks ? next : part, k_next,
                               Min(p.k_chunk, p.k - k_next), s_next,
                               Min(s_next + p.slot_chunk, p.nslots),
                               steps * p.ntaps * (s1 - s0) / Max(p.nslots, 1));
          }
          channels = 0;
          for (int64_t b = b0; b < b1; ++b) {
            const int64_t g = b / blocks;
            const Block block = p.blocks[first_block + b % blocks];
            for (int64_t r2 = 0; r2 < step; ++r2) {
              const int64_t r = r01 * step + r2, first = p.phase_begin[r];
              const int64_t taps = p.phase_begin[r + 1] - first;
              const TapRange t = TapsOf(p, r, s0, s1);
              const T* weight = static_cast<const T*>(ops.workspace) +
                                (group + g) * p.k * p.m * p.ntaps +
                                p.k * (first * p.m + block.m0 * taps) +
                                (k0 * taps + (t.begin - first) * ks) * block.mr;
              const auto run = [&](auto kernel, int64_t count) {
                const int64_t slot_size = groups * ks * p.plane;
                const Factors factors{p.taps + t.begin, t.end - t.begin, ks, p.plane, slot_size};
                for (int64_t i = 0; i < count; ++i) {
                  kernel(weight, panel + g * ks * p.plane - s0 * slot_size, factors, live, whole,
                         i * p.box[1] * p.box[2], span, sums + (channels * step + r2) * p.row,
                         step * p.row, k0 > 0 || s0 > 0, ahead);
                }
              };
              switch (block.mr) {
                case 1:
                  run(MultiplySpan<T, 1, false>, segments);
                  break;
                case 2:
                  run(MultiplySpan<T, 2, false>, segments);
                  break;
                case 4:
                  run(MultiplySpan<T, 4, false>, segments);
                  break;
                default:
                  whole.vectors > 0 ? run(MultiplySpan<T, kMaxMr, true>, 1)
                                    : run(MultiplySpan<T, kMaxMr, false>, segments);
              }
            }
            channels += block.mr;
          }
        }
      }
      const int64_t channel = (group + b0 / blocks) * p.m + p.blocks[first_block + b0 % blocks].m0;
      WithElement<T>(p.out_type, [&](auto element) {
        using E = decltype(element);
        StoreSums<T, E>(p, tile, n, channel, channels, r01 / p.dst_step[1], r01 % p.dst_step[1],
                        sums, static_cast<const E*>(ops.bias), static_cast<E*>(ops.dst));
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Weight gradient

// Runs of vectors, `stride` elements apart.
struct Segments {
  int64_t count, stride, vectors;
};

// to[m][t] (+)= sum over positions q of x[m][q] * columns[t][q], for mr rows and nr columns
template <class T, int mr, int nr>
__attribute__((noinline)) void Contract(const T* x, int64_t row, const T* const* columns,
                                        const Segments& segments, T* const* to, int64_t to_row,
                                        bool add) {
  constexpr int lanes = kLanes<T>;
  const T* from[nr];
#pragma GCC unroll 8
  for (int c = 0; c < nr; ++c) from[c] = columns[c];
  Vec<T> acc[mr * nr] = {};
  const int64_t vectors = segments.vectors;
  for (int64_t i = 0; i < segments.count; ++i) {
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<T> xs[mr];
#pragma GCC unroll 4
      for (int m = 0; m < mr; ++m) xs[m] = Load<T>(x + m * row + v * lanes);
#pragma GCC unroll 8
      for (int c = 0; c < nr; ++c) {
        const Vec<T> y = Load<T>(from[c] + v * lanes);
#pragma GCC unroll 4
        for (int m = 0; m < mr; ++m) acc[c * mr + m] += xs[m] * y;
      }
    }
    x += segments.stride;
#pragma GCC unroll 8
    for (int c = 0; c < nr; ++c) from[c] += segments.stride;
  }
  constexpr int count = mr * nr, at_once = lanes < 8 ? lanes : 8;
#pragma GCC unroll 8
  for (int i = 0; i < count; i += at_once) {
    Vec<T> v[at_once];
#pragma GCC unroll 8
    for (int j = 0; j < at_once; ++j) v[j] = i + j < count ? acc[(i + j) % count] : Vec<T>{};
    AddLanes<T, at_once>(v);
#pragma GCC unroll 8
    for (int j = 0; j < at_once; ++j) {
      if (i + j < count) {
        T& sum = to[(i + j) / mr][(i + j) % mr * to_row];
        sum = add ? sum + v[0][j] : v[0][j];
      }
    }
  }
}

#if JAXCONV_REGISTERS == 32
constexpr int kMaxRows = 4;
constexpr int Columns(int mr) { return mr == 4 ? 6 : 8; }
#else
constexpr int kMaxRows = 2;
constexpr int Columns(int mr) { return mr == 2 ? 6 : 8; }
#endif

template <class T, int mr>
void ContractRows(const T* x, int64_t row, const T* const* columns, int64_t ncolumns,
                  const Segments& segments, T* const* to, int64_t to_row, bool add) {
  const auto run = [&](auto kernel, int64_t c) {
    kernel(x, row, columns + c, segments, to + c, to_row, add);
  };
  constexpr int nr = Columns(mr);
  if (ncolumns == nr) return run(Contract<T, mr, nr>, 0);
  int64_t c = 0;
  for (; c + 4 <= ncolumns; c += 4) run(Contract<T, mr, 4>, c);
  if (ncolumns - c >= 2) {
    run(Contract<T, mr, 2>, c);
    c += 2;
  }
  if (c < ncolumns) run(Contract<T, mr, 1>, c);
}

// Task (group chunk, split of the source's channels, part): the part's share of the tiles of all
// images.
template <class T>
void WeightGrad(const PhasePlan& p, const PhaseOperands& ops, int64_t task, void* scratch) {
  T* panel = static_cast<T*>(scratch);
  T* rows = panel + p.panel_size;
  const int64_t part = task % p.parts, split = task / p.parts % p.splits;
  const int64_t group = task / p.parts / p.splits * p.group_chunk;
  const int64_t groups = Min(p.group_chunk, p.groups - group);
  const int64_t k_begin = p.k * split / p.splits, k_end = p.k * (split + 1) / p.splits;
  const int64_t tiles = p.tiles[0] * p.tiles[1] * p.tiles[2], units = p.n * tiles;

  // dw[group][m][k][t] of the part
  const int64_t size = p.groups * p.m * p.k * p.ntaps, to_row = p.k * p.ntaps;
  T* sums = static_cast<T*>(ops.workspace) + part * size + group * p.m * to_row;
  constexpr int64_t kRowsInL1 = 16;
  constexpr int64_t lanes = kLanes<T>;
  constexpr int64_t kOrigin[3] = {0, 0, 0};
  const Source x_source{p.dst, p.dst_size, p.dst_step, kOrigin, p.n * p.dst.n};
  const Slot whole{{0, 0, 0}, 1, 1};
  for (int64_t u = units * part / p.parts; u < units * (part + 1) / p.parts; ++u) {
    const int64_t n = u / tiles;
    const Tile tile = TileAt(p, u % tiles);
    const Segments segments{p.segments == 1 ? 1 : tile.size[0], p.box[1] * p.box[2],
                            (SpanOf(p, tile) + lanes - 1) / lanes};
    const bool first = u == units * part / p.parts;
    // x lies in the same boxes as y, with zeros where a box is not of the tile.
    WithElement<T>(p.in_type, [&](auto element) {
      using E = decltype(element);
      PackPlanes<T>(x_source, p.dst_last != 0, static_cast<const E*>(ops.dst), n, group * p.m,
                    groups * p.m, &whole, 0, 1, tile.begin, tile.size, p.box, 1, rows, p.row);
    });
    for (int64_t k0 = k_begin; k0 < k_end; k0 += p.k_chunk) {
      const int64_t ks = Min(p.k_chunk, k_end - k0);
      for (int64_t s0 = 0; s0 < p.nslots; s0 += p.slot_chunk) {
        const int64_t s1 = Min(s0 + p.slot_chunk, p.nslots);
        const TapRange t = TapsOf(p, 0, s0, s1);
        const int64_t taps = t.end - t.begin, slot_size = groups * ks * p.plane;
        PackPanel<T>(p, ops.src, n, group, groups, tile, k0, ks, s0, s1, panel);
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t r0 = 0; r0 < p.m; r0 += kRowsInL1) {
            const int64_t r1 = Min(r0 + kRowsInL1, p.m);
            const int64_t mr = r1 - r0 >= kMaxRows ? kMaxRows : r1 - r0 >= 2 ? 2 : 1;
            const int64_t nr = Columns(static_cast<int>(mr));
            // A column is a tap of a source channel: neighbours read nearly the same of the panel.
            for (int64_t c0 = 0; c0 < ks * taps; c0 += nr) {
              const int64_t columns = Min(nr, ks * taps - c0);
              const T* from[8];
              T* to[8];
              for (int64_t c = 0; c < columns; ++c) {
                const int64_t k = (c0 + c) / taps;
                const Tap& tap = p.taps[t.begin + (c0 + c) % taps];
                from[c] = panel + (tap.slot - s0) * slot_size + (g * ks + k) * p.plane + tap.rel;
                to[c] = sums + (g * p.m + r0) * to_row + (k0 + k) * p.ntaps + tap.t;
              }
              int64_t r = r0;
              const auto run = [&](auto kernel, int64_t count) {
                for (; r + count <= r1; r += count) {
                  kernel(rows + (g * p.m + r) * p.row, p.row, from, columns, segments, to, to_row,
                         !first);
                  for (int64_t c = 0; c < columns; ++c) to[c] += count * to_row;
                }
              };
              if constexpr (kMaxRows == 4) {
                if (mr == 4) run(ContractRows<T, 4>, 4);
              }
              run(ContractRows<T, 2>, 2);
              run(ContractRows<T, 1>, 1);
            }
          }
        }
      }
    }
  }
}

template <class T>
void AddParts(DType out_type, int64_t size, int64_t parts, const T* from, void* dw, int64_t task,
              int64_t tasks) {
  constexpr int lanes = kLanes<T>;
  const int64_t vectors = (size + lanes - 1) / lanes;
  WithElement<T>(out_type, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(dw);
    for (int64_t v = vectors * task / tasks; v < vectors * (task + 1) / tasks; ++v) {
      const int64_t i = v * lanes, some = size - i;
      Vec<T> sum = LoadSome<T>(from + i, some);
      for (int64_t part = 1; part < parts; ++part) {
        sum += LoadSome<T>(from + part * size + i, some);
      }
      StoreSome<T>(to + i, sum, some);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// The types of sums

void PackWeightOf(const PhasePlan& p, const void* w, void* packed, int64_t task, int64_t tasks) {
  p.in_type == DType::kF64 ? PackWeight<double>(p, w, packed, task, tasks)
                           : PackWeight<float>(p, w, packed, task, tasks);
}
void CorrelateOf(const PhasePlan& p, const PhaseOperands& ops, int64_t task, void* scratch) {
  p.in_type == DType::kF64 ? Correlate<double>(p, ops, task, scratch)
                           : Correlate<float>(p, ops, task, scratch);
}
void WeightGradOf(const PhasePlan& p, const PhaseOperands& ops, int64_t task, void* scratch) {
  p.in_type == DType::kF64 ? WeightGrad<double>(p, ops, task, scratch)
                           : WeightGrad<float>(p, ops, task, scratch);
}
void AddPartsOf(DType in_type, DType out_type, int64_t size, int64_t parts, const void* sums,
                void* dw, int64_t task, int64_t tasks) {
  in_type == DType::kF64
      ? AddParts(out_type, size, parts, static_cast<const double*>(sums), dw, task, tasks)
      : AddParts(out_type, size, parts, static_cast<const float*>(sums), dw, task, tasks);
}

}  // namespace

extern const PhaseKernels JAXCONV_PHASES = {kBytes,      kMaxMr,       PackWeightOf,
                                            CorrelateOf, WeightGradOf, AddPartsOf};

}  // namespace jaxconv::cpu
