#include "cuda/planes.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <utility>

#include "cuda/device_limits.h"
#include "cuda/phase_sets.h"
#include "cuda/plan_memo.h"

namespace jaxconv::cuda {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

// A problem whose first axis is trivial marches along the second.
Problem Turned(Problem p) {
  if (p.isize[0] == 1 && p.osize[0] == 1 && p.k[0] == 1) {
    for (Sizes* sizes : {&p.isize, &p.osize, &p.k, &p.stride, &p.dilation, &p.pad}) {
      std::swap((*sizes)[0], (*sizes)[1]);
    }
  }
  return p;
}

struct Shape : PhasedShape {
  int out_element, blocks;
};

Shape ShapeOf(const Problem& p) {
  Shape s{PhasedShapeOf(p), 0, 0};
  s.out_element = static_cast<int>(SizeOf(p.out_dtype));
  s.blocks = 8 * s.element / 16;
  return s;
}

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  if (CodeFor(device.compute_capability) < 90) return "needs compute capability 9.0";
  if (p.in_dtype == DType::kF64) return "float64 has no tensor cores here";
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "rounds float32 products to TF32";
  }
  const bool forward = p.pass == Pass::kForward;
  const int64_t cg = forward ? p.cig() : p.cog(), jg = forward ? p.cog() : p.cig();
  if (cg != 8) return "contracts eight channels a group";
  if (jg > 64 || jg < 4) return "takes groups of at most 64 channels and at least 4";
  if (Product(p.k) > PlanesArgs::kMaxTaps) {
    return "takes at most " + std::to_string(PlanesArgs::kMaxTaps) + " taps";
  }
  for (int a = 0; a < kAxes; ++a) {
    if (p.stride[a] > 8) return "takes strides up to 8";
    if ((p.k[a] - 1) * p.dilation[a] + std::abs(p.pad[a]) > (1 << 15)) {
      return "takes kernels that reach over less than 2^15 outputs";
    }
  }
  if (forward && Product(p.stride) > PlanesArgs::kMaxPhaseSets) {
    return "takes at most " + std::to_string(PlanesArgs::kMaxPhaseSets) + " phases";
  }
  if (p.ci * Product(p.isize) > kIntMax || p.co * Product(p.osize) > kIntMax) {
    return "indexes an image of x or y in 32 bits";
  }
  if (p.n > kIntMax || p.groups > 65535) return "takes fewer images and groups";
  return "";
}

