#include "cuda/thin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/device_limits.h"
#include "cuda/plan_memo.h"
#include "cuda/sum_parts.cuh"
#include "cuda/taps.h"

namespace jaxconv::cuda {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

// Compiled shapes: weights of 16 * mt columns (input gradient: channels) by ks steps of the tensor
// cores, of 32 bytes of terms, stay in a warp's registers.
struct Shape {
  int mt, ks;
};
constexpr Shape kShapes[] = {{4, 4}, {2, 8}, {1, 16}};

// The shape for sums of so many terms; ks is 0 where there is none.
Shape ShapeFor(int64_t terms, int64_t size) {
  for (const Shape& shape : kShapes) {
    if (terms * size <= 32 * shape.ks) return shape;
  }
  return {0, 0};
}

constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  if (CodeFor(device.compute_capability) < 80) return "needs compute capability 8.0";
  if (p.groups > 1) return "takes one group";
  if (p.in_dtype == DType::kF64) return "float64 has no tensor cores here";
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "rounds float32 products to TF32";
  }
  const int64_t columns = p.co * Product(p.k);
  if (p.co > 8) return "takes at most 8 output channels";
  if (columns > 256) return "takes at most 256 taps and output channels";
  if (p.pass != Pass::kWeightGrad &&
      ShapeFor(p.pass == Pass::kForward ? p.ci : columns, SizeOf(p.in_dtype)).ks == 0) {
    return "keeps weights in registers: sums of at most " +
           std::to_string(512 / SizeOf(p.in_dtype)) + " terms";
  }
  for (int a = 0; a < kAxes; ++a) {
    if (p.stride[a] > kThinMaxStride) {
      return "takes strides up to " + std::to_string(kThinMaxStride);
    }
    if (p.k[a] > kThinMaxTaps || (p.k[a] - 1) * p.dilation[a] > 512 || std::abs(p.pad[a]) > 4096) {
      return "takes kernels and padding of limited reach";
    }
    if (p.isize[a] > 1 << 28 || p.osize[a] > 1 << 28) return "takes shorter axes";
  }
  if (p.ci * Product(p.isize) > kIntMax || p.co * Product(p.osize) > kIntMax) {
    return "indexes an image of x or y in 32 bits";
  }
  if (p.n > 1 << 24) return "takes fewer images";
  return "";
}

// The longest copy, in bytes, that divides a row.
int Unit(int64_t row_bytes) {
  int unit = 16;
  while (row_bytes % unit != 0) unit /= 2;
  return unit;
}

// The model: cycles of a step of a block, alone on its multiprocessor, or the time of reading and
// writing everything once.
constexpr double kClock = 1.7e9, kBytesACycle = 17, kL2BytesACycle = 30;
double Traffic(const Problem& p, const Device& device) {
  return static_cast<double>((p.XElements() + p.YElements()) * SizeOf(p.in_dtype)) /
         (kBytesACycle * device.multiprocessors);
}

bool Allowed(int64_t forced, int64_t have) { return forced == 0 || forced == have; }

// x as the problem has it; channels of a block, rows and width of a step are given.
ThinX SourcesOf(const Problem& p) {
  ThinX x{};
  const Strides steps = p.XStrides();
  x.n_step = steps.n;
  x.c_step = static_cast<int>(steps.c);
  x.d_step = static_cast<int>(steps.s[0]);
  x.h_step = static_cast<int>(steps.s[1]);
  x.ci = static_cast<int>(p.ci);
  for (int i = 0; i < kAxes; ++i) x.size[i] = static_cast<int>(p.isize[i]);
  x.unit = Unit((p.channels_last ? p.ci : p.isize[2]) * SizeOf(p.in_dtype));
  return x;
}

