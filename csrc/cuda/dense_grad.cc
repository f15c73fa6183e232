#include "cuda/dense_grad.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "cuda/device_limits.h"
#include "cuda/plan_memo.h"
#include "cuda/sum_parts.cuh"
#include "cuda/weight_grad.h"

namespace jaxconv::cuda {
namespace {

constexpr DenseGradVariant kVariants[] = {
#define JAXCONV_CASE(NT, P) {NT, P},
    JAXCONV_DENSE_GRAD_VARIANTS(JAXCONV_CASE)
#undef JAXCONV_CASE
};

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  if (!HasWgmma(device.compute_capability)) return "needs compute capability 9.0";
  if (p.in_dtype == DType::kF64) return "float64 has no tensor cores here";
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "rounds float32 products to TF32";
  }
  if (p.channels_last && (p.cig() % 4 != 0 || p.cog() % 4 != 0)) {
    return "takes a multiple of 4 channels a group where channels are last";
  }
  if (Product(p.k) > DenseGradArgs::kMaxTaps) {
    return "takes at most " + std::to_string(DenseGradArgs::kMaxTaps) + " taps";
  }
  for (int a = 0; a < kAxes; ++a) {
    if (p.k[a] * p.dilation[a] + std::abs(p.pad[a]) + p.stride[a] > 1 << 14) {
      return "takes kernels that reach over less than 2^14 outputs";
    }
  }
  constexpr int64_t kMost = int64_t{1} << 31;
  if (p.ci * Product(p.isize) >= kMost || p.co * Product(p.osize) >= kMost) {
    return "indexes an image of x or y in 32 bits";
  }
  return "";
}

// The problem with its axes in the order in which the kernel takes them, and how an axis is cut.
struct Shape {
  DenseGradFrom from;
  int element, streams, cuts;
  int unit;  // pixels of a position: as many as there are streams, if those are pixels, or one
  std::array<int, kAxes> order;
  Sizes isize, osize, k, stride, dilation, pad;
  Strides xs, ys;
  int64_t segment;  // of axis 0

  int Images() const { return unit > 1 ? 1 : streams / cuts; }  // of a tile
};

// `pixels`: neighbours of the last axis as streams, which not all problems allow.
std::optional<Shape> ShapeOf(const Problem& p, bool pixels) {
  Shape s{};
  s.element = static_cast<int>(SizeOf(p.in_dtype));
  s.streams = static_cast<int>(Streams(p));
  s.cuts = pixels ? 1 : s.streams / static_cast<int>(std::gcd(p.n, int64_t{s.streams}));
  s.unit = pixels ? s.streams : 1;
  int cut = 0;
  if (s.cuts > 1) {
    // The first axis that is long enough, since the last one should stay whole.
    for (int a = 1; a < kAxes; ++a) {
      if (p.isize[cut] < 2 * s.cuts && p.isize[a] > p.isize[cut]) cut = a;
    }
  }
  s.order[0] = cut;
  for (int a = 0, to = 1; a < kAxes; ++a) {
    if (a != cut) s.order[to++] = a;
  }
  s.xs = p.XStrides();
  s.ys = p.YStrides();
  const Strides xs = s.xs, ys = s.ys;
  for (int i = 0; i < kAxes; ++i) {
    const int a = s.order[i];
    s.isize[i] = p.isize[a];
    s.osize[i] = p.osize[a];
    s.k[i] = p.k[a];
    s.stride[i] = p.stride[a];
    s.dilation[i] = p.dilation[a];
    s.pad[i] = p.pad[a];
    s.xs.s[i] = xs.s[a];
    s.ys.s[i] = ys.s[a];
  }
  s.segment = CeilDiv(s.isize[0], s.cuts);
  s.from = p.channels_last ? DenseGradFrom::kRuns : DenseGradFrom::kRows;
  // Copies need whole images as streams, aligned pixels and groups, and a map for each residue of
  // the outputs.
  const auto aligned = [&](int64_t channels) { return channels * s.element % 16 == 0; };
  int64_t residues = 1;
  bool all = true;  // have outputs
  for (int i = 0; i < kAxes; ++i) {
    residues *= std::min(s.stride[i], s.k[i]);
    all = all && s.osize[i] >= s.stride[i];
  }
  if (p.channels_last && s.cuts == 1 && aligned(p.cig()) && aligned(p.cog()) &&
      residues <= kDenseGradResidues && all) {
    s.from = DenseGradFrom::kCopies;
  }
  // Products across rows are of 16 bits.
  if (pixels && (s.from != DenseGradFrom::kCopies || s.element != 2)) return std::nullopt;
  return s;
}

