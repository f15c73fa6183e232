#include "cuda/dense.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cuda/block_diagonal.h"
#include "cuda/dense_shape.h"
#include "cuda/device_limits.h"
#include "cuda/plan_memo.h"

namespace jaxconv::cuda {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();
constexpr int kSharedMemory = 227 * 1024;  // that a block may have
constexpr int kQuad = kDenseQuad;
constexpr int kMaxBox = 256;  // of a bulk tensor copy

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  // Not of later devices either: their tensor cores have other instructions.
  if (!HasWgmma(device.compute_capability)) return "needs compute capability 9.0";
  if (p.in_dtype == DType::kF64) return "float64 has no tensor cores here";
  const bool forward = p.pass == Pass::kForward;
  const int64_t cg = forward ? p.cig() : p.cog(), jg = forward ? p.cog() : p.cig();
  const int64_t bytes = cg * SizeOf(p.in_dtype), all_bytes = bytes * p.groups;
  if (jg % 8 != 0) return "needs a multiple of 8 channels a group in the result";
  if (p.channels_last && all_bytes % 16 != 0) {
    return "needs pixels of the input of a multiple of 16 bytes";
  }
  // A copy past a group's channels would take the next group's for them.
  if (p.channels_last && p.groups > 1 && bytes % 32 != 0) {
    return "needs a multiple of 32 bytes of channels a group in the input";
  }
  if (Product(p.k) > DenseArgs::kMaxTaps) {
    return "takes at most " + std::to_string(DenseArgs::kMaxTaps) + " taps";
  }
  for (int a = 0; a < kAxes; ++a) {
    const int64_t reach = (p.k[a] - 1) * p.dilation[a] + std::abs(p.pad[a]);
    if (reach > (1 << 20)) return "takes kernels that reach over less than 2^20 outputs";
  }
  if (p.ci * Product(p.isize) > kIntMax || p.co * Product(p.osize) > kIntMax) {
    return "indexes an image of x or y in 32 bits";
  }
  if (p.n > kIntMax) return "counts the batch in 32 bits";
  if (p.groups * CeilDiv(Product(p.k), 32) > 65535 || CeilDiv(bytes, 32) > 65535) {
    return "takes fewer groups, taps and channels";
  }
  return "";
}

// Why taps of the last axis cannot be columns: a sentence's end. Empty: they can.
std::string RefuseFolding(const Problem& p) {
  if (!p.channels_last) return "takes channels last";
  if (p.stride[2] != 1 || p.k[2] == 1) {
    return "needs several taps and no stride along the last axis";
  }
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "has no registers for split operands";
  }
  return "";
}

// From 64 columns on a product takes the tensor cores as long as shared memory.
constexpr int64_t kFewChannels = 48;

// Why neighbouring outputs cannot be columns: a sentence's end. Empty: they can.
std::string RefuseBlocks(const Problem& p) {
  if (!p.channels_last) return "takes channels last";
  if ((p.pass == Pass::kForward ? p.cog() : p.cig()) > kFewChannels) {
    return "takes at most " + std::to_string(kFewChannels) + " channels a group in the result";
  }
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "has no registers for split operands";
  }
  return "";
}

// Why groups cannot lie beside each other: a sentence's end. Empty: they can.
std::string RefuseGrouped(const Problem& p) {
  if (!p.channels_last) return "takes channels last";
  if (p.groups == 1) return "takes several groups";
  if (p.pass != Pass::kForward) return "is for forwards";  // the others were slower
  if (p.cig() * SizeOf(p.in_dtype) != 32) {
    return "takes 32 bytes of channels a group in the input, or half of that";
  }
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "has no registers for split operands";
  }
  return "";
}

// Whether bulk tensor copies can take rows of channels first: of a multiple of 16 bytes.
bool HasWholeRows(const Sizes& size, DType dtype) { return size[2] * SizeOf(dtype) % 16 == 0; }

struct TileShape {
  int mt, columns;
};
constexpr TileShape kTileShapes[] = {{2, 32}, {4, 32}, {2, 48},  {2, 64},
                                     {4, 64}, {2, 96}, {1, 128}, {2, 128}};
// Those of folded taps: all columns of some channels.
constexpr TileShape kFoldedShapes[] = {{2, 48}, {2, 72}, {2, 80}, {2, 96}, {2, 112}};
constexpr int kFoldedSources = 64;  // of a row
// Those of groups beside each other: how many, and columns of each.
constexpr TileShape kGroupedShapes[] = {{2, 32}, {2, 64}, {2, 96}, {2, 128}, {4, 32}, {4, 64}};
// How blocks share work: see DenseArgs.
struct Cluster {
  int split = 1, pair = 1;
  constexpr int Blocks() const { return split * pair; }
};
constexpr Cluster kClusters[] = {{1, 1}, {1, 2}, {2, 1}, {2, 2}, {3, 1}, {3, 2},
                                 {4, 1}, {4, 2}, {5, 1}, {6, 1}, {8, 1}};
constexpr bool HasKernel(const TileShape& t, const Cluster& c) {
  if (c.Blocks() == 1 || t.columns == 128) return true;
  return c.split > 1 && t.mt == 2 && (t.columns == 32 || t.columns == 64);
}

// Pixels of a patch along n, d, h, w. Of images that are innermost more than eight are all of a
// box, so that positions along the last axis are neighbours.
struct Patch {
  std::array<int, 4> size;
  bool images;
};
constexpr Patch kPatches[] = {{{1, 1, 1, 64}, false}, {{1, 1, 8, 8}, false}, {{1, 8, 1, 8}, false},
                              {{8, 1, 1, 8}, false},  {{8, 8, 1, 1}, true},  {{8, 1, 8, 1}, true},
                              {{8, 1, 1, 8}, true},   {{16, 1, 1, 4}, true}, {{32, 1, 1, 2}, true},
                              {{64, 1, 1, 1}, true}};

constexpr double kClock = 1.75e9, kBandwidth = 4.0e12, kL2Bandwidth = 7.5e12;
constexpr double kPackBandwidth = 1.2e12;  // at which the weights are packed

struct Candidate {
  TileShape shape;
  int buffers, raws, store_bytes;
  int halved;  // the axis along which there are two of `part`
  Patch patch;
  std::array<int, 4> part;  // n, d, h, w
  Cluster cluster;
};

// The last axis where its taps are columns: a tile has so many sources, and those outputs whose
// sources all are in it, or outside of the tensor. Hence the outputs before those of the first
// source are the first tile's, and the last tile has those that reach beyond the last source.
bool FoldAxis(const DenseShape& s, DenseArgs& a) {
  DenseAxis& x = a.axis[2];
  if (x.box != kFoldedSources) return false;
  const std::vector<int>& places = s.fold.places;
  const int64_t reach = s.reach[2], source = s.groups[2][0].first, lead = source - s.fold.first;
  const int64_t box = kFoldedSources - reach;
  if (box < 8 || lead > reach) return false;
  const int64_t outputs = CeilDiv(s.q_size[2] - lead, box);
  const int64_t sources = CeilDiv(s.in_size[2] - source - reach, box);
  x.q_tiles = static_cast<int>(std::max<int64_t>(1, std::min(outputs, sources)));
  x.box = static_cast<int>(box);
  x.length = kFoldedSources;
  a.fold_taps = static_cast<int>(places.size());
  a.fold_lead = static_cast<int>(lead);
  a.fold_first = places[0];
  a.fold_step = a.fold_taps > 1 ? places[1] - places[0] : 0;
  return true;
}

