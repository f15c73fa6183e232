#include "cuda/rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "cuda/device_limits.h"
#include "cuda/phase_sets.h"
#include "cuda/plan_memo.h"

namespace jaxconv::cuda {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

struct Shape : PhasedShape {
  int step, blocks;
};

Shape ShapeOf(const Problem& p) {
  Shape s{PhasedShapeOf(p), 0, 0};
  s.step = 32 / s.element;
  s.blocks = static_cast<int>(CeilDiv(s.cg, s.step));
  return s;
}

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  if (CodeFor(device.compute_capability) < 90) return "needs compute capability 9.0";
  if (p.channels_last) return "takes channels first";
  if (p.in_dtype == DType::kF64) return "float64 has no tensor cores here";
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "rounds float32 products to TF32";
  }
  const bool forward = p.pass == Pass::kForward;
  const int64_t cg = forward ? p.cig() : p.cog(), jg = forward ? p.cog() : p.cig();
  if (cg > 64 || jg > 64 || jg < 4) return "takes groups of at most 64 channels and at least 4";
  if (p.in_dtype == DType::kF32 ? cg % 8 != 0 : cg != 8 && cg % 16 != 0) {
    return "contracts channels in eights, or sixteens of 16 bits";
  }
  if (Product(p.k) > RowsArgs::kMaxTaps) {
    return "takes at most " + std::to_string(RowsArgs::kMaxTaps) + " taps";
  }
  for (int a = 0; a < kAxes; ++a) {
    if (p.stride[a] > 8) return "takes strides up to 8";
    if ((p.k[a] - 1) * p.dilation[a] + std::abs(p.pad[a]) > (1 << 20)) {
      return "takes kernels that reach over less than 2^20 outputs";
    }
  }
  if (forward && Product(p.stride) > RowsArgs::kMaxPhaseSets) {
    return "takes at most " + std::to_string(RowsArgs::kMaxPhaseSets) + " phases";
  }
  if (p.ci * Product(p.isize) > kIntMax || p.co * Product(p.osize) > kIntMax) {
    return "indexes an image of x or y in 32 bits";
  }
  if (p.n > kIntMax || p.groups > 65535) return "takes fewer images and groups";
  return "";
}

// Lists each phase set's sources and taps.
void ListTaps(const Shape& s, RowsArgs& a) {
  struct Reader {
    int tap, phase;
  };
  struct Source {
    int place, turn;
    std::vector<Reader> readers;
  };
  std::vector<std::vector<Source>> sources(a.phase_sets);
  std::vector<std::map<int, size_t>> index(a.phase_sets);
  const auto& [td, th, tw] = s.taps;
  int tap = 0;
  for (size_t d = 0; d < td.phase.size(); ++d) {
    for (size_t h = 0; h < th.phase.size(); ++h) {
      for (size_t w = 0; w < tw.phase.size(); ++w, ++tap) {
        const int phase = (td.phase[d] * s.so[1] + th.phase[h]) * s.so[2] + tw.phase[w];
        const int set = phase / a.set_phases;
        const auto down = static_cast<int>(td.source[d] - s.first[0]);
        const auto along = static_cast<int>(th.source[h] - s.first[1]);
        const auto right = static_cast<int>(tw.source[w] - s.first[2]);
        const int place = (down * a.axis[1].length + along) * a.pitch + right * s.element;
        const int64_t ahead =
            int64_t{down} * a.axis[0].in_step + int64_t{along} * a.axis[1].in_step;
        const auto [found, added] = index[set].try_emplace(place, sources[set].size());
        if (added) {
          sources[set].push_back({place, static_cast<int>(ahead & (16 / s.element - 1)), {}});
        }
        sources[set][found->second].readers.push_back({tap, phase % a.set_phases});
      }
    }
  }
  int entries = 0, taps = 0;
  for (int set = 0; set < a.phase_sets; ++set) {
    a.first_entry[set] = static_cast<uint16_t>(entries);
    a.first_tap[set] = static_cast<uint16_t>(taps);
    for (Source& source : sources[set]) {
      auto& readers = source.readers;
      std::sort(readers.begin(), readers.end(),
                [](const Reader& x, const Reader& y) { return x.phase < y.phase; });
      int columns = 0;
      const int before = taps - a.first_tap[set];
      for (size_t i = 0; i < readers.size(); ++i) {
        a.tap[taps++] = {static_cast<uint16_t>(readers[i].tap), static_cast<uint16_t>(before),
                         static_cast<uint8_t>(set), static_cast<uint8_t>(i),
                         static_cast<uint8_t>(readers.size())};
        for (int t = 0; t < a.set_tiles; ++t) {
          columns |= 1 << (t * a.set_phases + readers[i].phase);
        }
      }
      a.entry[entries++] = {source.place, static_cast<uint16_t>(columns),
                            static_cast<uint16_t>(source.turn)};
    }
  }
  a.first_entry[a.phase_sets] = static_cast<uint16_t>(entries);
  a.first_tap[a.phase_sets] = static_cast<uint16_t>(taps);
}