// A tap reads y at stride * (input + place) + residue.
struct Tap {
  int index;
  std::array<int, kAxes> place, residue;
};

// All taps: in their order in memory, or those of one residue one after the other.
std::vector<Tap> TapsOf(const Problem& p, const Shape& s, bool by_residue) {
  std::vector<Tap> taps;
  for (int64_t t = 0; t < Product(p.k); ++t) {
    const Sizes at{t / p.k[2] / p.k[1], t / p.k[2] % p.k[1], t % p.k[2]};
    Tap tap{static_cast<int>(t), {}, {}};
    for (int i = 0; i < kAxes; ++i) {
      const int64_t shift = at[s.order[i]] * s.dilation[i] - s.pad[i];
      tap.place[i] = static_cast<int>(FloorDiv(shift, s.stride[i]));
      tap.residue[i] = static_cast<int>(shift - tap.place[i] * s.stride[i]);
    }
    taps.push_back(tap);
  }
  if (by_residue) {
    std::stable_sort(taps.begin(), taps.end(),
                     [](const Tap& a, const Tap& b) { return a.residue < b.residue; });
  }
  return taps;
}

// A box of y: the outputs of one residue that a chunk of taps reads.
struct Box {
  std::array<int, kAxes> residue, low, high;  // places
};

std::vector<Box> BoxesOf(const std::vector<Tap>& taps, int first, int count) {
  std::vector<Box> boxes;
  for (int t = first; t < first + count; ++t) {
    const Tap& tap = taps[t];
    auto box = std::find_if(boxes.begin(), boxes.end(),
                            [&](const Box& b) { return b.residue == tap.residue; });
    if (box == boxes.end()) {
      boxes.push_back({tap.residue, tap.place, tap.place});
      continue;
    }
    for (int i = 0; i < kAxes; ++i) {
      box->low[i] = std::min(box->low[i], tap.place[i]);
      box->high[i] = std::max(box->high[i], tap.place[i]);
    }
  }
  return boxes;
}

// What the choice of chunks says about boxes.
struct Chunks {
  const std::vector<Tap>* taps;
  int count, chunk_taps, most_boxes;
  std::array<int, kAxes> reach;
  double boxes, sectors;  // of a chunk: mean; of a (ci, co) in dw: all
  double read;            // share of the outputs that some tap reads
};

Chunks ChunksOf(const Problem& p, const std::vector<Tap>& taps, int most) {
  const int all = static_cast<int>(taps.size());
  Chunks c{&taps, static_cast<int>(CeilDiv(all, most)), 0, 0, {0, 0, 0}, 0, 0, 0};
  c.chunk_taps = static_cast<int>(CeilDiv(all, c.count));
  c.count = static_cast<int>(CeilDiv(all, c.chunk_taps));
  const std::vector<Box> residues = BoxesOf(taps, 0, all);
  c.read = static_cast<double>(residues.size()) / static_cast<double>(Product(p.stride));
  for (int i = 0; i < c.count; ++i) {
    const int first = i * c.chunk_taps, mine = std::min(c.chunk_taps, all - first);
    const std::vector<Box> boxes = BoxesOf(taps, first, mine);
    c.most_boxes = std::max(c.most_boxes, static_cast<int>(boxes.size()));
    c.boxes += static_cast<double>(boxes.size()) / c.count;
    for (const Box& b : boxes) {
      for (int a = 0; a < kAxes; ++a) {
        c.reach[a] = std::max(c.reach[a], b.high[a] - b.low[a]);
      }
    }
    for (int t = first, sector = -1; t < first + mine; ++t) {
      const int of = static_cast<int>(taps[t].index * SizeOf(p.out_dtype) / 32);
      if (of != sector) c.sectors += 1;
      sector = of;
    }
  }
  return c;
}

struct Candidate {
  DenseGradVariant variant;
  int row_blocks, cluster, waves;
  std::array<int, kAxes> box;
};