// What the model of channels first counts, in cycles of a block unless said: fitted to 5,100 plans
// each of float32 and of 16 bits, of 29 layers and both passes, on an H200.
struct RowsCost {
  double f32, of16;
};
constexpr RowsCost kTurnedStage{1360, 1570}, kTurnedMatrix{0, 34};    // 512 bytes, of a warp
constexpr RowsCost kTurnedPixels{19, 90};                             // 1,024 bytes, of a warp
constexpr RowsCost kLoadedPixels{1590, 580}, kLoadedChannel{47, 62};  // of 224 pixels
constexpr RowsCost kBox{48, 39}, kBoxRate{91, 44},
    kBoxRow{2.3, 0.96};                                        // bulk copies; bytes a cycle
constexpr RowsCost kWords{2560, 1030}, kWordRate{30.7, 23.7};  // the same word by word
constexpr RowsCost kWeightsQuad{1060, 1530},
    kWeightsShown{0.18, 0.26};                                     // of weights; what is not hidden
constexpr RowsCost kProducts{0.64, 0.66}, kProductQuad{150, 130};  // of the model's; for each quad
constexpr RowsCost kOverlap{0.56, 0.61};  // of products and copies: what is not hidden
// Of 32 results: by bulk copies, of rows of eight, and each copy; by rows of twos, or by elements,
// and for each line of 128 bytes; of each end of a row.
constexpr RowsCost kSent{1.05, 2}, kSentShort{1.9, 2}, kSends{390, 410};
constexpr RowsCost kTwos{0.44, 2}, kTwosLine{0.1, 0.25}, kOnes{1.66, 5.2}, kOnesLine{2.17, 0.97};
constexpr RowsCost kEnd{0.09, 0.09};
constexpr RowsCost kRowsLeave{170, 170}, kTile{140, 63};  // of 64 pixels each time; a tile
constexpr RowsCost kEndBytes{3, 4};                       // of device memory, of an end of a row
constexpr RowsCost kMemoryShown{0.41, 0.29};  // of the lesser of both times: what is not hidden

double CostOf(const DenseShape& s, const RowsCost& cost) {
  return s.element == 4 ? cost.f32 : cost.of16;
}

// Channels first, cycles of a block for an item of each program, if products alone take `multiply`.
double RowsCycles(const DenseShape& s, const DenseArgs& a, double stages, double boxes,
                  double multiply, double results, int columns) {
  const auto k = [&](const RowsCost& c) { return CostOf(s, c); };
  const double stage_bytes = static_cast<double>(a.pixels) * s.row_bytes;
  const double warps = DenseTurners(a, s.element) / 32.0;
  const double rows = a.raws > 0 ? a.box_n * a.axis[0].length * a.axis[1].length : 0;
  const double matrices =
      std::ceil(rows / warps) * std::ceil(a.raw_row / 8.0) * s.row_bytes / 64;  // of a warp
  const double turning =
      k(kTurnedStage) +
      (a.matrices ? matrices * k(kTurnedMatrix) : stage_bytes / 1024 / warps * k(kTurnedPixels));
  const double loading = std::ceil(static_cast<double>(a.pixels) / kDenseLoaders) *
                         (k(kLoadedPixels) + s.chunk_channels * k(kLoadedChannel));
  const double arriving = a.boxes ? k(kBox) + a.raw_bytes / k(kBoxRate) +
                                        rows * s.chunk_channels * a.pieces * k(kBoxRow)
                                  : k(kWords) + a.raw_bytes / k(kWordRate);
  const double stage = a.raws > 0 ? turning : loading;
  const double quads = a.total_steps / 4.0;  // of all programs
  const double products =
      stages > 0 ? (k(kProducts) * multiply + k(kProductQuad) * quads) / stages : 0;
  const double arrives =
      a.raws > 0 ? (boxes * arriving + stages * turning) / static_cast<double>(a.raws) : 0;
  const double fetches = std::max(arrives, stages * stage);
  const double boxed =
      std::max(stages * std::max({products, stage, (stage + products) / a.buffers}), arrives) +
      k(kOverlap) * std::min(stages * products, fetches);
  const double weights = a.resident ? 0 : quads * k(kWeightsQuad) / a.ring;
  const double staged = std::max(boxed, weights) + k(kWeightsShown) * std::min(boxed, weights);
  // Of a warp's 32 results: by bulk copies, or by lines of 128 bytes, which strides tear apart.
  const double torn = s.paired ? 1 : s.so[2], run = a.axis[2].part * (s.paired ? 2 : 1);
  const double lines = std::min(32.0, 32 / std::min(32.0, run) * torn * torn + 1);
  const double ends = a.sends ? 0 : 64 / (a.axis[2].box * (s.paired ? 2.0 : 1.0));
  const double each = a.sends  ? k(kSent) + (a.patch[3] == 8 ? k(kSentShort) : 0)
                      : a.twos ? k(kTwos) + k(kTwosLine) * lines
                               : k(kOnes) + k(kOnesLine) * lines;
  const double parts = static_cast<double>(columns) / a.store_columns;
  const double left =
      results / 32 * (each + ends * k(kEnd)) + k(kTile) +
      parts * (a.sends ? k(kSends) : (results / columns / 128 + 2) / 2 * k(kRowsLeave));
  // What the fit does not tell, of what it chooses: where other kernels were faster.
  double slower = torn > 1 ? 1.3 : 1;
  slower *= 1 + 0.05 * (std::clamp(s.chunks, 6, 14) - 6);
  if (s.paired && s.groups[2].size() == 1) slower *= 1.1;
  if (s.si[2] > 4) slower *= 1.25;
  if (s.cg <= 16) slower *= 1.15;
  return slower * (staged + s.programs * left);
}

