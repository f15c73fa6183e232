#include "cuda/weight_grad.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "cuda/device_limits.h"
#include "cuda/plan_memo.h"

namespace jaxconv::cuda {
namespace {

constexpr WeightGradVariant kVariants[] = {
#define JAXCONV_CASE(S, T, O, G) {S, T, O, G},
    JAXCONV_WEIGHT_GRAD_VARIANTS(JAXCONV_CASE)
#undef JAXCONV_CASE
};

constexpr int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int Padding(int from, int to, int modulus) {  // what brings `from` to `to`, modulo
  return ((to - from) % modulus + modulus) % modulus;
}

// Why no plan takes the problem, whatever its sizes.
std::string Refuse(const Problem& p, const Device& device) {
  if (p.Empty()) return "has nothing to read or write";
  if (device.compute_capability < 80) return "wants compute capability 8.0";
  if (p.in_dtype == DType::kF64) return "takes no float64";
  if (p.in_dtype == DType::kF32 && p.precision == Precision::kHighest) {
    return "rounds float32 operands to TF32";
  }
  constexpr int64_t kMost = int64_t{1} << 30;
  for (int a = 0; a < kAxes; ++a) {
    for (const int64_t size : {p.isize[a], p.osize[a], p.k[a] * p.dilation[a], p.pad[a], -p.pad[a],
                               p.isize[a] * p.stride[a]}) {
      if (size > kMost) return "indexes an axis in 32 bits";
    }
  }
  if (p.n > kMost || p.ci > kMost || p.co > kMost) return "indexes an axis in 32 bits";
  if (p.channels_last && SizeOf(p.in_dtype) == 2 &&
      (p.ci % 2 != 0 || p.co % 2 != 0 || p.cig() % 2 != 0 || p.cog() % 2 != 0)) {
    return "takes an even number of 16-bit channels where channels are last";
  }
  return "";
}

// The part of the arguments that no choice changes.
WeightGradArgs Common(const Problem& p) {
  WeightGradArgs a{};
  a.n = static_cast<int>(p.n);
  a.cig = static_cast<int>(p.cig());
  a.cog = static_cast<int>(p.cog());
  for (int i = 0; i < kAxes; ++i) {
    a.isize[i] = static_cast<int>(p.isize[i]);
    a.osize[i] = static_cast<int>(p.osize[i]);
    a.pad[i] = static_cast<int>(p.pad[i]);
    a.k[i] = static_cast<int>(p.k[i]);
    a.gap[i] = i + 1 == kAxes ? 1 : static_cast<int>(std::gcd(p.stride[i], p.dilation[i]));
    a.lattice_stride[i] = static_cast<int>(p.stride[i] / a.gap[i]);
    a.lattice_step[i] = static_cast<int>(p.dilation[i] / a.gap[i]);
  }
  a.xs = p.XStrides();
  a.ys = p.YStrides();
  a.w_elements = p.WElements();
  return a;
}

// The choices of a plan.
struct Choice {
  int groups, co_octets, ci_slots, pair_slots;
  int runs, depth, images, ahead;
};

// Fills in what follows from the choices; false if it does not fit the device.
bool Complete(const Problem& p, const Device& device, const WeightGradVariant& v, const Choice& c,
              WeightGradArgs& a) {
  const int size = static_cast<int>(SizeOf(p.in_dtype));
  const bool half = size == 2, last = p.channels_last;
  const int run = WeightGradRun(half, v.stride), pairs_of_warp = WeightGradPairs(v.taps, v.octets);
  const int stride = a.lattice_stride[2];

  a.groups_per_block = c.groups;
  a.co_octets = c.co_octets;
  a.ci_slots = c.ci_slots;
  a.pair_slots = c.pair_slots;
  a.pixel_slots = kWeightGradWarps / (c.groups * c.ci_slots * c.pair_slots);
  a.group_blocks = static_cast<int>(p.groups) / c.groups;
  a.ci_blocks = CeilDiv(a.cig, c.ci_slots * v.octets * 8);
  a.co_blocks = CeilDiv(a.cog, c.co_octets * 8);
  a.segments = CeilDiv(a.k[2], v.taps);
  a.co_rows = c.co_octets * 8;
  if (WeightGradRowList(half, last, v.stride)) a.co_rows = std::min(a.co_rows, a.cog);
  a.rows = a.k[0] * a.k[1] * a.segments * a.co_rows;
  const int pairs = CeilDiv(a.rows, 16);
  a.pair_blocks = CeilDiv(CeilDiv(pairs, pairs_of_warp), c.pair_slots);
  a.slot_pairs = CeilDiv(pairs, int64_t{a.pair_blocks} * c.pair_slots);

  a.runs = c.runs;
  a.pixels = c.runs * run;
  a.depth = c.depth;
  a.images = c.images;
  a.ahead = c.ahead;
  a.image_blocks = CeilDiv(p.n, c.images);
  a.depth_blocks = CeilDiv(a.isize[0], c.depth);
  a.column_blocks = CeilDiv(a.isize[2], a.pixels);
  a.steps = int64_t{a.image_blocks} * a.depth_blocks * a.column_blocks * a.isize[1];
  if (a.steps > std::numeric_limits<int>::max()) return false;
  a.by_runs = DivisorOf(a.runs);
  a.by_depth = DivisorOf(a.depth);

  // The taps along depth of a block of pairs, at most.
  const int tap_rows = a.co_rows * a.segments, per_block = 16 * a.slot_pairs * c.pair_slots;
  int depth_taps = 1;
  for (int b = 0; b < a.pair_blocks; ++b) {
    const int first = b * per_block / tap_rows / a.k[1];
    if (b * per_block >= a.rows) break;
    const int final = (std::min((b + 1) * per_block, a.rows) - 1) / tap_rows / a.k[1];
    depth_taps = std::max(depth_taps, final - first + 1);
  }
  a.y_depth = (c.depth - 1) * a.lattice_stride[0] + (depth_taps - 1) * a.lattice_step[0] + 1;
  a.window = (a.k[1] - 1) * a.lattice_step[1] + 1;
  a.advance = std::min(a.lattice_stride[1], a.window);
  if (a.y_depth > 64 || a.window > 64 || c.images * a.y_depth * a.window >= 1 << 15) return false;
  a.by_y_depth = DivisorOf(a.y_depth);
  a.by_planes = DivisorOf(c.images * a.y_depth);
  a.depth_mask = a.row_mask = 0;
  for (int d = 0; d < c.depth; ++d) {
    for (int t = 0; t < depth_taps; ++t) {
      a.depth_mask |= uint64_t{1} << (d * a.lattice_stride[0] + t * a.lattice_step[0]);
    }
  }
  for (int t = 0; t < a.k[1]; ++t) {
    for (int r = t * a.lattice_step[1]; r < a.window; r += a.lattice_stride[1]) {
      a.row_mask |= uint64_t{1} << r;
    }
  }
  // Windows of the steps in flight, of which some begin a new column.
  const int fresh = std::min(c.ahead, CeilDiv(c.ahead, a.isize[1]));
  a.slots = (1 + fresh) * a.window + (c.ahead - fresh) * a.advance;

  const int x_rows = (c.groups - 1) * a.cig + c.ci_slots * v.octets * 8;
  const int y_rows = (c.groups - 1) * a.cog + c.co_octets * 8;
  a.x_channels = c.groups > 1 ? c.groups * a.cig : std::min(a.cig, c.ci_slots * v.octets * 8);
  a.y_channels = c.groups > 1 ? c.groups * a.cog : std::min(a.cog, c.co_octets * 8);
  a.y_pixels = (a.pixels - 1) * stride + (a.segments * v.taps - 1) * a.lattice_step[2] + 1;
  a.x_run_pad = a.y_run_pad = 0;
  a.vector = 4;
  int64_t x_row, y_row;
  if (last) {
    a.vector = a.cig % (16 / size) == 0 && a.cog % (16 / size) == 0 ? 16 : 4;
    a.x_channel = a.y_channel = size;
    a.x_pixel = (x_rows * size + 15) / 16 * 16;
    a.y_pixel = (y_rows * size + 15) / 16 * 16;
    const int y_run = run * stride;
    const bool pad_y = v.stride > 0 && a.segments == 1;
    if (half) {  // eight matrix rows of 16 bytes: 4 runs x 2 pixels
      if (a.x_pixel / 16 % 2 == 0) a.x_pixel += 16;
      if (a.y_pixel / 16 % 2 == 0) a.y_pixel += 16;
      a.x_run_pad = Padding(run * a.x_pixel, 2 * a.x_pixel, 128);
      if (pad_y) a.y_run_pad = Padding(y_run * a.y_pixel, 2 * a.y_pixel, 128);
    } else {  // 8 channels x 4 runs
      a.x_run_pad = Padding(run * a.x_pixel, 32, 128);
      if (pad_y) a.y_run_pad = Padding(y_run * a.y_pixel, 32, 128);
    }
    x_row = int64_t{a.pixels} * a.x_pixel + a.runs * a.x_run_pad;
    y_row = int64_t{a.y_pixels} * a.y_pixel + (a.y_pixels - 1) / y_run * a.y_run_pad;
    // A thread copies one unit of every position that it looks after, even in narrow copies.
    if (std::max(a.x_channels, a.y_channels) * size > 4 * 32 * kWeightGradCopyWarps) return false;
    if (a.y_pixels >= 1 << 15) return false;
  } else if (WeightGradUnits(last, v.stride)) {
    // A thread reads 32 bytes apart from the next of the same row (16 bytes, of x with a stride).
    // Vectors of 16 bytes then want rows an odd number of units apart (four more than a multiple of
    // eight). Float32 rows whose offsets differ are read by words, from rows an even number apart
    // of which four are a unit further on.
    const int unit = 16 / size;
    const auto whole = [&](int64_t stride) { return stride % unit == 0; };
    const auto all_whole = [&](const Strides& s) {
      return whole(s.n) && whole(s.c) && whole(s.s[0]) && whole(s.s[1]);
    };
    a.x_units = (a.pixels + 2 * unit - 2) / unit;
    a.y_units = (a.y_pixels + 2 * unit - 2) / unit;
    a.y_spread = !half && a.ys.c % 2 != 0;
    a.x_aligned = all_whole(a.xs);
    a.y_aligned = all_whole(a.ys) && whole(a.pad[2]) && a.segments == 1;
    a.x_pixel = a.y_pixel = size;
    a.x_channel = 16 * (run * size == 16 ? a.x_units + Padding(a.x_units, 4, 8) : a.x_units | 1);
    a.y_channel = 16 * (a.y_spread ? (a.y_units + 2) / 2 * 2 : a.y_units | 1);
    if (a.y_units > 32 * 16) return false;
    x_row = int64_t{x_rows} * a.x_channel;
    y_row = int64_t{y_rows} * a.y_channel + 16;  // vectors of a window may end in the next unit
  } else {
    // Rows of an odd number of words.
    const int x_words = half ? a.pixels / 2 + 1 : a.pixels;
    const int y_words = half ? a.y_pixels / 2 + 1 : a.y_pixels;
    a.x_pixel = a.y_pixel = size;
    a.x_channel = 4 * (x_words | 1);
    a.y_channel = 4 * (y_words | 1);
    if (y_words > 1024) return false;  // a warp's 32 words at a time, counted in 32 bits
    x_row = int64_t{x_rows} * a.x_channel;
    y_row = int64_t{y_rows} * a.y_channel;
  }
  // A window of 16-bit words is rounded up, so it may read past its row, where the ring's next slot
  // is being filled: what is read there is not used, but room keeps the two apart.
  if (half) y_row += last ? 4 * a.y_pixel + a.y_run_pad : 8;
  x_row = (x_row + 15) / 16 * 16;
  y_row = (y_row + 15) / 16 * 16;
  const int64_t x_stage = x_row * c.images * c.depth, y_slot = y_row * c.images * a.y_depth;
  // Windows of the last row may read a little further.
  const int64_t slack = 16 + 4 * std::max(a.x_pixel, a.y_pixel);
  const int64_t x_base = (y_slot * a.slots + 15) / 16 * 16;
  int64_t shared = (x_base + x_stage * (c.ahead + 1) + slack + 127) / 128 * 128;
  const int64_t b_base = shared;
  if (v.group) {
    const int x_words = half ? run / 2 : run;
    shared += int64_t{CeilDiv(int64_t{c.images} * c.depth * c.runs, 4)} * x_words * c.ci_slots *
              v.octets * 128;
  }
  if (a.pixel_slots > 1) {
    const int sums = 4 * pairs_of_warp * v.taps * v.octets;
    shared = std::max(shared, int64_t{kWeightGradWarps / a.pixel_slots} * sums * 128);
  }
  a.barrier = static_cast<int>(shared);
  shared += 16;
  if (shared > SharedMemoryOfBlock(device.compute_capability)) return false;
  if (int64_t{c.images} * c.depth * c.runs >= 1 << 15) return false;
  a.x_row = static_cast<int>(x_row);
  a.y_row = static_cast<int>(y_row);
  a.x_stage = static_cast<int>(x_stage);
  a.y_slot = static_cast<int>(y_slot);
  a.x_base = static_cast<int>(x_base);
  a.b_base = static_cast<int>(b_base);
  a.shared = static_cast<int>(shared);
  return true;
}

int64_t Blocks(const WeightGradArgs& a) {
  return int64_t{a.parts} * a.group_blocks * a.ci_blocks * a.co_blocks * a.pair_blocks;
}

// Bytes of the parts, where there are several, and behind them of `kept`.
int64_t PartsBytes(const WeightGradArgs& a) { return a.parts > 1 ? 4 * a.parts * a.w_elements : 0; }
int64_t KeptOffset(const WeightGradArgs& a) { return (PartsBytes(a) + 127) / 128 * 128; }
int64_t Workspace(const WeightGradVariant& v, const WeightGradArgs& a) {
  if (a.flush == 0) return PartsBytes(a);
  return KeptOffset(a) + Blocks(a) * kWeightGradWarps * WeightGradSums(v) * 128;
}

// Chooses the number of parts and says how long it should take. Clock cycles of a step: what tensor
// cores, shared memory and instruction issue of a multiprocessor want, and the latency of a warp's
// own instructions. Bytes: what blocks stage,
// halos and repeated columns included. The instruction counts were read off the compiled kernels.
double Cost(const Problem& p, const Device& device, const WeightGradVariant& v, WeightGradArgs& a) {
  constexpr double kClock = 1.7e9, kIssue = 2.2;           // instructions a cycle, all warps
  const double bandwidth = device.multiprocessors * 30e9;  // device memory, of the H200's class
  const int size = static_cast<int>(SizeOf(p.in_dtype));
  const bool half = size == 2, last = p.channels_last;
  const int run = WeightGradRun(half, v.stride);
  const int window = v.stride == 0 ? run : (run - 1) * v.stride + v.taps;
  const double words = half ? (window + 1) / 2 + 1 : window, x_words = half ? run / 2 : run;

  const int64_t columns = int64_t{a.group_blocks} * a.ci_blocks * a.co_blocks * a.pair_blocks;
  const int64_t resident = device.multiprocessors;
  const int64_t limit = p.YElements() * size / 10 / (4 * a.w_elements);
  const int64_t parts = std::min({std::max<int64_t>(resident / columns, 1), limit, a.steps});
  a.parts = static_cast<int>(std::max<int64_t>(parts, 1));

  // Long sums are added up in the workspace, where it has room.
  const int step_products =
      CeilDiv(int64_t{a.images} * a.depth * a.runs, 4 * a.pixel_slots) * (half ? run / 4 : run / 2);
  a.flush = std::max(1, kWeightGradFlush / step_products);
  if (CeilDiv(a.steps, a.parts) <= a.flush || Workspace(v, a) > p.YElements() * size / 10) {
    a.flush = 0;
  }

  const int block_pairs = std::min(CeilDiv(a.rows, 16), a.pair_slots * a.slot_pairs);
  const double pairs = block_pairs, slots = CeilDiv(block_pairs, a.slot_pairs);
  const double warps = a.groups_per_block * a.ci_slots;
  const int chunks = CeilDiv(int64_t{a.images} * a.depth * a.runs, 4);
  const double loads = 2 * pairs * words * (v.stride == 0 ? 2 : 1) + slots * v.octets * x_words;
  const double products = pairs * v.taps * v.octets * x_words / 2;
  // A chunk of all warps that share it: loads, their conversion, and what surrounds them.
  const bool units = WeightGradUnits(last, v.stride);
  const double per_load = units  ? (a.y_aligned  ? 0.4
                                    : a.y_spread ? 1
                                                 : 2.4) +
                                       (half ? 0.4 : 1)
                          : half ? (last ? 0.6 : 2.5)
                                 : (last ? 3 : 2);
  const double chunk = per_load * (2 * pairs * words + slots * v.octets * x_words) +
                       products * (half ? 2 : 1.3) + 60 * slots + 12 * pairs;
  const double new_rows = a.isize[1] == 1 ? a.window : a.advance;
  const double x_rows = double{1} * a.images * a.depth, y_rows = new_rows * a.images * a.y_depth;
  double copies;
  if (last) {
    const double x = double{1} * a.pixels * a.x_channels, y = double{1} * a.y_pixels * a.y_channels;
    copies = (x_rows * x + y_rows * y) * size / a.vector / 32 * 7 + (x_rows + y_rows) * 130;
  } else if (units) {
    const auto row = [&](int channels, int units_of_row, bool padded) {
      const double each = CeilDiv(channels, 8), fours = CeilDiv(units_of_row, 4);
      return 120 +
             (!v.group && units_of_row >= 16 ? each * (24 + 2 * fours) : fours * (16 + 4 * each)) +
             (padded ? 30.0 * CeilDiv(channels * 16 / size, 32) / a.column_blocks : 0);
    };
    copies = x_rows * row(a.x_channels, a.x_units, false) +
             y_rows * row(a.y_channels, a.y_units, a.pad[2] > 0);
  } else {
    const double x = 40 + 3.0 * CeilDiv(a.pixels * size, 128);
    const double y = 40 + 3.0 * CeilDiv(a.y_pixels * size, 128);
    copies = x_rows * (a.x_channels * x + 80) + y_rows * (a.y_channels * y + 80);
  }
  double instructions = chunk * warps * chunks + copies + 150.0 * kWeightGradWarps;
  // Warps' own latencies, of which only a few run side by side.
  const double bytes =
      (x_rows * a.x_channels * a.pixels + y_rows * a.y_channels * a.y_pixels) * size;
  const double warp_pairs = a.slot_pairs;
  const double warp_chunk = chunk / slots * (1 + warp_pairs * slots / pairs) / 2;  // the busiest's
  double multiply = (warp_chunk * CeilDiv(chunks, a.pixel_slots) + 150) * 4.5 + 250;
  const double copy = (copies / kWeightGradCopyWarps + 250) * 4 + 250;
  const double arrival = bytes / (bandwidth / device.multiprocessors / kClock);
  double tensor = 2.0 * products * warps * chunks, shared_loads = loads * warps * chunks;
  if (v.group) {
    // Of a group and a pair of each of its warps: products, instructions that load and issue them.
    // Before them all warps bring x into its place.
    const double group_products = v.taps * x_words / 2;
    const double pair =
        per_load * 2 * words + (v.stride == 0 ? words : 0) + 5 * group_products + 50;
    const double groups = a.pair_slots * a.ci_slots / 4.0 * a.slot_pairs;
    const double placing = chunks * a.ci_slots * v.octets * (3 * x_words + 30);
    tensor = chunks * groups * group_products * v.octets * 4 * 1.15;
    shared_loads = chunks * groups * 4 * 2 * words + chunks * a.ci_slots * v.octets * 2 * x_words;
    instructions = chunks * groups * 4 * pair + placing + copies + 200.0 * kWeightGradWarps;
    multiply = std::max(tensor, CeilDiv(chunks, a.pixel_slots) * a.slot_pairs * pair * 2.5) +
               placing / kWeightGradWarps * 3 + 600;
  }
  const double throughput = std::max({tensor, shared_loads, instructions / kIssue});
  const double latency = a.ahead == 1 ? 1200 : 0;  // of the last copy, which nothing hides
  const double cycles = std::max({throughput, multiply, copy, arrival}) + latency;

  const double blocks = static_cast<double>(columns) * a.parts;
  const double steps = static_cast<double>(CeilDiv(a.steps, a.parts));
  const double waves = CeilDiv(static_cast<int64_t>(blocks), resident);
  const double busy = steps * waves * cycles / kClock;
  const double least = double(p.XElements() + p.YElements()) * size / bandwidth;
  const double staged = bytes * static_cast<double>(a.steps) * static_cast<double>(columns);
  // Over 20 layers in either layout the times were so much longer on average (H100).
  const double slower = p.channels_last ? 1.25 : 1.5;
  double seconds = slower * std::max({busy, least, staged / (1.3 * bandwidth)}) + 6e-6;
  seconds += waves * 4e-6;  // starting a block and writing its sums
  if (a.parts > 1) seconds += 3e-6 + 4.0 * a.parts * static_cast<double>(a.w_elements) / 2e12;
  return seconds;
}

// Calls visit(variant, args, seconds) for every plan that fits.
template <class Visit>
void ForEachPlan(const Problem& p, const Device& device, Visit visit) {
  const WeightGradArgs common = Common(p);
  const bool half = SizeOf(p.in_dtype) == 2;
  const int octets_of_co = CeilDiv(p.cog(), 8);
  const bool whole_octets = p.cig() % 8 == 0 && p.cog() % 8 == 0;
  const auto try_walks = [&](const WeightGradVariant& variant, Choice choice) {
    const int runs = CeilDiv(p.isize[2], WeightGradRun(half, variant.stride));
    for (int cut = 1; cut <= runs; cut *= 2) {
      choice.runs = CeilDiv(runs, cut);
      if (choice.runs > 128) continue;
      for (choice.depth = 1;; choice.depth *= 2) {
        choice.depth = static_cast<int>(std::min<int64_t>(choice.depth, p.isize[0]));
        for (choice.images = 1;; choice.images *= 2) {
          for (choice.ahead = 3; choice.ahead >= 1; --choice.ahead) {
            WeightGradArgs args = common;
            if (!Complete(p, device, variant, choice, args)) continue;
            const double seconds = Cost(p, device, variant, args);
            visit(variant, args, seconds);
          }
          if (choice.depth < p.isize[0] || choice.images >= p.n || choice.images >= 16) break;
        }
        if (choice.depth >= p.isize[0] || choice.depth >= 8) break;
      }
    }
  };
  for (const WeightGradVariant& v : kVariants) {
    if (v.stride != 0 && (p.stride[2] != v.stride || p.dilation[2] != 1)) continue;
    if (v.stride != 0 && (CeilDiv(p.k[2], v.taps) - 1) * v.taps >= p.k[2]) continue;
    if (v.group && v.taps == 7 && !half) continue;  // not enough registers: products wait in turn
    if (v.group ? !HasWgmma(device.compute_capability) || p.cig() <= v.octets * 8 - 16
                : (v.octets == 1) != (p.cig() <= 8)) {
      continue;
    }
    for (int groups = 1; groups <= (v.group ? 1 : kWeightGradWarps); groups *= 2) {
      if (p.groups % groups != 0) continue;
      if (groups > 1 && p.channels_last && !whole_octets) continue;
      for (int ci_slots = 1; ci_slots * groups <= kWeightGradWarps; ci_slots *= 2) {
        if (ci_slots > 1 && ci_slots / 2 * v.octets * 8 >= p.cig()) continue;
        if (groups > 1 && ci_slots * v.octets * 8 < p.cig()) continue;
        for (int pair_slots = v.group ? 4 : 1; pair_slots * ci_slots * groups <= kWeightGradWarps;
             pair_slots *= 2) {
          for (int co_octets = groups > 1 ? octets_of_co : 1;; co_octets *= 2) {
            co_octets = std::min(co_octets, octets_of_co);
            try_walks(v, {groups, co_octets, ci_slots, pair_slots, 0, 0, 0, 0});
            if (co_octets >= octets_of_co || co_octets >= 16) break;
          }
        }
      }
    }
  }
}

WeightGradPlan Search(const Problem& p, const Device& device) {
  WeightGradPlan best{};
  best.refusal = Refuse(p, device);
  if (!best.refusal.empty()) return best;
  if (p.XElements() == 0 || p.YElements() == 0 || p.WElements() == 0) {
    best.seconds = 2e-6;
    return best;
  }
  best.refusal = "finds no cut that fits into shared memory";
  best.seconds = std::numeric_limits<double>::infinity();
  ForEachPlan(p, device,
              [&](const WeightGradVariant& variant, const WeightGradArgs& args, double seconds) {
                if (seconds >= best.seconds) return;
                best.refusal.clear();
                best.variant = variant;
                best.args = args;
                best.seconds = seconds;
              });
  best.workspace = Workspace(best.variant, best.args);
  best.kept_offset = KeptOffset(best.args);
  best.blocks = Blocks(best.args);
  return best;
}

}  // namespace

WeightGradPlan PlanWeightGrad(const Problem& p, const Device& device) {
  return Remember<WeightGradPlan>(p, device, [&] { return Search(p, device); });
}

void AddWeightGrad(std::vector<Row>& rows) {
  rows.push_back({"mma", Pass::kWeightGrad,
                  [](const Problem& p, const Device& d) { return PlanWeightGrad(p, d).refusal; },
                  [](const Problem& p, const Device& d) { return PlanWeightGrad(p, d).workspace; },
                  [](const Problem& p, const Device& d) { return PlanWeightGrad(p, d).seconds; },
                  LaunchWeightGrad});
}

}  // namespace jaxconv::cuda