struct TileShape {
  int mt, nc;
};
constexpr TileShape kTileShapes[] = {{1, 8}, {2, 4}, {4, 4}, {3, 4},
                                     {4, 2}, {4, 1}, {2, 1}, {1, 1}};

// The model counts, for a block's tile: cycles of the tensor cores, of shared memory, of the issue
// of instructions, and of the warp that asks for copies; against device memory and L2.
constexpr double kClock = 1.7e9, kBandwidth = 4.0e12, kL2Bandwidth = 4.5e12;

// Fills the plan, but for the lists of taps; false where the tile does not fit.
bool Fill(const Problem& p, const Device& device, const Shape& s, const TileShape& shape,
          const Columns& columns, int wn, int rounds, const std::array<int, kAxes>& box,
          int64_t entries, double imbalance, RowsPlan& plan) {
  RowsArgs& a = plan.args;
  const Strides in = s.forward ? p.XStrides() : p.YStrides();
  const Strides out = s.forward ? p.YStrides() : p.XStrides();
  int64_t tiles = p.n;
  for (int i = 0; i < kAxes; ++i) {
    RowsAxis& x = a.axis[i];
    x.in_size = static_cast<int>(s.in_size[i]);
    x.out_size = static_cast<int>(s.out_size[i]);
    x.in_step = static_cast<int>(in.s[i]);
    x.out_step = static_cast<int>(out.s[i]);
    x.si = s.si[i];
    x.so = s.so[i];
    x.first = static_cast<int>(s.first[i]);
    x.box = box[i];
    x.tiles = static_cast<int>(CeilDiv(s.q_size[i], box[i]));
    x.length = static_cast<int>((box[i] - 1) * s.si[i] + s.reach[i]);
    tiles *= x.tiles;
  }
  const int64_t channel_rows = int64_t{a.axis[0].length} * a.axis[1].length;
  if (tiles > kIntMax || a.axis[0].length > 128 || a.axis[1].length > 2048 || channel_rows > 4096 ||
      a.axis[2].length > 8192)
    return false;
  a.in_n_step = in.n;
  a.out_n_step = out.n;
  a.in_c_step = in.c;
  a.out_c_step = out.c;
  a.n = static_cast<int>(p.n);
  a.groups = static_cast<int>(p.groups);
  a.cg = s.cg;
  a.jg = s.jg;
  a.tiles_j = s.tiles_j;
  a.blocks = s.blocks;
  const int granule = 16 / s.element;
  a.pitch = static_cast<int>(CeilDiv(a.axis[2].length + granule - 1, granule) * 16);
  a.skew = 8 * s.si[2] * s.element;
  a.plane = static_cast<int>(CeilDiv(channel_rows * a.pitch + 128 - 16, 128) * 128);
  a.taps = static_cast<int>(Product(p.k));
  a.phase_sets = columns.phase_sets;
  a.set_phases = columns.set_phases;
  a.set_tiles = columns.set_tiles;
  a.column_sets = columns.column_sets;
  a.wn = wn;
  a.rounds = rounds;
  a.tiles = static_cast<int>(tiles);
  const int64_t all = p.n * in.n;
  a.whole = all / granule * granule;
  a.ragged = all != a.whole;
  a.out_f32 = p.out_dtype == DType::kF32;

  const int64_t rows = s.cg * channel_rows;
  const int64_t row_tiles = int64_t{RowsArgs::kWarps / wn} * rounds;
  const int row = 16 * shape.mt * s.so[2];
  int64_t smem = 64;
  const auto place = [&](int& at, int64_t bytes) {
    at = static_cast<int>(smem);
    smem += CeilDiv(bytes, 128) * 128;
  };
  place(a.smem_table, rows * 8);
  place(a.smem_spots, row_tiles * 16);
  const int tile_sets = columns.column_sets / columns.phase_sets;
  place(a.smem_weights, int64_t{tile_sets} * a.taps * columns.set_tiles * s.blocks * 256);
  place(a.smem_stage, int64_t{RowsArgs::kWarps} * 8 * (row + 4) * 4);
  smem = CeilDiv(smem, 128) * 128;
  a.buffer = static_cast<int>(int64_t{s.cg} * a.plane);
  if (a.buffer > 200 * 1024) return false;
  place(a.smem_in, 2 * int64_t{a.buffer});
  const int most = SharedMemoryOfBlock(device.compute_capability);
  if (smem > most) return false;
  plan.smem = static_cast<int>(smem);
  plan.mt = shape.mt;
  plan.nc = shape.nc;
  plan.grid_y = static_cast<int>(p.groups);
  const int occupancy =
      std::min<int>(BlocksBeside(shape.mt, shape.nc), (most + 1024) / (plan.smem + 1024));
  const int64_t slots =
      std::max<int64_t>(1, int64_t{device.multiprocessors} * occupancy / p.groups);
  plan.grid_x = static_cast<int>(CeilDiv(tiles, CeilDiv(tiles, slots)));

  // The model.
  const double steps = static_cast<double>(entries) * tile_sets * s.blocks * row_tiles;
  const double products =
      static_cast<double>(a.taps) * s.tiles_j * s.blocks * row_tiles;  // by MT tiles of pixels
  const double outputs = static_cast<double>(row_tiles) * 16 * shape.mt * s.phases * s.tiles_j * 8;
  const double staged = static_cast<double>(rows);
  const bool wide = s.element == 4;
  const double conflicts = wide && s.si[2] % 2 == 0 ? std::min(4, s.si[2]) : 1;
  const double tensor = 1.5 * imbalance * products * shape.mt;
  const double shared = steps * shape.mt * (wide ? 4 * conflicts : 8) + products * 2 +
                        outputs / 32 * 4 + staged * a.pitch / 128;
  // With one column and one step of channels, several steps are under way at once.
  const bool overlaps = shape.nc == 1 && s.blocks == 1;
  const double a_step =
      overlaps ? 8 + shape.mt * (wide ? 8 : 12) : (wide ? 20 : 18) + shape.mt * (wide ? 9 : 14);
  // Fitted: with registers for a block alone, sums stay there and more is under way.
  double ease = 1.0;
  if (shape.mt == 3) ease = 1.2;
  if (shape.mt * shape.nc >= 16 && wide && s.blocks > 1) ease = 0.7;
  if (shape.mt * shape.nc >= 16 && !wide) ease = 0.85;
  const double alone_cost = overlaps ? 3.0 : shape.mt == 1 && shape.nc == 8 ? 10.0 : 4.0;
  const double issue = imbalance * ease * (steps * a_step + products * (4 + shape.mt)) +
                       outputs / 32 * (row % 32 == 0 ? 12 : 24) +
                       (90 + 30.0 * columns.column_sets) * row_tiles + staged * 6;
  const double asking = staged * (shape.nc == 1 ? 12 : 20);
  const double blocks_beside = std::min<double>(
      occupancy, std::ceil(static_cast<double>(tiles) * plan.grid_y / device.multiprocessors));
  const double alone = tensor + alone_cost * issue / RowsArgs::kWarps + 1500;
  const double cycles =
      std::max({alone / blocks_beside, tensor, shared, issue / (overlaps ? 2.4 : 2.0), asking});
  const double grid = static_cast<double>(plan.grid_x) * plan.grid_y;
  const double turns = std::ceil(static_cast<double>(tiles) / plan.grid_x);
  const double compute = turns * std::max(1.0, grid / device.multiprocessors) * cycles / kClock;
  // Pieces of rows tear lines that other blocks write, too.
  const double piece = static_cast<double>(a.axis[2].box) * s.so[2] * SizeOf(p.out_dtype);
  const double torn = a.axis[2].tiles > 1 ? 1 + 250 / piece : 1;
  const double in_bytes = static_cast<double>(all) * s.element;
  const double out_bytes =
      static_cast<double>(p.n) * static_cast<double>(out.n) * SizeOf(p.out_dtype) * torn;
  const double l2 =
      (static_cast<double>(tiles) * plan.grid_y * staged * (a.axis[2].length * s.element + 32) +
       out_bytes) /
      kL2Bandwidth;
  const double memory = (in_bytes + out_bytes) / kBandwidth;
  const double slow = std::max({compute, l2, memory});
  // Where rows of float32 results all begin a unit of 16 bytes, five large layers of one group took
  // 0.63 to 0.78 of that (H100).
  const bool whole_units = wide && p.groups == 1 && s.out_size[2] % 4 == 0;
  plan.seconds = 5e-6 + (whole_units ? 0.75 : 1.0) * (slow + 0.25 * (compute + l2 + memory - slow));
  return true;
}