// Fills what depends on the tile; false where it does not fit.
bool Fill(const Problem& p, const Device& device, const DenseShape& s, const Candidate& c,
          DensePlan& plan, bool& l2_limits) {
  DenseArgs& a = plan.args;
  const Strides in = s.forward ? p.XStrides() : p.YStrides();
  const Strides out = s.forward ? p.YStrides() : p.XStrides();
  std::copy(c.patch.size.begin(), c.patch.size.end(), a.patch);
  a.images = c.patch.images;
  a.split = c.cluster.split;
  a.pair = c.cluster.pair;
  a.cluster = c.cluster.Blocks();
  a.part_n = c.part[0];
  a.box_n = c.part[0] * (c.halved == 0 ? 2 : 1);
  if (a.box_n > kMaxBox) return false;
  a.paired = s.paired;
  a.rows = s.rows;
  a.raws = c.raws;
  a.matrices = false;
  a.boxes = c.raws > 0 && HasWholeRows(s.in_size, p.in_dtype);
  const bool runs = s.rows && (s.paired || s.so[2] == 1);  // of results along rows
  a.sends = runs && HasWholeRows(s.out_size, p.out_dtype);
  a.twos = runs && !a.sends && s.out_size[2] % 2 == 0;
  const int out_element = static_cast<int>(SizeOf(p.out_dtype));
  a.store_columns = c.store_bytes / out_element;
  if (a.store_columns < 8) return false;
  int64_t pixels = a.box_n, tiles = CeilDiv(p.n, a.box_n);
  for (int i = 0; i < kAxes; ++i) {
    DenseAxis& x = a.axis[i];
    x.part = c.part[i + 1];
    x.box = x.part * (c.halved == i + 1 ? 2 : 1);
    x.q_tiles = static_cast<int>(CeilDiv(s.q_size[i], x.box));
    x.length = x.box + s.reach[i];
    if (i == 2 && s.folded && !FoldAxis(s, a)) return false;
    x.si = s.si[i];
    x.so = s.so[i];
    x.in_size = static_cast<int>(s.in_size[i]);
    x.out_size = static_cast<int>(s.out_size[i]);
    x.in_step = in.s[i];
    x.out_step = out.s[i];
    if (i == 0 && x.length > 63) return false;  // what the kernel packs into words
    if (i == 2) {
      // A row too long for one copy is made of several, if the box is but a row.
      const int64_t unit = s.rows ? 16 / s.element : 1024 / s.row_bytes;
      const int64_t row = s.rows ? (x.length - 1) * s.si[2] + s.most_lead + 1 : x.length;
      const bool leads = s.most_lead > s.least_lead;  // differ, so that pieces would, too
      a.pieces = static_cast<int>(CeilDiv(row, kMaxBox));
      if (s.rows && !a.boxes) a.pieces = 1;
      if (a.pieces > 1 && (pixels > 1 || leads)) return false;
      a.piece_length = static_cast<int>(CeilDiv(row, a.pieces));
      if (a.pieces > 1 || s.rows) a.piece_length = static_cast<int>(RoundUp(a.piece_length, unit));
      // Channels an odd number of 16 bytes apart are free of bank conflicts when they are turned.
      const bool longer = a.piece_length >= 64 && a.piece_length < kMaxBox;  // by little
      if (a.boxes && s.element == 2 && longer) a.piece_length |= 8;
      if (!s.rows) x.length = a.piece_length * a.pieces;
    } else if (x.length > kMaxBox) {
      return false;
    }
    if (x.length > 511) return false;
    pixels *= x.length;
    tiles *= x.q_tiles;
  }
  const auto pitches = [&](int n, int d, int h, int w, int (&pitch)[kAxes + 1]) {
    pitch[3] = a.images ? n : 1;
    pitch[2] = pitch[3] * w;
    pitch[1] = pitch[2] * h;
    pitch[0] = a.images ? 1 : pitch[1] * d;
  };
  pitches(a.box_n, a.axis[0].length, a.axis[1].length, a.axis[2].length, a.in_pitch);
  pitches(a.part_n, a.axis[0].part, a.axis[1].part, a.axis[2].part, a.out_pitch);
  a.raw_row = a.piece_length;
  if (c.raws > 0) {
    const int64_t rows = int64_t{a.box_n} * s.chunk_channels * a.axis[0].length * a.axis[1].length;
    if (rows * a.raw_row * a.pieces * s.element > kSharedMemory) return false;
    // Words are found in 32 bits.
    if (!a.boxes && a.box_n * in.n > kIntMax) return false;
    a.raw_lead = static_cast<int>(s.least_lead);
    a.raw_plane = a.raw_row * a.axis[1].length;
    a.raw_channel = a.raw_plane * a.axis[0].length;
    a.raw_rows = a.box_n * a.pieces * a.axis[0].length * a.axis[1].length;
    if (!a.boxes && s.element == 2) a.raw_channel |= 8;
    // Two channels in a bank at the most, of eight; and no elements of other residues.
    a.matrices = s.element == 2 && s.si[2] == 1 && a.raw_channel / 8 % 4 != 0;
    a.raw_box = a.raw_channel * s.chunk_channels;
    a.raw_piece = static_cast<int>(RoundUp(int64_t{a.box_n} * a.raw_box * s.element, 128));
    a.raw_bytes = a.raw_piece * a.pieces;
  }
  if (s.rows) {
    // What keeps stores of eight pixels by four channels, or of matrices, free of bank conflicts;
    // a bulk copy takes no padding.
    const int phases = s.paired ? 2 : 1;
    a.out_channel = a.out_pitch[0] * phases + (a.sends ? 0 : out_element == 4 ? 4 : 8);
    a.out_image = a.out_channel * a.store_columns;
    a.out_pitch[0] = a.out_image / phases;
  }
  // The groups of eight of a patch are apart along its other axis, or go on along the same.
  const int inside = a.images ? 0 : 3;
  a.in_eights = a.out_eights = 8;
  for (int i = 0; i < 4 && a.patch[inside] == 8; ++i) {
    if (i == inside || a.patch[i] == 1) continue;
    a.in_eights = a.in_pitch[i];
    a.out_eights = a.out_pitch[i];
  }
  const bool across = a.images && a.patch[0] > 8 && a.patch[0] < 64;
  if (across && a.box_n != a.patch[0]) return false;
  int64_t span = a.box_n * out.n;  // results of a tile are counted in 32 bits
  for (const DenseAxis& x : a.axis) span += int64_t{x.box} * x.so * x.out_step;
  if (a.rows && span > kIntMax) return false;
  a.pixels = static_cast<int>(pixels);
  a.row_bytes = s.row_bytes;
  a.swizzle = s.row_bytes - 16;
  a.terms = s.terms;
  a.part_bytes = static_cast<int>(RoundUp(pixels * s.row_bytes, 1024));
  a.stage_bytes = a.part_bytes * (s.terms > 1 ? 2 : 1);
  a.buffers = c.buffers;
  a.column_tiles = static_cast<int>(CeilDiv(s.columns, c.shape.columns));
  a.columns = s.columns;

  a.sets = s.sets;
  const int patches = s.sets > 1 ? 1 : c.shape.mt;  // that a group of warps multiplies
  a.fold_channels = 0;
  if (s.folded) {
    a.fold_channels = c.shape.columns / a.fold_taps;
    if (a.fold_channels * a.fold_taps != c.shape.columns || a.fold_channels % 8 != 0) return false;
    if (s.jg % a.fold_channels != 0) return false;
  }
  if (s.sets > 1
          ? s.jg != a.store_columns
          : !s.folded && (s.jg % a.store_columns != 0 || c.shape.columns % a.store_columns != 0)) {
    return false;
  }
  a.store_bytes = c.store_bytes;
  a.store_swizzle = c.store_bytes > 16 ? c.store_bytes - 16 : 0;
  a.store_stages = s.sets > 1 ? 4 : 2;
  if (a.rows) {
    if (a.store_columns == c.shape.columns) a.store_stages = 1;
    const bool matrices = a.sends && !s.paired && out_element == 2;
    a.store_swizzle = matrices && a.axis[2].part * out_element == 128 ? 112 : 0;
  }
  const int64_t part_rows = int64_t{patches} * 64;
  a.store_pitch =
      static_cast<int>(a.rows ? RoundUp(int64_t{a.part_n} * a.out_image * out_element, 1024)
                              : RoundUp(part_rows * c.store_bytes, 1024));
  if (s.folded) {
    a.store_pitch = static_cast<int>(RoundUp(kFoldedSources * (c.shape.columns + 8) * 2, 1024));
  }

  const int quad_bytes = kQuad * c.shape.columns * 32;
  int64_t entries = 0, segments = 1;
  for (int i = 0; i < kAxes; ++i) segments *= static_cast<int64_t>(s.groups[i].size());
  int64_t places = Product(p.k) / (s.folded ? p.k[2] : 1);
  if (s.spread) {
    places = 1;
    for (const std::vector<int64_t>& sources : s.sources) {
      places *= static_cast<int64_t>(sources.size());
    }
  }
  entries = 16 * (places * (s.full_steps + s.last_steps) + 2 * kQuad * segments) / 4;
  int64_t smem = 8 * ((s.rows ? 5 : 3) * DenseArgs::kMaxBuffers + 2 * DenseArgs::kMaxRing);
  const auto place = [&](int& at, int64_t bytes, int64_t alignment) {
    smem = RoundUp(smem, alignment);
    at = static_cast<int>(smem);
    smem += bytes;
    return smem <= kSharedMemory;
  };
  const bool matrices = a.raws > 0 && a.matrices;
  const int64_t sources_bytes = matrices ? a.raw_rows * 16 : a.rows ? pixels * 4 : 0;
  if (pixels > 65535 || !place(a.smem_sources, sources_bytes, 16) ||
      !place(a.smem_waste, matrices ? DenseTurners(a, s.element) / 32 * kDenseWaste : 0,
             matrices ? 128 : 16) ||
      !place(a.smem_entries, entries + 16, 16) ||
      !place(a.smem_out, int64_t{2} * a.store_stages * a.store_pitch, 1024) ||
      !place(a.smem_in, int64_t{a.buffers} * a.stage_bytes, 1024) ||
      !place(a.smem_raw, int64_t{a.raws} * a.raw_bytes, 128) ||
      !place(a.smem_ring, 2 * quad_bytes, 128)) {
    return false;
  }
  a.ring = static_cast<int>(
      std::min<int64_t>((kSharedMemory - a.smem_ring) / quad_bytes, DenseArgs::kMaxRing));
  // The sums that blocks of a cluster add up take the place of what they multiplied.
  const int sums_bytes = c.shape.mt * c.shape.columns * 512;
  if (a.split > 1 && a.smem_ring + a.ring * quad_bytes - a.smem_in < sums_bytes) return false;
  a.resident = false;
  const int64_t groups = p.groups / s.sets;
  const int64_t items = CeilDiv(tiles, a.pair) * groups * s.programs * a.column_tiles;
  if (items > kIntMax / 2) return false;  // a block's next item is counted in 32 bits, too
  a.items = static_cast<int>(items);
  a.groups = static_cast<int>(groups);
  a.n = static_cast<int>(p.n);
  plan.mt = c.shape.mt;
  plan.columns = c.shape.columns;
  const int64_t clusters = ClustersAtOnce(device.multiprocessors, a.cluster);
  if (a.split > 1 && items > clusters) return false;
  plan.grid = static_cast<int>(std::min(items, clusters)) * a.cluster;

  // The model counts cycles of a tile: of the tensor cores, of shared memory, of stages that arrive
  // late, of stores, and of copies from the L2 cache; against the bytes of device memory. Its
  // factors are fitted to times on an H200.
  const int groups_m = 2 * patches;
  double steps = 0, stages = 0;  // over all programs
  for (const DenseAxisGroup& d : s.groups[0]) {
    for (const DenseAxisGroup& h : s.groups[1]) {
      for (const DenseAxisGroup& w : s.groups[2]) {
        const auto taps = static_cast<int64_t>(d.taps.size() * h.taps.size() * w.taps.size());
        steps += (s.chunks - 1) * PadToQuads(taps * s.full_steps) + PadToQuads(taps * s.last_steps);
        stages += s.chunks;
      }
    }
  }
  const double programs = s.programs;
  const double phases = s.paired ? 2 : 1;  // of a program
  if (s.paired) stages /= static_cast<double>(s.groups[2].size());
  if (s.fused && !s.spread) {
    steps /= s.phases;
    stages /= s.phases;
  }
  const double weights = steps / kQuad * quad_bytes;
  // The weights stay where all items of a block have the same: sets of groups go round.
  if (s.sets > 1 && plan.grid > groups) plan.grid -= plan.grid % static_cast<int>(groups);
  a.resident = a.cluster == 1 && programs * a.column_tiles == 1 && plan.grid % groups == 0 &&
               weights <= static_cast<double>(a.ring) * quad_bytes;
  if (a.ring < 4 && !a.resident) return false;  // copies would not hide their latency
  const double stage_bytes = static_cast<double>(pixels) * s.row_bytes;
  const double copied = stages * stage_bytes + (a.resident ? 0 : weights);
  const double tensor = steps * groups_m * c.shape.columns / 2;
  const bool rounds = s.element == 4 && p.channels_last;
  // Boxes that are turned: of them so many in all, which arrive, are read, and written as stages.
  const double raws = a.raws > 0 ? stages / (s.paired ? 1 : a.members) : 0;
  const double shared = steps * groups_m * (16 + c.shape.columns / 4.0) +
                        (copied + (rounds ? 0.6 * stages * stage_bytes : 0) +
                         (a.raws > 0 ? raws * a.raw_bytes + stages * stage_bytes : 0)) /
                            128;
  const double multiply = 1.05 * std::max(tensor, shared);
  const double rounding = s.element == 4 ? stage_bytes / 16 / 192 * (12 + 5 * (s.terms - 1)) : 0;
  const double late = 3100 + a.pixels + (rounds ? stage_bytes / 21 : 0);
  const double each = stages > 0 ? multiply / stages : 0;  // of a stage
  const double staged = stages * std::max({each, (late + each) / c.buffers, rounding});
  const double results = groups_m * 64.0 * c.shape.columns * s.sets * phases;
  // Folded sums are stored and read again, the stores by two ways at once.
  const double stores = s.folded     ? results * 12 / 128 + 300.0 * groups_m
                        : s.sets > 1 ? results / 10 + 450.0 * s.phases
                                     : results / 8 + 900.0 * c.shape.columns / a.store_columns;
  const double fetched = (a.raws > 0 ? raws * a.raw_bytes : stages * stage_bytes) +
                         (a.resident ? 0 : weights / a.pair);
  const double l2 = fetched / (kL2Bandwidth / kClock / device.multiprocessors);
  // Of blocks that share an item, each multiplies and stores a part; each sends and reads all sums.
  const double sends = (a.split > 1 ? sums_bytes / 6.7 : 0) + 60.0 * (a.pair - 1);
  const double others = a.rows ? RowsCycles(s, a, stages, raws, multiply, results, c.shape.columns)
                               : staged + programs * stores;
  l2_limits = l2 > 0.5 * others;
  const double cycles = std::max(others, l2) + (a.rows ? 0 : 0.06 * std::min(others, l2));
  const double mean = cycles / programs / a.split + sends;
  const double turns = std::ceil(static_cast<double>(items) * a.cluster / plan.grid);
  // Channels last, measured against that, in the mean (28 layers, both passes, TF32 and bf16,
  // H100).
  double fitted = a.rows && turns < 2 ? 1.8 : 1;  // a block's first item waits for all
  if (p.channels_last) {
    if (c.shape.mt == 4) fitted *= 0.94;
    if (c.shape.columns == 48 || a.pair > 1 || a.resident) fitted *= 1.06;
    if (s.folded || a.split > 4) fitted *= 1.1;
  }
  const double compute = fitted * turns * mean / kClock;
  const double out_bytes = static_cast<double>(s.forward ? p.YElements() : p.XElements()) *
                           static_cast<double>(SizeOf(p.out_dtype));
  const double in_bytes =
      static_cast<double>(s.forward ? p.XElements() : p.YElements()) * s.element;
  plan.weights_bytes = groups * a.column_tiles * a.total_steps * c.shape.columns * 32;
  const auto packed = static_cast<double>(plan.weights_bytes);
  double memory = (in_bytes + out_bytes + packed) / kBandwidth;
  if (a.rows && !a.sends) {
    const double rows_of = a.axis[2].box * phases;
    memory += out_bytes / out_element / rows_of * 2 * CostOf(s, kEndBytes) / kBandwidth;
  }
  plan.pack_seconds = 3e-6 + packed / (s.spread ? 0.4e12 : kPackBandwidth);
  plan.seconds = 5e-6 + plan.pack_seconds + std::max(compute, memory) +
                 (a.rows ? CostOf(s, kMemoryShown) : 0.2) * std::min(compute, memory);
  return true;
}

