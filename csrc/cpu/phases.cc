#include "cpu/phases.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "cpu/phase_plan.h"
#include "cpu/scratch.h"

namespace jaxconv::cpu {
namespace {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A PhasePlan and what it points to: it may be moved, not copied.
struct Plan {
  Plan() = default;
  Plan(Plan&&) = default;
  PhasePlan p{};
  std::vector<Tap> taps;
  std::vector<int64_t> phase_begin;
  std::vector<Slot> slots;
  std::vector<Block> blocks;
  Sizes shared{};  // what rows of a tile that is all of the grid need not have between them
  std::vector<Place> places;
  int64_t row_slots = 1;  // source phases along axis 2
  double cycles = 0;      // of one thread: an estimate

  int64_t Tiles() const { return p.tiles[0] * p.tiles[1] * p.tiles[2]; }
  int64_t GroupChunks() const { return CeilDiv(p.groups, p.group_chunk); }
};

constexpr int64_t kMaxTaps = int64_t{1} << 20, kMaxPhases = int64_t{1} << 16;
constexpr int64_t kMaxBox = 2000;                   // positions along axis 2
constexpr int64_t kMaxScratch = int64_t{16} << 20;  // bytes a thread
// Half of the second-level cache for what is read, a quarter for the sums.
constexpr int64_t kPanelBytes = int64_t{512} << 10, kSumsBytes = int64_t{256} << 10;
constexpr int64_t kSumsNear = int64_t{32} << 10;    // sums that stay in the first-level cache
constexpr int64_t kSumsOfAll = int64_t{384} << 10;  // of the blocks that share what is packed
constexpr int64_t kTasks = 16;                      // enough to share evenly

int64_t SumSize(const Problem& p) { return p.in_dtype == DType::kF64 ? 8 : 4; }

// A length of at least `n` elements that is an odd number of cache lines, so that neighbouring rows
// do not compete for the same sets of a cache.
int64_t Spread(int64_t n) { return (CeilDiv(n, 16) | 1) * 16; }

// Where each tap lies: phases of the destination and the source, and offset. See phase_plan.h.
struct AxisTap {
  int64_t dst_phase, src_phase, offset;
};
AxisTap AxisTapOf(const Problem& p, int axis, int64_t t) {
  const bool forward = p.pass == Pass::kForward;
  const int64_t stride = p.stride[axis];
  const int64_t at = t * p.dilation[axis] - (forward ? p.pad[axis] : 0);
  const int64_t shift = FloorDiv(at, stride), phase = at - shift * stride;
  if (forward) return {phase, 0, -shift};
  return {0, phase, shift};
}

// How many of the columns between the rows of tiles that are all of an axis can be left out. Column
// c of a row is element (c + lo) * step + phase - origin of the source, and `columns` are heard by
// positions that exist. With s left out, the last of them are the first of the next row: of a tap,
// columns - (grid + span - s), which must be zero in both.
int64_t SharedOf(const Problem& problem, const PhasePlan& p, int axis) {
  const int64_t step = p.src_step[axis], origin = p.src_origin[axis], lo = p.lo[axis];
  const int64_t grid = CeilDiv(p.dst_size[axis], p.dst_step[axis]);
  int64_t shared = p.span[axis];
  for (int64_t t = 0; t < problem.k[static_cast<size_t>(axis)]; ++t) {
    const AxisTap tap = AxisTapOf(problem, axis, t);
    const int64_t columns =
        CeilDiv(p.dst_size[axis] - tap.dst_phase, p.dst_step[axis]) + tap.offset - lo;
    const int64_t before = -FloorDiv(tap.src_phase - origin, step) - lo;
    const int64_t end = -FloorDiv(tap.src_phase - origin - p.src_size[axis], step) - lo;
    const int64_t zeros = std::max<int64_t>(std::min(before, columns - end), 0);
    shared = std::min(shared, grid + p.span[axis] - columns + zeros);
  }
  return std::max<int64_t>(shared, 0);
}

Distances DistancesOf(const Strides& s) { return {s.n, s.c, {s.s[0], s.s[1], s.s[2]}}; }

// Sets the tiles to at most `most` positions along each axis, all tiles nearly equal.
void SetTiles(Plan& plan, const Sizes& grid, const Sizes& most, int64_t lanes) {
  PhasePlan& p = plan.p;
  for (size_t a = 0; a < 3; ++a) {
    p.tiles[a] = CeilDiv(grid[a], most[a]);
    p.tile[a] = CeilDiv(grid[a], p.tiles[a]);
    p.tiles[a] = CeilDiv(grid[a], p.tile[a]);
    p.box[a] = p.tile[a] + p.span[a] - (p.tiles[a] == 1 ? plan.shared[a] : 0);
  }
  p.tail = (p.tile[1] + p.span[1] - p.box[1]) * p.box[2] + p.tile[2] + p.span[2] - p.box[2] + lanes;
  const int64_t positions = p.tile[0] * p.box[1] * p.box[2];
  // Plane by plane, if what is computed past the end of one does not reach the next.
  p.segment = (p.tile[1] - 1) * p.box[2] + p.tile[2];
  p.segments = p.tile[0];
  if (p.box[1] * p.box[2] - p.segment < lanes) {
    p.segment += (p.tile[0] - 1) * p.box[1] * p.box[2];
    p.segments = 1;
  }
  p.plane = Spread(positions + p.span[0] * p.box[1] * p.box[2] + p.tail + lanes);
  p.row = Spread(positions + lanes);
}

// The cycles of one thread that all tiles take, roughly: what the constants stand for was measured
// on one processor, and only their proportions matter.
double Cycles(const Plan& plan, const PhaseKernels& kernels, Pass pass, int64_t lanes,
              int64_t size) {
  const PhasePlan& p = plan.p;
  const auto real = [](int64_t n) { return static_cast<double>(n); };
  const int64_t steps = p.dst_step[0] * p.dst_step[1] * p.dst_step[2];
  const double vectors = real(p.segments * CeilDiv(p.segment, lanes));
  const double macs = real(p.ntaps) * real(p.k) * real(p.m);  // of a position and a group
  const int64_t side = pass == Pass::kWeightGrad ? std::min(p.m, p.k * p.ntaps) : p.m;
  const double fill = side >= kernels.max_mr / 2 ? 0.6 : side > 1 ? 0.9 : 1.2;
  // Multiply-adds, and the weight, which each tile reads anew.
  double cycles = (vectors * fill + 0.3) * macs;

  const double planes = real(p.nslots) * real(p.k);
  const double volume = real(p.box[0] * p.box[1] * p.box[2]);
  double pack = planes * (volume / real(lanes) * 8 + real(p.box[0] * p.box[1]) * 10);
  const int64_t panel = p.nslots * p.k * p.group_chunk * p.plane * size;
  if (panel > kPanelBytes && pass == Pass::kForward) {
    pack *= real(p.dst_step[0] * p.dst_step[1]);
  }
  // Where not even the phases of a row fit, the channels are read in pieces, which was measured to
  // be slower but in the input gradient.
  if (pass != Pass::kInputGrad && panel / p.nslots * plan.row_slots > kPanelBytes) pack *= 2;
  const int64_t tasks = p.n * plan.GroupChunks() * plan.Tiles();
  if (pass != Pass::kWeightGrad) pack *= real(std::min(CeilDiv(kTasks, tasks), p.nblocks));
  cycles += pack;
  // Each run of neighbouring rows in memory has to be found.
  const auto runs = [&](const int64_t* count, const int64_t* step) {
    return real(count[0] * step[0] * (p.tiles[2] > 1 ? count[1] * step[1] : 1)) * 80;
  };
  cycles += real(p.k) * runs(p.box, p.src_step) + real(p.m) * runs(p.tile, p.dst_step);
  int64_t sums;
  if (pass == Pass::kWeightGrad) {
    sums = p.m * p.group_chunk * p.row * size;
    cycles += macs * 4.5 + real(p.m) * volume / real(lanes) * 8;
    cycles *= 1.3;
  } else {
    sums = std::min(kernels.max_mr, p.m) * p.dst_step[2] * p.row * size;
    cycles += vectors * real(p.m * steps) * (sums > kSumsNear ? 8 : 6);
    // With several panels, the sums come and go with each of them. A panel has whole rows' slots.
    if (panel > kPanelBytes) {
      const int64_t rows = kPanelBytes / (panel / p.nslots * plan.row_slots);
      const int64_t panels =
          rows > 0 ? CeilDiv(p.nslots / plan.row_slots, rows) : CeilDiv(panel, kPanelBytes);
      cycles += vectors * real(p.m * panels) * 12;
    }
  }
  // Out of the second-level cache, everything waits; x is read in pieces of the first-level one.
  if (sums > (pass == Pass::kWeightGrad ? 3 * kSumsBytes : kSumsBytes)) cycles *= 1.5;
  // Pixels are transposed on both sides.
  if (p.channels_last != 0) cycles *= 1.12;
  cycles = cycles * real(p.group_chunk) + 2000;
  return cycles * real(tasks);
}

// The tiles that take the fewest cycles, and are enough to share.
void ChooseTiles(Plan& plan, const PhaseKernels& kernels, Pass pass, int64_t lanes, int64_t size) {
  PhasePlan& p = plan.p;
  Sizes grid;
  for (size_t a = 0; a < 3; ++a) {
    grid[a] = std::max<int64_t>(CeilDiv(p.dst_size[a], p.dst_step[a]), 1);
  }
  constexpr int64_t kLengths[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256};
  constexpr int64_t kMostPositions = 4096, kWholeRow = 1152;
  double best = 0;
  Sizes chosen{};
  for (const int64_t t2 : {grid[2], int64_t{768}, int64_t{384}, int64_t{192}}) {
    if (t2 > std::min(grid[2], kWholeRow)) continue;
    for (const int64_t t1 : kLengths) {
      if (t1 > grid[1] && t1 > 1) break;
      for (const int64_t t0 : kLengths) {
        if (t0 > grid[0] && t0 > 1) break;
        SetTiles(plan, grid, {t0, t1, t2}, lanes);
        if (p.tile[0] * p.box[1] * p.box[2] > kMostPositions && t0 * t1 > 1) break;
        const int64_t tasks =
            p.n * plan.GroupChunks() * plan.Tiles() *
            (pass == Pass::kWeightGrad ? std::max<int64_t>(p.k / 8, 1) : p.nblocks);
        const double idle = tasks >= kTasks ? 1 : 1 + 0.5 / static_cast<double>(tasks);
        const double cycles = Cycles(plan, kernels, pass, lanes, size) * idle;
        if (best == 0 || cycles < best) {
          best = cycles;
          chosen = {t0, t1, t2};
        }
      }
    }
  }
  if (best == 0) chosen = {1, 1, std::min(grid[2], kWholeRow)};
  SetTiles(plan, grid, chosen, lanes);
  plan.cycles = Cycles(plan, kernels, pass, lanes, size);
}

// Lists the source phases with taps, in order, and the taps by destination phase and slot.
void AddTaps(Plan& plan, const Problem& problem) {
  PhasePlan& p = plan.p;
  const bool forward = problem.pass == Pass::kForward;
  struct Placed {
    int64_t dst_phase, src_phase, t;
    std::array<int64_t, 3> offset;
  };
  std::vector<Placed> placed;
  placed.reserve(static_cast<size_t>(p.ntaps));
  const auto& s = problem.stride;
  for (int64_t t = 0; t < p.ntaps; ++t) {
    const AxisTap t0 = AxisTapOf(problem, 0, t / problem.k[2] / problem.k[1]);
    const AxisTap t1 = AxisTapOf(problem, 1, t / problem.k[2] % problem.k[1]);
    const AxisTap t2 = AxisTapOf(problem, 2, t % problem.k[2]);
    placed.push_back({(t0.dst_phase * s[1] + t1.dst_phase) * s[2] + t2.dst_phase,
                      (t0.src_phase * s[1] + t1.src_phase) * s[2] + t2.src_phase,
                      t,
                      {t0.offset - p.lo[0], t1.offset - p.lo[1], t2.offset - p.lo[2]}});
  }
  std::stable_sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return a.dst_phase != b.dst_phase ? a.dst_phase < b.dst_phase : a.src_phase < b.src_phase;
  });
  const int64_t phases = p.dst_step[0] * p.dst_step[1] * p.dst_step[2];
  plan.phase_begin.assign(static_cast<size_t>(phases) + 1, 0);
  plan.places.resize(placed.size());
  for (const Placed& tap : placed) ++plan.phase_begin[static_cast<size_t>(tap.dst_phase) + 1];
  for (size_t r = 0; r < static_cast<size_t>(phases); ++r) {
    plan.phase_begin[r + 1] += plan.phase_begin[r];
  }
  int64_t last = -1;
  for (const Placed& tap : placed) {
    if (tap.src_phase == last) continue;
    last = tap.src_phase;
    if (forward && !plan.slots.empty()) continue;
    plan.slots.push_back({{last / s[2] / s[1], last / s[2] % s[1], last % s[2]}, 0, 0});
  }
  for (size_t i = plan.slots.size(); i-- > 0;) {
    Slot& slot = plan.slots[i];
    slot.row_end = slot.plane_end = static_cast<int64_t>(i) + 1;
    if (i + 1 == plan.slots.size()) continue;
    const Slot& next = plan.slots[i + 1];
    if (next.phase[0] != slot.phase[0]) continue;
    slot.plane_end = next.plane_end;
    if (next.phase[1] == slot.phase[1] && next.phase[2] == slot.phase[2] + 1) {
      slot.row_end = next.row_end;
    }
  }
  int64_t slot = -1;
  last = -1;
  for (const Placed& tap : placed) {
    const auto& o = tap.offset;
    if (tap.src_phase != last) ++slot;
    last = tap.src_phase;
    const int64_t begin = plan.phase_begin[static_cast<size_t>(tap.dst_phase)];
    plan.places[static_cast<size_t>(tap.t)] = {
        begin, plan.phase_begin[static_cast<size_t>(tap.dst_phase) + 1] - begin,
        static_cast<int64_t>(plan.taps.size()) - begin};
    const int64_t row = o[0] * p.box[1] + o[1];
    plan.taps.push_back({row * p.box[2] + o[2], row, o[2], tap.t, forward ? 0 : slot});
  }
  p.taps = plan.taps.data();
  p.places = plan.places.data();
  p.phase_begin = plan.phase_begin.data();
  p.slots = plan.slots.data();
  p.blocks = plan.blocks.data();
}