// Lists each phase set's sources and taps.
void ListTaps(const Shape& s, PlanesArgs& a) {
  struct Reader {
    int tap, phase;
  };
  struct Source {
    std::array<int, kAxes> at;
    std::vector<Reader> readers;
    int columns;
  };
  std::vector<std::vector<Source>> sources(a.phase_sets);
  std::vector<std::map<std::array<int, kAxes>, size_t>> index(a.phase_sets);
  const auto& [td, th, tw] = s.taps;
  int tap = 0;
  for (size_t d = 0; d < td.phase.size(); ++d) {
    for (size_t h = 0; h < th.phase.size(); ++h) {
      for (size_t w = 0; w < tw.phase.size(); ++w, ++tap) {
        const int phase = (td.phase[d] * s.so[1] + th.phase[h]) * s.so[2] + tw.phase[w];
        const int set = phase / a.set_phases;
        const std::array<int, kAxes> at = {static_cast<int>(td.source[d] - s.first[0]),
                                           static_cast<int>(th.source[h] - s.first[1]),
                                           static_cast<int>(tw.source[w] - s.first[2])};
        const auto [found, added] = index[set].try_emplace(at, sources[set].size());
        if (added) sources[set].push_back({at, {}, 0});
        sources[set][found->second].readers.push_back({tap, phase % a.set_phases});
      }
    }
  }
  size_t entries = 0;
  int taps = 0;
  for (int set = 0; set < a.phase_sets; ++set) {
    a.first_entry[set] = static_cast<uint16_t>(entries);
    a.first_tap[set] = static_cast<uint16_t>(taps);
    for (Source& source : sources[set]) {
      auto& readers = source.readers;
      std::sort(readers.begin(), readers.end(),
                [](const Reader& x, const Reader& y) { return x.phase < y.phase; });
      for (const Reader& reader : readers) {
        for (int t = 0; t < a.set_tiles; ++t) {
          source.columns |= 1 << (t * a.set_phases + reader.phase);
        }
      }
    }
    std::stable_sort(sources[set].begin(), sources[set].end(),
                     [](const Source& x, const Source& y) { return x.columns > y.columns; });
    for (const Source& source : sources[set]) {
      const auto& readers = source.readers;
      const int before = taps - a.first_tap[set];
      for (size_t i = 0; i < readers.size(); ++i) {
        a.tap[taps++] = {static_cast<uint16_t>(readers[i].tap), static_cast<uint16_t>(before),
                         static_cast<uint8_t>(set), static_cast<uint8_t>(i),
                         static_cast<uint8_t>(readers.size())};
      }
      const auto& [down, along, right] = source.at;
      a.entry[entries++] = {along * a.row_pitch, static_cast<uint16_t>(right),
                            static_cast<uint16_t>(down), static_cast<uint16_t>(source.columns)};
    }
  }
  // Masks that are compiled.
  const auto matches = [&](const auto& masks) {
    if (entries != std::size(masks)) return false;
    return std::equal(std::begin(masks), std::end(masks), a.entry,
                      [](int mask, const PlanesEntry& entry) { return mask == entry.columns; });
  };
  const bool single = a.phase_sets == 1 && a.set_tiles == 1;
  a.pattern = !single                            ? PlanesArgs::kNone
              : matches(PlanesArgs::kMasks3x3x3) ? PlanesArgs::k3x3x3
              : matches(PlanesArgs::kMasks3x5x7) ? PlanesArgs::k3x5x7
                                                 : PlanesArgs::kNone;
  a.first_entry[a.phase_sets] = static_cast<uint16_t>(entries);
  a.first_tap[a.phase_sets] = static_cast<uint16_t>(taps);
}

struct TileShape {
  int mt, nc;
};
constexpr TileShape kTileShapes[] = {{1, 8}, {2, 8}, {2, 4}, {4, 1}, {2, 1}, {1, 1}};
// Compiled for a stride of the results' last axis of two alone.
constexpr bool OnlyForTwo(const TileShape& t) { return t.mt * t.nc == 8 && t.nc > 2; }

constexpr double kClock = 1.7e9, kBandwidth = 3.9e12;

// How a block's work is cut, and what comes of it.
struct Cut {
  TileShape shape;
  Columns columns;
  int wn, across, high, march, stages, slots;
  int64_t entries;
  bool compiled;  // the masks of all entries together
  double imbalance;
};