// `pitch`: bytes of a staged channel (channels last: pixel), of which there are `staged`.
bool CutSources(const Problem& p, int64_t channels, int64_t rows, int64_t width, int64_t pitch,
                int64_t staged, ThinX& x) {
  const int64_t units = (p.channels_last ? channels : width) * SizeOf(p.in_dtype) / x.unit;
  if ((p.channels_last ? width : channels) * rows * units >= 1 << 15) return false;
  x.channels = static_cast<int>(channels);
  x.rows = static_cast<int>(rows);
  x.width = static_cast<int>(width);
  x.by_units = DivisorOf(static_cast<int>(units));
  x.by_rows = DivisorOf(static_cast<int>(p.channels_last ? width : rows));
  x.pitch = static_cast<int>(pitch);
  x.stage = static_cast<int>(RoundUp(staged * pitch, 128));
  return true;
}

// The least that is no less than `bytes` and `rest` beyond a multiple of `step`.
constexpr int64_t Pitch(int64_t bytes, int64_t step, int64_t rest) {
  return RoundUp(bytes - rest, step) + rest;
}

ThinY TargetsOf(const Problem& p) {
  ThinY y{};
  const Strides steps = p.YStrides();
  y.n_step = steps.n;
  y.c_step = static_cast<int>(steps.c);
  y.d_step = static_cast<int>(steps.s[0]);
  y.h_step = static_cast<int>(steps.s[1]);
  y.co = static_cast<int>(p.co);
  for (int i = 0; i < kAxes; ++i) {
    y.size[i] = static_cast<int>(p.osize[i]);
    y.k[i] = static_cast<int>(p.k[i]);
    y.stride[i] = static_cast<int>(p.stride[i]);
    y.pad[i] = static_cast<int>(p.pad[i]);
    y.dilation[i] = static_cast<int>(p.dilation[i]);
  }
  const int64_t size = SizeOf(p.in_dtype);
  y.unit = Unit(p.osize[2] * (p.channels_last ? p.co : 1) * size);
  y.unit_elements = static_cast<int>(y.unit / size);
  return y;
}

bool CutTargets(const Problem& p, int64_t rows, int64_t width, ThinY& y) {
  const int64_t channels = p.channels_last ? p.co : 1;
  const int64_t planes = (p.channels_last ? 1 : p.co) * p.k[0];
  const int64_t reach = (width - 1) * p.stride[2] + (p.k[2] - 1) * p.dilation[2] + 1;
  const int64_t length = RoundUp(reach * channels + y.unit_elements - 1, y.unit_elements);
  const int64_t units = length / y.unit_elements;
  const int64_t staged_rows = (rows - 1) * p.stride[1] + (p.k[1] - 1) * p.dilation[1] + 1;
  if (planes * staged_rows * units >= 1 << 15) return false;
  y.rows = static_cast<int>(staged_rows);
  y.by_units = DivisorOf(static_cast<int>(units));
  y.by_rows = DivisorOf(y.rows);
  y.by_planes = DivisorOf(y.k[0]);
  y.pixel_step = static_cast<int>(p.stride[2] * channels);
  y.tap_step = static_cast<int>(p.dilation[2] * channels);
  y.row_step = static_cast<int>(length);
  y.plane_step = y.rows * y.row_step;
  y.channel_step = p.channels_last ? 1 : y.k[0] * y.plane_step;
  y.stage = static_cast<int>(RoundUp(planes * y.plane_step * SizeOf(p.in_dtype), 128));
  return true;
}

bool CutTiles(const Problem& p, int64_t rows, int64_t width, int ahead, ThinTiles& at) {
  at.rows = static_cast<int>(rows);
  at.width = static_cast<int>(width);
  at.ahead = ahead;
  at.cuts[0] = static_cast<int>(p.isize[0]);
  at.cuts[1] = static_cast<int>(CeilDiv(p.isize[1], rows));
  at.cuts[2] = static_cast<int>(CeilDiv(p.isize[2], width));
  const int64_t tiles = p.n * at.cuts[0] * at.cuts[1] * at.cuts[2];
  at.tiles = static_cast<int>(tiles);
  return tiles <= kIntMax / 2;
}

template <class T>
double Real(T n) {
  return static_cast<double>(n);
}

// ---------------------------------------------------------------------------------------------
// Forward

struct Span {
  int64_t begin, end;
};

