#include "cuda/correlate.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>

#include "cuda/device_limits.h"
#include "cuda/plan_memo.h"
#include "cuda/taps.h"

namespace jaxconv::cuda {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();

constexpr int Log2(int64_t v) { return v <= 1 ? 0 : 1 + Log2(v / 2); }

std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  const bool forward = p.pass == Pass::kForward;
  if (device.compute_capability < 80) return "needs compute capability 8.0";
  if (p.in_dtype == DType::kF64) return "float64 has no tensor cores here";
  if (p.cig() < 4 || p.cog() < 4) return "needs at least 4 input and 4 output channels a group";
  if (Product(p.k) > CorrelatePack::kMaxTaps) {
    return "takes at most " + std::to_string(CorrelatePack::kMaxTaps) + " taps";
  }
  int64_t phases = 1;
  for (int a = 0; a < kAxes; ++a) {
    if (p.stride[a] > 64) return "takes strides up to 64";
    phases *= forward ? p.stride[a] : 1;
    const int64_t reach = (p.k[a] - 1) * p.dilation[a] + std::abs(p.pad[a]);
    if (reach > (1 << 24)) return "takes kernels that reach over less than 2^24 outputs";
  }
  if (phases > CorrelatePack::kMaxPhaseSets) {
    return "takes at most " + std::to_string(CorrelatePack::kMaxPhaseSets) + " phases";
  }
  if (p.ci * Product(p.isize) > kIntMax || p.co * Product(p.osize) > kIntMax) {
    return "indexes an image of x or y in 32 bits";
  }
  if (p.n > kIntMax) return "counts the batch in 32 bits";
  if (p.groups * CeilDiv(Product(p.k), 32) > 65535) return "takes fewer groups and taps";
  return "";
}

// The part of a plan that does not depend on the tile.
struct Shape : PhasedShape {
  bool rows;  // channels first
  int block_channels, blocks, variants, taps_total;
};

Shape ShapeOf(const Problem& p) {
  Shape s{PhasedShapeOf(p), !p.channels_last, 0, 0, 0, 0};
  s.block_channels = 16 / s.element;
  s.blocks = static_cast<int>(CeilDiv(s.cg, s.block_channels));
  s.taps_total = static_cast<int>(Product(p.k));
  s.variants = p.in_dtype == DType::kF32 && p.precision == Precision::kHighest ? 3 : 1;
  return s;
}

// Sources of a box along one axis; false: more residues than there are slots.
bool FillAxis(const Shape& s, int a, int box, CorrelateAxis& x) {
  const auto& e = s.taps[a].source;
  const int64_t first = s.first[a];
  x.in_size = static_cast<int>(s.in_size[a]);
  x.out_size = static_cast<int>(s.out_size[a]);
  x.si = s.si[a];
  x.so = s.so[a];
  x.first = static_cast<int>(first);
  x.box = box;
  x.log_box = Log2(box);
  x.tiles = static_cast<int>(CeilDiv(s.q_size[a], box));
  x.length = box + static_cast<int>((s.reach[a] - 1) / x.si);
  x.slots = 0;
  for (int64_t source : e) {
    const int rho = static_cast<int>((source - first) % x.si);
    if (std::find(x.rho, x.rho + x.slots, rho) != x.rho + x.slots) continue;
    if (x.slots == CorrelateAxis::kMaxSlots) return false;
    x.rho[x.slots++] = rho;
  }
  if (x.slots == 0) x.rho[x.slots++] = 0;
  return true;
}

// The staged place of a tap's source, relative to that of its pixel.
int PlaceOf(const CorrelateAxis& x, int64_t source) {
  const int64_t v = source - x.first;
  const int* slot = std::find(x.rho, x.rho + x.slots, static_cast<int>(v % x.si));
  return static_cast<int>(slot - x.rho) * x.length + static_cast<int>(v / x.si);
}