// Fills the plan, but for the lists of taps; false where the tile does not fit.
bool Fill(const Problem& p, const Device& device, const Shape& s, const Cut& cut,
          PlanesPlan& plan) {
  PlanesArgs& a = plan.args;
  const auto& [shape, columns, wn, across, high, march, stages, forced_slots, entries, compiled,
               imbalance] = cut;
  const Strides in = s.forward ? p.XStrides() : p.YStrides();
  const Strides out = s.forward ? p.YStrides() : p.XStrides();
  const std::array<int, kAxes> box = {march, high, across * 16 * shape.mt};
  int64_t walks = p.n;
  for (int i = 0; i < kAxes; ++i) {
    PlanesAxis& x = a.axis[i];
    x.in_size = static_cast<int>(s.in_size[i]);
    x.out_size = static_cast<int>(s.out_size[i]);
    x.in_step = static_cast<int>(in.s[i]);
    x.out_step = static_cast<int>(out.s[i]);
    x.si = s.si[i];
    x.so = s.so[i];
    x.first = static_cast<int>(s.first[i]);
    x.q_size = static_cast<int>(s.q_size[i]);
    x.box = box[i];
    x.tiles = static_cast<int>(CeilDiv(s.q_size[i], box[i]));
    x.length = static_cast<int>(((i == 0 ? 1 : box[i]) - 1) * s.si[i] + s.reach[i]);
    walks *= x.tiles;
  }
  if (walks > kIntMax || a.axis[0].length > PlanesArgs::kMaxSlots || a.axis[2].length > 16000) {
    return false;
  }
  a.in_n_step = in.n;
  a.out_n_step = out.n;
  a.in_c_step = in.c;
  a.out_c_step = out.c;
  a.jg = s.jg;
  a.columns = static_cast<int>(walks);
  a.last = p.channels_last;
  // Channels last, eight channels of float32 are a sector. Groups of 16-bit results go together
  // until a pixel's channels are 64 bytes, which device memory writes at once, and meet on the
  // stage.
  const int group_bytes = s.jg * s.out_element, least = s.out_element == 4 ? 32 : 64;
  a.groups_beside = 1;
  while (a.last && a.groups_beside * group_bytes < least && p.groups % (2 * a.groups_beside) == 0) {
    a.groups_beside *= 2;
  }
  a.staged = !a.last || ((s.out_element == 2 || a.groups_beside > 1) &&
                         a.groups_beside * group_bytes % 16 == 0 && group_bytes % 4 == 0 &&
                         out.s[2] * s.out_element % 16 == 0);
  const int blocks = s.blocks * a.groups_beside;
  a.pairs = s.jg % 2 == 0;
  a.out_f32 = p.out_dtype == DType::kF32;
  a.fresh = std::min(s.si[0], a.axis[0].length);

  // Shared memory of the input.
  const int granule = 16 / s.element, width = a.axis[2].length, height = a.axis[1].length;
  const auto block_of = [](int pixel) { return pixel + pixel / 8; };
  a.row_pitch = 16 * (9 + block_of(width + granule));
  int block_pitch = height * a.row_pitch / 16;
  if (a.last) {
    while (block_pitch % 8 != (blocks % 2 ? 0 : blocks % 4 ? 4 : 2)) ++block_pitch;
  }
  if (int64_t{block_pitch} * 16 * blocks > 200 * 1024) return false;
  a.block_pitch = block_pitch * 16;
  a.plane = static_cast<int>(CeilDiv(a.block_pitch * blocks, 128) * 128);
  a.blocks_beside = !a.last || blocks % 2 ? 1 : blocks % 4 ? 2 : 4;
  a.rows = height * blocks / a.blocks_beside;
  if (a.rows > 1 << 14) return false;
  a.by_height = DivisorOf(height);

  a.taps = static_cast<int>(Product(p.k));
  a.phase_sets = columns.phase_sets;
  a.set_phases = columns.set_phases;
  a.set_tiles = columns.set_tiles;
  a.column_sets = columns.column_sets;
  a.wn = wn;
  a.across = across;
  a.units = across * high;

  // Shared memory of the results. Neighbouring channels of a fragment lie in different banks.
  a.flat = a.axis[2].tiles == 1;
  a.run_rows = a.flat ? 1 : high * s.so[1];
  const int64_t run =
      a.flat ? int64_t{high} * s.so[1] * a.axis[2].out_size : int64_t{box[2]} * s.so[2];
  const int64_t run_pitch = CeilDiv((run + 16 / s.out_element) * s.out_element, 16);
  int64_t channel_pitch = run_pitch * s.so[0] * a.run_rows;
  while (channel_pitch % 4 != (s.out_element == 4 && s.so[2] > 1 ? 2 : 1)) ++channel_pitch;
  a.pixel_pitch = a.groups_beside * group_bytes + 16;
  const int64_t stage = !a.staged ? 0
                        : a.last
                            ? int64_t{s.so[0]} * high * s.so[1] * box[2] * s.so[2] * a.pixel_pitch
                            : CeilDiv(channel_pitch * 16 * s.tiles_j * 8, 128) * 128;
  if (stage > 200 * 1024) return false;
  a.run_pitch = static_cast<int>(run_pitch * 16);
  a.channel_pitch = static_cast<int>(channel_pitch * 16);
  a.stage = static_cast<int>(CeilDiv(stage, 128) * 128);
  a.stages = stages;

  const int tile_sets = columns.column_sets / columns.phase_sets;
  int64_t smem = PlanesArgs::kBarriers;
  a.smem_weights = static_cast<int>(smem);
  a.weights = tile_sets * a.taps * columns.set_tiles * (s.element == 4 ? 256 : 128);
  smem += int64_t{a.groups_beside} * a.weights;
  a.smem_places = static_cast<int>(smem);
  smem += entries * 128;
  a.smem_stage = static_cast<int>(smem);
  smem += int64_t{a.stage} * stages;
  a.smem_ring = static_cast<int>(smem);
  const int64_t most = SharedMemoryOfBlock(device.compute_capability);
  const int64_t beside = PlanesBlocks(shape.mt, shape.nc);
  // Planes: those of a step, and some ahead; for two blocks, if that leaves one step ahead.
  const int enough = std::min(PlanesArgs::kMaxSlots, a.axis[0].length + std::max(3, 2 * a.fresh));
  const auto slots_in = [&](int64_t bytes) {
    return static_cast<int>(std::min<int64_t>(enough, (bytes - smem) / a.plane));
  };
  int slots = forced_slots;
  if (slots == 0) {
    slots = slots_in((most + 1024) / beside - 1024);
    if (slots < a.axis[0].length + a.fresh) slots = slots_in(most);
  }
  if (slots < a.axis[0].length || slots > PlanesArgs::kMaxSlots) return false;
  a.slots = slots;
  smem += int64_t{slots} * a.plane;
  if (smem > most) return false;
  plan.smem = static_cast<int>(smem);
  plan.mt = shape.mt;
  plan.nc = shape.nc;
  plan.grid_y = static_cast<int>(p.groups / a.groups_beside);
  const int64_t occupancy = std::min(beside, (most + 1024) / (smem + 1024));
  const int64_t places = std::max<int64_t>(1, device.multiprocessors * occupancy / plan.grid_y);
  plan.grid_x = static_cast<int>(CeilDiv(walks, CeilDiv(walks, places)));

  // The model, in cycles: how long a step takes the busiest multiplying warp, how long a plane
  // takes the arrangers, and what both take of the multiprocessor's shared memory and issue slots.
  // Fitted to 138 timed tiles: 10 % mean error.
  const bool wide = s.element == 4, single = shape.nc == 1;
  const double steps_of = march, arrangers = Arrangers(shape.mt, shape.nc);
  const double jobs = a.units * a.groups_beside, sources = static_cast<double>(entries);
  const double products = static_cast<double>(a.taps) * s.tiles_j;
  const double outputs = 16.0 * shape.mt * s.phases * s.tiles_j * 8 / 32;
  const bool masked = !single && !compiled;
  double job = sources * ((single ? 26 : 3) + (masked ? 240 : 0)) + products * shape.mt * 6 +
               outputs * (a.last ? 50 : 20) + columns.column_sets * 435.0;
  if (!single && s.so[2] != 2) job *= 1.6;
  const double step = std::ceil(jobs / (PlanesArgs::kWarps / wn)) / wn * imbalance * job + 2200;
  const double turns = std::ceil(width * a.blocks_beside / 32.0);
  const double arrange =
      a.rows / arrangers * (turns + 5 * std::ceil(turns / 5)) * 220 * (wide ? 1 : 1.3);
  const double brought = arrange * a.fresh, ahead = a.slots - a.axis[0].length;
  const double each = ahead >= a.fresh ? std::max(step, brought) + 0.15 * std::min(step, brought)
                                       : step + brought * (1 - 0.5 * ahead / a.fresh);
  const double planes = a.axis[0].length + (steps_of - 1) * a.fresh;
  const double serial = steps_of * each + (a.axis[0].length - a.fresh) * arrange / 2;
  const double shared =
      steps_of * jobs *
          (sources * (shape.mt * (wide ? 6 : 3) + 1) + products * (wide ? 2 : 1) + outputs * 2) +
      planes * a.rows * turns * (wide ? 8 : 12);
  const double issue = steps_of * (jobs * (sources * (10 + 3 * shape.mt + (masked ? 25 : 0)) +
                                           products * (1 + shape.mt) + outputs * 1.3 +
                                           static_cast<double>(s.phases) * s.tiles_j * 18 + 150) +
                                   400) +
                       planes * a.rows * (80 + turns * 22);
  const double here = std::min<double>(
      static_cast<double>(occupancy),
      std::ceil(static_cast<double>(plan.grid_x) * plan.grid_y / device.multiprocessors));
  const double busy = here * std::max(shared / 0.75, issue / 4 / 0.55);
  const double column = std::max(serial, busy) + 0.15 * std::min(serial, busy);
  const double rounds = std::ceil(static_cast<double>(walks) / plan.grid_x);
  const double compute = (rounds * column + 12000) / kClock;
  // Pieces of rows tear sectors that other blocks write, too; single sectors come one at a time.
  const double torn = !a.last    ? 1 + 100 / (static_cast<double>(run) * s.out_element)
                      : a.staged ? 1
                                 : 1.8 + 2.0 / high;
  const double memory =
      (static_cast<double>(p.n) * static_cast<double>(in.n) * s.element +
       static_cast<double>(p.n) * static_cast<double>(out.n) * s.out_element * torn) /
      kBandwidth;
  const double slow = std::max(compute, memory);
  plan.seconds = 4e-6 + slow + 0.25 * (compute + memory - slow);
  if (!a.last && stages == 1) plan.seconds *= 1.25;
  if (a.last && !wide) plan.seconds *= 1.2;  // four layers, H100
  return true;
}