// What the maps of the input and of the output have in common: of the pixels of a residue.
DenseMap MapOf(const Problem& p, const Strides& step, const Sizes& size, const Sizes& residue,
               const Sizes& stride, int row_bytes, int element) {
  DenseMap m{};
  m.row_bytes = row_bytes;
  m.box[0] = static_cast<uint32_t>(row_bytes / element);
  m.size[4] = static_cast<uint64_t>(p.n);
  m.stride[3] = static_cast<uint64_t>(step.n * element);
  for (int i = 0; i < kAxes; ++i) {
    m.size[3 - i] = static_cast<uint64_t>(CeilDiv(size[i] - residue[i], stride[i]));
    m.stride[2 - i] = static_cast<uint64_t>(step.s[i] * stride[i] * element);
    m.offset += residue[i] * step.s[i] * element;
  }
  std::fill(std::begin(m.step), std::end(m.step), 1);
  return m;
}

// The same where channels come first: rows lie as they are, whatever the stride along them.
DenseMap RowsMapOf(const Problem& p, const Strides& step, const Sizes& size, int64_t channels,
                   const Sizes& residue, const Sizes& stride, int element) {
  DenseMap m{};
  m.size[0] = static_cast<uint64_t>(size[2]);
  m.size[3] = static_cast<uint64_t>(channels);
  m.size[4] = static_cast<uint64_t>(p.n);
  m.stride[2] = static_cast<uint64_t>(step.c * element);
  m.stride[3] = static_cast<uint64_t>(step.n * element);
  for (int i = 0; i < 2; ++i) {
    m.size[2 - i] = static_cast<uint64_t>(CeilDiv(size[i] - residue[i], stride[i]));
    m.stride[1 - i] = static_cast<uint64_t>(step.s[i] * stride[i] * element);
    m.offset += residue[i] * step.s[i] * element;
  }
  std::fill(std::begin(m.step), std::end(m.step), 1);
  return m;
}