// Fills what the cost needs; false where it does not fit.
bool Fill(const Problem& p, const Device& device, const Shape& s, const Chunks& chunks,
          const Candidate& c, DenseGradPlan& plan) {
  DenseGradArgs& a = plan.args;
  const int columns = 8 * c.variant.tiles;
  a.row_blocks = c.row_blocks;
  a.cluster = c.cluster;
  a.chunks = chunks.count;
  a.chunk_taps = chunks.chunk_taps;
  a.co_tiles = static_cast<int>(CeilDiv(p.cog(), columns));
  a.ci_tiles = static_cast<int>(CeilDiv(p.cig(), 64 * c.row_blocks));
  a.groups = static_cast<int>(p.groups);
  a.positions = 1;
  a.y_positions = 1;
  a.unit = s.unit;
  a.tile_groups = static_cast<int>(p.n / s.Images());
  int64_t tiles = a.tile_groups;
  for (int i = 0; i < kAxes; ++i) {
    a.box[i] = c.box[i];
    a.y_box[i] = c.box[i] + chunks.reach[i];
    a.tiles_of[i] = static_cast<int>(CeilDiv(i == 0 ? s.segment : s.isize[i], c.box[i]));
    a.stride[i] = static_cast<int>(s.stride[i]);
    a.positions *= a.box[i];
    a.y_positions *= a.y_box[i];
    tiles *= a.tiles_of[i];
  }
  a.positions /= s.unit;
  // Steps take two neighbours of the last axis that a box has several positions along.
  int pair = kAxes - 1, along = a.box[pair] / s.unit;
  a.y_pair = s.unit;
  for (int y_row = 1; pair > 0 && along == 1; along = a.box[--pair]) {
    a.y_pair = y_row *= a.y_box[pair];
  }
  if (along % 2 != 0) return false;
  if (a.positions % 4 != 0 || tiles > std::numeric_limits<int>::max()) return false;
  a.tiles = static_cast<int>(tiles);
  a.steps = a.positions / 2;
  a.x.channels = 64 * c.row_blocks;
  a.y.channels = columns;
  const double y_loaded = chunks.boxes * a.y_positions / s.unit;  // positions of a stage
  a.y_box_bytes = a.y_positions * a.y.channels * 16 / s.unit;
  a.y_positions = static_cast<int>(RoundUp(a.y_positions, s.unit));  // boxes begin at whole ones
  const int y_all = chunks.most_boxes * a.y_positions;
  const bool copies = s.from == DenseGradFrom::kCopies;
  for (DenseGradOperand* o : {&a.x, &a.y}) {
    o->copies = copies && s.element == 2 ? o->channels / 64 : 1;
    // Channels first, neighbouring positions are stored at once: 16 bytes bring them apart.
    o->pitch = o->channels * 16 / o->copies + (p.channels_last ? 0 : 16);
  }
  a.y.pitch /= s.unit;
  a.x.copied = a.positions * a.x.pitch;
  a.y.copied = y_all * a.y.pitch;
  if (copies) {
    for (int i = 0; i < kAxes; ++i) {
      if (a.y_box[i] > 256) return false;
    }
  }
  if (y_all > std::numeric_limits<uint16_t>::max()) return false;
  int smem = 24 * kDenseGradStages;
  const auto place = [&](int bytes) {
    const int at = smem;
    smem = static_cast<int>(RoundUp(smem + bytes, 128));
    return at;
  };
  place(0);
  a.smem_x = place(copies ? 0 : a.positions * 16);
  a.smem_y = place(copies ? 0 : y_all * 16);
  a.smem_pairs = place(a.steps * 4);
  // Swizzled rows begin at multiples of 1024 bytes.
  a.smem_stages = smem = static_cast<int>(RoundUp(smem, 1024));
  a.y_offset = static_cast<int>(RoundUp(a.x.copies * a.x.copied, 1024));
  a.stage_bytes = static_cast<int>(RoundUp(a.y_offset + a.y.copies * a.y.copied, 1024));
  const int64_t limit = SharedMemoryOfBlock(device.compute_capability);
  a.stages = static_cast<int>(
      std::min<int64_t>((limit - a.smem_stages) / a.stage_bytes, kDenseGradStages));
  if (a.stages < 2) return false;
  const int slots = c.variant.products * kDenseGradGroups / c.row_blocks;
  // Four floats more than rows bring taps into different banks.
  a.tap_pitch = 64 * c.row_blocks * (columns + 8) + 4;
  a.smem = a.smem_stages + std::max(a.stages * a.stage_bytes, slots * a.tap_pitch * 4);
  if (a.smem > limit) return false;

  // Parts: of clusters as many as fill the device so many times, and as have room.
  const int64_t column_blocks = int64_t{a.chunks} * a.co_tiles * a.ci_tiles * a.groups;
  const int64_t at_once = ClustersAtOnce(device.multiprocessors, c.cluster) * c.cluster;
  const int64_t room = p.YElements() * s.element / 10;
  int64_t parts = at_once * c.waves / (column_blocks * c.cluster);
  parts = std::min({parts, room / (4 * p.WElements()), tiles / c.cluster});
  a.parts = static_cast<int>(std::max<int64_t>(parts, 1));
  const int64_t blocks = column_blocks * c.cluster * a.parts;
  if (blocks > std::numeric_limits<int>::max() / 2) return false;
  plan.blocks = static_cast<int>(blocks);
  plan.variant = c.variant;
  plan.from = s.from;
  const int64_t block_tiles = CeilDiv(tiles, int64_t{a.parts} * c.cluster);
  plan.workspace = a.parts > 1 ? 4 * a.parts * p.WElements() : 0;
  plan.kept_offset = RoundUp(plan.workspace, 128);
  const int64_t kept =
      blocks * c.variant.products * c.variant.tiles * 4 * 4 * 128 * kDenseGradGroups;
  a.flush = std::max(1, kWeightGradFlush / a.steps);
  if (block_tiles <= a.flush || plan.kept_offset + kept > room) {
    a.flush = 0;
  } else {
    plan.workspace = plan.kept_offset + kept;
  }

  // Cycles of a stage: of the tensor cores, of shared memory, of the threads that load, and of
  // copies from the L2 cache.
  constexpr double kClock = 1.7e9;
  const double products = double{1} * a.steps * kDenseGradGroups * c.variant.products;
  const double tensor = products * c.variant.tiles * 4;
  const double x_vectors = double{1} * a.positions * a.x.channels;
  const double y_vectors = y_loaded * a.y.channels;
  const double vectors = x_vectors + y_vectors;
  const double shared = products * (2048 + columns * 32) / 128 +
                        vectors * 16 / 128 * (copies && s.element == 4 ? 3 : 1);
  const bool half = s.element == 2, last = p.channels_last;
  // Loads by threads wait for latency: that of device memory, if the arrays outgrow the L2 cache.
  const bool cached = (p.XElements() + p.YElements()) * s.element <= 40 << 20;
  const double loaded = (cached ? 9 : 4.5) * (half && !last ? 0.75 : 1);  // bytes a cycle
  const double load = copies ? 0 : vectors * 16 / loaded;
  // Channels first, rows touch sectors in part.
  const auto torn = [&](int axis_length, int64_t stride) {
    const double bytes = double{1} * axis_length * s.element;
    return last ? 1
                : std::min(32.0 / s.element, (bytes * static_cast<double>(stride) + 28) / bytes);
  };
  const double x_torn = torn(a.box[2], 1), y_torn = torn(a.y_box[2], a.stride[2]);
  // Boxes of several residues took longer (H100).
  const double apart = copies ? 1 + 0.12 * (chunks.most_boxes - 1) : 1;
  const double l2 = (x_vectors * x_torn + y_vectors * y_torn) * 16 / 22 * apart;
  // Copies that are under way arrive late.
  const double multiply = 1.1 * std::max(tensor, shared);
  const double turn = copies && s.element == 4 ? 0.5 * vectors : 0;
  const double late = copies ? (3400 + 0.5 * l2 + turn + multiply) / a.stages : 0;
  const double stage = std::max({multiply, load, l2, late}) + 300;
  const auto waves = static_cast<double>(CeilDiv(blocks, at_once));
  const double results = 64.0 * c.row_blocks * columns * a.chunk_taps;
  const double least =
      (static_cast<double>(p.XElements()) * (1 + x_torn) +
       static_cast<double>(p.YElements()) * (last ? 2 * chunks.read : 1 + y_torn)) /
      2 * s.element / 4e12;
  double seconds = std::max(waves * static_cast<double>(block_tiles) * stage / kClock, least) +
                   waves * (3e-6 + results * 0.35 / kClock) + 6e-6;
  seconds += a.parts * chunks.sectors * static_cast<double>(p.ci * p.cog()) / 170e9;
  if (a.flush > 0) {
    seconds += static_cast<double>(block_tiles / a.flush) * results * 8 / 22 / kClock;
  }
  if (a.parts > 1) seconds += 3e-6 + 4.0 * a.parts * static_cast<double>(p.WElements()) / 2e12;
  // Measured: 0.8 to 1.1 of that; of pixels as streams less, unless a row has only eight.
  if (copies) seconds *= s.unit == 1 ? 0.88 : s.isize[2] < 2 * s.unit ? 0.97 : 0.85;
  // Loads of long rows from up to 1.5 MB of a channel took 0.54 to 0.72 of that (H100).
  const bool flat = Product(s.isize) <= s.isize[1] * s.isize[2] && s.isize[2] >= 128;
  if (!last && flat && Product(s.isize) * s.element < 3 << 19) seconds *= 0.57;
  plan.seconds = seconds;
  return true;
}