// `with_taps`: also what only a run needs, the taps and slots.
Plan PlanOf(const Problem& problem, const PhaseKernels& kernels, bool with_taps) {
  Plan plan;
  PhasePlan& p = plan.p;
  const bool forward = problem.pass == Pass::kForward, sums_w = problem.pass == Pass::kWeightGrad;
  const int64_t taps = Product(problem.k), size = SumSize(problem);
  const int64_t lanes = kernels.vector_bytes / size;
  p.in_type = problem.in_dtype;
  p.out_type = problem.out_dtype;
  p.n = problem.n;
  p.groups = problem.groups;
  p.k = forward ? problem.cig() : problem.cog();
  p.m = forward ? problem.cog() : problem.cig();
  p.channels_last = problem.channels_last;
  p.src_last = problem.channels_last && p.groups * p.k > 1 ? 1 : 0;
  p.dst_last = problem.channels_last && p.groups * p.m > 1 ? 1 : 0;
  p.src = DistancesOf(forward ? problem.XStrides() : problem.YStrides());
  p.dst = DistancesOf(forward ? problem.YStrides() : problem.XStrides());
  p.ntaps = taps;
  p.wg = problem.cig() * problem.cog() * taps;
  p.wk = forward ? problem.cog() * taps : taps;
  p.wm = forward ? taps : problem.cog() * taps;

  for (int a = 0; a < 3; ++a) {
    const size_t i = static_cast<size_t>(a);
    p.src_size[a] = forward ? problem.isize[i] : problem.osize[i];
    p.dst_size[a] = forward ? problem.osize[i] : problem.isize[i];
    p.src_step[a] = forward ? 1 : problem.stride[i];
    p.dst_step[a] = forward ? problem.stride[i] : 1;
    p.src_origin[a] = forward ? 0 : problem.pad[i];
    const int64_t first = AxisTapOf(problem, a, 0).offset;
    const int64_t last = AxisTapOf(problem, a, problem.k[i] - 1).offset;
    p.lo[a] = std::min(first, last);
    p.span[a] = std::max(first, last) - p.lo[a];
    if (a > 0) plan.shared[i] = SharedOf(problem, p, a);
  }

  p.nslots = 1;
  for (size_t a = 0; a < 3 && !forward; ++a) {  // t * dilation mod stride takes so many values
    plan.row_slots = std::min(problem.k[a],
                              problem.stride[a] / std::gcd(problem.stride[a], problem.dilation[a]));
    p.nslots *= plan.row_slots;
  }

  int64_t m0 = 0;
  for (int64_t mr = kernels.max_mr; mr > 0; mr /= 2) {
    for (; m0 + mr <= p.m; m0 += mr) plan.blocks.push_back({m0, mr});
  }
  p.nblocks = static_cast<int64_t>(plan.blocks.size());

  // Groups a task: with channels last, enough for whole cache lines on both sides; else enough for
  // a task to be worth its overhead.
  const int64_t narrow = std::max<int64_t>(std::min(p.k, p.m), 1);
  const int64_t positions = Product(problem.isize) + Product(problem.osize);
  p.group_chunk = problem.channels_last
                      ? CeilDiv(32, narrow)
                      : 8192 / std::max<int64_t>(std::max(p.k, p.m) * positions, 1);
  p.group_chunk = std::clamp<int64_t>(p.group_chunk, 1, std::max<int64_t>(p.groups, 1));

  ChooseTiles(plan, kernels, problem.pass, lanes, size);
  const int64_t tasks = p.n * plan.GroupChunks() * plan.Tiles();
  p.splits = 1;
  p.parts = 1;
  if (sums_w) {
    const int64_t parts = 1 + problem.YElements() / 10 / std::max<int64_t>(problem.WElements(), 1);
    const int64_t wanted = std::max<int64_t>(64 / plan.GroupChunks(), 1);
    p.parts = std::max<int64_t>(std::min({parts, p.n * plan.Tiles(), wanted}), 1);
    if (p.group_chunk == 1) {
      p.splits = std::clamp<int64_t>(kTasks / (plan.GroupChunks() * p.parts), 1,
                                     std::max<int64_t>(p.k / 8, 1));
    }
  }
  // What of the source does not fit is read in pieces.
  const auto panel_bytes = [&](int64_t slots, int64_t k) {
    return slots * p.group_chunk * k * p.plane * size;
  };
  p.slot_chunk = std::max<int64_t>(p.nslots, 1);
  p.k_chunk = CeilDiv(std::max<int64_t>(p.k, 1), sums_w ? p.splits : 1);
  if (panel_bytes(p.slot_chunk, p.k_chunk) > kPanelBytes) {
    p.slot_chunk = std::max<int64_t>(kPanelBytes / panel_bytes(1, p.k_chunk), 1);
    if (p.slot_chunk >= plan.row_slots) {
      p.slot_chunk -= p.slot_chunk % plan.row_slots;
    } else if (p.group_chunk == 1) {
      // Fewer channels, so that a row is read once, for all of its phases.
      const int64_t most = std::max<int64_t>(kPanelBytes / panel_bytes(plan.row_slots, 1), 1);
      p.slot_chunk = plan.row_slots;
      p.k_chunk = CeilDiv(p.k_chunk, CeilDiv(p.k_chunk, most));
    }
    if (panel_bytes(1, p.k_chunk) > kPanelBytes) {
      p.group_chunk = 1;
      p.k_chunk = std::clamp<int64_t>(kPanelBytes / panel_bytes(1, 1), 1, p.k_chunk);
    }
  }

  // What is added up before it is stored.
  if (sums_w) {
    p.acc_size = p.m * p.group_chunk * p.row;
  } else {
    if (p.group_chunk == 1) {
      const int64_t most = problem.channels_last ? p.m / 16 : p.nblocks;
      p.splits = std::clamp<int64_t>(CeilDiv(kTasks, std::max<int64_t>(tasks, 1)), 1,
                                     std::max<int64_t>(most, 1));
    }
    const int64_t blocks = p.group_chunk * CeilDiv(p.nblocks, p.splits);
    const int64_t block_bytes = std::min(kernels.max_mr, p.m) * p.dst_step[2] * p.row * size;
    if (p.group_chunk > 1) {
      p.acc_blocks = blocks;
    } else if (!p.one_panel()) {
      // All panels are packed once for so many blocks: as many as fit, in equal parts.
      const int64_t most = std::max<int64_t>(kSumsOfAll / std::max<int64_t>(block_bytes, 1), 1);
      p.acc_blocks = std::max(CeilDiv(blocks, CeilDiv(blocks, most)), CeilDiv(16, kernels.max_mr));
    } else {
      p.acc_blocks = problem.channels_last ? CeilDiv(16, kernels.max_mr) : 1;
    }
    p.acc_size =
        std::min(p.acc_blocks * kernels.max_mr, p.group_chunk * p.m) * p.dst_step[2] * p.row;
  }
  p.panel_size = Spread(p.slot_chunk * p.group_chunk * p.k_chunk * p.plane);

  if (with_taps) AddTaps(plan, problem);
  return plan;
}

