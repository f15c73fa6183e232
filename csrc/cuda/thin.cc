#include "cuda/thin.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/device_limits.h"
#include "cuda/plan_memo.h"
#include "cuda/taps.h"

namespace jaxconv::cuda {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

// Compiled shapes: weights of 16 * mt columns (channels of x, input gradient) by ks steps of the
// tensor cores stay in a warp's registers.
struct Shape {
  int mt, ks;
};
constexpr Shape kShapes[] = {{2, 8}, {4, 4}};

constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  if (CodeFor(device.compute_capability) < 80) return "needs compute capability 8.0";
  if (p.groups > 1) return "takes one group";
  if (p.in_dtype == DType::kF64) return "float64 has no tensor cores here";
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "rounds float32 products to TF32";
  }
  const int64_t step = 32 / SizeOf(p.in_dtype);
  const int64_t columns = p.co * Product(p.k);
  if (p.co > 8) return "takes at most 8 output channels";
  if (columns > 256) return "takes at most 256 taps and output channels";
  if (p.pass == Pass::kForward ? p.ci > 8 * step : columns > 8 * step) {
    return "keeps weights in registers, of " + std::to_string(8 * step) + " terms a sum";
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

// The model: cycles of a step of a block, alone on its multiprocessor.
constexpr double kClock = 1.7e9, kBytesACycle = 17, kL2BytesACycle = 30;

// ---------------------------------------------------------------------------------------------
// Forward

struct Span {
  int64_t begin, end;
};

void ListTaps(const Problem& p, ThinForwardArgs& a) {
  for (int axis = 0; axis < kAxes; ++axis) {
    ThinTaps& taps = a.taps[axis];
    const Taps innermost = TapsOf(p, 2);
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
  ThinForwardArgs& a = plan.f;
  const int64_t element = SizeOf(p.in_dtype);
  const bool last = p.channels_last;
  a.sets = static_cast<int>(CeilDiv(a.columns, 16 * shape.mt));
  if (a.sets > kThinMultipliers) return false;
  a.rows = cut.rows;
  a.width = static_cast<int>(cut.width);
  a.first = static_cast<int>(cut.first);
  a.ahead = cut.ahead;
  const int64_t box[kAxes] = {cut.box_d, cut.box_h, cut.box_w};
  const int64_t all[kAxes] = {a.q_end[0] - a.q_begin[0], a.q_end[1] - a.q_begin[1], a.runs};
  int64_t items = p.n;
  for (int i = 0; i < kAxes; ++i) {
    a.box[i] = static_cast<int>(box[i]);
    a.cuts[i] = static_cast<int>(CeilDiv(all[i], box[i]));
    items *= a.cuts[i];
  }
  if (items > kIntMax) return false;
  a.items = static_cast<int>(items);

  const int64_t pixels = cut.rows * cut.width;
  const int64_t units = (last ? p.ci * element : cut.width * element) / a.unit;
  if ((last ? cut.width : p.ci) * cut.rows * units >= 1 << 15) return false;
  a.by_units = DivisorOf(static_cast<int>(units));
  a.by_rows = DivisorOf(last ? a.width : a.rows);
  a.by_tiles = DivisorOf(a.width / 8);
  // Pitches keep the tensor cores' loads free of bank conflicts.
  const int64_t channels = a.ksteps * 32 / element;
  if (last) {
    a.x_pitch = a.ksteps * 32 + 16;
    a.x_stage = static_cast<int>(RoundUp(pixels * a.x_pitch, 128));
  } else {
    const int64_t bytes = pixels * element;
    a.x_pitch = static_cast<int>(element == 4 ? RoundUp(bytes - 32, 128) + 32
                                              : RoundUp(bytes - 16, 32) + 16);
    a.x_stage = static_cast<int>(RoundUp(channels * a.x_pitch, 128));
  }
  a.p_margin = static_cast<int>(RoundUp(std::max<int64_t>(0, cut.first - sources.begin), 2));
  a.p_row = static_cast<int>(
      a.p_margin + RoundUp(std::max(cut.width, cut.box_w + sources.end - 1 - cut.first), 2));
  a.p_rows = 2 * cut.rows + a.reach[1];
  a.p_column = static_cast<int>(RoundUp(int64_t{a.p_rows} * a.p_row - 8, 16) + 8);
  a.run_chunks = static_cast<int>(CeilDiv(cut.box_w, 32));
  a.spots = static_cast<int>(p.stride[0] * p.stride[1] * cut.rows * a.run_chunks);
  if (cut.rows > 255 || a.run_chunks > 255) return false;

  int64_t smem = 0;
  const auto place = [&](int& at, int64_t bytes) {
    at = static_cast<int>(smem);
    smem += RoundUp(bytes, 128);
  };
  const int64_t columns = int64_t{a.sets} * 16 * shape.mt;
  place(a.smem_p, columns * a.p_column * 4);
  place(a.smem_sums, int64_t{a.reach[0]} * p.co * cut.box_h * Product(p.stride) * 32 *
                         a.run_chunks * 4);
  place(a.smem_stage, kThinCopiers * 32 * p.stride[2] * (last ? p.co : 1) * 4);
  place(a.smem_spots, int64_t{a.spots} * 4);
  place(a.smem_x, int64_t{cut.ahead + 1} * a.x_stage);
  if (smem > SharedMemoryOfBlock(device.compute_capability)) return false;
  a.smem = static_cast<int>(smem);
  plan.mt = shape.mt;
  plan.ks = shape.ks;
  plan.grid_x = static_cast<int>(std::min<int64_t>(items, device.multiprocessors));
  plan.grid_y = 1;

  const auto real = [](int64_t n) { return static_cast<double>(n); };
  const double bytes = real(pixels * p.ci * element);
  const int groups = kThinMultipliers / a.sets, nt = shape.mt == 4 ? 3 : 4;
  const double rounds = std::ceil(real(pixels) / 8 / (groups * nt));
  const double tensor = rounds * nt * shape.mt * a.ksteps * 2 * 6;
  const double shared = (bytes + real(pixels) * (a.sets * a.ksteps * 32 + real(columns) * 4 +
                                                 a.columns * 4)) / 128 +
                        real(a.spots) * 4;
  const double gathered = real(CeilDiv(a.spots, kThinCopiers)) *
                          (100 + 4.0 * a.columns * real(cut.rows * a.run_chunks) / a.spots);
  const double copied = bytes / a.unit / (32 * kThinCopiers) * 12;
  const double memory = std::max(bytes / kL2BytesACycle, 0.0);
  const double step = std::max({tensor, shared, 2.5 * (gathered + copied), memory}) + 250;
  const double steps = std::ceil(real(items) / plan.grid_x) *
                       real(std::min(all[0], cut.box_d) + (a.cuts[0] > 1 ? a.reach[0] : 0)) *
                       real(CeilDiv(std::min(all[1], cut.box_h) + (a.cuts[1] > 1 ? a.reach[1] : 0),
                                    cut.rows));
  const double traffic = real(p.XElements() * element + p.YElements() * SizeOf(p.out_dtype)) /
                         (kBytesACycle * device.multiprocessors);
  plan.seconds = 5e-6 + std::max(steps * step + 3000, traffic) / kClock;
  return true;
}

ThinPlan PlanForward(const Problem& p, const Device& device, const ThinTile& forced) {
  ThinPlan best{};
  best.seconds = std::numeric_limits<double>::infinity();
  ThinPlan plan{};
  plan.forward = true;
  ThinForwardArgs& a = plan.f;
  const Strides xs = p.XStrides(), ys = p.YStrides();
  const int64_t element = SizeOf(p.in_dtype), step = 32 / element;
  a.out_f32 = p.out_dtype == DType::kF32;
  a.ci = static_cast<int>(p.ci);
  a.co = static_cast<int>(p.co);
  a.columns = static_cast<int>(p.co * Product(p.k));
  for (int i = 0; i < kAxes; ++i) {
    a.isize[i] = static_cast<int>(p.isize[i]);
    a.osize[i] = static_cast<int>(p.osize[i]);
    a.k[i] = static_cast<int>(p.k[i]);
    a.stride[i] = static_cast<int>(p.stride[i]);
    a.pad[i] = static_cast<int>(p.pad[i]);
  }
  a.x_n = xs.n;
  a.y_n = ys.n;
  a.x_c = static_cast<int>(xs.c);
  a.x_d = static_cast<int>(xs.s[0]);
  a.x_h = static_cast<int>(xs.s[1]);
  a.y_c = static_cast<int>(ys.c);
  a.y_d = static_cast<int>(ys.s[0]);
  a.y_h = static_cast<int>(ys.s[1]);
  for (int i = 0; i < 2; ++i) {
    a.q_begin[i] = static_cast<int>(FloorDiv(p.pad[i], p.stride[i]));
    a.q_end[i] = static_cast<int>(FloorDiv(p.osize[i] - 1 + p.pad[i], p.stride[i]) + 1);
    a.reach[i] = static_cast<int>((p.k[i] - 1) * p.dilation[i] / p.stride[i]);
  }
  a.runs = static_cast<int>(CeilDiv(p.osize[2], p.stride[2]));
  a.window = p.stride[2] == 2 && p.dilation[2] == 1 && p.k[2] <= 4;
  a.unit = Unit((p.channels_last ? p.ci : p.isize[2]) * element);
  a.ksteps = static_cast<int>(RoundUp(CeilDiv(p.ci, step), 2));
  ListTaps(p, a);
  Span sources{kIntMax, -kIntMax};
  for (const int64_t source : TapsOf(p, 2).source) {
    sources.begin = std::min(sources.begin, source);
    sources.end = std::max(sources.end, source + 1);
  }

  // All of the innermost axis, or pieces whose sources begin at a multiple of eight.
  std::vector<ForwardCut> widths;
  if (p.isize[2] <= 256 && a.runs <= 1024) {
    widths.push_back({0, 0, a.runs, RoundUp(p.isize[2], 8), 0, 0, 0});
  }
  const int64_t first = FloorDiv(sources.begin, 8) * 8;
  for (int64_t width : {64, 128, 256, 512}) {
    const int64_t box = FloorDiv(width - (sources.end - 1 - first), 8) * 8;
    if (box >= 8 && box < a.runs) widths.push_back({0, 0, box, width, first, 0, 0});
  }
  const auto boxes = [](int64_t all) {
    std::vector<int64_t> sizes;
    for (int64_t cuts = 1; cuts <= all; cuts += std::max<int64_t>(1, cuts / 4)) {
      const int64_t size = CeilDiv(all, cuts);
      if (sizes.empty() || sizes.back() != size) sizes.push_back(size);
    }
    return sizes;
  };
  const auto allowed = [](int64_t want, int64_t have) { return want == 0 || want == have; };
  for (const Shape& shape : kShapes) {
    if (a.ksteps > shape.ks) continue;
    for (ForwardCut cut : widths) {
      if (!allowed(forced.box_w, cut.box_w)) continue;
      for (int rows : {1, 2, 3, 4, 5, 6, 8, 11, 16}) {
        if (!allowed(forced.rows, rows) || rows * cut.width > 1024) continue;
        cut.rows = rows;
        for (const int64_t box_h : boxes(a.q_end[1] - a.q_begin[1])) {
          if (!allowed(forced.box_h, box_h) || (rows > 1 && rows > box_h + a.reach[1])) continue;
          cut.box_h = box_h;
          for (const int64_t box_d : boxes(a.q_end[0] - a.q_begin[0])) {
            if (!allowed(forced.box_d, box_d)) continue;
            cut.box_d = box_d;
            for (int ahead = kThinMostAhead; ahead >= 1; --ahead) {
              if (!allowed(forced.ahead, ahead)) continue;
              cut.ahead = ahead;
              if (!FillForward(p, device, shape, cut, sources, plan)) continue;
              if (plan.seconds < best.seconds) best = plan;
              break;
            }
          }
        }
      }
    }
  }
  if (best.seconds == std::numeric_limits<double>::infinity()) {
    best.refusal = "finds no step that fits into shared memory";
  }
  return best;
}

// ---------------------------------------------------------------------------------------------
// Input gradient

bool FillInputGrad(const Problem& p, const Device& device, const Shape& shape, int64_t width,
                   int rows, int ahead, ThinPlan& plan) {
  ThinInputGradArgs& a = plan.g;
  const int64_t element = SizeOf(p.in_dtype);
  const bool last = p.channels_last;
  a.width = static_cast<int>(width);
  a.rows = rows;
  a.ahead = ahead;
  a.cuts[0] = a.isize[0];
  a.cuts[1] = static_cast<int>(CeilDiv(p.isize[1], rows));
  a.cuts[2] = static_cast<int>(CeilDiv(p.isize[2], width));
  const int64_t tiles = p.n * a.cuts[0] * a.cuts[1] * a.cuts[2];
  if (tiles > kIntMax / 2) return false;
  a.tiles = static_cast<int>(tiles);
  const int64_t blocks16 = CeilDiv(p.ci, 16 * shape.mt);
  a.sets = static_cast<int>(std::min<int64_t>(blocks16, kThinMultipliers));
  plan.grid_y = static_cast<int>(CeilDiv(blocks16, a.sets));
  plan.grid_x = static_cast<int>(std::min<int64_t>(
      tiles, std::max(1, device.multiprocessors / plan.grid_y)));
  const int64_t channels = last ? p.co : 1, planes = (last ? 1 : p.co) * p.k[0];
  const int64_t reach = (width - 1) * p.stride[2] + (p.k[2] - 1) * p.dilation[2] + 1;
  a.staged_length =
      static_cast<int>(RoundUp(reach * channels + a.unit_elements - 1, a.unit_elements));
  const int64_t staged_rows = (rows - 1) * p.stride[1] + (p.k[1] - 1) * p.dilation[1] + 1;
  const int64_t units = a.staged_length / a.unit_elements;
  if (planes * staged_rows * units >= 1 << 15) return false;
  a.staged_rows = static_cast<int>(staged_rows);
  a.by_units = DivisorOf(static_cast<int>(units));
  a.by_staged_rows = DivisorOf(a.staged_rows);
  a.by_planes = DivisorOf(a.k[0]);
  a.by_width = DivisorOf(a.width / 16);
  a.pixel_step = static_cast<int>(p.stride[2] * channels);
  a.tap_step = static_cast<int>(p.dilation[2] * channels);
  a.row_step = a.staged_length;
  a.plane_step = a.staged_rows * a.row_step;
  a.channel_step = last ? 1 : a.k[0] * a.plane_step;
  a.y_stage = static_cast<int>(RoundUp(planes * a.plane_step * element, 128));
  const int64_t smem = int64_t{a.y_stage} * (ahead + 1);
  if (smem > SharedMemoryOfBlock(device.compute_capability)) return false;
  a.smem = static_cast<int>(smem);
  plan.mt = shape.mt;
  plan.ks = shape.ks;

  const auto real = [](int64_t n) { return static_cast<double>(n); };
  const int groups = kThinMultipliers / a.sets, nt = 2;
  const double rounds = std::ceil(real(rows * width) / 16 / (groups * nt));
  const double tensor = rounds * nt * shape.mt * 2 * a.ksteps * 2 * 6;
  const double issue = rounds * nt * a.ksteps * (shape.mt * 2 + 4 * (element == 4 ? 3 : 4)) * 2;
  const double channels_of_block = std::min<double>(real(p.ci), 16.0 * shape.mt * a.sets);
  const double written = real(rows * width) * channels_of_block * real(SizeOf(p.out_dtype));
  const double stored = written / 32 * (a.vector ? 1.0 : 4.0);
  const double copied = real(planes * staged_rows * units) / (32 * kThinCopiers) * 14 * 2.5;
  const double step = std::max({tensor, issue, stored, copied, written / kL2BytesACycle}) + 250;
  const double steps = std::ceil(real(tiles) / plan.grid_x);
  const double traffic = real(p.XElements() * SizeOf(p.out_dtype) + p.YElements() * element) /
                         (kBytesACycle * device.multiprocessors);
  plan.seconds = 5e-6 + std::max(steps * step + 3000, traffic) / kClock;
  return true;
}

ThinPlan PlanInputGrad(const Problem& p, const Device& device, const ThinTile& forced) {
  ThinPlan best{};
  best.seconds = std::numeric_limits<double>::infinity();
  ThinPlan plan{};
  ThinInputGradArgs& a = plan.g;
  const Strides xs = p.XStrides(), ys = p.YStrides();
  const int64_t element = SizeOf(p.in_dtype), step = 32 / element;
  a.out_f32 = p.out_dtype == DType::kF32;
  a.ci = static_cast<int>(p.ci);
  a.co = static_cast<int>(p.co);
  a.columns = static_cast<int>(p.co * Product(p.k));
  for (int i = 0; i < kAxes; ++i) {
    a.isize[i] = static_cast<int>(p.isize[i]);
    a.osize[i] = static_cast<int>(p.osize[i]);
    a.k[i] = static_cast<int>(p.k[i]);
    a.stride[i] = static_cast<int>(p.stride[i]);
    a.pad[i] = static_cast<int>(p.pad[i]);
    a.dilation[i] = static_cast<int>(p.dilation[i]);
  }
  a.x_n = xs.n;
  a.y_n = ys.n;
  a.x_c = static_cast<int>(xs.c);
  a.x_d = static_cast<int>(xs.s[0]);
  a.x_h = static_cast<int>(xs.s[1]);
  a.y_c = static_cast<int>(ys.c);
  a.y_d = static_cast<int>(ys.s[0]);
  a.y_h = static_cast<int>(ys.s[1]);
  a.ksteps = static_cast<int>(CeilDiv(a.columns, step));
  a.unit = Unit(p.osize[2] * (p.channels_last ? p.co : 1) * element);
  a.unit_elements = static_cast<int>(a.unit / element);
  a.vector = (p.channels_last ? p.ci : p.isize[2]) % 4 == 0;
  std::vector<int64_t> widths = {32, 64, 128};
  if (p.isize[2] <= 256) widths.push_back(RoundUp(p.isize[2], 16));
  const auto allowed = [](int64_t want, int64_t have) { return want == 0 || want == have; };
  for (const Shape& shape : kShapes) {
    if (a.ksteps > shape.ks) continue;
    for (const int64_t width : widths) {
      if (!allowed(forced.box_w, width)) continue;
      for (int rows : {1, 2, 4, 8, 16}) {
        if (!allowed(forced.rows, rows) || rows * width > 1024 || rows >= 2 * p.isize[1]) continue;
        for (int ahead = kThinMostAhead; ahead >= 1; --ahead) {
          if (!allowed(forced.ahead, ahead)) continue;
          if (!FillInputGrad(p, device, shape, width, rows, ahead, plan)) continue;
          if (plan.seconds < best.seconds) best = plan;
          break;
        }
      }
    }
  }
  if (best.seconds == std::numeric_limits<double>::infinity()) {
    best.refusal = "finds no tile that fits into shared memory";
  }
  return best;
}

// ---------------------------------------------------------------------------------------------

ThinPlan MakePlan(const Problem& p, const Device& device, const ThinTile& forced) {
  const std::string refusal = Refuse(p, device);
  if (!refusal.empty()) {
    ThinPlan plan{};
    plan.refusal = refusal;
    return plan;
  }
  return p.pass == Pass::kForward ? PlanForward(p, device, forced)
                                  : PlanInputGrad(p, device, forced);
}

const ThinPlan& PlanOf(const Problem& p, const Device& d) {
  return Remember<ThinPlan>(p, d, [&] { return MakePlan(p, d, {}); });
}

template <class T>
cudaError_t Enqueue(const Problem& p, const Operands& ops, const ThinPlan& plan,
                    cudaStream_t stream) {
  if (plan.forward) {
    ThinForwardArgs args = plan.f;
    args.x = ops.x;
    args.w = ops.w;
    args.bias = ops.bias;
    args.out = ops.out;
    return EnqueueThinForward<T>(plan, args, p.channels_last, stream);
  }
  ThinInputGradArgs args = plan.g;
  args.y = ops.y;
  args.w = ops.w;
  args.out = ops.out;
  return EnqueueThinInputGrad<T>(plan, args, p.channels_last, stream);
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
  for (const Pass pass : {Pass::kForward, Pass::kInputGrad}) {
    rows.push_back({"thin", pass,
                    [](const Problem& p, const Device& d) { return PlanOf(p, d).refusal; },
                    [](const Problem&, const Device&) { return int64_t{0}; },
                    [](const Problem& p, const Device& d) { return PlanOf(p, d).seconds; },
                    [](const Problem& p, const Operands& ops, const Device& d, cudaStream_t s) {
                      return LaunchThin(p, ops, PlanOf(p, d), s);
                    }});
  }
}

}  // namespace jaxconv::cuda