void ListTaps(const Problem& p, ThinForwardArgs& a) {
  const Taps innermost = TapsOf(p, 2);
  for (int axis = 0; axis < kAxes; ++axis) {
    ThinTaps& taps = a.taps[axis];
    int at = 0;
    for (int r = 0; r < p.stride[axis]; ++r) {
      taps.first[r] = static_cast<int16_t>(at);
      for (int64_t t = 0; t < p.k[axis]; ++t) {
        const int64_t reach = t * p.dilation[axis];
        const int64_t phase = axis == 2 ? innermost.phase[t] : reach % p.stride[axis];
        const int64_t back = axis == 2 ? innermost.source[t] : reach / p.stride[axis];
        if (phase == r) {
          taps.tap[at++] = {static_cast<int16_t>(t), static_cast<int16_t>(back)};
        }
      }
    }
    taps.first[p.stride[axis]] = static_cast<int16_t>(at);
  }
}

struct ForwardCut {
  int64_t box_d, box_h, box_w, width, first;
  int rows, ahead;
};

bool FillForward(const Problem& p, const Device& device, const Shape& shape, const ForwardCut& cut,
                 Span sources, ThinPlan& plan) {
  ThinForwardArgs& a = plan.forward;
  const int64_t size = SizeOf(p.in_dtype);
  const bool last = p.channels_last;
  a.sets = static_cast<int>(CeilDiv(a.columns, 16 * shape.mt));
  if (a.sets > kThinMultipliers) return false;
  a.first = static_cast<int>(cut.first);
  a.ahead = cut.ahead;
  const int64_t runs = CeilDiv(p.osize[2], p.stride[2]);
  const int64_t box[kAxes] = {cut.box_d, cut.box_h, cut.box_w};
  const int64_t all[kAxes] = {a.q_end[0] - a.q_begin[0] - a.lead[0],
                              a.q_end[1] - a.q_begin[1] - a.lead[1], runs};
  int64_t items = p.n;
  for (int i = 0; i < kAxes; ++i) {
    a.box[i] = static_cast<int>(box[i]);
    a.cuts[i] = static_cast<int>(std::max<int64_t>(1, CeilDiv(all[i], box[i])));
    items *= a.cuts[i];
  }
  if (items > kIntMax / 2) return false;
  a.items = static_cast<int>(items);

  // Pitches keep the tensor cores' loads free of bank conflicts.
  const int64_t pixels = cut.rows * cut.width, bytes = pixels * size;
  const int64_t pitch = last        ? shape.ks * 32 + 16
                        : size == 4 ? Pitch(bytes, 128, 32)
                                    : Pitch(bytes, 32, 16);
  if (!CutSources(p, p.ci, cut.rows, cut.width, pitch, last ? pixels : shape.ks * 32 / size, a.x)) {
    return false;
  }
  a.by_tiles = DivisorOf(a.x.width / 8);
  a.p_margin = static_cast<int>(RoundUp(std::max<int64_t>(0, cut.first - sources.begin), 2));
  a.p_row = static_cast<int>(
      a.p_margin + RoundUp(std::max(cut.width, cut.box_w + sources.end - 1 - cut.first), 2));
  a.p_rows = 2 * cut.rows + a.reach[1];
  a.p_column = static_cast<int>(Pitch(int64_t{a.p_rows} * a.p_row, 16, 8));
  a.run_chunks = static_cast<int>(CeilDiv(cut.box_w, 32));
  a.spots = static_cast<int>((a.window ? 1 : p.stride[0]) * p.stride[1] * cut.rows * a.run_chunks);
  if (cut.rows > 255 || a.run_chunks > 255) return false;

  int64_t smem = 0;
  const auto place = [&](int& at, int64_t bytes) {
    at = static_cast<int>(smem);
    smem += RoundUp(bytes, 128);
  };
  const int64_t columns = int64_t{a.sets} * 16 * shape.mt;
  place(a.smem_p, columns * a.p_column * 4);
  place(a.smem_sums,
        a.reach[0] * p.co * (cut.box_h + a.lead[1]) * Product(p.stride) * 32 * a.run_chunks * 4);
  place(a.smem_stage, kThinGatherers * 32 * p.stride[2] * (last ? p.co : 1) * 4);
  place(a.smem_spots, int64_t{a.spots} * 4);
  place(a.smem_bias, p.co * 4);
  place(a.smem_barrier, 8);
  place(a.smem_rows, cut.rows * (last ? cut.width : p.ci) * 8);
  place(a.smem_x, int64_t{cut.ahead + 1} * a.x.stage);
  if (smem > SharedMemoryOfBlock(device.compute_capability)) return false;
  a.smem = static_cast<int>(smem);
  plan.mt = shape.mt;
  plan.ks = shape.ks;
  plan.grid_x = static_cast<int>(std::min<int64_t>(items, device.multiprocessors));
  plan.grid_y = 1;

  const double read = Real(bytes * p.ci);
  const int groups = kThinMultipliers / a.sets, nt = shape.mt == 4 ? 2 : 4;
  const double rounds = std::ceil(Real(pixels) / 8 / (groups * nt));
  const double tensor = rounds * nt * shape.mt * shape.ks * 2 * 6;
  // Of a multiplying warp: loads, roundings, products, stores; and copies.
  const double issue = rounds * nt * (shape.ks * (shape.mt + (size == 4 ? 3 : 1)) + 8 * shape.mt) +
                       read / a.x.unit / (32 * kThinMultipliers) * (a.x.unit == 16 ? 7 : 40);
  const double shared =
      (read + Real(pixels) * (a.sets * shape.ks * 32 + Real(columns) * 4 + a.columns * 4)) / 128 +
      a.spots * 4.0;
  // Of a gathering warp: a spot, its outputs, their taps.
  const double spot_outputs =
      (a.window ? 1 : p.stride[2] * 2) * p.co * (a.window ? p.stride[0] : 1);
  const double gathered = std::ceil(Real(a.spots) / kThinGatherers) *
                          (60 + 30 * spot_outputs +
                           (a.window ? 3.0 : 8.0) * a.columns * cut.rows * a.run_chunks / a.spots);
  const double step =
      std::max({tensor, 4 * issue, shared, 5 * gathered, read / kL2BytesACycle}) + 300;
  // The first item walks over what it completes, the others over what their first outputs need,
  // too.
  const auto walked = [&](int i) {
    const int64_t first = std::min<int64_t>(box[i], all[i]) + a.lead[i];
    return Real(a.cuts[i] > 1 ? std::max(first, box[i] + a.reach[i]) : first);
  };
  const double steps =
      std::ceil(Real(items) / plan.grid_x) * walked(0) * std::ceil(walked(1) / cut.rows);
  // Measured: 1.6 to 1.8 times what is counted, with windows; lists of taps 2.0 times.
  const double busy = (a.window > 0 ? 1.75 : 2.0) * steps * step + 3000;
  plan.seconds = 5e-6 + std::max(busy, Traffic(p, device)) / kClock;
  return true;
}