bool SumsAreResult(const Problem& p, const Plan& plan) {
  return plan.p.parts == 1 && SizeOf(p.out_dtype) == SumSize(p);
}

template <const PhaseKernels& kernels>
void LaunchCorrelate(const Problem& problem, const Operands& ops, const Parallel& parallel) {
  const Plan plan = PlanOf(problem, kernels, true);
  const PhasePlan& p = plan.p;
  const bool forward = problem.pass == Pass::kForward;
  const int64_t tasks = p.n * plan.GroupChunks() * plan.Tiles() * p.splits;
  if (problem.YElements() * problem.XElements() == 0 && tasks == 0) return;
  const int64_t pack_tasks = std::clamp<int64_t>(problem.WElements() >> 14, 1, 64);
  parallel.For(pack_tasks, [&](int64_t task) {
    kernels.pack_weight(p, ops.w, ops.workspace, task, pack_tasks);
  });
  const PhaseOperands operands{forward ? ops.x : ops.y, ops.bias, ops.out, ops.workspace};
  const int64_t bytes = (p.panel_size + p.acc_size) * SumSize(problem);
  parallel.For(tasks,
               [&](int64_t task) { kernels.correlate(p, operands, task, ThreadScratch(bytes)); });
}

template <const PhaseKernels& kernels>
void LaunchWeightGrad(const Problem& problem, const Operands& ops, const Parallel& parallel) {
  const Plan plan = PlanOf(problem, kernels, true);
  const PhasePlan& p = plan.p;
  const int64_t bytes = (p.panel_size + p.acc_size) * SumSize(problem);
  void* sums = SumsAreResult(problem, plan) ? ops.out : ops.workspace;
  // x is only read, though it is called a destination.
  const PhaseOperands operands{ops.y, nullptr, const_cast<void*>(ops.x), sums};
  parallel.For(plan.GroupChunks() * p.splits * p.parts,
               [&](int64_t task) { kernels.weight_grad(p, operands, task, ThreadScratch(bytes)); });
  if (sums == ops.out) return;
  const int64_t add_tasks = std::clamp<int64_t>(problem.WElements() * p.parts >> 14, 1, 64);
  parallel.For(add_tasks, [&](int64_t task) {
    kernels.add_parts(p.in_type, p.out_type, problem.WElements(), p.parts, sums, ops.out, task,
                      add_tasks);
  });
}

