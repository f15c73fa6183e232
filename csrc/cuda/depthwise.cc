#include "cuda/depthwise.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace jaxconv::cuda {
namespace {

constexpr int kWindows[][2] = {
#define JAXCONV_CASE(S, T) {S, T},
    JAXCONV_DEPTHWISE_WINDOWS(JAXCONV_CASE)
#undef JAXCONV_CASE
};

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string Refuse(const Problem& p) {
  if (p.Empty()) return "has nothing to read or write";
  if (p.groups != p.ci || p.groups != p.co) {
    return "wants one input and one output channel a group";
  }
  if (p.in_dtype == DType::kF64) return "takes no float64";
  constexpr int64_t kMost = int64_t{1} << 30;
  for (int a = 0; a < kAxes; ++a) {
    for (const int64_t size : {p.isize[a] * p.stride[a] + p.k[a] * p.dilation[a], p.osize[a],
                               p.pad[a], -p.pad[a], p.n, p.ci}) {
      if (size > kMost) return "indexes an axis in 32 bits";
    }
  }
  return "";
}

// Fills in what follows from channels and box; false if it does not fit.
bool Complete(const Problem& p, int stride, int taps, int64_t shared_limit, DepthwisePlan& plan) {
  DepthwiseArgs& a = plan.args;
  int64_t boxes = p.n;
  for (int i = 0; i < kAxes; ++i) {
    const int reach = (a.k[i] - 1) * a.dilation[i];
    if (p.pass == Pass::kForward) {
      // Outputs 0 ... osize - 1 lie at origin * stride and beyond, counted from -pad.
      a.origin[i] = static_cast<int>(FloorDiv(p.pad[i], p.stride[i]));
      const int64_t end = CeilDiv(p.osize[i] + p.pad[i] - a.origin[i] * p.stride[i], p.stride[i]);
      a.boxes[i] = static_cast<int>(CeilDiv(end, a.box[i]));
      a.x_extent[i] = a.box[i] + reach / a.stride[i];
      a.y_extent[i] = a.box[i] * a.stride[i];
    } else {
      a.origin[i] = 0;
      a.boxes[i] = static_cast<int>(CeilDiv(p.isize[i], a.box[i]));
      a.x_extent[i] = a.box[i];
      a.y_extent[i] = (a.box[i] - 1) * a.stride[i] + reach + 1;
    }
    boxes *= a.boxes[i];
  }
  a.boxes_total = boxes;
  a.channels_log = 0;
  while (1 << a.channels_log < a.channels) ++a.channels_log;
  a.channel_blocks = static_cast<int>(CeilDiv(p.ci, a.channels));
  const auto plane = [&](const int* extent, int run, int& pitch) -> int64_t {
    pitch = extent[2] + extent[2] / run + 1;
    const int64_t floats = int64_t{extent[0]} * extent[1] * pitch;
    return a.channels == 1 ? floats : floats + ((4 - floats) % 32 + 32) % 32;
  };
  const int64_t x_plane = plane(a.x_extent, DepthwiseRowRun(stride, false), a.x_pitch);
  const int64_t y_plane = plane(a.y_extent, DepthwiseRowRun(stride, true), a.y_pitch);
  const int64_t weights = p.pass == Pass::kWeightGrad ? 0 : Product(p.k);
  int64_t shared = 4 * a.channels * (x_plane + y_plane + weights);
  if (p.pass == Pass::kWeightGrad) {
    shared = std::max<int64_t>(
        shared, 4 * kDepthwiseThreads * (stride == 0 ? 1 : kDepthwiseTapRows * taps));
  }
  if (shared > shared_limit) return false;
  if (shared >= 1 << 17) return false;  // and so do rows and positions count
  a.by_x_rows = DivisorOf(a.x_extent[0] * a.x_extent[1]);
  a.by_y_rows = DivisorOf(a.y_extent[0] * a.y_extent[1]);
  a.by_x_rows1 = DivisorOf(a.x_extent[1]);
  a.by_y_rows1 = DivisorOf(a.y_extent[1]);
  a.x_plane = static_cast<int>(x_plane);
  a.y_plane = static_cast<int>(y_plane);
  a.shared = static_cast<int>(shared);
  return true;
}

// Instructions of a block's warps for one box, as counted in the compiled kernels.
double Instructions(const Problem& p, const DepthwisePlan& plan) {
  const DepthwiseArgs& a = plan.args;
  const double copy = SizeOf(p.in_dtype) == 4 ? 12 : 18;
  // A warp moves 32 elements of a row at a time.
  const auto moved = [&](const int* extent) {
    const double rows = double{1} * extent[0] * extent[1] * (p.channels_last ? 1 : a.channels);
    return rows * (80 + copy * static_cast<double>(CeilDiv(
                                   int64_t{extent[2]} * (p.channels_last ? a.channels : 1), 32)));
  };
  const double run = DepthwiseRun(plan.stride), taps = static_cast<double>(p.k[2]);
  const double reads = plan.stride == 0           ? 30 * taps
                       : p.pass == Pass::kForward ? run + taps / plan.stride + taps
                                                  : (run - 1) * plan.stride + 2 * taps;
  const double row = reads + run * taps + 14, tap_rows = static_cast<double>(p.k[0] * p.k[1]);
  double items = a.channels * a.box[2] / run, tap_rows_of_item = tap_rows;
  if (p.pass == Pass::kForward) {
    items *= double{1} * a.y_extent[0] * a.y_extent[1] * (plan.stride == 0 ? a.stride[2] : 1);
    tap_rows_of_item = std::max(1.0, tap_rows / static_cast<double>(p.stride[0] * p.stride[1]));
  } else {
    items *= double{1} * a.box[0] * a.box[1];
  }
  return moved(a.x_extent) + moved(a.y_extent) + items / 32 * (150 + tap_rows_of_item * row);
}

}  // namespace