ThinPlan PlanForward(const Problem& p, const Device& device, const ThinTile& forced) {
  ThinPlan best{}, plan{};
  best.seconds = std::numeric_limits<double>::infinity();
  ThinForwardArgs& a = plan.forward;
  const Strides ys = p.YStrides();
  const Shape shape = ShapeFor(p.ci, SizeOf(p.in_dtype));
  a.x = SourcesOf(p);
  a.out_f32 = p.out_dtype == DType::kF32;
  a.co = static_cast<int>(p.co);
  a.columns = static_cast<int>(p.co * Product(p.k));
  for (int i = 0; i < kAxes; ++i) {
    a.osize[i] = static_cast<int>(p.osize[i]);
    a.k[i] = static_cast<int>(p.k[i]);
    a.stride[i] = static_cast<int>(p.stride[i]);
    a.pad[i] = static_cast<int>(p.pad[i]);
  }
  a.y_n = ys.n;
  a.y_c = static_cast<int>(ys.c);
  a.y_d = static_cast<int>(ys.s[0]);
  a.y_h = static_cast<int>(ys.s[1]);
  for (int i = 0; i < 2; ++i) {
    a.q_begin[i] = static_cast<int>(FloorDiv(p.pad[i], p.stride[i]));
    a.q_end[i] = static_cast<int>(FloorDiv(p.osize[i] - 1 + p.pad[i], p.stride[i]) + 1);
    a.reach[i] = static_cast<int>((p.k[i] - 1) * p.dilation[i] / p.stride[i]);
    a.lead[i] = std::max(
        0, std::min({a.reach[i], a.reach[i] - a.q_begin[i], a.q_end[i] - a.q_begin[i] - 1}));
  }
  a.window = p.stride[2] == 2 && (p.k[2] == 3 || p.k[2] == 4) ? static_cast<int>(p.k[2]) : 0;
  for (int i = 0; i < kAxes; ++i) {
    if (p.dilation[i] != 1 || p.k[i] > 2 * p.stride[i]) a.window = 0;
  }
  a.first_parity = static_cast<int>(p.pad[2] & 1);
  a.pairs = p.osize[2] % 2 == 0 && (p.co == 1 || !p.channels_last);
  ListTaps(p, a);
  Span sources{kIntMax, -kIntMax};
  for (const int64_t source : TapsOf(p, 2).source) {
    sources.begin = std::min(sources.begin, source);
    sources.end = std::max(sources.end, source + 1);
  }

  // All of the innermost axis, or pieces whose sources begin at a multiple of eight.
  const int64_t runs = CeilDiv(p.osize[2], p.stride[2]);
  std::vector<ForwardCut> widths;
  if (p.isize[2] <= 256 && runs <= 1024) {
    widths.push_back({0, 0, runs, RoundUp(p.isize[2], 8), 0, 0, 0});
  }
  const int64_t first = FloorDiv(sources.begin, 8) * 8;
  for (const int64_t width : {64, 128, 256, 512}) {
    const int64_t box = FloorDiv(width - (sources.end - 1 - first), 8) * 8;
    if (box >= 8 && box < runs) widths.push_back({0, 0, box, width, first, 0, 0});
  }
  const auto boxes = [](int64_t all) {
    std::vector<int64_t> sizes;
    for (int64_t cuts = 1; cuts <= all; cuts += std::max<int64_t>(1, cuts / 4)) {
      const int64_t size = CeilDiv(all, cuts);
      if (sizes.empty() || sizes.back() != size) sizes.push_back(size);
    }
    return sizes;
  };
  const std::vector<int64_t> boxes_d = boxes(a.q_end[0] - a.q_begin[0] - a.lead[0]);
  const std::vector<int64_t> boxes_h = boxes(a.q_end[1] - a.q_begin[1] - a.lead[1]);
  for (ForwardCut cut : widths) {
    if (!Allowed(forced.box_w, cut.box_w)) continue;
    for (const int rows : {1, 2, 3, 4, 5, 6, 8, 11, 16}) {
      if (!Allowed(forced.rows, rows) || rows * cut.width > 1024) continue;
      cut.rows = rows;
      for (const int64_t box_h : boxes_h) {
        if (!Allowed(forced.box_h, box_h) || (rows > 1 && rows > box_h + a.reach[1])) continue;
        cut.box_h = box_h;
        for (const int64_t box_d : boxes_d) {
          if (!Allowed(forced.box_d, box_d)) continue;
          cut.box_d = box_d;
          for (int ahead = kThinMostAhead; ahead >= 1; --ahead) {
            if (!Allowed(forced.ahead, ahead)) continue;
            cut.ahead = ahead;
            if (!FillForward(p, device, shape, cut, sources, plan)) continue;
            if (plan.seconds < best.seconds) best = plan;
            break;
          }
        }
      }
    }
  }
  return best;
}