// Makes images what follows the channels.
void PutImagesFirst(DenseMap& m) {
  std::rotate(m.size + 1, m.size + 4, m.size + 5);
  std::rotate(m.stride, m.stride + 3, m.stride + 4);
  std::rotate(m.box + 1, m.box + 4, m.box + 5);
}

// What a block packs: of few taps several tiles or steps, so that it reads long rows. A warp reads
// a word of four channels (pairs of channels) of each of eight columns: banks are apart if the
// channels' pitch is odd and the columns' pitch is an odd multiple of 16 bytes.
void PlanPack(const DenseShape& s, DensePack& k, int (&grid)[3]) {
  const int channels = 32 / s.element, sixteen = 16 / s.element;
  const auto odd_multiple = [&](int n) {
    return static_cast<int>(CeilDiv(n, sixteen) / 2 * 2 + 1) * sixteen;
  };
  const auto odd = [](int n) { return n / 2 * 2 + 1; };
  k.columns_inside = s.forward;
  k.ranges = static_cast<int>(CeilDiv(k.taps, DensePack::kTaps));
  k.range = static_cast<int>(CeilDiv(k.taps, k.ranges));
  const int pitch = k.columns_inside ? odd_multiple(k.range) : odd(k.range);
  int log_units = 0;
  while (pitch << (log_units + 1) <= DensePack::kUnits) ++log_units;
  const int units = 1 << log_units, inside = units * (k.columns_inside ? 8 : channels);
  k.log_tiles = k.columns_inside ? log_units : 0;
  k.log_steps = k.columns_inside ? 0 : log_units;
  k.j_pitch = k.columns_inside ? pitch : odd_multiple(inside * pitch);
  k.c_pitch = k.columns_inside ? odd(inside * pitch) : pitch;
  k.by_range = DivisorOf(k.range);
  k.all_tiles = k.jg / 8 + k.column_tiles * k.tiles - k.used_tiles;
  k.log_chunk = s.row_bytes == 128 ? 2 : s.row_bytes == 64 ? 1 : 0;
  k.channel_steps = ((s.chunks - 1) << k.log_chunk) + s.last_steps / s.terms;
  grid[0] = static_cast<int>(CeilDiv(k.all_tiles, 1 << k.log_tiles));
  grid[1] = static_cast<int>(CeilDiv(k.channel_steps, 1 << k.log_steps));
  grid[2] = k.groups * k.ranges;
}

