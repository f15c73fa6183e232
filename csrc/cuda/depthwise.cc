#include "cuda/depthwise.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/sum_parts.cuh"
#include "cuda/taps.h"

namespace jaxconv::cuda {
namespace {

constexpr DepthwiseWindow kWindows[] = {
#define JAXCONV_CASE(T0, S1, K1, S2, K2) {T0, S1, K1, S2, K2},
    JAXCONV_DEPTHWISE_WINDOWS(JAXCONV_CASE)
#undef JAXCONV_CASE
};
constexpr DepthwiseWindow kAny{1, 1, 1, 1, 1};

std::string Refuse(const Problem& p) {
  if (p.Empty()) return "has nothing to read or write";
  if (p.groups != p.ci || p.groups != p.co) {
    return "wants one input and one output channel a group";
  }
  if (p.in_dtype == DType::kF64) return "takes no float64";
  // Indices may leave the image by a window.
  Sizes most{};
  for (int a = 0; a < kAxes; ++a) {
    most[a] = std::max(p.isize[a], p.osize[a]) + p.k[a] * p.dilation[a] + std::abs(p.pad[a]) +
              p.stride[a];
    if (p.stride[a] * p.isize[a] > int64_t{1} << 29 || most[a] > int64_t{1} << 29) {
      return "indexes an axis in 32 bits";
    }
  }
  if (static_cast<double>(Product({most[0], most[1], 1})) * static_cast<double>(most[2]) *
          static_cast<double>(p.channels_last ? p.ci : 1) >
      static_cast<double>(int64_t{1} << 31)) {
    return "indexes an image in 32 bits";
  }
  return "";
}

// The window of a problem, or -1.
int WindowOf(const Problem& p) {
  for (int a = 0; a < kAxes; ++a) {
    if (p.dilation[a] != 1 && p.k[a] > 1) return -1;
  }
  const bool input = p.pass == Pass::kInputGrad;
  if (!input && p.stride[0] > kDepthwiseThreads / 2) return -1;
  const int64_t t0 = input ? p.k[0] : CeilDiv(p.k[0], p.stride[0]);
  int index = 0;
  for (const DepthwiseWindow& w : kWindows) {
    if (DepthwiseHas(p.pass, w) && w.t0 == t0 && w.s1 == p.stride[1] && w.k1 == p.k[1] &&
        w.s2 == p.stride[2] && w.k2 == p.k[2]) {
      return index;
    }
    ++index;
  }
  return -1;
}

// The size of pieces of at most `most`, of which n is an integer's number as nearly as can be.
int Even(int64_t n, int64_t most) {
  return n <= 0 ? 1 : static_cast<int>(CeilDiv(n, CeilDiv(n, std::max<int64_t>(most, 1))));
}

// Instructions of a thread for a step of its march, about.
double Instructions(const Problem& p, const DepthwiseWindow& w, int channels) {
  if (p.pass == Pass::kInputGrad) {
    const int loads = w.t0 * w.k2 * w.s1;
    return (w.t0 * w.k1 * w.k2 + loads) * channels + 2.5 * loads + 15;
  }
  const int loads = w.t0 * CeilDiv(w.k2, w.s2), outputs = w.s1 * w.s2;
  return (w.t0 * w.k1 * w.k2 + loads + outputs) * channels + 3 * (loads + outputs) + 15;
}

}  // namespace

DepthwisePlan PlanDepthwise(const Problem& p, const Device& device) {
  DepthwisePlan plan{};
  plan.refusal = Refuse(p);
  if (!plan.refusal.empty()) return plan;
  plan.window = WindowOf(p);
  const bool forward = p.pass == Pass::kForward, weight = p.pass == Pass::kWeightGrad;
  const bool any = plan.window < 0;
  const DepthwiseWindow& w = any ? kAny : kWindows[plan.window];
  const bool wide = p.out_dtype == DType::kF32 && p.in_dtype != DType::kF32;
  plan.channels = !any && !(forward && wide) && p.channels_last && p.ci % 2 == 0 &&
                          2 * w.t0 * w.k1 * w.k2 <= kDepthwiseKept
                      ? 2
                      : 1;
  plan.pairs = !any && !(forward && wide) && !p.channels_last && w.s2 == 2 && p.osize[2] % 2 == 0;

  DepthwiseArgs& a = plan.args;
  a.wide = wide;
  a.channels_last = p.channels_last;
  a.c = static_cast<int>(p.ci);
  const Strides xs = p.XStrides(), ys = p.YStrides();
  a.xn = xs.n;
  a.yn = ys.n;
  a.xc = static_cast<int>(xs.c);
  a.yc = static_cast<int>(ys.c);
  a.w_elements = p.WElements();
  // Where axes 0 and 1 have one position each, images are the rows to march over.
  const bool folded = Product(p.isize) == p.isize[2] && Product(p.osize) == p.osize[2] &&
                      p.k[1] == 1 && p.stride[1] == 1 && p.pad[1] == 0 &&
                      p.n * std::max(xs.n, ys.n) < int64_t{1} << 30;
  const int64_t images = folded ? 1 : p.n;
  for (int i = 0; i < kAxes; ++i) {
    a.isize[i] = static_cast<int>(p.isize[i]);
    a.osize[i] = static_cast<int>(p.osize[i]);
    a.k[i] = static_cast<int>(p.k[i]);
    a.stride[i] = static_cast<int>(p.stride[i]);
    a.dilation[i] = static_cast<int>(p.dilation[i]);
    a.pad[i] = static_cast<int>(p.pad[i]);
    a.xs[i] = static_cast<int>(xs.s[i]);
    a.ys[i] = static_cast<int>(ys.s[i]);
    if (i == 1 && folded) {
      a.isize[1] = a.osize[1] = static_cast<int>(p.n);
      a.xs[1] = static_cast<int>(xs.n);
      a.ys[1] = static_cast<int>(ys.n);
    }
    // Positions, as the kernels define them: inputs, outputs, u or q.
    const bool outputs = forward || (weight && !any && i != 1);
    a.origin[i] = 0;
    a.end[i] = outputs ? a.osize[i] : a.isize[i];
    if (outputs && !any) {
      const int64_t pad = p.pad[i] - (i == 2 && plan.pairs ? ((p.pad[2] % 2) + 2) % 2 : 0);
      const int64_t first = FloorDiv(pad, p.stride[i]), end = a.osize[i] + pad;
      a.origin[i] = static_cast<int>(i == 0 ? first * p.stride[i] : first);
      a.end[i] = static_cast<int>(i == 0 ? end : FloorDiv(end - 1, p.stride[i]) + 1);
    }
  }
  const auto span = [&](int i) { return int64_t{a.end[i]} - a.origin[i]; };

  // Threads are filled with channels, then positions of axis 2, or the other way round, by layout;
  // a few positions of axis 0 share what L1 holds.
  const int residues = any || p.pass == Pass::kInputGrad ? 1 : a.stride[0];
  const int64_t vectors = CeilDiv(p.ci, plan.channels), most = kDepthwiseThreads / residues;
  const auto tile0_for = [&](int64_t room) {
    return residues * static_cast<int>(std::clamp<int64_t>(CeilDiv(span(0), residues), 1,
                                                           std::max<int64_t>(room, 1)));
  };
  int tile_c, tile2, tile0;
  if (p.channels_last) {
    tile_c = Even(vectors, std::min<int64_t>(most, 32));
    tile0 = tile0_for(std::min<int64_t>(most / tile_c, 2));
    tile2 = Even(span(2), kDepthwiseThreads / (tile_c * tile0));
    tile0 = tile0_for(most / (tile_c * tile2));
  } else {
    tile2 = Even(span(2), most);
    tile0 = tile0_for(most / tile2);
    tile_c = Even(vectors, kDepthwiseThreads / (tile2 * tile0));
  }
  a.by_c = DivisorOf(tile_c);
  a.by2 = DivisorOf(tile2);
  a.by0 = DivisorOf(tile0);
  a.by_residue = DivisorOf(residues);
  plan.threads = static_cast<int>(CeilDiv(int64_t{tile_c} * tile2 * tile0, 32)) * 32;
  plan.channel_blocks = static_cast<int>(CeilDiv(vectors, tile_c));
  a.tiles2 = static_cast<int>(CeilDiv(span(2), tile2));
  a.tiles0 = static_cast<int>(CeilDiv(span(0), tile0));
  // Marches are cut where there would be few blocks.
  const int64_t columns = int64_t{a.tiles0} * a.tiles2 * images;
  const int64_t resident = 2 * device.multiprocessors, wanted = 4 * resident;
  const int taps = any && weight ? static_cast<int>(Product(p.k)) : 1;
  const int64_t cuts =
      std::clamp<int64_t>(wanted / (columns * plan.channel_blocks * taps), 1, CeilDiv(span(1), 4));
  a.steps = Even(span(1), CeilDiv(span(1), cuts));
  a.segments = static_cast<int>(CeilDiv(span(1), a.steps));
  const int64_t tiles = columns * a.segments;
  if (tiles >= int64_t{1} << 30) plan.refusal = "wants too many blocks";
  a.tiles = static_cast<int>(tiles);

  // How many blocks share the tiles of the same channels: all that are resident for sums, else as
  // many as need not load weights too often.
  int64_t parts = std::max<int64_t>(1, 8 * wanted / plan.channel_blocks);
  if (weight) {
    const int64_t limit = p.YElements() * SizeOf(p.in_dtype) / 10 / (4 * p.WElements());
    parts = std::clamp<int64_t>(resident / (int64_t{plan.channel_blocks} * taps), 1,
                                std::max<int64_t>(limit, 1));
  }
  parts = std::min(parts, tiles);
  a.parts = static_cast<int>(CeilDiv(tiles, CeilDiv(tiles, parts)));
  if (a.parts > 65535 || taps > 65535) plan.refusal = "wants too many blocks";
  if (weight && a.parts > 1) plan.workspace = 4 * a.parts * p.WElements();

  // Memory at four fifths of what it copies, instructions of the warps, and the march of the
  // thread that is last.
  const double rounds = static_cast<double>(CeilDiv(tiles, a.parts));
  const double bytes = static_cast<double>((p.XElements() + p.YElements()) * SizeOf(p.in_dtype));
  const double step = any ? 40 + 12 * static_cast<double>(weight ? 1 : Product(p.k))
                          : Instructions(p, w, plan.channels);
  const double warp_steps = static_cast<double>(taps) * plan.channel_blocks * a.parts * rounds *
                            a.steps * plan.threads / 32;
  plan.seconds = 4e-6 + (weight ? 3e-6 : 0) +
                 std::max({bytes / (device.multiprocessors * 26e9),
                           warp_steps * step / (device.multiprocessors * 4.2e9),
                           rounds * a.steps * (5e-7 + step * 4e-9)});
  return plan;
}

namespace {

cudaError_t LaunchDepthwise(const Problem& p, const Operands& ops, const Device& device,
                            cudaStream_t stream) {
  const DepthwisePlan plan = PlanDepthwise(p, device);
  if (!plan.refusal.empty()) return cudaErrorInvalidValue;
  DepthwiseArgs a = plan.args;
  a.x = ops.x;
  a.w = ops.w;
  a.y = ops.y;
  a.bias = ops.bias;
  const bool summed = p.pass == Pass::kWeightGrad && a.parts > 1;
  a.out = summed ? ops.workspace : ops.out;
  const cudaError_t status =
      p.in_dtype == DType::kF32    ? EnqueueDepthwise<float>(p.pass, plan, a, stream)
      : p.in_dtype == DType::kBF16 ? EnqueueDepthwise<__nv_bfloat16>(p.pass, plan, a, stream)
                                   : EnqueueDepthwise<__half>(p.pass, plan, a, stream);
  if (status != cudaSuccess || !summed) return status;
  return SumParts(static_cast<const float*>(ops.workspace), a.parts, p.WElements(), p.out_dtype,
                  ops.out, stream);
}

}  // namespace

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