template <const PhaseKernels& kernels>
std::string Refuse(const Problem& p, const Device& device) {
  if (kernels.vector_bytes > device.vector_bytes) {
    return "needs vectors of " + std::to_string(kernels.vector_bytes) +
           " bytes, the processor has " + std::to_string(device.vector_bytes);
  }
  if (Product(p.k) > kMaxTaps) return "takes kernels of at most 2**20 taps";
  if (p.stride[0] > kMaxPhases || p.stride[1] > kMaxPhases || p.stride[2] > kMaxPhases ||
      Product(p.stride) > kMaxPhases) {
    return "takes at most 2**16 stride phases";
  }
  if (p.n == 0 || p.XElements() == 0 || p.YElements() == 0 || p.WElements() == 0) {
    return "takes no empty arrays";
  }
  const Plan plan = PlanOf(p, kernels, false);
  if (plan.p.tile[2] + plan.p.span[2] > kMaxBox) {
    return "takes rows that hear at most " + std::to_string(kMaxBox) + " inputs, these hear " +
           std::to_string(plan.p.tile[2] + plan.p.span[2]);
  }
  const int64_t bytes = (plan.p.panel_size + plan.p.acc_size) * SumSize(p);
  if (bytes > kMaxScratch) {
    return "would need " + std::to_string(bytes >> 20) +
           " MiB of scratch memory a thread, for the "
           "span of the kernel's taps; 16 is the limit";
  }
  return "";
}

