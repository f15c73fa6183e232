#include "cpu/pixels.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "cpu/phase_plan.h"
#include "cpu/pixel_plan.h"
#include "cpu/scratch.h"

namespace jaxconv::cpu {
namespace {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// A PixelPlan and what it points to: it may be moved, not copied.
struct Plan {
  Plan() = default;
  Plan(Plan&&) = default;
  PixelPlan p{};
  std::vector<AxisTap> axis_taps[3];
  std::vector<int64_t> phase_begin[3];
  std::vector<PixelTap> taps;
  std::vector<int64_t> phase_first;
  int64_t most_taps = 0;  // of a phase

  int64_t Units() const { return p.groups * p.nblocks; }
  int64_t Tasks() const { return p.n * p.tiles * p.phase_splits * p.block_splits; }
  int64_t WeightGradTasks() const { return p.groups * p.parts * p.x_chunks * p.y_chunks; }
};

constexpr int64_t kMaxTaps = int64_t{1} << 16, kMaxPhases = int64_t{1} << 12;
constexpr int64_t kMaxScratch = int64_t{16} << 20;  // bytes a task
constexpr int64_t kTasks = 16;                      // enough to share evenly
constexpr int64_t kMostPositions = 128;             // of a tile
// A quarter of the second-level cache for what is listed, as for a chunk of the weight; half of it
// for the sums of a weight gradient.
constexpr int64_t kListBytes = int64_t{256} << 10, kWeightBytes = int64_t{256} << 10;
constexpr int64_t kSumsBytes = int64_t{512} << 10, kRowsBytes = int64_t{256} << 10;
constexpr int64_t kTaskBytes = int64_t{896} << 10;  // sums and copies of x and y
constexpr int64_t kNearBytes = int64_t{96} << 10;   // what a tap reads
constexpr int64_t kBoxTasks = 8;                    // fewer than others: each copies what it reads

int64_t SumSize(const Problem& p) { return p.in_dtype == DType::kF64 ? 8 : 4; }
bool Depthwise(const Problem& p) { return p.cig() == 1 && p.cog() == 1; }

// The taps of each axis by destination phase, and the place of each tap of the weight among all.
void AddTaps(Plan& plan, const Problem& problem) {
  PixelPlan& p = plan.p;
  const bool forward = problem.pass == Pass::kForward;
  std::vector<int64_t> index[3], phase[3];  // of each tap of an axis
  for (size_t a = 0; a < 3; ++a) {
    auto& taps = plan.axis_taps[a];
    auto& begin = plan.phase_begin[a];
    index[a].resize(static_cast<size_t>(problem.k[a]));
    phase[a].resize(static_cast<size_t>(problem.k[a]));
    for (int64_t r = 0; r < p.dst_step[a]; ++r) {
      begin.push_back(static_cast<int64_t>(taps.size()));
      for (int64_t t = 0; t < problem.k[a]; ++t) {
        // o = i * stride + t * dilation - pad, solved for the source's coordinate.
        const int64_t at = t * problem.dilation[a] - problem.pad[a];
        if (forward && FloorDiv(r - at, p.dst_step[a]) * p.dst_step[a] != r - at) continue;
        index[a][static_cast<size_t>(t)] = static_cast<int64_t>(taps.size()) - begin.back();
        phase[a][static_cast<size_t>(t)] = r;
        taps.push_back({t, forward ? (r - at) / p.dst_step[a] : at});
      }
    }
    begin.push_back(static_cast<int64_t>(taps.size()));
    p.axis_taps[a] = taps.data();
    p.phase_begin[a] = begin.data();
  }
  const auto count = [&](size_t a, int64_t r) {
    const auto& begin = plan.phase_begin[a];
    return begin[static_cast<size_t>(r) + 1] - begin[static_cast<size_t>(r)];
  };
  int64_t first = 0;
  for (int64_t r = 0; r < p.phases; ++r) {
    plan.phase_first.push_back(first);
    const int64_t taps = count(0, r / p.dst_step[2] / p.dst_step[1]) *
                         count(1, r / p.dst_step[2] % p.dst_step[1]) * count(2, r % p.dst_step[2]);
    plan.most_taps = std::max(plan.most_taps, taps);
    first += taps;
  }
  for (int64_t t = 0; t < p.ntaps; ++t) {
    const size_t t0 = static_cast<size_t>(t / problem.k[2] / problem.k[1]),
                 t1 = static_cast<size_t>(t / problem.k[2] % problem.k[1]),
                 t2 = static_cast<size_t>(t % problem.k[2]);
    const int64_t r = (phase[0][t0] * p.dst_step[1] + phase[1][t1]) * p.dst_step[2] + phase[2][t2];
    const int64_t n1 = count(1, phase[1][t1]), n2 = count(2, phase[2][t2]);
    plan.taps.push_back({plan.phase_first[static_cast<size_t>(r)], count(0, phase[0][t0]) * n1 * n2,
                         (index[0][t0] * n1 + index[1][t1]) * n2 + index[2][t2]});
  }
  p.taps = plan.taps.data();
  p.phase_first = plan.phase_first.data();
}

// Which positions, phases and blocks are a task of forward or input gradient.
void SetTasks(Plan& plan, const PixelKernels& kernels, int64_t size) {
  PixelPlan& p = plan.p;
  const int64_t together = kernels.positions,
                positions = Product({p.grid[0], p.grid[1], p.grid[2]});
  const int64_t entry = (together + 1) * 8;
  const int64_t listed = kListBytes / (entry * std::max<int64_t>(plan.most_taps, 1)) * together;
  const auto set = [&](int64_t tile) {
    p.tile = tile;
    p.tiles = CeilDiv(positions, tile);
    p.phase_splits = p.block_splits = 1;
    p.phase_splits = std::clamp<int64_t>(CeilDiv(kTasks, plan.Tasks()), 1, p.phases);
    p.block_splits = std::clamp<int64_t>(CeilDiv(kTasks, plan.Tasks()), 1, plan.Units());
  };
  int64_t most = std::min(kMostPositions, RoundUp(positions, together));
  // Depthwise, a pixel is written at once, with all its channels.
  while (p.depthwise != 0 && p.n * CeilDiv(positions, most) < kTasks && most > 4 * together) {
    most = RoundUp(most / 2, together);
  }
  set(std::clamp(listed, together, most));
  while (plan.Tasks() < kTasks && p.tile > 4 * together) set(RoundUp(p.tile / 2, together));
  p.tap_chunk = std::max<int64_t>(kWeightBytes / (p.k * p.mr * size), 1);
  const int64_t blocks = p.tile / together;
  p.scratch = (p.zeros + p.tile * p.mr) * size + (4 * p.tile + 2 * blocks + 1) * 8 +
              (blocks * plan.most_taps + 1) * entry;
}

// Which channels and positions are a task of the weight gradient.
void SetWeightGradTasks(Plan& plan, const Problem& problem, bool boxes, int64_t lanes,
                        int64_t size) {
  PixelPlan& p = plan.p;
  const bool depthwise = p.depthwise != 0;
  const int64_t all_x = depthwise ? 1 : p.m, all_y = depthwise ? p.m : p.k;
  const int64_t most_parts = 1 + problem.YElements() / 10 / problem.WElements();
  const auto filled = [&](int64_t channels) {
    return static_cast<double>(channels) / static_cast<double>(RoundUp(channels, lanes));
  };
  const auto pair = [&](int64_t channels) { return std::min(channels, 2 * lanes); };
  p.swapped = !depthwise && (filled(all_y) < filled(all_x) ||
                             (filled(all_y) == filled(all_x) && pair(all_y) < pair(all_x)))
                  ? 1
                  : 0;
  // Rows of y that no tap hears are not copied. Columns are: rows are read as they lie.
  for (size_t a = 0; a < 3; ++a) {
    p.y_step[a] = a == 2 ? 1 : std::gcd(problem.stride[a], problem.dilation[a]);
  }
  p.x_chunk = all_x;
  p.y_chunk = all_y;
  // The operand whose vectors are taken has whole vectors in a copy, and where not all of a pixel
  // is read at once, an odd number of them, so that neighbouring pixels do not compete for the same
  // sets of a cache.
  const auto vectors = [&](int64_t channels) {
    const int64_t n = CeilDiv(channels, lanes);
    return (n <= 2 ? n : n | 1) * lanes;
  };
  const auto set_boxes = [&] {
    // Whole pixels of x are copied as they lie.
    const bool as_it_lies =
        p.x_chunk <= 2 * lanes || (problem.channels_last && p.x_chunk == problem.ci);
    p.x_pitch = p.swapped != 0 || !as_it_lies ? vectors(p.x_chunk) : p.x_chunk;
    p.y_pitch = p.swapped != 0 ? p.y_chunk : vectors(p.y_chunk);
    Sizes box{1, 1, p.dst_size[2]};
    const auto set_panels = [&] {
      int64_t pixels = 1;
      for (size_t a = 0; a < 3; ++a) {
        const AxisTap* taps = p.axis_taps[a];
        const int64_t span = taps[p.kernel[a] - 1].e - taps[0].e;
        const int64_t count = ((box[a] - 1) * p.src_step[a] + span) / p.y_step[a] + 1;
        pixels *= a < 2 || p.swapped != 0 ? count : RoundUp(count, p.src_step[2]);
      }
      p.y_panel = RoundUp(pixels * p.y_pitch, 16);
      p.x_panel =
          p.swapped != 0 && problem.channels_last ? 0 : RoundUp(Product(box) * p.x_pitch, 16);
      const int64_t heard = p.swapped != 0 ? 2 * lanes + p.y_chunk : p.x_chunk + 2 * lanes;
      return (p.x_panel + p.y_panel + p.sums) * size <= kTaskBytes &&
             Product(box) * heard * size <= kNearBytes;
    };
    while (!set_panels() && box[2] > 16) box[2] = CeilDiv(box[2], 2);
    for (const size_t a : {size_t{1}, size_t{0}}) {
      // As many as possible, and then as equal as possible.
      const int64_t least = box[a];
      while (box[a] < p.dst_size[a]) {
        ++box[a];
        if (set_panels()) continue;
        box[a] = std::max(box[a] - 1, least);
        break;
      }
      box[a] = CeilDiv(p.dst_size[a], CeilDiv(p.dst_size[a], box[a]));
      if (box[a] < p.dst_size[a]) break;
    }
    set_panels();
    p.units = p.n;
    for (size_t a = 0; a < 3; ++a) {
      p.box[a] = box[a];
      p.boxes[a] = CeilDiv(p.dst_size[a], box[a]);
      p.units *= p.boxes[a];
    }
  };
  // What a position and the taps of a row join: whole lines.
  const auto bytes = [&](int64_t channels) { return std::max<int64_t>(channels * size, 64); };
  const auto position = [&] {
    return bytes(p.x_chunk) + bytes(p.y_chunk) * p.src_step[1] * p.src_step[2];
  };
  p.columns = std::min(std::max<int64_t>(kRowsBytes / position(), 16), p.dst_size[2]);
  const auto set_parts = [&] {
    p.x_chunks = CeilDiv(all_x, p.x_chunk);
    p.y_chunks = CeilDiv(all_y, p.y_chunk);
    const int64_t rows = p.ntaps * (p.swapped != 0 ? p.y_chunk : p.x_chunk);
    p.sums = rows * RoundUp(p.swapped != 0 ? p.x_chunk : p.y_chunk, lanes);
    if (boxes) {
      set_boxes();
    } else {
      p.boxes[0] = 0;
      p.units = p.n * p.dst_size[0] * p.dst_size[1] * CeilDiv(p.dst_size[2], p.columns);
    }
    p.parts = 1;
    p.parts = std::clamp<int64_t>(CeilDiv(kTasks, plan.WeightGradTasks()), 1,
                                  std::min(most_parts, p.units));
    return p.sums * size <= kSumsBytes && plan.WeightGradTasks() >= (boxes ? kBoxTasks : kTasks);
  };
  while (!set_parts()) {
    // Copies of y are the larger ones, so that its channels are divided first.
    const bool y_first = boxes ? p.y_chunk > 2 * lanes : p.x_chunk <= 8 || p.x_chunk < p.y_chunk;
    if (p.swapped != 0 && p.x_chunk > 2 * lanes) {
      p.x_chunk = RoundUp(p.x_chunk / 2, lanes);
    } else if (p.swapped != 0) {
      if (p.y_chunk <= 8) break;
      p.y_chunk = RoundUp(p.y_chunk / 2, 8);
    } else if (y_first && p.y_chunk > 2 * lanes) {
      p.y_chunk = RoundUp(p.y_chunk / 2, lanes);
    } else if (p.x_chunk > 8) {
      p.x_chunk = RoundUp(p.x_chunk / 2, 8);
    } else {
      break;
    }
  }
  p.pieces = std::clamp<int64_t>(kRowsBytes / (position() * p.columns), 1, p.units);
  const int64_t listed = boxes ? p.ntaps * 8 + p.box[0] * p.box[1] * 24 : p.pieces * 24;
  p.scratch = (p.sums + p.x_panel + p.y_panel) * size + listed;
}

Plan PlanOf(const Problem& problem, const PixelKernels& kernels) {
  Plan plan;
  PixelPlan& p = plan.p;
  const bool forward = problem.pass == Pass::kForward;
  const int64_t size = SumSize(problem), lanes = kernels.vector_bytes / size;
  const Strides src = forward ? problem.XStrides() : problem.YStrides();
  const Strides dst = forward ? problem.YStrides() : problem.XStrides();
  p.in_type = problem.in_dtype;
  p.out_type = problem.out_dtype;
  p.depthwise = Depthwise(problem) ? 1 : 0;
  p.n = problem.n;
  p.ntaps = Product(problem.k);
  if (p.depthwise != 0) {
    p.groups = p.k = 1;
    p.m = problem.ci;
    p.wm = p.ntaps;
    p.wg = problem.WElements();
  } else {
    p.groups = problem.groups;
    p.k = forward ? problem.cig() : problem.cog();
    p.m = forward ? problem.cog() : problem.cig();
    p.wg = problem.cig() * problem.cog() * p.ntaps;
    p.wk = forward ? problem.cog() * p.ntaps : p.ntaps;
    p.wm = forward ? p.ntaps : problem.cog() * p.ntaps;
  }
  p.src_n = src.n;
  p.dst_n = dst.n;
  p.src_c = src.c;
  p.dst_c = dst.c;
  p.phases = 1;
  for (size_t a = 0; a < 3; ++a) {
    p.kernel[a] = problem.k[a];
    p.src_s[a] = src.s[a];
    p.dst_s[a] = dst.s[a];
    p.src_size[a] = forward ? problem.isize[a] : problem.osize[a];
    p.dst_size[a] = forward ? problem.osize[a] : problem.isize[a];
    p.src_step[a] = forward ? 1 : problem.stride[a];
    p.dst_step[a] = forward ? problem.stride[a] : 1;
    p.phases *= p.dst_step[a];
    p.grid[a] = CeilDiv(p.dst_size[a], p.dst_step[a]);
  }
  p.zeros = RoundUp(forward ? problem.ci : problem.co, lanes) + lanes;
  AddTaps(plan, problem);

  // Blocks of as many vectors as waste least.
  p.mr = lanes;
  for (int64_t nv = kernels.max_vectors; nv > 1; --nv) {
    const int64_t waste = RoundUp(p.m, nv * lanes) - RoundUp(p.m, lanes);
    if (waste == 0) {
      p.mr = nv * lanes;
      break;
    }
  }
  p.nblocks = CeilDiv(p.m, p.mr);
  if (problem.pass == Pass::kWeightGrad) {
    SetWeightGradTasks(plan, problem, p.depthwise == 0, lanes, size);
    // Where so few positions are copied that nothing is used often, pixels are read as they lie.
    if (problem.channels_last && p.swapped == 0 && p.boxes[0] > 0 &&
        Product({p.box[0], p.box[1], p.box[2]}) < 16 && p.box[2] < p.dst_size[2]) {
      SetWeightGradTasks(plan, problem, false, lanes, size);
    }
  } else {
    SetTasks(plan, kernels, size);
  }
  return plan;
}

struct Kernels {
  const PixelKernels& pixels;
  const PhaseKernels& phases;  // for the sum of parts
};

template <const Kernels& kernels>
void LaunchCorrelate(const Problem& problem, const Operands& ops, const Parallel& parallel) {
  const Plan plan = PlanOf(problem, kernels.pixels);
  const PixelPlan& p = plan.p;
  const int64_t pack_tasks = std::clamp<int64_t>(problem.WElements() >> 14, 1, 64);
  parallel.For(pack_tasks, [&](int64_t task) {
    kernels.pixels.pack_weight(p, ops.w, ops.workspace, task, pack_tasks);
  });
  const bool forward = problem.pass == Pass::kForward;
  const PixelOperands operands{forward ? ops.x : ops.y, ops.bias, ops.out, ops.workspace};
  parallel.For(plan.Tasks(), [&](int64_t task) {
    kernels.pixels.correlate(p, operands, task, ThreadScratch(p.scratch));
  });
}

template <const Kernels& kernels>
void LaunchWeightGrad(const Problem& problem, const Operands& ops, const Parallel& parallel) {
  const Plan plan = PlanOf(problem, kernels.pixels);
  const PixelPlan& p = plan.p;
  const PixelOperands operands{ops.y, ops.x, p.parts == 1 ? ops.out : ops.workspace, nullptr};
  parallel.For(plan.WeightGradTasks(), [&](int64_t task) {
    kernels.pixels.weight_grad(p, operands, task, ThreadScratch(p.scratch));
  });
  if (p.parts == 1) return;
  const int64_t size = problem.WElements();
  const int64_t add_tasks = std::clamp<int64_t>(size * p.parts >> 14, 1, 64);
  parallel.For(add_tasks, [&](int64_t task) {
    kernels.phases.add_parts(p.in_type, p.out_type, size, p.parts, ops.workspace, ops.out, task,
                             add_tasks);
  });
}

template <const Kernels& kernels>
std::string Refuse(const Problem& p, const Device& device) {
  const int64_t bytes = kernels.pixels.vector_bytes, lanes = bytes / SumSize(p);
  if (bytes > device.vector_bytes) {
    return "needs vectors of " + std::to_string(bytes) + " bytes, the processor has " +
           std::to_string(device.vector_bytes);
  }
  if (!p.channels_last && (p.pass != Pass::kWeightGrad || Depthwise(p))) {
    return "takes channels first in weight gradients only, and no depthwise ones";
  }
  if (SizeOf(p.in_dtype) == 2) return "takes float32 and float64 only";
  if (p.Empty()) return "takes no empty arrays";
  if (Depthwise(p) && p.ci % lanes != 0) {
    return "takes depthwise layers whose channels fill vectors of " + std::to_string(lanes) +
           ", this one has " + std::to_string(p.ci);
  }
  if (Product(p.k) > kMaxTaps) return "takes kernels of at most 2**16 taps";
  if (std::max({p.stride[0], p.stride[1], p.stride[2], Product(p.stride)}) > kMaxPhases) {
    return "takes at most 2**12 stride phases";
  }
  const Plan plan = PlanOf(p, kernels.pixels);
  if (plan.p.scratch > kMaxScratch) {
    return "would need " + std::to_string(plan.p.scratch >> 20) +
           " MiB of scratch memory a thread; 16 is the limit";
  }
  return "";
}

template <const Kernels& kernels>
int64_t Workspace(const Problem& p, const Device&) {
  const Plan plan = PlanOf(p, kernels.pixels);
  if (p.pass != Pass::kWeightGrad)
    return plan.Units() * plan.p.mr * plan.p.k * plan.p.ntaps * SumSize(p);
  return plan.p.parts == 1 ? 0 : plan.p.parts * p.WElements() * SumSize(p);
}

// Cycles at 3 GHz: products at two vectors a cycle (depthwise: one), what is listed, sums that come
// and go, memory; a weight that is rearranged at 1 GB/s; what a call costs. See phases.cc.
template <const Kernels& kernels>
double Seconds(const Problem& p, const Device& device) {
  const Plan plan = PlanOf(p, kernels.pixels);
  const PixelPlan& q = plan.p;
  const auto real = [](int64_t n) { return static_cast<double>(n); };
  const double lanes = real(kernels.pixels.vector_bytes / SumSize(p));
  const double inputs = real(p.n * Product(p.isize) * q.ntaps);  // pairs of a pixel of x and a tap
  double cycles = 0;
  if (p.pass == Pass::kWeightGrad) {
    const int64_t width = static_cast<int64_t>(lanes);
    cycles = real(p.WElements()) * 0.5;
    const double vectors = q.depthwise != 0 ? real(q.m) / lanes
                           : q.swapped != 0 ? real(q.groups * q.k * CeilDiv(q.m, width))
                                            : real(q.groups * q.m * CeilDiv(q.k, width));
    if (q.boxes[0] > 0) {
      const int64_t units = q.units * q.groups;
      cycles += inputs * vectors * ((q.swapped != 0 ? q.m : q.k) > width ? 0.65 : 1);
      cycles += real(units * q.x_chunks * q.y_chunks) * real(q.y_panel + q.x_panel) / lanes * 5;
      // Sums that come and go, some of them out of the second-level cache.
      cycles += real(units * q.ntaps) * vectors * (q.sums * SumSize(p) > kSumsBytes ? 20 : 4);
      cycles += real(units * q.x_chunks * q.y_chunks * q.box[0] * q.box[1] * q.ntaps) * 8;
    } else {
      const double product = q.depthwise != 0 ? 1.5 : q.k % width != 0 ? 1.6 : 0.65;
      const double pieces = real(p.n * p.isize[0] * p.isize[1] * CeilDiv(p.isize[2], q.columns));
      cycles += inputs * vectors * product;
      cycles += pieces * real(q.ntaps) *
                (10 * real(q.x_chunks * q.y_chunks * q.groups) + 4 * vectors / real(q.pieces));
    }
  } else {
    const double vectors = real(plan.Units() * q.mr) / lanes;
    const double dst = real(p.n * Product({q.dst_size[0], q.dst_size[1], q.dst_size[2]}));
    if (q.depthwise != 0) {
      cycles = inputs * (vectors * 0.8 + 1.5) + dst * vectors * 3;
    } else {
      const double product = q.mr > static_cast<int64_t>(lanes) ? 0.6 : 0.85;
      cycles = inputs * (vectors * (real(q.k) * product + 1) + 4);
      cycles += dst * vectors * 4;
    }
  }
  cycles += real(p.XElements() + p.YElements()) * real(SumSize(p)) / 8;
  const double weight = p.pass == Pass::kWeightGrad ? 0 : real(p.WElements()) * 4;
  return 2e-6 + (cycles / 3e9 + weight / 1e9) / device.threads;
}

template <const Kernels& kernels>
void Add(std::vector<Row>& rows, const char* name) {
  AddRows(rows,
          {name, Pass::kForward, Refuse<kernels>, Workspace<kernels>, Seconds<kernels>,
           LaunchCorrelate<kernels>},
          LaunchWeightGrad<kernels>);
}

#if defined(__x86_64__)
constexpr Kernels kAvx512{kPixelsAvx512, kPhasesAvx512}, kAvx2{kPixelsAvx2, kPhasesAvx2};
#endif
constexpr Kernels kPortable{kPixelsPortable, kPhasesPortable};

}  // namespace

void AddPixels(std::vector<Row>& rows) {
#if defined(__x86_64__)
  Add<kAvx512>(rows, "pixels_avx512");
  Add<kAvx2>(rows, "pixels_avx2");
#endif
  Add<kPortable>(rows, "pixels");
}

}  // namespace jaxconv::cpu