// ---------------------------------------------------------------------------------------------
// Gradients

// Calls fill(rows, width, ahead) for each tile that it may be, with the most steps ahead that fit.
template <class Fill>
void ForEachTile(const Problem& p, const ThinTile& forced, int64_t multiple, Fill fill) {
  std::vector<int64_t> widths = {32, 64, 128, 256};
  const int64_t all = RoundUp(p.isize[2], multiple);
  if (all <= 512) widths.push_back(all);
  for (const int64_t width : widths) {
    if (!Allowed(forced.box_w, width) || width > all) continue;
    for (const int rows : {1, 2, 3, 4, 6, 8, 16}) {
      if (!Allowed(forced.rows, rows) || rows * width > 1024 || rows >= 2 * p.isize[1]) continue;
      for (int ahead = kThinMostAhead; ahead >= 1; --ahead) {
        if (Allowed(forced.ahead, ahead) && fill(rows, width, ahead)) break;
      }
    }
  }
}

double CopiedY(const ThinY& y, const Problem& p) {
  const int64_t planes = (p.channels_last ? 1 : p.co) * p.k[0];
  return Real(planes * y.rows * y.by_units.divisor) / (32 * kThinCopiers) * 14;
}

bool FillInputGrad(const Problem& p, const Device& device, const Shape& shape, int64_t rows,
                   int64_t width, int ahead, ThinPlan& plan) {
  ThinInputGradArgs& a = plan.input;
  const int64_t size = SizeOf(p.in_dtype), out_size = SizeOf(p.out_dtype);
  if (!CutTiles(p, rows, width, ahead, a.at) || !CutTargets(p, rows, width, a.y)) return false;
  const int64_t blocks = CeilDiv(p.ci, 16 * shape.mt);
  a.sets = static_cast<int>(std::min<int64_t>(blocks, kThinMultipliers));
  plan.grid_y = static_cast<int>(CeilDiv(blocks, a.sets));
  plan.grid_x = std::min(a.at.tiles, std::max(1, device.multiprocessors / plan.grid_y));
  a.by_width = DivisorOf(static_cast<int>(width / 16));
  const int64_t smem = kThinOrigins + int64_t{a.y.stage} * (ahead + 1);
  if (smem > SharedMemoryOfBlock(device.compute_capability)) return false;
  a.smem = static_cast<int>(smem);
  plan.mt = shape.mt;
  plan.ks = shape.ks;

  const int groups = kThinMultipliers / a.sets, nt = 2;
  const double rounds = std::ceil(Real(rows * width) / 16 / (groups * nt));
  const double tensor = rounds * nt * shape.mt * 2 * shape.ks * 2 * 6;
  const double issue = rounds * nt * shape.ks * (shape.mt * 2 + 4 * (size == 4 ? 3 : 4)) * 2;
  const double written =
      Real(rows * width) * std::min(Real(p.ci), 16.0 * shape.mt * a.sets) * Real(out_size);
  const double stored = written / 32 * (a.vector ? 1.0 : 4.0);
  const double step =
      std::max({tensor, issue, stored, 2.5 * CopiedY(a.y, p), written / kL2BytesACycle}) + 1500;
  const double steps = std::ceil(Real(a.at.tiles) / plan.grid_x);
  plan.seconds =
      5e-6 + std::max((size == 4 ? 1.15 : 1.5) * steps * step + 3000, Traffic(p, device)) / kClock;
  return true;
}