PlanesPlan MakePlan(const Problem& problem, const Device& device, const PlanesTile& forced) {
  PlanesPlan best{};
  best.refusal = Refuse(problem, device);
  if (!best.refusal.empty()) return best;
  const Problem p = Turned(problem);
  const Shape s = ShapeOf(p);
  best.seconds = std::numeric_limits<double>::infinity();
  const auto allowed = [](int want, int have) { return want == 0 || want == have; };
  PlanesPlan plan{};
  for (const TileShape& shape : kTileShapes) {
    Cut cut;
    cut.shape = shape;
    cut.slots = forced.slots;
    if (!allowed(forced.mt, shape.mt) || !allowed(forced.nc, shape.nc)) continue;
    if (OnlyForTwo(shape) && s.so[2] != 2) continue;
    if (!GroupColumns(s, shape.nc, cut.columns)) continue;
    if (cut.columns.set_phases * cut.columns.set_tiles * 2 <= shape.nc) continue;
    const std::vector<Load> loads = LoadsOf(s, cut.columns);
    cut.entries = 0;
    for (const Load& load : loads) cut.entries += load.entries;
    plan.args.phase_sets = cut.columns.phase_sets;
    plan.args.set_phases = cut.columns.set_phases;
    plan.args.set_tiles = cut.columns.set_tiles;
    ListTaps(s, plan.args);
    cut.compiled = shape.nc == 8 && plan.args.pattern != PlanesArgs::kNone;
    const int pixels = 16 * shape.mt;
    const auto most_across = static_cast<int>(CeilDiv(s.q_size[2], pixels));
    for (cut.wn = 1; cut.wn <= std::min(cut.columns.column_sets, PlanesArgs::kWarps); cut.wn *= 2) {
      if (!allowed(forced.wn, cut.wn)) continue;
      cut.imbalance = ImbalanceOf(loads, cut.columns, cut.wn);
      const int workers = PlanesArgs::kWarps / cut.wn;
      for (int pieces = 1; pieces <= most_across; ++pieces) {
        cut.across = static_cast<int>(CeilDiv(most_across, pieces));
        if (pieces > 1 && cut.across == CeilDiv(most_across, pieces - 1)) continue;
        if (cut.across > 8 * workers || !allowed(forced.box_w, cut.across * pixels)) continue;
        for (cut.high = 1; cut.high <= s.q_size[1]; ++cut.high) {
          if (cut.across * cut.high > 8 * workers) break;
          if (!allowed(forced.box_h, cut.high)) continue;
          for (int parts = 1; parts <= 8 && parts <= s.q_size[0]; ++parts) {
            cut.march = static_cast<int>(CeilDiv(s.q_size[0], parts));
            if (!allowed(forced.march, cut.march)) continue;
            for (cut.stages = 1; cut.stages <= (p.channels_last ? 1 : 2); ++cut.stages) {
              if (!allowed(forced.stages, cut.stages)) continue;
              if (Fill(p, device, s, cut, plan) && plan.seconds < best.seconds) best = plan;
            }
          }
        }
      }
    }
  }
  if (best.seconds == std::numeric_limits<double>::infinity()) {
    best.refusal = "finds no tile whose weights and inputs fit into shared memory";
    return best;
  }
  ListTaps(s, best.args);
  const int64_t taps = Product(p.k), co_step = p.cog() * taps;
  best.args.w_g_step = p.cig() * co_step;
  best.args.w_c_step = s.forward ? co_step : taps;
  best.args.w_j_step = s.forward ? taps : co_step;
  return best;
}

