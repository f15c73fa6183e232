#include "cuda/across.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <utility>

#include "cuda/dense_grad.h"
#include "cuda/device_limits.h"
#include "cuda/plan_memo.h"
#include "cuda/sum_parts.cuh"
#include "cuda/weight_grad.h"

namespace jaxconv::cuda {
namespace {

constexpr AcrossVariant kVariants[] = {
#define JAXCONV_CASE(NT, P) {NT, P},
    JAXCONV_ACROSS_VARIANTS(JAXCONV_CASE)
#undef JAXCONV_CASE
};

constexpr int kMostChannels = 64, kElement = 2;  // bytes
constexpr int kMostBox = 256;                    // pixels of a bulk copy along an axis

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  if (!HasWgmma(device.compute_capability)) return "needs compute capability 9.0";
  if (SizeOf(p.in_dtype) != kElement) return "takes operands of 16 bits";
  if (!p.channels_last) return "takes channels last";
  if (p.ci > kMostChannels || p.co > kMostChannels)
    return "takes at most 64 channels, of all groups";
  if (p.ci % 8 != 0 || p.co % 8 != 0) return "takes a multiple of 8 channels";
  if (p.cig() == 1 && p.cog() == 1) return "would multiply each channel with all others";
  if (Product(p.k) > AcrossArgs::kMaxEntries) {
    return "takes at most " + std::to_string(AcrossArgs::kMaxEntries) + " taps";
  }
  int64_t residues = 1;
  for (int i = 0; i < kAxes; ++i) {
    if (p.k[i] * p.dilation[i] + std::abs(p.pad[i]) + p.stride[i] > 1 << 13) {
      return "takes kernels that reach over less than 2^13 outputs";
    }
    if (p.osize[i] < p.stride[i]) return "takes outputs at least as long as the stride";
    residues *= std::min(p.stride[i] / std::gcd(p.stride[i], p.dilation[i]), p.k[i]);
  }
  if (residues > kAcrossMaps) return "takes kernels that read few residues by the stride";
  constexpr int64_t kMost = int64_t{1} << 31;
  if (Product(p.isize) >= kMost || Product(p.osize) >= kMost) {
    return "counts the pixels of an image in 32 bits";
  }
  return "";
}

// The taps of an axis that read outputs of one residue by the stride, that is at stride * (input +
// place) + residue: every so manieth, at places that are as far apart.
struct Class {
  int residue, place;  // of the first
  std::vector<int> taps;
};

struct Axis {
  std::vector<Class> classes;
  int pitch;  // of the places
  int most;   // taps of a class
};

Axis AxisOf(const Problem& p, int i) {
  Axis axis{{}, static_cast<int>(p.dilation[i] / std::gcd(p.dilation[i], p.stride[i])), 0};
  for (int t = 0; t < p.k[i]; ++t) {
    const int64_t shift = t * p.dilation[i] - p.pad[i];
    const int place = static_cast<int>(FloorDiv(shift, p.stride[i]));
    const int residue = static_cast<int>(shift - place * p.stride[i]);
    auto known = std::find_if(axis.classes.begin(), axis.classes.end(),
                              [&](const Class& c) { return c.residue == residue; });
    if (known == axis.classes.end()) {
      axis.classes.push_back({residue, place, {}});
      known = axis.classes.end() - 1;
    }
    known->taps.push_back(t);
    axis.most = std::max(axis.most, static_cast<int>(known->taps.size()));
  }
  return axis;
}

// How products cover the taps. An operand has `count` shifts along an axis, `pitch` apart.
struct Shifts {
  int axis, count, pitch;
};

struct Cut {
  AcrossVariant variant;
  bool rows_x;
  int row_piece, column_piece, pieces;  // channels; pieces of the columns
  int split;
  Shifts x, y;
};

// A product: where y begins, of which residue; the piece of the columns; the index, in dw, of the
// tap of each shift of x and y, or -1.
struct Tile {
  std::array<int, kAxes> residue, place;
  int piece;
  std::vector<int> taps;  // [x][y]
};

struct Box {
  std::array<int, kAxes> residue;
  int piece;                         // of y
  std::array<int, kAxes> low, high;  // places
};

// The products of a cut in chunks.
struct Products {
  std::vector<Tile> tiles;
  int chunks, chunk_tiles;
  std::vector<std::vector<Box>> boxes;  // of y, by chunk
  std::array<int, kAxes> reach;         // of the largest
  int most_boxes;
  double sectors;  // of a (ci, co) in dw
};

// With shifts of x by a * pitch (a < count) and of y by place + b * pitch, a product has the taps
// at place + b * pitch - a * pitch. Where both go along one axis, those of y are apart by all of x.
Products ProductsOf(const Problem& p, const std::array<Axis, kAxes>& axes, const Cut& c) {
  Products all{};
  std::array<int, kAxes> group{1, 1, 1};
  group[c.x.axis] *= c.x.count;
  group[c.y.axis] *= c.y.count;
  std::set<std::pair<int, int>> taken;
  std::array<size_t, kAxes> at;
  for (at[0] = 0; at[0] < axes[0].classes.size(); ++at[0]) {
    for (at[1] = 0; at[1] < axes[1].classes.size(); ++at[1]) {
      for (at[2] = 0; at[2] < axes[2].classes.size(); ++at[2]) {
        std::array<std::vector<int>, kAxes> starts;
        std::array<const Class*, kAxes> of;
        for (int i = 0; i < kAxes; ++i) {
          of[i] = &axes[i].classes[at[i]];
          const int count = static_cast<int>(of[i]->taps.size());
          // The last ones overlap, rather than reach further.
          for (int k = 0; k < count; k += group[i]) {
            starts[i].push_back(std::max(0, std::min(k, count - group[i])));
          }
        }
        for (int d : starts[0]) {
          for (int h : starts[1]) {
            for (int w : starts[2]) {
              for (int piece = 0; piece < c.pieces; ++piece) {
                const std::array<int, kAxes> k{d, h, w};
                Tile tile{{}, {}, piece, {}};
                for (int i = 0; i < kAxes; ++i) {
                  const int first = k[i] + (i == c.x.axis ? c.x.count - 1 : 0);
                  tile.residue[i] = of[i]->residue;
                  tile.place[i] = of[i]->place + first * axes[i].pitch;
                }
                for (int a = 0; a < c.x.count; ++a) {
                  for (int b = 0; b < c.y.count; ++b) {
                    int tap = 0;
                    for (int i = 0; i < kAxes; ++i) {
                      const size_t mine = k[i] + (i == c.x.axis ? c.x.count - 1 - a : 0) +
                                          (i == c.y.axis ? b * (group[i] / c.y.count) : 0);
                      tap = tap < 0 || mine >= of[i]->taps.size()
                                ? -1
                                : tap * static_cast<int>(p.k[i]) + of[i]->taps[mine];
                    }
                    if (tap >= 0 && !taken.insert({tap, piece}).second) tap = -1;
                    tile.taps.push_back(tap);
                  }
                }
                all.tiles.push_back(tile);
              }
            }
          }
        }
      }
    }
  }
  const int slots = c.variant.products * (c.split == 1 ? kAcrossGroups : 1);
  const int count = static_cast<int>(all.tiles.size());
  all.chunks = static_cast<int>(CeilDiv(count, slots));
  all.chunk_tiles = static_cast<int>(CeilDiv(count, all.chunks));
  all.chunks = static_cast<int>(CeilDiv(count, all.chunk_tiles));
  for (int chunk = 0; chunk < all.chunks; ++chunk) {
    std::vector<Box> boxes;
    std::vector<int> taps;
    const int end = std::min(count, (chunk + 1) * all.chunk_tiles);
    for (int t = chunk * all.chunk_tiles; t < end; ++t) {
      const Tile& tile = all.tiles[t];
      std::array<int, kAxes> high = tile.place;
      high[c.y.axis] += (c.y.count - 1) * c.y.pitch;
      const int piece = c.rows_x ? tile.piece : 0;
      auto box = std::find_if(boxes.begin(), boxes.end(), [&](const Box& b) {
        return b.residue == tile.residue && b.piece == piece;
      });
      if (box == boxes.end()) {
        boxes.push_back({tile.residue, piece, tile.place, high});
        box = boxes.end() - 1;
      }
      for (int i = 0; i < kAxes; ++i) {
        box->low[i] = std::min(box->low[i], tile.place[i]);
        box->high[i] = std::max(box->high[i], high[i]);
        all.reach[i] = std::max(all.reach[i], box->high[i] - box->low[i]);
      }
      taps.insert(taps.end(), tile.taps.begin(), tile.taps.end());
    }
    std::sort(taps.begin(), taps.end());
    int sector = -1;
    for (const int tap : taps) {
      if (tap >= 0 && tap / 8 != sector) all.sectors += 1;
      if (tap >= 0) sector = tap / 8;
    }
    all.most_boxes = std::max(all.most_boxes, static_cast<int>(boxes.size()));
    all.boxes.push_back(std::move(boxes));
  }
  return all;
}

// How the pixels are cut.
struct Walk {
  std::array<int, kAxes> box;
  int cluster;
};

int PixelsOf(const int (&box)[kAxes]) { return box[0] * box[1] * box[2]; }

// Fills what the cost needs; false where it does not fit.
bool Fill(const Problem& p, const Device& device, const Cut& c, const Products& products,
          const Walk& walk, AcrossPlan& plan) {
  AcrossArgs& a = plan.args;
  const int columns = 8 * c.variant.tiles;
  plan.variant = c.variant;
  a.rows_x = c.rows_x;
  a.split = c.split;
  a.chunks = products.chunks;
  a.products = static_cast<int>(products.tiles.size());
  a.chunk_products = products.chunk_tiles;
  a.cluster = walk.cluster;
  int64_t tiles = p.n;
  for (int i = 0; i < kAxes; ++i) {
    a.box[i] = walk.box[i];
    a.before[i] = i == c.x.axis ? (c.x.count - 1) * c.x.pitch : 0;
    a.x_box[i] = a.box[i] + a.before[i];
    a.y_box[i] = a.box[i] + products.reach[i];
    if (a.x_box[i] > kMostBox || a.y_box[i] > kMostBox) return false;
    a.tiles_of[i] = static_cast<int>(CeilDiv(p.isize[i] + a.before[i], a.box[i]));
    tiles *= a.tiles_of[i];
  }
  if (tiles > std::numeric_limits<int>::max()) return false;
  a.tiles = static_cast<int>(tiles);
  a.steps = PixelsOf(a.box) / kAcrossStep;
  if (a.steps < c.split) return false;
  const int row_bytes = c.row_piece * kElement, column_bytes = c.column_piece * kElement;
  a.x_row = c.rows_x ? row_bytes : column_bytes;
  a.y_row = c.rows_x ? column_bytes : row_bytes;
  a.box_bytes[0] = PixelsOf(a.x_box) * a.x_row;
  a.box_bytes[1] = PixelsOf(a.y_box) * a.y_row;
  const int x_pieces = c.rows_x ? 1 : c.pieces;
  // Swizzled rows begin at multiples of 1024 bytes.
  a.stage_y = static_cast<int>(x_pieces * RoundUp(a.box_bytes[0], 1024));
  a.stage_bytes = static_cast<int>(a.stage_y + products.most_boxes * RoundUp(a.box_bytes[1], 1024));
  a.smem_steps = 16 * kAcrossStages;
  a.smem_stages = static_cast<int>(RoundUp(a.smem_steps + 8 * a.steps, 1024));
  const int64_t limit = SharedMemoryOfBlock(device.compute_capability);
  a.stages =
      static_cast<int>(std::min<int64_t>((limit - a.smem_stages) / a.stage_bytes, kAcrossStages));
  if (a.stages < 2) return false;
  const int slots = c.variant.products * (c.split == 1 ? kAcrossGroups : 1);
  // Results take the place of the stages, with the chunk's entries behind them.
  a.row_piece = c.row_piece;
  a.smem_entries = a.smem_stages + AcrossRow(slots * 64, c.row_piece, columns + 8) * 4;
  a.smem =
      std::max(a.smem_stages + a.stages * a.stage_bytes,
               a.smem_entries + AcrossArgs::kMaxEntries * static_cast<int>(sizeof(AcrossEntry)));
  if (a.smem > limit) return false;

  // Parts: of clusters as many as run at once, and as have room.
  const int64_t at_once = ClustersAtOnce(device.multiprocessors, a.cluster) * a.cluster;
  const int64_t room = p.YElements() * kElement / 10;
  int64_t parts = at_once / (int64_t{a.chunks} * a.cluster);
  parts = std::min({parts, room / (4 * p.WElements()), tiles / a.cluster});
  a.parts = static_cast<int>(std::max<int64_t>(parts, 1));
  plan.blocks = a.chunks * a.cluster * a.parts;
  const int64_t block_tiles = CeilDiv(tiles, int64_t{a.parts} * a.cluster);
  plan.workspace = a.parts > 1 ? 4 * a.parts * p.WElements() : 0;
  plan.kept_offset = RoundUp(plan.workspace, 128);
  const int64_t sums = int64_t{c.variant.products} * c.variant.tiles * 4 * 128 * kAcrossGroups;
  const int64_t kept = plan.blocks * sums * 4;
  a.flush = std::max(1, kWeightGradFlush / (a.steps / c.split));
  if (block_tiles <= a.flush || plan.kept_offset + kept > room) {
    a.flush = 0;
  } else {
    plan.workspace = plan.kept_offset + kept;
  }

  // Cycles of a stage: of the tensor cores, of shared memory, and of copies from the L2 cache.
  constexpr double kClock = 1.7e9;
  const double issued = double{1} * a.steps * c.variant.products * kAcrossGroups / c.split;
  const double tensor = issued * columns / 2, shared = issued * (16 + columns / 4.0);
  double boxes = 0;
  for (const std::vector<Box>& chunk : products.boxes) {
    boxes += static_cast<double>(chunk.size()) / a.chunks;
  }
  const double copied = x_pieces * a.box_bytes[0] + boxes * a.box_bytes[1];
  const double l2 = copied / 22;
  const double multiply = 1.1 * std::max(tensor, shared);
  const double late = (2000 + 0.5 * l2 + multiply) / a.stages;
  const double stage = std::max({multiply, l2, late}) + 200;
  const double waves = static_cast<double>(CeilDiv(plan.blocks, at_once));
  const double bytes = static_cast<double>(p.XElements() + p.YElements()) * kElement;
  const double least = bytes / (bytes > 40e6 ? 3.0e12 : 4e12);
  const double stored = static_cast<double>(p.WElements()) / a.chunks;
  double seconds = std::max(waves * static_cast<double>(block_tiles) * stage / kClock, least) +
                   waves * (3e-6 + (static_cast<double>(sums) * 0.05 + stored * 0.35) / kClock) +
                   4e-6;
  seconds += a.parts * products.sectors * static_cast<double>(p.ci * p.cog()) / 170e9;
  if (a.flush > 0) {
    seconds +=
        static_cast<double>(block_tiles / a.flush) * static_cast<double>(sums) * 8 / 22 / kClock;
  }
  if (a.parts > 1) seconds += 3e-6 + 4.0 * a.parts * static_cast<double>(p.WElements()) / 2e12;
  // In 1D, where "dense" is good, short layers take longer (16 layers, H200).
  plan.seconds = seconds * (p.isize[0] * p.isize[1] == 1 ? 1.15 : 1.0);
  return true;
}

// A bulk copy's box of pixels: those of y are `stride` apart, from `residue` on.
DenseMap MapOf(const Problem& p, bool x, int piece, const int (&box)[kAxes],
               const std::array<int, kAxes>& residue) {
  DenseMap m{};
  const Sizes& size = x ? p.isize : p.osize;
  const Strides strides = x ? p.XStrides() : p.YStrides();
  m.size[0] = static_cast<uint64_t>(x ? p.ci : p.co);
  m.size[4] = static_cast<uint64_t>(p.n);
  m.stride[3] = static_cast<uint64_t>(strides.n * kElement);
  m.box[0] = static_cast<uint32_t>(piece);
  m.box[4] = 1;
  m.row_bytes = piece * kElement;
  std::fill(std::begin(m.step), std::end(m.step), 1);
  for (int i = 0; i < kAxes; ++i) {
    const int64_t stride = x ? 1 : p.stride[i];
    m.size[3 - i] = static_cast<uint64_t>(CeilDiv(size[i] - residue[i], stride));
    m.stride[2 - i] = static_cast<uint64_t>(strides.s[i] * stride * kElement);
    m.box[3 - i] = static_cast<uint32_t>(box[i]);
    m.offset += residue[i] * strides.s[i] * kElement;
  }
  return m;
}

// The parts of a descriptor that are not the address: pieces of `row` bytes, `apart` bytes apart.
AcrossOperand OperandOf(int64_t channels, int64_t groups, int row, int apart) {
  const uint32_t swizzle = row == 128 ? 1 : row == 64 ? 2 : 3;
  return {static_cast<int>(channels), static_cast<int>(channels / groups),
          swizzle << 30 | static_cast<uint32_t>(row * 8 / 16),
          static_cast<uint32_t>(apart / 16) << 16};
}

// Fills what the choice does not need; false where that does not fit.
bool Complete(const Problem& p, const Cut& c, const Products& products, AcrossPlan& plan) {
  AcrossArgs& a = plan.args;
  const auto distance = [](const Shifts& s, const int (&box)[kAxes], int row) {
    int pixels = s.pitch;
    for (int i = s.axis + 1; i < kAxes; ++i) pixels *= box[i];
    return pixels * row;
  };
  const AcrossOperand x = OperandOf(p.ci, p.groups, a.x_row, distance(c.x, a.x_box, a.x_row));
  const AcrossOperand y = OperandOf(p.co, p.groups, a.y_row, distance(c.y, a.y_box, a.y_row));
  a.rows = c.rows_x ? x : y;
  a.columns = c.rows_x ? y : x;
  a.w_elements = p.WElements();
  a.cog = static_cast<int>(p.cog());
  a.taps = static_cast<int>(Product(p.k));
  while (1 << a.log_piece < c.column_piece) ++a.log_piece;
  const int x_pieces = c.rows_x ? 1 : c.pieces;
  const int x_bytes = static_cast<int>(RoundUp(a.box_bytes[0], 1024));
  const int y_bytes = static_cast<int>(RoundUp(a.box_bytes[1], 1024));
  plan.maps = {MapOf(p, true, a.x_row / kElement, a.x_box, {0, 0, 0})};
  std::vector<std::array<int, kAxes>> residues;  // of the maps
  int boxes = 0, entries = 0;
  const int pitch = 8 * c.variant.tiles + 8;  // of staged results
  for (int chunk = 0; chunk < a.chunks; ++chunk) {
    const std::vector<Box>& mine = products.boxes[chunk];
    a.first_box[chunk] = static_cast<uint16_t>(boxes);
    a.first_entry[chunk] = static_cast<uint16_t>(entries);
    if (boxes + x_pieces + static_cast<int>(mine.size()) > AcrossArgs::kMaxEntries) return false;
    for (int piece = 0; piece < x_pieces; ++piece) {
      a.boxes[boxes++] = {
          piece * x_bytes, {0, 0, 0}, 0, static_cast<int16_t>(piece * c.column_piece)};
    }
    for (size_t i = 0; i < mine.size(); ++i) {
      auto known = std::find(residues.begin(), residues.end(), mine[i].residue);
      const auto map = known - residues.begin();
      if (known == residues.end()) {
        if (static_cast<int>(residues.size()) == kAcrossMaps) return false;
        residues.push_back(mine[i].residue);
        plan.maps.push_back(MapOf(p, false, a.y_row / kElement, a.y_box, mine[i].residue));
      }
      AcrossBox& box = a.boxes[boxes++];
      box.offset = a.stage_y + static_cast<int>(i) * y_bytes;
      box.map = static_cast<int16_t>(1 + map);
      box.channel = static_cast<int16_t>(mine[i].piece * c.column_piece);
      for (int k = 0; k < kAxes; ++k) box.at[k] = static_cast<int16_t>(mine[i].low[k]);
    }
    const int first = chunk * a.chunk_products;
    const int end = std::min(first + a.chunk_products, a.products);
    for (int t = first; t < end; ++t) {
      const Tile& tile = products.tiles[t];
      const auto box = std::find_if(mine.begin(), mine.end(), [&](const Box& b) {
        return b.residue == tile.residue && b.piece == (c.rows_x ? tile.piece : 0);
      });
      int pixel = 0;
      for (int i = 0; i < kAxes; ++i) pixel = pixel * a.y_box[i] + tile.place[i] - box->low[i];
      const int y_at =
          (a.stage_y + static_cast<int>(box - mine.begin()) * y_bytes + pixel * a.y_row) / 16;
      const int x_at = c.rows_x ? 0 : tile.piece * x_bytes / 16;
      a.product[t] = {static_cast<uint16_t>(c.rows_x ? x_at : y_at),
                      static_cast<uint16_t>(c.rows_x ? y_at : x_at)};
      for (int i = 0; i < c.x.count; ++i) {
        for (int j = 0; j < c.y.count; ++j) {
          const int tap = tile.taps[i * c.y.count + j];
          if (tap < 0) continue;
          if (entries == AcrossArgs::kMaxEntries) return false;
          const int row = (t - first) * 64 + (c.rows_x ? i : j) * c.row_piece;
          const int column = (c.rows_x ? j : i) * c.column_piece;
          a.entry[entries++] = {AcrossRow(row, c.row_piece, pitch) + column,
                                static_cast<uint16_t>(tap), static_cast<uint16_t>(tile.piece)};
        }
      }
    }
    std::sort(a.entry + a.first_entry[chunk], a.entry + entries,
              [](const AcrossEntry& a, const AcrossEntry& b) {
                return std::make_pair(a.piece, a.tap) < std::make_pair(b.piece, b.tap);
              });
  }
  a.first_box[a.chunks] = static_cast<uint16_t>(boxes);
  a.first_entry[a.chunks] = static_cast<uint16_t>(entries);
  plan.refusal.clear();
  return true;
}

// Channels of a row in shared memory: of as many, or of more.
int PieceOf(int64_t channels) { return channels > 32 ? 64 : channels > 16 ? 32 : 16; }

template <class Visit>
void ForEachCut(const Problem& p, const std::array<Axis, kAxes>& axes, Visit visit) {
  // Rows of several shifts want an axis of several taps, if there is one.
  const int most = std::max({axes[0].most, axes[1].most, axes[2].most});
  for (const bool rows_x : {true, false}) {
    const int row_piece = PieceOf(rows_x ? p.ci : p.co);
    const int64_t channels = rows_x ? p.co : p.ci;
    const int row_shifts = 64 / row_piece;
    for (const AcrossVariant& variant : kVariants) {
      for (int piece = PieceOf(channels); piece >= 16; piece /= 2) {
        const int pieces = static_cast<int>(CeilDiv(channels, piece));
        const int shifts = 8 * variant.tiles / piece;
        if (8 * variant.tiles % piece != 0) continue;
        for (int row_axis = 0; row_axis < kAxes; ++row_axis) {
          if (row_shifts == 1 || most == 1 ? row_axis > 0 : axes[row_axis].most == 1) continue;
          for (int axis = 0; axis < kAxes; ++axis) {
            const bool both = row_shifts > 1 && axis == row_axis;
            if (shifts == 1 ? axis > 0 : shifts * (both ? row_shifts : 1) > 2 * axes[axis].most) {
              continue;
            }
            for (int split = 1; split <= kAcrossGroups; ++split) {
              Shifts rows{row_axis, row_shifts, axes[row_axis].pitch};
              Shifts columns{axis, shifts, axes[axis].pitch};
              Cut c{variant, rows_x, row_piece, piece, pieces, split, {}, {}};
              c.x = rows_x ? rows : columns;
              c.y = rows_x ? columns : rows;
              if (c.x.axis == c.y.axis) c.y.pitch *= c.x.count;
              visit(c);
            }
          }
        }
      }
    }
  }
}

std::vector<AcrossPlan> Search(const Problem& p, const Device& device, int most) {
  AcrossPlan none{};
  none.refusal = Refuse(p, device);
  if (!none.refusal.empty()) return {none};
  none.refusal = "finds no cut that fits into shared memory";
  const std::array<Axis, kAxes> axes{AxisOf(p, 0), AxisOf(p, 1), AxisOf(p, 2)};
  struct Candidate {
    Cut cut;
    Walk walk;
    double seconds;
  };
  std::vector<Candidate> best;
  AcrossPlan plan{};
  ForEachCut(p, axes, [&](const Cut& c) {
    const Products products = ProductsOf(p, axes, c);
    Candidate mine{c, {}, std::numeric_limits<double>::infinity()};
    std::set<int> widths;
    const int64_t row = p.isize[2] + (c.x.axis == 2 ? (c.x.count - 1) * c.x.pitch : 0);
    for (int64_t pieces = CeilDiv(row, kMostBox), width = kMostBox; width > 32;
         pieces += std::max<int64_t>(pieces / 4, 1)) {
      width = RoundUp(CeilDiv(row, pieces), kAcrossStep);
      if (width <= kMostBox) widths.insert(static_cast<int>(width));
    }
    for (const int width : widths) {
      for (int height = 1; height < 2 * p.isize[1] && height <= 32; height *= 2) {
        for (int depth = 1; depth < 2 * p.isize[0] && depth <= 8; depth *= 2) {
          for (int cluster = 1; cluster <= 8; cluster *= 2) {
            const Walk walk{{depth, height, width}, cluster};
            if (!Fill(p, device, c, products, walk, plan)) continue;
            if (plan.seconds < mine.seconds) mine = {c, walk, plan.seconds};
          }
        }
      }
    }
    if (mine.seconds < std::numeric_limits<double>::infinity()) best.push_back(mine);
  });
  std::sort(best.begin(), best.end(),
            [](const Candidate& a, const Candidate& b) { return a.seconds < b.seconds; });
  std::vector<AcrossPlan> plans;
  for (const Candidate& b : best) {
    if (static_cast<int>(plans.size()) == most) break;
    plan = {};
    const Products products = ProductsOf(p, axes, b.cut);
    if (Fill(p, device, b.cut, products, b.walk, plan) && Complete(p, b.cut, products, plan)) {
      plans.push_back(plan);
    }
  }
  if (plans.empty()) plans.push_back(none);
  return plans;
}

}  // namespace

