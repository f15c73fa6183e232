#include "cuda/depthwise.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/device_limits.h"
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

bool Wide(const Problem& p) { return p.out_dtype != p.in_dtype; }

// Whether y comes through a ring in shared memory.
bool Staged(const Problem& p, int window) {
  return p.pass == Pass::kInputGrad && window >= 0 && kWindows[window].t0 > 1;
}

// The window of a problem, or -1.
int WindowOf(const Problem& p) {
  for (int a = 0; a < kAxes; ++a) {
    if (p.dilation[a] != 1 && p.k[a] > 1) return -1;
  }
  const bool input = p.pass == Pass::kInputGrad;
  if (!input && p.stride[0] > 8) return -1;  // a block has all residues
  if (p.pass == Pass::kForward && Wide(p)) return -1;
  const int64_t t0 = input ? p.k[0] : CeilDiv(p.k[0], p.stride[0]);
  int index = -1;
  for (const DepthwiseWindow& w : kWindows) {
    ++index;
    const bool staged = Staged(p, index);
    // Neighbouring inputs share planes of y; vectors of channels are full.
    if (staged ? p.stride[0] != w.s1 : p.channels_last && p.ci % w.channels() != 0) continue;
    if (DepthwiseHas(p.pass, w) && w.t0 == t0 && w.s1 == p.stride[1] && w.k1 == p.k[1] &&
        w.s2 == p.stride[2] && w.k2 == p.k[2]) {
      return index;
    }
  }
  return -1;
}

// The size of pieces of at most `most`, of which n is an integer's number as nearly as can be.
int Even(int64_t n, int64_t most) {
  return n <= 0 ? 1 : static_cast<int>(CeilDiv(n, CeilDiv(n, std::max<int64_t>(most, 1))));
}

// Elements of y that are copied together: what rows are aligned to, up to 16 bytes.
int ElementsOfChunk(const Problem& p) {
  const int64_t length = p.channels_last ? p.ci : p.osize[2];
  const int unit = static_cast<int>(16 / SizeOf(p.in_dtype));
  return length % unit == 0 ? unit : length % 2 == 0 && p.in_dtype != DType::kF32 ? 2 : 1;
}

// The input gradient's ring for a block's tile; false if it is too large.
bool Stage(const Problem& p, const DepthwiseWindow& w, int tile_c, int tile2, int tile0,
           int threads, const Device& device, DepthwisePlan& plan) {
  DepthwiseStage& s = plan.args.stage;
  const int64_t planes = (int64_t{tile0} * kDepthwiseInputs - 1) * p.stride[0] + w.t0;
  const int64_t columns = int64_t{tile2 - 1} * w.s2 + w.k2;
  const int64_t size = SizeOf(p.in_dtype), unit = 16 / size, each = ElementsOfChunk(p);
  // Channels first, a row begins up to unit - 1 before what is asked for, and pairs may end beyond.
  const int64_t first = CeilDiv(p.channels_last ? tile_c : columns + unit, unit) * unit;
  const int64_t second = p.channels_last ? columns : planes;
  const int64_t third = p.channels_last ? planes : tile_c;
  const int64_t pitch = p.channels_last ? 32 : first, elements = pitch * second * third;
  const int64_t count = first * second * third / each;
  const int64_t shared = kDepthwiseStages * std::min(w.s1, w.k1) * elements * size;
  if (count > (each == unit ? int64_t{kDepthwiseChunks} * threads : int64_t{1} << 14) ||
      (!p.channels_last && tile_c * Product(p.osize) > int64_t{1} << 30) ||
      shared > SharedMemoryOfBlock(device.compute_capability) / 2 - 1024) {  // two blocks at a time
    return false;
  }
  s.by_first = DivisorOf(static_cast<int>(first / each));
  s.by_second = DivisorOf(static_cast<int>(second));
  s.count = static_cast<int>(count);
  s.each = static_cast<int>(each);
  s.plane = static_cast<int>(p.channels_last ? columns * pitch : pitch);
  s.channel = static_cast<int>(p.channels_last ? 1 : planes * pitch);
  s.elements = static_cast<int>(elements);
  plan.shared = static_cast<int>(shared);
  return true;
}