void FillOperand(DenseGradOperand& o, const Shape& s, const Strides& steps, const Sizes& size,
                 bool y, int64_t group_channels) {
  o.group_channels = static_cast<int>(group_channels);
  o.n_step = steps.n;
  o.c_step = steps.c;
  for (int i = 0; i < kAxes; ++i) {
    o.step[i] = steps.s[i];
    o.size[i] = static_cast<int>(size[i]);
  }
  o.limit = y ? std::numeric_limits<int>::max() : static_cast<int>(s.segment);
  for (int stream = 0; stream < s.streams; ++stream) {
    const int64_t along = stream % s.cuts * s.segment * (y ? s.stride[0] : 1);
    o.along[stream] = static_cast<int>(along);
    o.delta[stream] = (stream / s.cuts * steps.n + along * steps.s[0]) * s.element;
  }
  o.cuts = s.cuts;
  o.by_units = DivisorOf(o.channels / 32);
  while (32 << o.log_shares < o.channels) ++o.log_shares;
}

// A bulk copy's box: channels, then images that are streams, then pixels `stride` apart, from
// `residue` on, or then those of one image.
DenseMap MapOf(const DenseGradOperand& o, const Shape& s, int64_t n, int64_t channels,
               const int (&box)[kAxes], const Sizes& stride,
               const std::array<int, kAxes>& residue) {
  DenseMap m{};
  const bool pixels = s.unit > 1;
  const int images = pixels ? 4 : 1, last = pixels ? 3 : 4;  // axes of the map
  m.size[0] = static_cast<uint64_t>(channels);
  m.size[images] = static_cast<uint64_t>(n);
  m.stride[images - 1] = static_cast<uint64_t>(o.n_step * s.element);
  m.box[0] = static_cast<uint32_t>(o.channels / o.copies);
  m.box[images] = static_cast<uint32_t>(s.Images());
  m.row_bytes = static_cast<int>(m.box[0]) * s.element;
  std::fill(std::begin(m.step), std::end(m.step), 1);
  for (int i = 0; i < kAxes; ++i) {
    m.size[last - i] = static_cast<uint64_t>(CeilDiv(o.size[i] - residue[i], stride[i]));
    m.stride[last - i - 1] = static_cast<uint64_t>(o.step[i] * stride[i] * s.element);
    m.box[last - i] = static_cast<uint32_t>(box[i]);
    m.offset += residue[i] * o.step[i] * s.element;
  }
  return m;
}