// How columns are grouped into sets of at most `nc`, and how many steps that makes.
struct Columns {
  int set_phases, set_tiles, phase_sets, column_sets;
  std::vector<int> entries;   // of each phase set: distinct offsets
  std::vector<int64_t> used;  // and pairs of an offset and a phase that has a tap there
};

Columns ColumnsOf(const Shape& s, int nc, bool single_phase) {
  Columns c;
  // Channels first, the phases of the last axis make a row together.
  const int unit = s.rows && s.so[2] <= nc && !single_phase ? s.so[2] : 1;
  const int most = std::max(1, std::min(s.tiles_j, nc / unit));
  c.set_tiles = static_cast<int>(CeilDiv(s.tiles_j, CeilDiv(s.tiles_j, most)));
  c.set_phases = unit * std::max(1, std::min(s.phases / unit, nc / (unit * c.set_tiles)));
  if (single_phase || (unit == 1 && s.rows && s.so[2] > nc)) c.set_phases = 1;
  c.phase_sets = static_cast<int>(CeilDiv(s.phases, c.set_phases));
  c.column_sets = c.phase_sets * static_cast<int>(CeilDiv(s.tiles_j, c.set_tiles));
  return c;
}

template <class Body>  // body(tap, phase, {tap of each axis})
void ForEachTap(const Shape& s, Body body) {
  int tap = 0;
  for (size_t d = 0; d < s.taps[0].phase.size(); ++d) {
    for (size_t h = 0; h < s.taps[1].phase.size(); ++h) {
      for (size_t w = 0; w < s.taps[2].phase.size(); ++w, ++tap) {
        const int phase =
            (s.taps[0].phase[d] * s.so[1] + s.taps[1].phase[h]) * s.so[2] + s.taps[2].phase[w];
        body(tap, phase, std::array<size_t, kAxes>{d, h, w});
      }
    }
  }
}

// Lists each phase set's distinct offsets. With `pack`, writes them down.
void ListEntries(const Shape& s, const CorrelateAxis (&axis)[kAxes], Columns& c,
                 CorrelatePack* pack) {
  struct Entry {
    int place, phases;
  };
  std::vector<std::vector<Entry>> lists(c.phase_sets);
  std::vector<std::map<int, int>> index(c.phase_sets);
  c.entries.assign(c.phase_sets, 0);
  c.used.assign(c.phase_sets, 0);
  const int height = axis[1].slots * axis[1].length, width = axis[2].slots * axis[2].length;
  ForEachTap(s, [&](int tap, int phase, const std::array<size_t, kAxes>& t) {
    const int set = phase / c.set_phases;
    const int place = (PlaceOf(axis[0], s.taps[0].source[t[0]]) * height +
                       PlaceOf(axis[1], s.taps[1].source[t[1]])) *
                          width +
                      PlaceOf(axis[2], s.taps[2].source[t[2]]);
    const auto [found, added] = index[set].try_emplace(place, static_cast<int>(lists[set].size()));
    if (added) lists[set].push_back({place, 0});
    lists[set][found->second].phases |= 1 << phase % c.set_phases;
    ++c.used[set];
    if (pack != nullptr) {
      pack->tap_entry[tap] = static_cast<uint16_t>(found->second);
      pack->tap_phase[tap] = static_cast<uint16_t>(phase);
    }
  });
  int total = 0;
  for (int set = 0; set < c.phase_sets; ++set) {
    c.entries[set] = static_cast<int>(lists[set].size());
    if (pack == nullptr) continue;
    pack->first_entry[set] = static_cast<uint16_t>(total);
    for (const Entry& e : lists[set]) {
      int mask = 0;
      for (int t = 0; t < c.set_tiles; ++t) mask |= e.phases << t * c.set_phases;
      pack->entry_offset[total] = static_cast<uint16_t>(e.place);
      pack->entry_mask[total++] = static_cast<uint16_t>(mask);
    }
  }
  if (pack != nullptr) pack->first_entry[c.phase_sets] = static_cast<uint16_t>(total);
}