DepthwisePlan PlanDepthwise(const Problem& p, const Device& device) {
  DepthwisePlan best{};
  best.refusal = Refuse(p);
  if (!best.refusal.empty()) return best;
  best.args.parts = 1;
  best.seconds = 2e-6;
  const bool reads_nothing = p.XElements() == 0 || p.YElements() == 0 || p.WElements() == 0;
  const bool forward = p.pass == Pass::kForward, input = p.pass == Pass::kInputGrad;
  if (forward ? p.YElements() == 0 : input ? p.XElements() == 0 : reads_nothing) return best;

  DepthwisePlan plan{};
  plan.stride = plan.taps = 0;
  for (const auto& [stride, taps] : kWindows) {
    if (stride > 0 && p.stride[2] == stride && p.k[2] == taps && p.dilation[2] == 1) {
      plan.stride = stride;
      plan.taps = taps;
    }
  }
  DepthwiseArgs& a = plan.args;
  a.in_dtype = static_cast<int32_t>(p.in_dtype);
  a.out_dtype = static_cast<int32_t>(p.out_dtype);
  a.channels_last = p.channels_last;
  a.n = static_cast<int>(p.n);
  a.c = static_cast<int>(p.ci);
  for (int i = 0; i < kAxes; ++i) {
    a.isize[i] = static_cast<int>(p.isize[i]);
    a.osize[i] = static_cast<int>(p.osize[i]);
    a.k[i] = static_cast<int>(p.k[i]);
    a.stride[i] = static_cast<int>(p.stride[i]);
    a.dilation[i] = static_cast<int>(p.dilation[i]);
    a.pad[i] = static_cast<int>(p.pad[i]);
    const int gap = static_cast<int>(std::gcd(p.stride[i], p.dilation[i]));
    a.tap_step[i] = a.stride[i] / gap;
    a.row_step[i] = a.dilation[i] / gap;
  }
  a.xs = p.XStrides();
  a.ys = p.YStrides();
  a.w_elements = p.WElements();

  const int run = DepthwiseRun(plan.stride);
  const auto span = [&](int i) {  // input positions along an axis
    return forward ? CeilDiv(p.osize[i] + p.pad[i], p.stride[i]) - FloorDiv(p.pad[i], p.stride[i])
                   : p.isize[i];
  };
  const int64_t size = SizeOf(p.in_dtype);
  const double bandwidth = device.multiprocessors * 31e9;
  best.refusal = "finds no box that fits into shared memory";
  best.seconds = std::numeric_limits<double>::infinity();
  const int most_channels =
      static_cast<int>(std::min<int64_t>(p.ci, p.channels_last ? 32 / size : 16));
  for (const int64_t shared_limit : {int64_t{46} << 10, int64_t{70} << 10, int64_t{96} << 10}) {
    for (a.channels = 1; a.channels <= most_channels; a.channels *= 2) {
      if (p.channels_last && a.channels < most_channels && a.channels * 2 <= most_channels)
        continue;
      const int longest = static_cast<int>(CeilDiv(std::max<int64_t>(span(2), 1), run));
      for (int cut = 1; cut <= longest; cut *= 2) {
        a.box[2] = static_cast<int>(CeilDiv(longest, cut)) * run;
        if (a.box[2] > 1024) continue;
        for (a.box[1] = 1; a.box[1] < 2 * std::max<int64_t>(span(1), 1) && a.box[1] <= 64;
             a.box[1] *= 2) {
          for (a.box[0] = 1; a.box[0] < 2 * std::max<int64_t>(span(0), 1) && a.box[0] <= 16;
               a.box[0] *= 2) {
            if (!Complete(p, plan.stride, plan.taps, shared_limit, plan)) break;
            const double blocks = static_cast<double>(a.boxes_total * a.channel_blocks);
            const double x = double{1} * a.x_extent[0] * a.x_extent[1] * a.x_extent[2] * a.channels;
            const double y = double{1} * a.y_extent[0] * a.y_extent[1] * a.y_extent[2] * a.channels;
            // Whole waves of boxes, with the staged traffic and a fixed cost each.
            const double resident =
                device.multiprocessors *
                std::min<double>(
                    8, std::max<double>(1, (device.compute_capability == 90 ? 226.0 : 98.0) * 1024 /
                                               (a.shared + 1024)));
            const double waves = std::max(blocks / resident, 1.0);
            const double traffic = waves * resident * (x + y) * size / (0.75 * bandwidth);
            const double arithmetic =
                waves * resident * Instructions(p, plan) / (device.multiprocessors * 2.2 * 1.7e9);
            const double seconds = 4e-6 + std::max(traffic, arithmetic) + waves * 1.5e-6;
            if (seconds < best.seconds) {
              best = plan;
              best.seconds = seconds;
            }
          }
        }
      }
    }
  }
  if (best.seconds == std::numeric_limits<double>::infinity()) return best;
  DepthwiseArgs& b = best.args;
  b.parts = 1;
  best.blocks = b.boxes_total * b.channel_blocks;
  if (p.pass == Pass::kWeightGrad) {
    const int64_t resident =
        device.multiprocessors *
        std::max<int64_t>(1, std::min<int64_t>(8, 226 * 1024 / (b.shared + 1024)));
    const int64_t limit = p.YElements() * size / 10 / (4 * p.WElements());
    b.parts = static_cast<int>(
        std::max<int64_t>(1, std::min({resident / b.channel_blocks, limit, b.boxes_total})));
    best.blocks = int64_t{b.parts} * b.channel_blocks;
    if (b.parts > 1) best.workspace = 4 * b.parts * p.WElements();
    best.seconds += 3e-6;
  }
  if (best.blocks >= int64_t{1} << 31) best.refusal = "wants too many blocks";
  return best;
}

void AddDepthwise(std::vector<Row>& rows) {
  for (const Pass pass : {Pass::kForward, Pass::kInputGrad, Pass::kWeightGrad}) {
    rows.push_back({"depthwise", pass,
                    [](const Problem& p, const Device& d) { return PlanDepthwise(p, d).refusal; },
                    [](const Problem& p, const Device& d) { return PlanDepthwise(p, d).workspace; },
                    [](const Problem& p, const Device& d) { return PlanDepthwise(p, d).seconds; },
                    LaunchDepthwise});
  }
}

}  // namespace jaxconv::cuda