const AcrossPlan& PlanAcross(const Problem& p, const Device& d) {
  return Remember<AcrossPlan>(p, d, [&] { return Search(p, d, 1)[0]; });
}

std::vector<AcrossPlan> AcrossPlans(const Problem& p, const Device& device, int most) {
  return Search(p, device, most);
}

cudaError_t RunAcrossParts(const Problem& p, const AcrossPlan& plan, const Operands& ops, void* out,
                           DType out_dtype, cudaStream_t stream) {
  if (!plan.refusal.empty()) return cudaErrorInvalidValue;
  AcrossArgs args = plan.args;
  args.out = out;
  args.out_dtype = static_cast<int32_t>(out_dtype);
  args.kept = reinterpret_cast<float*>(static_cast<char*>(ops.workspace) + plan.kept_offset);
  AcrossMaps maps{};
  cudaError_t status = cudaSuccess;
  for (size_t i = 0; i < plan.maps.size() && status == cudaSuccess; ++i) {
    status = EncodeMap(p.in_dtype, plan.maps[i], i == 0 ? ops.x : ops.y, maps.map[i]);
  }
  if (status != cudaSuccess) return status;
  return p.in_dtype == DType::kBF16 ? EnqueueAcross<__nv_bfloat16>(plan, args, maps, stream)
                                    : EnqueueAcross<__half>(plan, args, maps, stream);
}

cudaError_t RunAcross(const Problem& p, const AcrossPlan& plan, const Operands& ops,
                      cudaStream_t stream) {
  const int parts = plan.args.parts;
  if (parts == 1) return RunAcrossParts(p, plan, ops, ops.out, p.out_dtype, stream);
  const cudaError_t status = RunAcrossParts(p, plan, ops, ops.workspace, DType::kF32, stream);
  if (status != cudaSuccess) return status;
  return SumParts(static_cast<const float*>(ops.workspace), parts, plan.args.w_elements,
                  p.out_dtype, ops.out, stream);
}

void AddAcross(std::vector<Row>& rows) {
  rows.push_back({"across", Pass::kWeightGrad,
                  [](const Problem& p, const Device& d) { return PlanAcross(p, d).refusal; },
                  [](const Problem& p, const Device& d) { return PlanAcross(p, d).workspace; },
                  [](const Problem& p, const Device& d) { return PlanAcross(p, d).seconds; },
                  [](const Problem& p, const Operands& ops, const Device& d, cudaStream_t stream) {
                    return RunAcross(p, PlanAcross(p, d), ops, stream);
                  }});
}

}  // namespace jaxconv::cuda