struct TileShape {
  bool group;  // wgmma
  int mt, nc, registers, max_warps;
};
constexpr TileShape kTileShapes[] = {
    {false, 4, 8, 256, 8},  {false, 2, 8, 168, 4}, {false, 4, 4, 168, 4}, {false, 4, 2, 168, 4},
    {false, 2, 2, 128, 16}, {true, 2, 16, 255, 8}, {true, 2, 8, 128, 8},  {true, 2, 4, 128, 8}};

constexpr int kSlabBytes = 16 * 1024, kResidentBytes = 96 * 1024;

// The model counts, for a tile of a block: tensor-core and shared-memory cycles, and instructions
// for staging, storing and stepping, alone (every warp waits for its own) and with the blocks
// beside it (four instructions a cycle); times whole turns of whole blocks; against the bytes of
// device memory and those that blocks fetch from the L2 cache. Its factors are fitted to 1,700
// tiles timed on an H200, where its choice took 7 % longer than the best tile on average.
constexpr double kClock = 1.7e9, kBandwidth = 4.0e12, kL2Bandwidth = 5.0e12;

struct Candidate {
  TileShape shape;
  int warps, wn, chunk_blocks, set_rounds;
  std::array<int, 4> box;  // n, d, h, w
};

// Fills the plan for a candidate; false where it does not fit.
bool Fill(const Problem& p, const Device& device, const Shape& s, const Columns& columns,
          const Candidate& c, CorrelatePlan& plan) {
  CorrelateArgs& a = plan.args;
  for (int i = 0; i < kAxes; ++i) {
    if (!FillAxis(s, i, c.box[i + 1], a.axis[i])) return false;
  }
  const Strides in = s.forward ? p.XStrides() : p.YStrides();
  const Strides out = s.forward ? p.YStrides() : p.XStrides();
  if (in.n * c.box[0] > kIntMax || out.n * c.box[0] > kIntMax) return false;
  int64_t halo = c.box[0], tiles = CeilDiv(p.n, c.box[0]);
  for (int i = 0; i < kAxes; ++i) {
    a.axis[i].in_step = static_cast<int>(in.s[i]);
    a.axis[i].out_step = static_cast<int>(out.s[i]);
    halo *= a.axis[i].slots * a.axis[i].length;
    tiles *= a.axis[i].tiles;
  }
  const auto reach = [&](int i) { return int64_t{a.axis[i].length} * a.axis[i].si; };
  if (halo > 8192 || tiles > kIntMax || c.box[0] > 32 || reach(0) > 128 || reach(1) > 512 ||
      reach(2) > 2048) {
    return false;  // what the kernel packs into words
  }
  a.in_n_step = in.n;
  a.out_n_step = out.n;
  a.in_c_step = in.c;
  a.out_c_step = out.c;
  a.n = static_cast<int>(p.n);
  a.box_n = c.box[0];
  a.groups = static_cast<int>(p.groups);
  a.cg = s.cg;
  a.jg = s.jg;
  a.halo = static_cast<int>(halo);
  a.plane = static_cast<int>(CeilDiv(halo - 1, 8) * 8 + 1);
  a.split = s.variants > 1;
  a.chunk_blocks = c.chunk_blocks;
  a.chunks = static_cast<int>(CeilDiv(s.blocks, c.chunk_blocks));
  a.planes = c.chunk_blocks * (a.split ? 2 : 1);
  a.buffers = 2;
  a.wn = c.wn;
  a.tiles_j = s.tiles_j;
  a.set_phases = columns.set_phases;
  a.set_tiles = columns.set_tiles;
  a.phase_sets = columns.phase_sets;
  a.column_sets = columns.column_sets;
  a.sets_per_block = c.set_rounds * c.wn;
  a.spatial_tiles = static_cast<int>(tiles);

  int steps = 0;
  double all_steps = 0, all_mma = 0;  // of a chunk, over the sets
  for (int set = 0; set < columns.phase_sets; ++set) {
    const int mine =
        static_cast<int>(CeilDiv(int64_t{columns.entries[set]} * c.chunk_blocks * s.variants, 2));
    steps = std::max(steps, mine);
    all_steps += mine;
    all_mma += 0.5 * static_cast<double>(columns.used[set]) * c.chunk_blocks * s.variants *
               columns.set_tiles;
  }
  const int tile_sets = columns.column_sets / columns.phase_sets;
  all_steps *= tile_sets;
  all_mma *= tile_sets;
  const int step_bytes = c.wn * c.shape.nc * 256;
  const int64_t program = int64_t{steps} * step_bytes * c.set_rounds * a.chunks;
  if (program <= kResidentBytes) {
    a.slabs = 1;
    a.ring = std::max(1, c.set_rounds * a.chunks);
  } else {
    a.slabs = static_cast<int>(CeilDiv(steps, std::max(1, kSlabBytes / step_bytes)));
    a.ring = 2;
  }
  a.slab_steps = static_cast<int>(std::max<int64_t>(1, CeilDiv(steps, a.slabs)));
  a.steps_padded = a.slab_steps * a.slabs;
  const bool resident = a.ring >= c.set_rounds * a.chunks * a.slabs;

  const bool through_stage = s.rows && columns.set_phases % s.so[2] == 0 && s.so[2] <= 8;
  a.stage_words = through_stage ? 8 * (c.shape.mt * 16 * s.so[2] + 4) : 0;
  a.vector_in = p.channels_last && s.cg % s.block_channels == 0;
  a.vector_out = p.channels_last && s.jg % 2 == 0;
  a.out_f32 = p.out_dtype == DType::kF32;

  int64_t smem = 0;
  const auto place = [&](int& at, int64_t bytes) {
    at = static_cast<int>(smem);
    smem += CeilDiv(bytes, 128) * 128;
    return smem <= kIntMax;
  };
  if (!place(a.smem_table, 4 * halo * 4) ||
      !place(a.smem_in, int64_t{a.buffers} * a.planes * a.plane * 16) ||
      !place(a.smem_ring, int64_t{a.ring} * a.slab_steps * step_bytes) ||
      !place(a.smem_out, int64_t{c.warps} * a.stage_words * 4)) {
    return false;
  }
  if (smem > SharedMemoryOfBlock(device.compute_capability)) return false;
  plan.smem = static_cast<int>(smem);
  plan.group = c.shape.group;
  plan.mt = c.shape.mt;
  plan.nc = c.shape.nc;
  plan.warps = c.warps;
  plan.grid_y = static_cast<int>(p.groups * CeilDiv(columns.column_sets, a.sets_per_block));
  if (plan.grid_y > 65535) return false;
  const int occupancy = std::min(
      {static_cast<int>((SharedMemoryOfBlock(device.compute_capability) + 1024) / (smem + 1024)),
       65536 / (c.shape.registers * c.warps * 32), 64 / c.warps});
  // Blocks stay: each fetches its next tile while it works on one.
  const int64_t slots =
      std::max<int64_t>(1, int64_t{device.multiprocessors} * occupancy / plan.grid_y);
  plan.grid_x = static_cast<int>(CeilDiv(tiles, CeilDiv(tiles, slots)));
  plan.steps_bytes = CeilDiv(int64_t{columns.phase_sets} * a.steps_padded * 16, 256) * 256;
  plan.weights_bytes =
      p.groups * columns.column_sets * a.chunks * int64_t{a.steps_padded} * c.shape.nc * 256;

  // The model.
  const double blocks = static_cast<double>(tiles) * plan.grid_y;
  const double share = 1.0 / static_cast<double>(CeilDiv(columns.column_sets, a.sets_per_block));
  const int workers = c.warps / (c.shape.group ? 4 : 1), wm = workers / c.wn;
  const int step_pixels = c.shape.group ? 64 : 16, pixels = wm * c.shape.mt * step_pixels;
  const double mma = all_mma * a.chunks * share * wm * c.shape.mt * (step_pixels / 16);
  const double conflicts = c.box[3] >= 8 ? 1 : 2;
  const double wavefronts =
      a.chunks * share * wm * (all_steps * 4 * c.shape.mt * conflicts + all_mma * 2);
  const double staged =
      static_cast<double>(halo) * a.chunks * c.chunk_blocks * (a.chunks > 1 ? c.set_rounds : 1);
  const double outputs = static_cast<double>(pixels) * columns.column_sets * share *
                         columns.set_phases * columns.set_tiles * 8;
  const double wgmma = a.chunks * share * wm * all_steps * c.shape.mt *
                       std::max(4.0 * c.shape.nc, 16.0 + 2 * c.shape.nc);
  const double warp_steps = a.chunks * share * c.warps / c.wn * all_steps;
  const double rounds = static_cast<double>(c.set_rounds) * a.chunks * a.slabs;
  const double issue = staged / 32 * (a.vector_in ? 94 : 18 * s.block_channels) +
                       static_cast<double>(halo) / 32 * 147 +
                       outputs / 32 *
                           (through_stage     ? 21.5
                            : p.channels_last ? 9.3
                                              : 52) +
                       (c.shape.group ? 0 : 13.8 * warp_steps + 1.1 * mma) + 210 * rounds * c.warps;
  const double tensor = c.shape.group ? wgmma : std::max(1.5 * mma, wavefronts);
  const double alone = tensor + 4.3 * issue / c.warps + 330 * rounds;
  const double together = std::min<double>(occupancy, std::ceil(blocks / device.multiprocessors));
  const double throughput = std::max(tensor, issue / 4);
  const double cycles =
      std::max(alone / together, throughput) + 0.3 * std::min(alone / together, throughput);
  // Whole tiles a block, whole blocks a multiprocessor.
  const double grid = static_cast<double>(plan.grid_x) * plan.grid_y;
  const double turns = std::ceil(blocks / grid);
  const double compute = turns * std::ceil(grid / device.multiprocessors) * cycles / kClock;
  const double out_bytes = static_cast<double>(p.n) * p.groups * s.jg *
                           static_cast<double>(Product(s.out_size)) * SizeOf(p.out_dtype);
  const double in_bytes = static_cast<double>(p.n) * p.groups * s.cg *
                          static_cast<double>(Product(s.in_size)) * s.element;
  const double weight_traffic =
      static_cast<double>(program) *
      (resident ? static_cast<double>(plan.grid_x) * plan.grid_y : blocks);
  // Rows of a box begin and end within sectors of 32 bytes.
  const double row_bytes = static_cast<double>(a.axis[2].length) * a.axis[2].si * s.element;
  const double torn = s.rows ? 1 + 32 / row_bytes : 1;
  // Without the stage, every phase of a row writes all of its sectors, and in part. Channels last,
  // a group's pixel may be a sector or less: fitted to three layers of 16 bits.
  const bool small_pixels = !s.rows && s.so[2] > 1 && SizeOf(p.out_dtype) == 2 && s.jg <= 16;
  const double partial = s.rows && !through_stage && s.so[2] > 1 ? 3.0 * s.so[2]
                         : small_pixels                          ? 8.0
                                                                 : 1.0;
  const double l2 =
      (blocks * staged * 16 * torn + weight_traffic + out_bytes * partial) / kL2Bandwidth;
  const double memory =
      (in_bytes + out_bytes + static_cast<double>(plan.weights_bytes)) / kBandwidth;
  const double slow = std::max({compute, l2, memory});
  // Slower than the model by about this much: 16 bits, channels first, pass through registers; and
  // several phases.
  const double slower = s.rows && s.element == 2 ? 1.3 : s.phases > 1 ? 1.25 : 1.0;
  plan.seconds = 6e-6 + slower * (slow + 0.5 * (compute + l2 + memory - slow));
  return true;
}