// Instructions of a thread for a step of its march, about: as counted in the compiled kernels.
double Instructions(const Problem& p, const DepthwiseWindow& w, int channels) {
  const int taps = w.t0 * w.k1 * w.k2, rows = std::min(w.s1, w.k1);
  if (p.pass == Pass::kInputGrad && w.t0 > 1) {
    const int loads = (w.t0 + (kDepthwiseInputs - 1) * w.s1) * w.k2 * rows;
    return kDepthwiseInputs * taps + 1.5 * loads + 130;
  }
  if (p.pass == Pass::kInputGrad) return taps * channels + rows * w.k2 * (channels + 3) + 30;
  const int sources = w.t0 * static_cast<int>(CeilDiv(w.k2, w.s2)), outputs = w.s1 * w.s2;
  return (taps + 40) * channels + (sources + outputs) * (channels + 2);
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
  const bool staged = Staged(p, plan.window);
  plan.channels = !any && !staged && p.channels_last ? w.channels() : 1;
  plan.pairs = !any && !staged && !p.channels_last && w.s2 == 2 && p.osize[2] % 2 == 0 &&
               (p.pad[2] - w.shift()) % 2 == 0;

  DepthwiseArgs& a = plan.args;
  a.wide = Wide(p);
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
      const int64_t pad = p.pad[i] - (i == 2 && plan.pairs ? w.shift() : 0);
      const int64_t first = FloorDiv(pad, p.stride[i]), end = a.osize[i] + pad;
      a.origin[i] = static_cast<int>(i == 0 ? first * p.stride[i] : first);
      a.end[i] = static_cast<int>(i == 0 ? end : FloorDiv(end - 1, p.stride[i]) + 1);
    }
  }
  const auto span = [&](int i) { return int64_t{a.end[i]} - a.origin[i]; };

  // Threads are filled with channels, then positions of axis 2, or the other way round, by layout;
  // a few positions of axis 0 share what L1 holds.
  const int residues = any || p.pass == Pass::kInputGrad ? 1 : a.stride[0],
            of_thread = staged ? kDepthwiseInputs : 1;
  const int64_t vectors = CeilDiv(p.ci, plan.channels), most = kDepthwiseThreads / residues;
  const int64_t span0 = CeilDiv(span(0), of_thread);
  const auto tile0_for = [&](int64_t room) {
    return residues * Even(CeilDiv(span0, residues),
                           std::clamp<int64_t>(room, 1, std::max<int64_t>(span0, 1)));
  };
  int tile_c, tile2, tile0;
  if (p.channels_last) {
    tile_c = Even(vectors, std::min<int64_t>(most, 32));
    const int chunk = ElementsOfChunk(p);  // a block's channels begin with one
    if (staged) tile_c = static_cast<int>(CeilDiv(tile_c, chunk)) * chunk;
    tile0 = tile0_for(std::min<int64_t>(most / tile_c, 2));
    tile2 = Even(span(2), kDepthwiseThreads / (tile_c * tile0));
    tile0 = tile0_for(most / (tile_c * tile2));
  } else {
    tile2 = Even(span(2), most);
    tile0 = tile0_for(most / tile2);
    tile_c = Even(vectors, kDepthwiseThreads / (tile2 * tile0));
  }
  const auto threads = [&] { return static_cast<int>(CeilDiv(tile_c * tile2 * tile0, 32)) * 32; };
  while (staged && !Stage(p, w, tile_c, tile2, tile0, threads(), device, plan)) {
    if (!p.channels_last && tile_c > 1) {
      tile_c = (tile_c + 1) / 2;
    } else if (tile2 > 1 && (tile2 * residues >= tile0 * of_thread || tile0 == residues)) {
      tile2 = (tile2 + 1) / 2;
    } else if (tile0 > residues) {
      tile0 = (tile0 / residues + 1) / 2 * residues;
    } else {
      plan.refusal = "finds no tile that fits into shared memory";
      return plan;
    }
  }
  a.by_c = DivisorOf(tile_c);
  a.by2 = DivisorOf(tile2);
  a.by0 = DivisorOf(tile0);
  a.by_residue = DivisorOf(residues);
  plan.threads = threads();
  plan.channel_blocks = static_cast<int>(CeilDiv(vectors, tile_c));
  a.tiles2 = static_cast<int>(CeilDiv(span(2), tile2));
  a.tiles0 = static_cast<int>(CeilDiv(span0, tile0));
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
    parts = std::clamp<int64_t>(CeilDiv(resident, int64_t{plan.channel_blocks} * taps), 1,
                                std::max<int64_t>(limit, 1));
  }
  parts = std::min(parts, tiles);
  a.parts = static_cast<int>(CeilDiv(tiles, CeilDiv(tiles, parts)));
  if (a.parts > 65535 || taps > 65535) plan.refusal = "wants too many blocks";
  if (weight && a.parts > 1) plan.workspace = 4 * a.parts * p.WElements();

  // Memory at four fifths of what it copies; instructions of the warps, of which a multiprocessor
  // issues about two a cycle; and the march of one block.
  const double rounds = static_cast<double>(CeilDiv(tiles, a.parts));
  const double bytes = static_cast<double>((p.XElements() + p.YElements()) * SizeOf(p.in_dtype));
  const double step = any ? 60 + 15 * static_cast<double>(weight ? 1 : Product(p.k))
                          : Instructions(p, w, plan.channels);
  const double warp_steps =
      static_cast<double>(taps) * plan.channel_blocks * tiles * a.steps * plan.threads / 32;
  plan.seconds = 4e-6 + (weight ? 6e-6 : 0) +
                 std::max({bytes / (device.multiprocessors * 24e9),
                           warp_steps * step / (device.multiprocessors * 3.5e9),
                           rounds * (2e-6 + a.steps * (2e-7 + step * 2e-9))});
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