ThinPlan PlanInputGrad(const Problem& p, const Device& device, const ThinTile& forced) {
  ThinPlan best{}, plan{};
  best.seconds = std::numeric_limits<double>::infinity();
  ThinInputGradArgs& a = plan.input;
  const Strides xs = p.XStrides();
  a.y = TargetsOf(p);
  a.out_f32 = p.out_dtype == DType::kF32;
  a.ci = static_cast<int>(p.ci);
  a.columns = static_cast<int>(p.co * Product(p.k));
  for (int i = 0; i < kAxes; ++i) a.size[i] = static_cast<int>(p.isize[i]);
  a.x_n = xs.n;
  a.x_c = static_cast<int>(xs.c);
  a.x_d = static_cast<int>(xs.s[0]);
  a.x_h = static_cast<int>(xs.s[1]);
  a.vector = (p.channels_last ? p.ci : p.isize[2]) % 4 == 0;
  const Shape shape = ShapeFor(a.columns, SizeOf(p.in_dtype));
  ForEachTile(p, forced, 16, [&](int64_t rows, int64_t width, int ahead) {
    if (!FillInputGrad(p, device, shape, rows, width, ahead, plan)) return false;
    if (plan.seconds < best.seconds) best = plan;
    return true;
  });
  return best;
}