CorrelatePlan MakePlan(const Problem& p, const Device& device, const CorrelateTile& forced) {
  CorrelatePlan best{};
  best.refusal = Refuse(p, device);
  if (!best.refusal.empty()) return best;
  const Shape s = ShapeOf(p);
  best.seconds = std::numeric_limits<double>::infinity();
  CorrelateAxis axis[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    if (!FillAxis(s, i, 1, axis[i])) {
      best.refusal = "takes at most " + std::to_string(CorrelateAxis::kMaxSlots) +
                     " residues of the sources by the stride along an axis";
      return best;
    }
  }
  Columns winner_columns;
  CorrelatePlan plan{};
  const auto allowed = [](int want, int have) { return want == 0 || want == have; };
  for (const TileShape& shape : kTileShapes) {
    if (!allowed(forced.mt, shape.mt) || !allowed(forced.nc, shape.nc)) continue;
    if (forced.group >= 0 && forced.group != int{shape.group}) continue;
    if (shape.group && (!HasWgmma(device.compute_capability) || s.variants > 1)) continue;
    Columns columns = ColumnsOf(s, shape.nc, false);
    ListEntries(s, axis, columns, nullptr);
    if (shape.group) {
      // wgmma multiplies all columns of a set or none.
      bool full = true;
      for (int set = 0; set < columns.phase_sets; ++set) {
        full = full && columns.used[set] == int64_t{columns.entries[set]} * columns.set_phases;
      }
      if (!full) {
        columns = ColumnsOf(s, shape.nc, true);
        ListEntries(s, axis, columns, nullptr);
      }
      if (columns.set_phases * columns.set_tiles * 2 <= shape.nc) continue;
    }
    const int step = shape.group ? 64 : 16;
    for (int warps : {4, 8, 16}) {
      if (!allowed(forced.warps, warps) || warps > shape.max_warps) continue;
      for (int wn : {1, 2, 4}) {
        if (!allowed(forced.wn, wn) || (wn > 1 && wn > columns.column_sets)) continue;
        if (shape.group && wn > warps / 4) continue;
        const int log_pixels = Log2(warps / (shape.group ? 4 : 1) / wn * shape.mt * step);
        for (int lw = 0; lw <= log_pixels; ++lw) {
          if (!allowed(forced.box_w, 1 << lw)) continue;
          if (lw > 2 && (1 << (lw - 1)) >= s.q_size[2]) break;
          if (shape.group && lw != 3 && lw < 6) continue;
          if (lw < 3 && (1 << lw) < s.q_size[2]) continue;  // rows shorter than ldmatrix's eight
          for (int lh = 0; lh + lw <= log_pixels; ++lh) {
            if (!allowed(forced.box_h, 1 << lh)) continue;
            if (lh > (shape.group ? 3 : 0) && (1 << (lh - 1)) >= s.q_size[1]) break;
            if (shape.group && lw == 3 && lh < 3) continue;
            for (int ld = 0; ld + lh + lw <= log_pixels; ++ld) {
              if (ld > 0 && (1 << (ld - 1)) >= s.q_size[0]) break;
              const int ln = log_pixels - lw - lh - ld;
              // A box over several images only where the images are small.
              if (ln > 0 && ((1 << lw) < s.q_size[2] || (1 << lh) < s.q_size[1])) continue;
              for (int blocks : {1, 2, 3, 4, 6, 8, 12, 16}) {
                if (!allowed(forced.chunk_blocks, blocks)) continue;
                if (shape.group && blocks % 2 != 0) continue;
                if (blocks > s.blocks ||
                    CeilDiv(s.blocks, blocks) * blocks > s.blocks * 5 / 4 + 0) {
                  continue;
                }
                const int all = static_cast<int>(CeilDiv(columns.column_sets, wn));
                for (int rounds = 1;; rounds = std::min(2 * rounds, all)) {
                  const Candidate c{shape,  warps,  wn,
                                    blocks, rounds, {1 << ln, 1 << ld, 1 << lh, 1 << lw}};
                  if (allowed(forced.rounds, rounds) && Fill(p, device, s, columns, c, plan) &&
                      plan.seconds < best.seconds) {
                    best = plan;
                    winner_columns = columns;
                  }
                  if (rounds == all || (blocks < s.blocks && rounds == 1)) break;
                }
              }
            }
          }
        }
      }
    }
  }
  if (best.seconds == std::numeric_limits<double>::infinity()) {
    best.refusal = "finds no tile whose inputs fit into shared memory";
    return best;
  }
  CorrelatePack& k = best.pack;
  const CorrelateArgs& a = best.args;
  ListEntries(s, a.axis, winner_columns, &k);
  const int64_t taps = s.taps_total, co_step = p.cog() * taps;
  k.w_g_step = p.cig() * co_step;
  k.w_c_step = s.forward ? co_step : taps;
  k.w_j_step = s.forward ? taps : co_step;
  k.groups = a.groups;
  k.taps = s.taps_total;
  k.cg = a.cg;
  k.jg = a.jg;
  k.tiles_j = a.tiles_j;
  k.chunks = a.chunks;
  k.chunk_blocks = a.chunk_blocks;
  k.plane = a.plane;
  k.steps_padded = a.steps_padded;
  k.phase_sets = a.phase_sets;
  k.set_phases = a.set_phases;
  k.set_tiles = a.set_tiles;
  k.column_sets = a.column_sets;
  k.nc = best.nc;
  k.split = a.split;
  return best;
}