// Fills what the choice does not need.
void Complete(const Problem& p, const Shape& s, const Chunks& chunks, DenseGradPlan& plan) {
  DenseGradArgs& a = plan.args;
  FillOperand(a.x, s, s.xs, s.isize, false, p.cig());
  FillOperand(a.y, s, s.ys, s.osize, true, p.cog());
  const bool copies = s.from == DenseGradFrom::kCopies;
  std::vector<std::array<int, kAxes>> residues;  // of the maps
  if (copies) plan.x = MapOf(a.x, s, p.n, p.ci, a.box, {1, 1, 1}, {0, 0, 0});
  a.w_elements = p.WElements();
  a.cig = static_cast<int>(p.cig());
  a.cog = static_cast<int>(p.cog());
  a.taps = static_cast<int>(chunks.taps->size());
  a.image_groups = s.Images();
  a.by_chunk_taps = DivisorOf(a.chunk_taps);
  int boxes_so_far = 0;
  for (int c = 0; c < a.chunks; ++c) {
    const int first = c * a.chunk_taps, count = std::min(a.chunk_taps, a.taps - first);
    const std::vector<Box> boxes = BoxesOf(*chunks.taps, first, count);
    a.first_box[c] = static_cast<uint16_t>(boxes_so_far);
    for (const Box& b : boxes) {
      for (int i = 0; i < kAxes; ++i) {
        a.box_first[boxes_so_far][i] =
            static_cast<int16_t>(copies ? b.low[i] : b.low[i] * a.stride[i] + b.residue[i]);
      }
      if (copies) {
        const auto known = std::find(residues.begin(), residues.end(), b.residue);
        a.box_map[boxes_so_far] = static_cast<uint8_t>(known - residues.begin());
        if (known == residues.end()) {
          residues.push_back(b.residue);
          plan.y.push_back(MapOf(a.y, s, p.n, p.co, a.y_box, s.stride, b.residue));
        }
      }
      ++boxes_so_far;
    }
    for (int t = first; t < first + count; ++t) {
      const Tap& tap = (*chunks.taps)[t];
      const auto box = std::find_if(boxes.begin(), boxes.end(),
                                    [&](const Box& b) { return b.residue == tap.residue; });
      int place = 0;
      for (int i = 0; i < kAxes; ++i) place = place * a.y_box[i] + tap.place[i] - box->low[i];
      place += static_cast<int>(box - boxes.begin()) * a.y_positions;
      a.tap[t] = static_cast<uint16_t>(tap.index);
      a.shift[t] = static_cast<uint16_t>(place);
    }
  }
  a.first_box[a.chunks] = static_cast<uint16_t>(boxes_so_far);
}