constexpr int kColumns = 32;  // that a warp multiplies, by 16 * mt channels

bool FillWeightGrad(const Problem& p, const Device& device, int64_t rows, int64_t width, int ahead,
                    int mt, int channel_sets, ThinPlan& plan) {
  ThinWeightGradArgs& a = plan.weight;
  const int64_t size = SizeOf(p.in_dtype), pixels = rows * width, step_pixels = 32 / size;
  if (!CutTiles(p, rows, width, ahead, a.at) || !CutTargets(p, rows, width, a.y)) return false;
  a.channel_sets = channel_sets;
  const int64_t staged = int64_t{channel_sets} * 16 * mt;
  const int64_t channels = std::min<int64_t>(p.ci, staged);
  const int64_t pitch = p.channels_last
                            ? Pitch(staged * size, size == 4 ? 128 : 32, size == 4 ? 32 : 16)
                            : Pitch(pixels * size, 32, 16);
  if (!CutSources(p, channels, rows, width, pitch, p.channels_last ? pixels : staged, a.x)) {
    return false;
  }
  a.steps_of_row = static_cast<int>(width / step_pixels);
  a.by_steps = DivisorOf(a.steps_of_row);
  a.smem_x = kThinOrigins + a.y.stage * (ahead + 1);
  const int64_t listed = RoundUp(rows * (p.channels_last ? width : channels) * 8, 128);
  a.smem_rows = a.smem_x + a.x.stage * (ahead + 1);
  a.smem_sums = static_cast<int>(a.smem_rows + listed);
  const int64_t smem = kThinOrigins + int64_t{a.y.stage + a.x.stage} * (ahead + 1) + listed +
                       int64_t{kThinMultipliers} * 16 * mt * kColumns * 4;
  plan.mt = mt;
  if (smem > SharedMemoryOfBlock(device.compute_capability)) return false;
  a.smem = static_cast<int>(smem);
  plan.grid_y = static_cast<int>(CeilDiv(p.ci, channels));
  const int64_t most = p.YElements() * size / 10 / (4 * p.WElements());
  plan.grid_x = static_cast<int>(std::max<int64_t>(
      1, std::min<int64_t>({most, a.at.tiles, device.multiprocessors / plan.grid_y})));
  plan.workspace = 4 * plan.grid_x * p.WElements();
  const int groups = kThinMultipliers / (channel_sets * a.column_sets);
  const double products = std::ceil(Real(pixels / step_pixels) / groups);
  // As in "mma": the tensor cores cut off what they add to a sum.
  a.flush = std::max(1, static_cast<int>(1024 / products));

  const double tensor = products * 4 * mt * 2 * 6, read = Real(pixels * channels * size);
  const double issue = products * ((size == 4 ? 30 : 40) + 12.0 * mt) * 4;
  const double shared = (2 * read * a.column_sets +
                         Real(pixels) * kColumns * size * 4 * channel_sets * a.column_sets) /
                        128;
  const double copied =
      CopiedY(a.y, p) + read / a.x.unit / (32 * kThinCopiers) * (a.x.unit == 16 ? 7 : 40);
  // With one step ahead nothing hides how long the first bytes take.
  const double arrival = read / kL2BytesACycle + (ahead == 1 ? 1500 : 0);
  const double step = std::max({tensor, issue, shared, 2.5 * copied, arrival}) + 500;
  const double steps = std::ceil(Real(a.at.tiles) / plan.grid_x);
  plan.seconds = 9e-6 + std::max(steps * step + 5000, Traffic(p, device)) / kClock;
  return true;
}