const CorrelatePlan& PlanOf(const Problem& p, const Device& d) {
  return Remember<CorrelatePlan>(p, d, [&] { return MakePlan(p, d, {}); });
}

std::string RefuseRow(const Problem& p, const Device& d) { return PlanOf(p, d).refusal; }

int64_t Workspace(const Problem& p, const Device& d) {
  const CorrelatePlan& plan = PlanOf(p, d);
  return plan.steps_bytes + plan.weights_bytes;
}

double Seconds(const Problem& p, const Device& d) { return PlanOf(p, d).seconds; }

cudaError_t LaunchRow(const Problem& p, const Operands& ops, const Device& d, cudaStream_t stream) {
  return LaunchCorrelate(p, ops, PlanOf(p, d), stream);
}

}  // namespace

CorrelatePlan PlanCorrelate(const Problem& p, const Device& device, const CorrelateTile& tile) {
  return MakePlan(p, device, tile);
}

cudaError_t LaunchCorrelate(const Problem& p, const Operands& ops, const CorrelatePlan& plan,
                            cudaStream_t stream) {
  const bool forward = p.pass == Pass::kForward;
  if ((forward ? p.YElements() : p.XElements()) == 0) return cudaSuccess;
  CorrelateArgs args = plan.args;
  CorrelatePack pack = plan.pack;
  char* workspace = static_cast<char*>(ops.workspace);
  args.in = forward ? ops.x : ops.y;
  args.out = ops.out;
  args.bias = forward ? ops.bias : nullptr;
  pack.w = ops.w;
  pack.steps = reinterpret_cast<int4*>(workspace);
  pack.weights = workspace + plan.steps_bytes;
  args.steps = pack.steps;
  args.weights = pack.weights;
  switch (p.in_dtype) {
    case DType::kF32:
      return EnqueueCorrelate<float>(plan, pack, args, stream);
    case DType::kBF16:
      return EnqueueCorrelate<__nv_bfloat16>(plan, pack, args, stream);
    case DType::kF16:
      return EnqueueCorrelate<__half>(plan, pack, args, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

void AddCorrelate(std::vector<Row>& rows) {
  for (Pass pass : {Pass::kForward, Pass::kInputGrad}) {
    rows.push_back({"mma", pass, RefuseRow, Workspace, Seconds, LaunchRow});
  }
}

}  // namespace jaxconv::cuda