// Keeps the fastest in `best`.
void SearchShape(const Problem& p, const Device& device, const Shape& s, DenseGradPlan& best) {
  const std::vector<Tap> orders[] = {TapsOf(p, s, true), TapsOf(p, s, false)};
  DenseGradPlan plan{};
  Chunks best_chunks{};
  for (const DenseGradVariant& variant : kVariants) {
    for (int row_blocks = 1; row_blocks <= (p.cig() > 64 ? 2 : 1); ++row_blocks) {
      for (const std::vector<Tap>& taps : orders) {
        const Chunks chunks = ChunksOf(p, taps, variant.products * kDenseGradGroups / row_blocks);
        for (int code = 0; code < 6 * 5 * 7; ++code) {
          const std::array<int, kAxes> box{1 << code % 6, 1 << code / 6 % 5, s.unit << code / 30};
          bool useful = box[0] * box[1] * box[2] <= 128 * s.unit;
          for (int i = 0; i < kAxes; ++i) {
            const int least = i == kAxes - 1 ? s.unit : 1;
            useful = useful && (box[i] == least || box[i] < 2 * s.isize[i]);
          }
          if (!useful) continue;
          for (int cluster = 1; cluster <= 8; cluster *= 2) {
            for (int waves = 1; waves <= 3; ++waves) {
              const Candidate c{variant, row_blocks, cluster, waves, box};
              if (!Fill(p, device, s, chunks, c, plan) || plan.seconds >= best.seconds) continue;
              best = plan;
              best_chunks = chunks;
            }
          }
        }
      }
    }
  }
  if (best_chunks.taps != nullptr) Complete(p, s, best_chunks, best);
}

// Copies take a multiple of the streams of images. Channels last the outermost axis can be cut into
// more of them, by other counts alone, if no tap reaches over a cut: as where kernel = stride.
Problem CutImages(Problem p) {
  const int64_t cuts = Streams(p) / std::gcd(p.n, Streams(p));
  const int axis = OutermostAxis(p);
  const int64_t s = p.stride[axis];
  if (p.channels_last && p.isize[axis] % cuts == 0 && p.pad[axis] == 0 &&
      (p.k[axis] - 1) * p.dilation[axis] < s && p.osize[axis] == p.isize[axis] * s) {
    p.n *= cuts;
    p.isize[axis] /= cuts;
    p.osize[axis] /= cuts;
  }
  return p;
}

