// "rows": the forward and the input gradient of few channels a group, channels first, on the tensor
// cores. It is the correlation of cuda/correlate.h on another data path: whole rows of the input go
// to shared memory by bulk copies, as they are, and the tensor cores' operands are read from there.
// docs/gpu_kernels.md explains the kernel.
#ifndef JAXCONV_CUDA_ROWS_H_
#define JAXCONV_CUDA_ROWS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/table.h"

namespace jaxconv::cuda {

void AddRows(std::vector<Row>& rows);

// One axis: out[q * so + r] reads in[q * si + source]. A block stages `length` sources.
struct RowsAxis {
  int in_size, out_size;
  int in_step, out_step;  // elements between neighbours
  int si, so;
  int first;  // source of q = 0 that lies first
  int box, tiles, length;
};

// A source that some taps of a phase set share.
struct RowsEntry {
  int place;         // bytes from the source of the pixel, in shared memory
  uint16_t columns;  // a bit for each column that has a tap there
  uint16_t turn;     // elements that its row lies past a multiple of 16 bytes, relatively
};

// A tap, and the place of its weights among those of its entry, for one tile of output channels.
struct RowsTap {
  uint16_t tap, first;  // taps of the phase set before those of the entry
  uint8_t set, index, count;
};

struct RowsArgs {
  static constexpr int kMaxTaps = 512, kMaxPhaseSets = 64, kWarps = 8;
  const void* in;
  const void* w;
  const void* bias;  // [groups * jg], or null
  void* out;
  RowsAxis axis[kAxes];
  int64_t in_n_step, out_n_step, in_c_step, out_c_step;
  int64_t w_g_step, w_c_step, w_j_step;
  int64_t whole;  // elements of the input, but for what follows its last multiple of 16 bytes
  int n, groups, cg, jg, tiles_j;
  int blocks;              // of channels: a step of the tensor cores each
  int pitch, plane, skew;  // bytes of a staged row, of a channel, and between channels' banks
  int taps, phase_sets, set_phases, set_tiles, column_sets;
  int wn, rounds;  // column sets side by side, and a warp's tiles of pixels one after another
  int tiles;       // of the grid's first axis to walk over
  int smem_table, smem_spots, smem_weights, smem_stage, smem_in, buffer;  // bytes
  bool ragged, out_f32;
  uint16_t first_entry[kMaxPhaseSets + 1], first_tap[kMaxPhaseSets + 1];
  RowsEntry entry[kMaxTaps];
  RowsTap tap[kMaxTaps];
};

// Blocks that a multiprocessor has registers for.
constexpr int BlocksBeside(int mt, int nc) { return nc == 1 || mt * nc >= 16 ? 1 : 2; }

struct RowsPlan {
  std::string refusal;  // the sentence's end; empty: the rest is meant
  int mt, nc, grid_x, grid_y, smem;
  double seconds;
  RowsArgs args;
};

// A tile: 0 means that the cost model chooses.
struct RowsTile {
  int mt = 0, nc = 0, wn = 0, rounds = 0, box_w = 0, box_h = 0;
};
RowsPlan PlanRows(const Problem&, const Device&, const RowsTile& = {});

cudaError_t LaunchRows(const Problem&, const Operands&, const RowsPlan&, cudaStream_t);

// Defined in one small file a dtype, so that they compile in parallel.
template <class T>
cudaError_t EnqueueRows(const RowsPlan&, const RowsArgs&, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_ROWS_H_
