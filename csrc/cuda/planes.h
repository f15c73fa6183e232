// "planes": the forward and the input gradient of few channels a group, on the tensor cores. It is
// the correlation of cuda/correlate.h on another data path: a block marches along one axis through
// a column of the input, planes go round in shared memory, and whole rows of results leave it by
// bulk copies. docs/gpu_kernels.md explains the kernel.
#ifndef JAXCONV_CUDA_PLANES_H_
#define JAXCONV_CUDA_PLANES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddPlanes(std::vector<Row>& rows);

// One axis: out[q * so + r] reads in[q * si + source]. A step needs `length` sources. Axis 0 is
// marched along, one q a step, `box` steps a column.
struct PlanesAxis {
  int in_size, out_size;
  int in_step, out_step;  // elements between neighbours
  int si, so;
  int first;  // source of q = 0 that lies first
  int q_size, box, tiles, length;
};

// A source that some taps of a phase set share, relatively to that of the pixel.
struct PlanesEntry {
  int row;           // bytes from the first row of a plane
  uint16_t right;    // pixels from the first of a row
  uint16_t plane;    // of those that a step needs
  uint16_t columns;  // a bit for each column that has a tap there; entries of a kind are neighbours
};

// A tap, and the place of its weights among those of its entry, for one tile of output channels.
struct PlanesTap {
  uint16_t tap, first;  // taps of the phase set before those of the entry
  uint8_t set, index, count;
};

struct PlanesArgs {
  static constexpr int kBarriers = 384;  // bytes
  static constexpr int kMaxTaps = 512, kMaxPhaseSets = 64, kMaxSlots = 16, kWarps = 8;
  // Masks of the entries of kernels with strides of two and padding of half the kernel: of the
  // sources of 3 taps on an axis one serves both phases and one the second, of 5 two serve both and
  // one the first, of 7 three serve both and one the second.
  static constexpr uint8_t kMasks3x3x3[] = {255, 240, 204, 192, 170, 160, 136, 128};
  static constexpr uint8_t kMasks3x5x7[] = {255, 255, 255, 255, 255, 255, 240, 240,
                                            240, 240, 240, 240, 170, 170, 160, 160,
                                            51,  51,  51,  48,  48,  48,  34,  32};
  enum Pattern : int { kNone, k3x3x3, k3x5x7 };
  const void* in;
  const void* in_end;
  const void* w;
  const void* bias;  // [groups * jg], or null
  void* out;
  PlanesAxis axis[kAxes];
  int64_t in_n_step, out_n_step, in_c_step, out_c_step;
  int64_t w_g_step, w_c_step, w_j_step;
  int groups_beside;  // groups of a block
  int jg;
  int columns;                        // to walk through, by the grid's first axis
  int slots, fresh;                   // planes in shared memory, and those that a step brings
  int plane, block_pitch, row_pitch;  // bytes of a plane, of 16 bytes of channels, of a row
  int rows;                           // that one warp copies, of a plane
  int blocks_beside;  // channels last: blocks of a pixel that neighbouring lanes copy
  SmallDivisor by_height;
  int taps, phase_sets, set_phases, set_tiles, column_sets;
  int wn, units;                           // column sets side by side, and a step's tiles of pixels
  int across;                              // tiles of pixels in a row
  int stages;                              // 1 or 2
  int run_pitch, channel_pitch, run_rows;  // bytes, and runs of a channel and plane
  int pixel_pitch;                         // bytes, channels last
  int weights, stage;                      // bytes, of a group and of a step
  int smem_weights, smem_places, smem_stage, smem_ring;  // bytes
  bool last, staged, pairs, flat, out_f32;
  Pattern pattern;
  uint16_t first_entry[kMaxPhaseSets + 1], first_tap[kMaxPhaseSets + 1];
  PlanesEntry entry[kMaxTaps];
  PlanesTap tap[kMaxTaps];
};

// Blocks that a multiprocessor has registers for, and their warps that copy.
constexpr int PlanesBlocks(int mt, int nc) { return mt * nc > 8 || nc == 1 ? 1 : 2; }
constexpr int Arrangers(int mt, int nc) { return nc == 1 ? 15 : PlanesBlocks(mt, nc) == 1 ? 7 : 3; }

struct PlanesPlan {
  std::string refusal;  // the sentence's end; empty: the rest is meant
  int mt, nc, grid_x, grid_y, smem;
  double seconds;
  PlanesArgs args;
};

// A tile: 0 means that the cost model chooses.
struct PlanesTile {
  int mt = 0, nc = 0, wn = 0, box_w = 0, box_h = 0, march = 0, stages = 0, slots = 0;
};
PlanesPlan PlanPlanes(const Problem&, const Device&, const PlanesTile& = {});

cudaError_t LaunchPlanes(const Problem&, const Operands&, const PlanesPlan&, cudaStream_t);

// Defined in one small file a dtype, so that they compile in parallel.
template <class T>
cudaError_t EnqueuePlanes(const PlanesPlan&, const PlanesArgs&, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_PLANES_H_