// Fills what the choice of the tile does not need.
void Complete(const Problem& p, const DenseShape& s, DensePlan& plan) {
  DenseArgs& a = plan.args;
  DensePack& k = plan.pack;
  ListPrograms(s, p, plan);
  const Strides in = s.forward ? p.XStrides() : p.YStrides();
  const Strides out = s.forward ? p.YStrides() : p.XStrides();
  a.in_n_step = in.n;
  a.out_n_step = out.n;
  a.in_c_step = in.c;
  a.out_c_step = out.c;
  a.cg = s.cg;
  a.jg = s.jg;
  a.chunks = s.chunks;
  a.chunk_channels = s.chunk_channels;
  a.full_steps = s.full_steps;
  a.last_steps = s.last_steps;
  a.fused = s.fused;
  a.out_f32 = p.out_dtype == DType::kF32;
  const int clusters = plan.grid / a.cluster;
  a.tiles = a.items / a.column_tiles / a.programs;
  a.band = a.programs == 1 ? a.tiles : static_cast<int>(CeilDiv(clusters, a.column_tiles));
  a.by_band_items = LargeDivisorOf(a.band * a.column_tiles * a.programs);
  a.by_band = LargeDivisorOf(std::min(a.band, a.tiles));
  a.by_last_band = LargeDivisorOf(a.tiles % a.band == 0 ? a.band : a.tiles % a.band);
  a.by_column_tiles = LargeDivisorOf(a.column_tiles);
  a.by_groups = LargeDivisorOf(a.groups);
  for (int i = 0; i < kAxes; ++i) a.by_q_tiles[i] = LargeDivisorOf(a.axis[i].q_tiles);
  plan.smem = a.smem_ring + a.ring * kQuad * plan.columns * 32;
  const int64_t taps = Product(p.k), co_step = p.cog() * taps;
  if (s.spread) {
    SpreadPack& g = plan.spread;
    g.w_g_step = p.cig() * co_step;
    g.w_c_step = s.forward ? co_step : taps;
    g.w_j_step = s.forward ? taps : co_step;
    g.sets = s.sets;
    g.cg = s.cg / s.sets;
    g.jg = s.jg / s.sets;
    g.columns = s.columns;
    for (int i = 0; i < kAxes; ++i) {
      g.k[i] = static_cast<int>(p.k[i]);
      g.so[i] = s.so[i];
      for (size_t source = 0; source < s.sources[i].size(); ++source) {
        for (int phase = 0; phase < s.so[i]; ++phase) {
          g.tap[i][source][phase] =
              static_cast<int16_t>(TapOf(p, s, i, s.sources[i][source], phase));
        }
      }
    }
  }
  k.w_g_step = p.cig() * co_step;
  k.w_c_step = s.forward ? co_step : taps;
  k.w_j_step = s.forward ? taps : co_step;
  k.taps = static_cast<int>(taps);
  k.groups = a.groups;
  k.cg = s.cg;
  k.jg = s.jg;
  k.column_tiles = a.column_tiles;
  k.tiles = plan.columns / 8;
  k.used_tiles = s.columns / 8;
  k.phase_tiles = (s.folded ? a.fold_channels : s.jg) / 8;
  if (!s.spread) PlanPack(s, k, plan.pack_grid);
  k.chunks = s.chunks;
  k.chunk_channels = s.chunk_channels;
  k.full_steps = s.full_steps;
  k.last_steps = s.last_steps;
  k.total_steps = a.total_steps;
  k.terms = s.terms;
  const Sizes si{s.si[0], s.si[1], s.si[2]}, so{s.so[0], s.so[1], s.so[2]};
  if (s.rows) {
    const auto add = [](std::vector<DenseMap>& maps, DenseMap m, std::array<int, 5> box) {
      std::copy(box.begin(), box.end(), m.box);
      maps.push_back(m);
    };
    a.by_raw_row = LargeDivisorOf(std::max(1, a.raw_row * s.element / 4));  // of words
    for (int i = 0; i < 2; ++i) a.by_length[i] = LargeDivisorOf(a.axis[i].length);
    for (const Sizes& r : a.boxes ? plan.residues : std::vector<Sizes>{}) {
      add(plan.in, RowsMapOf(p, in, s.in_size, s.forward ? p.ci : p.co, r, si, s.element),
          {a.piece_length, a.axis[1].length, a.axis[0].length, s.chunk_channels, a.box_n});
    }
    a.in_maps = static_cast<int>(plan.in.size());
    for (int i = 0; i < a.programs && a.sends; ++i) {
      add(plan.out,
          RowsMapOf(p, out, s.out_size, s.forward ? p.co : p.ci, PhaseOf(s, a.program[i].phase), so,
                    static_cast<int>(SizeOf(p.out_dtype))),
          {a.axis[2].part * (s.paired ? 2 : 1), a.axis[1].part, a.axis[0].part, a.store_columns,
           a.part_n});
      if (a.store_swizzle > 0) plan.out.back().row_bytes = 128;
    }
  } else {
    for (const Sizes& r : plan.residues) {
      DenseMap m = MapOf(p, in, s.in_size, r, si, s.row_bytes, s.element);
      for (int i = 0; i < kAxes; ++i) m.box[3 - i] = static_cast<uint32_t>(a.axis[i].length);
      m.box[1] = static_cast<uint32_t>(a.piece_length);
      m.box[4] = static_cast<uint32_t>(a.box_n);
      m.size[0] = static_cast<uint64_t>(s.forward ? p.ci : p.co);
      if (a.images) PutImagesFirst(m);
      plan.in.push_back(m);
    }
    a.in_maps = static_cast<int>(plan.in.size());
    // Folded sums do not leave by copies.
    for (int i = 0; i < (s.fused ? s.phases : a.programs) && !s.folded; ++i) {
      const Sizes r = PhaseOf(s, s.fused ? i : a.program[i].phase);
      DenseMap m =
          MapOf(p, out, s.out_size, r, so, a.store_bytes, static_cast<int>(SizeOf(p.out_dtype)));
      for (int x = 0; x < kAxes; ++x) m.box[3 - x] = static_cast<uint32_t>(a.axis[x].part);
      m.box[4] = static_cast<uint32_t>(a.part_n);
      m.size[0] = static_cast<uint64_t>(s.forward ? p.co : p.ci);
      if (a.images) PutImagesFirst(m);
      plan.out.push_back(m);
    }
  }
}