ThinPlan PlanWeightGrad(const Problem& p, const Device& device, const ThinTile& forced) {
  ThinPlan best{}, plan{};
  best.seconds = std::numeric_limits<double>::infinity();
  ThinWeightGradArgs& a = plan.weight;
  a.x = SourcesOf(p);
  a.y = TargetsOf(p);
  a.columns = static_cast<int>(p.co * Product(p.k));
  a.out_step = p.WElements();
  a.column_sets = static_cast<int>(CeilDiv(a.columns, kColumns));
  for (const int mt : {4, 1}) {
    for (int sets = 1; sets * a.column_sets <= kThinMultipliers; sets *= 2) {
      if (sets > 1 && sets / 2 * 16 * mt >= p.ci) break;
      ForEachTile(p, forced, 16, [&](int64_t rows, int64_t width, int ahead) {
        if (!FillWeightGrad(p, device, rows, width, ahead, mt, sets, plan)) return false;
        if (plan.seconds < best.seconds) best = plan;
        return true;
      });
    }
  }
  return best;
}

// ---------------------------------------------------------------------------------------------

ThinPlan MakePlan(const Problem& p, const Device& device, const ThinTile& forced) {
  ThinPlan plan{};
  plan.refusal = Refuse(p, device);
  if (!plan.refusal.empty()) return plan;
  switch (p.pass) {
    case Pass::kForward:
      plan = PlanForward(p, device, forced);
      break;
    case Pass::kInputGrad:
      plan = PlanInputGrad(p, device, forced);
      break;
    case Pass::kWeightGrad:
      plan = PlanWeightGrad(p, device, forced);
      break;
  }
  if (plan.seconds == std::numeric_limits<double>::infinity()) {
    plan.refusal = "finds no step that fits into shared memory";
  }
  return plan;
}

const ThinPlan& PlanOf(const Problem& p, const Device& d) {
  return Remember<ThinPlan>(p, d, [&] { return MakePlan(p, d, {}); });
}

template <class T>
cudaError_t Enqueue(const Problem& p, const Operands& ops, const ThinPlan& plan,
                    cudaStream_t stream) {
  switch (p.pass) {
    case Pass::kForward: {
      ThinForwardArgs args = plan.forward;
      args.x.x = ops.x;
      args.w = ops.w;
      args.bias = ops.bias;
      args.out = ops.out;
      return EnqueueThin<T>(plan, args, p.channels_last, stream);
    }
    case Pass::kInputGrad: {
      ThinInputGradArgs args = plan.input;
      args.y.y = ops.y;
      args.w = ops.w;
      args.out = ops.out;
      return EnqueueThin<T>(plan, args, p.channels_last, stream);
    }
    case Pass::kWeightGrad: {
      ThinWeightGradArgs args = plan.weight;
      args.x.x = ops.x;
      args.y.y = ops.y;
      args.out = static_cast<float*>(ops.workspace);
      const cudaError_t status = EnqueueThin<T>(plan, args, p.channels_last, stream);
      if (status != cudaSuccess) return status;
      return SumParts(args.out, plan.grid_x, p.WElements(), p.out_dtype, ops.out, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace

ThinPlan PlanThin(const Problem& p, const Device& device, const ThinTile& tile) {
  return MakePlan(p, device, tile);
}

cudaError_t LaunchThin(const Problem& p, const Operands& ops, const ThinPlan& plan,
                       cudaStream_t stream) {
  switch (p.in_dtype) {
    case DType::kF32:
      return Enqueue<float>(p, ops, plan, stream);
    case DType::kBF16:
      return Enqueue<__nv_bfloat16>(p, ops, plan, stream);
    case DType::kF16:
      return Enqueue<__half>(p, ops, plan, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

void AddThin(std::vector<Row>& rows) {
  for (const Pass pass : {Pass::kForward, Pass::kInputGrad, Pass::kWeightGrad}) {
    rows.push_back({"thin", pass,
                    [](const Problem& p, const Device& d) { return PlanOf(p, d).refusal; },
                    [](const Problem& p, const Device& d) { return PlanOf(p, d).workspace; },
                    [](const Problem& p, const Device& d) { return PlanOf(p, d).seconds; },
                    [](const Problem& p, const Operands& ops, const Device& d, cudaStream_t s) {
                      return LaunchThin(p, ops, PlanOf(p, d), s);
                    }});
  }
}

}  // namespace jaxconv::cuda