DenseGradPlan Search(const Problem& whole, const Device& device) {
  DenseGradPlan best{};
  best.refusal = Refuse(whole, device);
  if (!best.refusal.empty()) return best;
  best.refusal = "finds no cut that fits into shared memory";
  best.seconds = std::numeric_limits<double>::infinity();
  for (bool pixels : {true, false}) {
    const Problem p = pixels ? whole : CutImages(whole);
    const std::optional<Shape> s = ShapeOf(p, pixels);
    if (s) SearchShape(p, device, *s, best);
  }
  return best;
}

const DenseGradPlan& PlanOf(const Problem& p, const Device& d) {
  return Remember<DenseGradPlan>(p, d, [&] { return Search(p, d); });
}

template <class T>
cudaError_t Enqueue(const DenseGradPlan& plan, const DenseGradArgs& args, const DenseGradMaps& maps,
                    cudaStream_t stream) {
  switch (plan.from) {
    case DenseGradFrom::kRows:
      return EnqueueDenseGrad<T, DenseGradFrom::kRows>(plan, args, maps, stream);
    case DenseGradFrom::kRuns:
      return EnqueueDenseGrad<T, DenseGradFrom::kRuns>(plan, args, maps, stream);
    case DenseGradFrom::kCopies:
      return EnqueueDenseGrad<T, DenseGradFrom::kCopies>(plan, args, maps, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t LaunchDenseGrad(const Problem& p, const Operands& ops, const Device& d,
                            cudaStream_t stream) {
  const DenseGradPlan& plan = PlanOf(p, d);
  DenseGradLaunch launch;
  cudaError_t status = PrepareDenseGrad(p, ops, plan, launch);
  if (status == cudaSuccess) status = RunDenseGrad(p, plan, launch, stream);
  if (status != cudaSuccess || plan.args.parts == 1) return status;
  return SumParts(static_cast<const float*>(ops.workspace), plan.args.parts, plan.args.w_elements,
                  p.out_dtype, ops.out, stream);
}

}  // namespace

const DenseGradPlan& PlanDenseGrad(const Problem& p, const Device& device) {
  return PlanOf(p, device);
}

cudaError_t PrepareDenseGrad(const Problem& p, const Operands& ops, const DenseGradPlan& plan,
                             DenseGradLaunch& launch) {
  DenseGradArgs& args = launch.args = plan.args;
  args.x.from = ops.x;
  args.y.from = ops.y;
  args.out = args.parts > 1 ? ops.workspace : ops.out;
  args.kept = reinterpret_cast<float*>(static_cast<char*>(ops.workspace) + plan.kept_offset);
  args.out_dtype = static_cast<int32_t>(args.parts > 1 ? DType::kF32 : p.out_dtype);
  launch.maps = {};
  if (plan.from != DenseGradFrom::kCopies) return cudaSuccess;
  cudaError_t status = EncodeMap(p.in_dtype, plan.x, ops.x, launch.maps.x);
  for (size_t i = 0; i < plan.y.size() && status == cudaSuccess; ++i) {
    status = EncodeMap(p.in_dtype, plan.y[i], ops.y, launch.maps.y[i]);
  }
  return status;
}

cudaError_t RunDenseGrad(const Problem& p, const DenseGradPlan& plan, const DenseGradLaunch& launch,
                         cudaStream_t stream) {
  switch (p.in_dtype) {
    case DType::kF32:
      return Enqueue<float>(plan, launch.args, launch.maps, stream);
    case DType::kBF16:
      return Enqueue<__nv_bfloat16>(plan, launch.args, launch.maps, stream);
    case DType::kF16:
      return Enqueue<__half>(plan, launch.args, launch.maps, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

void AddDenseGrad(std::vector<Row>& rows) {
  rows.push_back({"dense", Pass::kWeightGrad,
                  [](const Problem& p, const Device& d) { return PlanOf(p, d).refusal; },
                  [](const Problem& p, const Device& d) { return PlanOf(p, d).workspace; },
                  [](const Problem& p, const Device& d) { return PlanOf(p, d).seconds; },
                  LaunchDenseGrad});
}

}  // namespace jaxconv::cuda