const PlanesPlan& PlanOf(const Problem& p, const Device& d) {
  return Remember<PlanesPlan>(p, d, [&] { return MakePlan(p, d, {}); });
}

std::string RefuseRow(const Problem& p, const Device& d) { return PlanOf(p, d).refusal; }
int64_t Workspace(const Problem&, const Device&) { return 0; }
double Seconds(const Problem& p, const Device& d) { return PlanOf(p, d).seconds; }
cudaError_t LaunchRow(const Problem& p, const Operands& ops, const Device& d, cudaStream_t stream) {
  return LaunchPlanes(p, ops, PlanOf(p, d), stream);
}

}  // namespace

PlanesPlan PlanPlanes(const Problem& p, const Device& device, const PlanesTile& tile) {
  return MakePlan(p, device, tile);
}

cudaError_t LaunchPlanes(const Problem& p, const Operands& ops, const PlanesPlan& plan,
                         cudaStream_t stream) {
  const bool forward = p.pass == Pass::kForward;
  PlanesArgs args = plan.args;
  args.in = forward ? ops.x : ops.y;
  args.in_end = static_cast<const char*>(args.in) +
                (forward ? p.XElements() : p.YElements()) * SizeOf(p.in_dtype);
  args.w = ops.w;
  args.out = ops.out;
  args.bias = forward ? ops.bias : nullptr;
  switch (p.in_dtype) {
    case DType::kF32:
      return EnqueuePlanes<float>(plan, args, stream);
    case DType::kBF16:
      return EnqueuePlanes<__nv_bfloat16>(plan, args, stream);
    case DType::kF16:
      return EnqueuePlanes<__half>(plan, args, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

void AddPlanes(std::vector<Row>& rows) {
  for (Pass pass : {Pass::kForward, Pass::kInputGrad}) {
    rows.push_back({"planes", pass, RefuseRow, Workspace, Seconds, LaunchRow});
  }
}

}  // namespace jaxconv::cuda