RowsPlan MakePlan(const Problem& p, const Device& device, const RowsTile& forced) {
  RowsPlan best{};
  best.refusal = Refuse(p, device);
  if (!best.refusal.empty()) return best;
  const Shape s = ShapeOf(p);
  best.seconds = std::numeric_limits<double>::infinity();
  const auto allowed = [](int want, int have) { return want == 0 || want == have; };
  RowsPlan plan{};
  for (const TileShape& shape : kTileShapes) {
    Columns columns;
    if (!allowed(forced.mt, shape.mt) || !allowed(forced.nc, shape.nc)) continue;
    if (!GroupColumns(s, shape.nc, columns)) continue;
    if (columns.set_phases * columns.set_tiles * 2 <= shape.nc) continue;
    const std::vector<Load> loads = LoadsOf(s, columns);
    int64_t entries = 0;
    for (const Load& load : loads) entries += load.entries;
    const int pixels = 16 * shape.mt;
    for (int wn = 1; wn <= std::min(columns.column_sets, RowsArgs::kWarps); wn *= 2) {
      if (!allowed(forced.wn, wn)) continue;
      const double imbalance = ImbalanceOf(loads, columns, wn);
      for (int rounds : {1, 2, 4}) {
        if (!allowed(forced.rounds, rounds)) continue;
        const int row_tiles = RowsArgs::kWarps / wn * rounds;
        for (int across = 1; across <= row_tiles; across *= 2) {
          if (across > 1 && (across / 2) * pixels >= s.q_size[2]) break;
          if (!allowed(forced.box_w, across * pixels)) continue;
          for (int high = 1; high * across <= row_tiles; high *= 2) {
            const int deep = row_tiles / across / high;
            if (high > 1 && high / 2 >= s.q_size[1]) break;
            if (!allowed(forced.box_h, high)) continue;
            if (deep > 1 && deep / 2 >= s.q_size[0]) continue;
            if (Fill(p, device, s, shape, columns, wn, rounds, {deep, high, across * pixels},
                     entries, imbalance, plan) &&
                plan.seconds < best.seconds) {
              best = plan;
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

const RowsPlan& PlanOf(const Problem& p, const Device& d) {
  return Remember<RowsPlan>(p, d, [&] { return MakePlan(p, d, {}); });
}

std::string RefuseRow(const Problem& p, const Device& d) { return PlanOf(p, d).refusal; }
int64_t Workspace(const Problem&, const Device&) { return 0; }
double Seconds(const Problem& p, const Device& d) { return PlanOf(p, d).seconds; }
cudaError_t LaunchRow(const Problem& p, const Operands& ops, const Device& d, cudaStream_t stream) {
  return LaunchRows(p, ops, PlanOf(p, d), stream);
}

}  // namespace

RowsPlan PlanRows(const Problem& p, const Device& device, const RowsTile& tile) {
  return MakePlan(p, device, tile);
}

cudaError_t LaunchRows(const Problem& p, const Operands& ops, const RowsPlan& plan,
                       cudaStream_t stream) {
  const bool forward = p.pass == Pass::kForward;
  RowsArgs args = plan.args;
  args.in = forward ? ops.x : ops.y;
  args.w = ops.w;
  args.out = ops.out;
  args.bias = forward ? ops.bias : nullptr;
  switch (p.in_dtype) {
    case DType::kF32:
      return EnqueueRows<float>(plan, args, stream);
    case DType::kBF16:
      return EnqueueRows<__nv_bfloat16>(plan, args, stream);
    case DType::kF16:
      return EnqueueRows<__half>(plan, args, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

void AddRows(std::vector<Row>& rows) {
  for (Pass pass : {Pass::kForward, Pass::kInputGrad}) {
    rows.push_back({"rows", pass, RefuseRow, Workspace, Seconds, LaunchRow});
  }
}

}  // namespace jaxconv::cuda