template <const PhaseKernels& kernels>
int64_t Workspace(const Problem& p, const Device&) {
  if (p.pass != Pass::kWeightGrad) return p.WElements() * SumSize(p);
  const Plan plan = PlanOf(p, kernels, false);
  return SumsAreResult(p, plan) ? 0 : plan.p.parts * p.WElements() * SumSize(p);
}

// The cycles at 3 GHz, a weight that is rearranged at 1 GB/s, and what a call costs.
template <const PhaseKernels& kernels>
double Seconds(const Problem& p, const Device& device) {
  const Plan plan = PlanOf(p, kernels, false);
  const double weight = p.pass == Pass::kWeightGrad ? 0 : static_cast<double>(p.WElements()) * 4;
  return 2e-6 + (plan.cycles / 3e9 + weight / 1e9) / device.threads;
}

template <const PhaseKernels& kernels>
void Add(std::vector<Row>& rows, const char* name) {
  AddRows(rows,
          {name, Pass::kForward, Refuse<kernels>, Workspace<kernels>, Seconds<kernels>,
           LaunchCorrelate<kernels>},
          LaunchWeightGrad<kernels>);
}

}  // namespace

void AddPhases(std::vector<Row>& rows) {
#if defined(__x86_64__)
  Add<kPhasesAvx512>(rows, "phases_avx512");
  Add<kPhasesAvx2>(rows, "phases_avx2");
#endif
  Add<kPhasesPortable>(rows, "phases");
}

}  // namespace jaxconv::cpu