// Takes the fastest tile of a shape into `best`, if it beats what is there.
void SearchTiles(const Problem& p, const Device& device, const DenseShape& s,
                 const DenseTile& forced, DensePlan& best) {
  DensePlan plan{};
  // The lists do not depend on the tile, but for the shifts.
  best.refusal = ListPrograms(s, p, plan);
  if (!best.refusal.empty()) return;
  bool better = false;
  const auto allowed = [](int want, int64_t have) { return want == 0 || want == have; };
  const bool can_cluster = p.channels_last && s.terms == 1 && !s.folded && s.sets == 1;
  const bool can_pair = s.element == 4;  // of 16 bits no pair was faster
  std::vector<TileShape> shapes(std::begin(kTileShapes), std::end(kTileShapes));
  if (s.folded) shapes.assign(std::begin(kFoldedShapes), std::end(kFoldedShapes));
  if (s.sets > 1) shapes = {{s.sets, s.columns}};
  if (s.paired) {
    // They have two sets of sums.
    const auto large = [](const TileShape& t) { return t.mt > 2 || t.mt * t.columns > 128; };
    shapes.erase(std::remove_if(shapes.begin(), shapes.end(), large), shapes.end());
  }
  // Of 16 bits, words of two are copied where rows have no other ends.
  const bool turns = s.rows && s.terms == 1 && s.in_size[2] * s.element % 4 == 0;
  const int most_raws = turns ? 3 : 0;
  if (s.spread) {
    const auto other = [&](const TileShape& t) { return t.columns != s.columns; };
    shapes.erase(std::remove_if(shapes.begin(), shapes.end(), other), shapes.end());
  }
  for (const TileShape& shape : shapes) {
    // Split operands have two sets of sums, which leaves no registers for large tiles.
    if (s.terms > 1 && (shape.mt > 2 || shape.mt * shape.columns > 128)) continue;
    if (!allowed(forced.mt, shape.mt) || !allowed(forced.columns, shape.columns)) continue;
    // Doublings of a patch: to `mt` patches, and once more, to the parts of both groups of warps.
    const int patches = s.sets > 1 ? 1 : shape.mt;
    const int doublings = patches == 4 ? 3 : patches == 2 ? 2 : 1;
    for (const Patch& patch : kPatches) {
      if (!allowed(forced.inside, patch.images ? 2 : 1)) continue;
      // Images where eight neighbours along the last axis are often too many.
      const bool short_rows = forced.inside == 2 || s.q_size[2] % 8 != 0;
      if (patch.images && (!p.channels_last || p.n < 8 || !short_rows)) continue;
      if (s.folded && patch.size[3] != kFoldedSources) continue;
      for (int code = 0; code < 1 << 2 * doublings; ++code) {
        std::array<int, 4> part = patch.size;
        for (int i = 1; i < doublings; ++i) part[3 - (code >> 2 * i & 3)] *= 2;
        const int halved = 3 - (code & 3);
        std::array<int, 4> box = part;
        box[halved] *= 2;
        if (s.folded && box[3] != kFoldedSources) continue;
        if (!allowed(forced.box[0], box[1]) || !allowed(forced.box[1], box[2]) ||
            !allowed(forced.box[2], box[3])) {
          continue;
        }
        for (int buffers = 2; buffers <= DenseArgs::kMaxBuffers; ++buffers) {
          if (!allowed(forced.buffers, buffers)) continue;
          Candidate c{shape, buffers, 0, 0, halved, patch, part, {}};
          bool fits = false, l2_limits = false;
          for (int store_bytes : {128, 64, 32, 16}) {
            if (!allowed(forced.store_bytes, store_bytes)) continue;
            c.store_bytes = store_bytes;
            for (int raws = 0; raws <= most_raws; ++raws) {
              if (!allowed(forced.raws, raws + 1)) continue;
              c.raws = raws;
              fits = Fill(p, device, s, c, plan, l2_limits);
              if (!fits) break;
              if (s.rows && plan.seconds < best.seconds) {
                best = plan;
                better = true;
              }
            }
            if (fits && !s.rows) break;
          }
          if (!fits || s.rows) continue;
          // Clusters pay where items are few, or where copies from the L2 cache take longest.
          const bool share = l2_limits || forced.pair > 1;
          const int64_t items = plan.args.items;
          for (const Cluster& cluster : kClusters) {
            if (!allowed(forced.split, cluster.split) || !allowed(forced.pair, cluster.pair)) {
              continue;
            }
            if (cluster.split > 1 && items * cluster.split > device.multiprocessors) continue;
            if (cluster.pair > 1 && !(share && can_pair)) continue;
            if (!HasKernel(shape, cluster) || (cluster.Blocks() > 1 && !can_cluster)) continue;
            c.cluster = cluster;
            if (Fill(p, device, s, c, plan, l2_limits) && plan.seconds < best.seconds) {
              best = plan;
              better = true;
            }
          }
        }
      }
    }
  }
  if (better) Complete(p, s, best);
}

void SearchSpread(const Problem& p, const Device& device, int row_bytes, int sets, int columns,
                  const std::array<int, kAxes>& block, const DenseTile& forced, DensePlan& best) {
  const bool forward = p.pass == Pass::kForward;
  const Sizes size = forward ? p.osize : p.isize;
  int64_t all = forward ? p.cog() : p.cig();
  for (int i = 0; i < kAxes; ++i) {
    const int64_t phases = (forward ? p.stride[i] : 1) * block[i];
    const int64_t reach = (p.k[i] - 1) * p.dilation[i] + (block[i] - 1) * p.stride[i];
    if (phases > std::min<int64_t>(SpreadPack::kMaxPhases, size[i])) return;
    if (reach >= SpreadPack::kMaxSources) return;
    all *= phases;
  }
  if (all != columns) return;
  DensePlan plan = best;
  SearchTiles(p, device, SpreadShapeOf(p, row_bytes, sets, block), forced, plan);
  if (plan.refusal.empty()) best = plan;
}

// Groups beside each other, with phases, and blocks of neighbouring outputs, that make up the
// columns of a shape.
void SearchGrouped(const Problem& p, const Device& device, const DenseTile& forced,
                   DensePlan& best) {
  for (const TileShape& shape : kGroupedShapes) {
    if (p.groups % shape.mt != 0) continue;
    std::array<int, kAxes> b;
    for (b[0] = 1; b[0] <= 8; b[0] *= 2) {
      for (b[1] = 1; b[1] <= 8; b[1] *= 2) {
        for (b[2] = 1; b[2] <= 8; b[2] *= 2) {
          SearchSpread(p, device, 32 * shape.mt, shape.mt, shape.columns, b, forced, best);
        }
      }
    }
  }
}

// Phases, and blocks of neighbouring outputs, as columns of one product, where there are so few
// channels that shared memory limits products. With k taps along an axis, b neighbours read
// (k + b - 1) / b sources each, with zeros between, but the pixels once for all of them.
void SearchBlocks(const Problem& p, const Device& device, int row_bytes, const DenseTile& forced,
                  DensePlan& best) {
  constexpr int64_t kMostNeighbours = 4;
  const int64_t jg = p.pass == Pass::kForward ? p.cog() : p.cig();
  for (const int columns : {32, 48, 64, 96, 128}) {
    std::array<int, kAxes> b;
    for (b[0] = 1; b[0] <= kMostNeighbours; b[0] *= 2) {
      for (b[1] = 1; b[1] <= kMostNeighbours; b[1] *= 2) {
        for (b[2] = 1; b[2] <= kMostNeighbours; b[2] *= 2) {
          if (columns > jg) SearchSpread(p, device, row_bytes, 1, columns, b, forced, best);
        }
      }
    }
  }
}

DensePlan PlanMerged(const Problem& p, const Device& device, const DenseTile& forced) {
  DensePlan best{};
  best.refusal = Refuse(p, device);
  const auto refused = [&](DenseForm form) -> std::string {
    switch (form) {
      case DenseForm::kFold:
        return RefuseFolding(p);
      case DenseForm::kBlocks:
        return RefuseBlocks(p);
      case DenseForm::kGrouped:
        return RefuseGrouped(p);
      default:
        return "";
    }
  };
  if (best.refusal.empty()) best.refusal = refused(forced.form);
  if (!best.refusal.empty()) return best;
  const auto wants = [&](DenseForm form) {
    return (forced.form == DenseForm::kAny || forced.form == form) && refused(form).empty();
  };
  best.seconds = std::numeric_limits<double>::infinity();
  const int64_t bytes = (p.pass == Pass::kForward ? p.cig() : p.cog()) * SizeOf(p.in_dtype);
  const int row_bytes = bytes > 64 ? 128 : bytes > 32 ? 64 : 32;
  // Shorter rows make more but smaller stages.
  const int least = std::max(32, row_bytes / (Terms(p) + 1));
  for (int rows = row_bytes; wants(DenseForm::kPlain) && rows >= least; rows /= 2) {
    SearchTiles(p, device, ShapeOf(p, rows, false), forced, best);
    if (!best.refusal.empty()) return best;
  }
  for (int rows = row_bytes; wants(DenseForm::kFold) && rows >= 32; rows /= 2) {
    SearchTiles(p, device, ShapeOf(p, rows, true), forced, best);
    if (!best.refusal.empty()) return best;
  }
  for (int rows = row_bytes; wants(DenseForm::kBlocks) && rows >= least; rows /= 2) {
    SearchBlocks(p, device, rows, forced, best);
  }
  if (wants(DenseForm::kGrouped)) SearchGrouped(p, device, forced, best);
  if (best.seconds == std::numeric_limits<double>::infinity()) {
    best.refusal = forced.form == DenseForm::kFold ? "finds no tile for these taps and channels"
                   : forced.form == DenseForm::kBlocks || forced.form == DenseForm::kGrouped
                       ? "finds no phases and neighbours whose columns make up a product"
                       : "finds no tile whose inputs fit into shared memory";
  }
  return best;
}

// A tile has 32 columns, and a copy of less than 32 bytes a pixel is not to be had. So small groups
// run as one, where that wastes no more: the zeros between them take the room of idle columns.
constexpr int64_t kMergedColumns = 64, kMergedBytes = 128;

DensePlan MakePlan(const Problem& p, const Device& device, const DenseTile& forced) {
  DensePlan best = PlanMerged(p, device, forced);
  best.merged = 1;
  best.expanded_bytes = 0;
  const bool forward = p.pass == Pass::kForward;
  const int64_t cg = forward ? p.cig() : p.cog(), jg = forward ? p.cog() : p.cig();
  if (cg == 1 && jg == 1) return best;  // "depthwise" multiplies no zeros
  for (int merged = 2; merged <= p.groups; ++merged) {
    if (p.groups % merged != 0) continue;
    if (merged * jg > kMergedColumns || merged * cg * SizeOf(p.in_dtype) > kMergedBytes) break;
    DensePlan plan = PlanMerged(MergeGroups(p, merged), device, forced);
    if (!plan.refusal.empty()) continue;
    plan.merged = merged;
    plan.expanded_bytes = merged * p.WElements() * SizeOf(p.in_dtype);
    plan.pack_seconds += 2e-6;
    plan.seconds += 2e-6;
    if (!best.refusal.empty() || plan.seconds < best.seconds) best = plan;
  }
  return best;
}

// The rows "dense", "fold", "blocks" and "grouped" are one kernel. What refuses them and what they
// cost differ, so each has a name by which it is chosen, forced and tested.
template <DenseForm kForm>
struct DenseRow {
  static const DensePlan& PlanOf(const Problem& p, const Device& d) {
    return Remember<DensePlan>(p, d, [&] {
      DenseTile tile;
      tile.form = kForm;
      return MakePlan(p, d, tile);
    });
  }
  static std::string Refusal(const Problem& p, const Device& d) { return PlanOf(p, d).refusal; }
  static int64_t Workspace(const Problem& p, const Device& d) { return PlanOf(p, d).Workspace(); }
  static double Seconds(const Problem& p, const Device& d) { return PlanOf(p, d).seconds; }
  static cudaError_t Launch(const Problem& p, const Operands& ops, const Device& d,
                            cudaStream_t stream) {
    const DensePlan& plan = PlanOf(p, d);
    DenseLaunch launch;
    const cudaError_t status = PrepareDense(p, ops, plan, launch);
    return status == cudaSuccess ? RunDense(p, plan, launch, true, stream) : status;
  }
  static Row Of(const char* name, Pass pass) {
    return {name, pass, Refusal, Workspace, Seconds, Launch};
  }
};

}  // namespace

// The driver's function is asked for at run time, since the driver is not linked.
cudaError_t EncodeMap(DType dtype, const DenseMap& m, const void* data, CUtensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &found);
    const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const CUtensorMapDataType type = dtype == DType::kF32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = m.row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : m.row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : m.row_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
  void* first = const_cast<char*>(static_cast<const char*>(data) + m.offset);
  const CUresult result =
      encode(&map, type, 5, first, m.size, m.stride, m.box, m.step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

DensePlan PlanDense(const Problem& p, const Device& device, const DenseTile& tile) {
  return MakePlan(p, device, tile);
}

cudaError_t PrepareDense(const Problem& p, const Operands& ops, const DensePlan& plan,
                         DenseLaunch& launch) {
  const bool forward = p.pass == Pass::kForward;
  DenseArgs& args = launch.args = plan.args;
  DensePack& pack = launch.pack = plan.pack;
  args.in = forward ? ops.x : ops.y;
  args.out = ops.out;
  args.bias = forward ? ops.bias : nullptr;
  args.weights = static_cast<const char*>(ops.workspace);
  launch.w = ops.w;
  launch.expanded = static_cast<char*>(ops.workspace) + plan.weights_bytes;
  pack.w = plan.merged > 1 ? launch.expanded : ops.w;
  pack.weights = ops.workspace;
  launch.spread = plan.spread;
  launch.spread.w = pack.w;
  launch.spread.weights = pack.weights;
  launch.maps = {};
  cudaError_t status = cudaSuccess;
  CUtensorMap* map = launch.maps.map;
  for (const DenseMap& m : plan.in) {
    if (status == cudaSuccess) status = EncodeMap(p.in_dtype, m, args.in, *map++);
  }
  for (const DenseMap& m : plan.out) {
    if (status == cudaSuccess) status = EncodeMap(p.out_dtype, m, args.out, *map++);
  }
  return status;
}

cudaError_t RunDense(const Problem& p, const DensePlan& plan, const DenseLaunch& launch, bool packs,
                     cudaStream_t stream) {
  if (packs && plan.merged > 1) {
    const cudaError_t status = ExpandWeights(p, plan.merged, launch.w, launch.expanded, stream);
    if (status != cudaSuccess) return status;
  }
  switch (p.in_dtype) {
    case DType::kF32:
      return EnqueueDense<float>(plan, launch, packs, stream);
    case DType::kBF16:
      return EnqueueDense<__nv_bfloat16>(plan, launch, packs, stream);
    case DType::kF16:
      return EnqueueDense<__half>(plan, launch, packs, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

void AddDense(std::vector<Row>& rows) {
  for (Pass pass : {Pass::kForward, Pass::kInputGrad}) {
    rows.push_back(DenseRow<DenseForm::kPlain>::Of("dense", pass));
    rows.push_back(DenseRow<DenseForm::kFold>::Of("fold", pass));
    rows.push_back(DenseRow<DenseForm::kBlocks>::Of("blocks", pass));
    rows.push_back(DenseRow<DenseForm::kGrouped>::Of("grouped", pass));
  }
}

}  // namespace jaxconv::cuda
