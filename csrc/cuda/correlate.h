// "mma": the forward and the input gradient on the tensor cores (mma.sync), for groups of a few or
// of many channels. Both passes are one correlation,
//
//   out[q * out_stride + r, j] = sum over taps of phase r, c   in[q * in_stride + e(tap), c] *
//   w[tap, c, j]
//
// the forward with in_stride 1 and the input gradient with out_stride 1. docs/gpu_kernels.md
// explains the kernel.
#ifndef JAXCONV_CUDA_CORRELATE_H_
#define JAXCONV_CUDA_CORRELATE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/table.h"

namespace jaxconv::cuda {

void AddCorrelate(std::vector<Row>& rows);

// One axis of the correlation. In a block, the sources that are si * a + rho[s] past the first one
// needed lie at s * length + a: the steps of q then always are steps of one in shared memory.
struct CorrelateAxis {
  static constexpr int kMaxSlots = 8;
  int in_size, out_size;
  int in_step, out_step;  // elements between neighbours
  int si, so;             // strides of the input and of the output
  int first;              // source of q = 0 that lies first
  int box, log_box;       // q's of a block
  int tiles;              // blocks
  int length, slots;      // sources of a block: slots * length
  int rho[kMaxSlots];
};

// What the main kernel needs to know.
struct CorrelateArgs {
  const void* in;
  void* out;
  const void* bias;     // [groups * jg], or null
  const int4* steps;    // [phase_sets][steps]: shared-memory offsets of two blocks, two masks
  const char* weights;  // [groups][column_sets][chunks][steps][NC][2][32 lanes] words
  CorrelateAxis axis[kAxes];
  int64_t in_n_step, out_n_step;
  int64_t in_c_step, out_c_step;
  int n, box_n;
  int groups, cg, jg;                   // channels of a group, contracted and produced
  int halo, plane;                      // pixels staged, and the pitch of their 16-byte blocks
  int chunks, chunk_blocks, planes;     // channels are staged chunk_blocks * 16 bytes at a time
  int steps_padded, slab_steps, slabs;  // steps of a chunk, in slabs of the weights' ring
  int phase_sets, set_phases, set_tiles;
  int tiles_j;  // tiles of eight output channels
  int column_sets, sets_per_block, wn;
  int spatial_tiles, ring, buffers;
  int stage_words;                               // of a warp's output stage; 0: store directly
  int smem_table, smem_in, smem_ring, smem_out;  // byte offsets
  bool vector_in, vector_out, out_f32, split;
};

// What the kernel that packs the weights needs to know beyond that.
struct CorrelatePack {
  static constexpr int kMaxTaps = 2048, kMaxPhaseSets = 256;
  const void* w;
  int4* steps;
  char* weights;
  int64_t w_g_step, w_c_step, w_j_step;
  int groups, taps, cg, jg, tiles_j, chunks, chunk_blocks, plane, steps_padded;
  int phase_sets, set_phases, set_tiles, column_sets, nc;
  bool split;
  uint16_t tap_entry[kMaxTaps];  // place of the tap's offset in its phase set's list
  uint16_t tap_phase[kMaxTaps];
  uint16_t entry_offset[kMaxTaps];  // the lists, one phase set after another: pixels, and
  uint16_t entry_mask[kMaxTaps];    // the columns that have a tap there
  uint16_t first_entry[kMaxPhaseSets + 1];
};

// What a launch is made of, but for the pointers.
struct CorrelatePlan {
  std::string refusal;  // the sentence's end; empty: the rest is meant
  bool group;           // wgmma: tiles of 64 pixels, else mma.sync: of 16
  int mt, nc, warps, grid_x, grid_y, smem;
  int64_t steps_bytes, weights_bytes;
  double seconds;
  CorrelateArgs args;
  CorrelatePack pack;
};

// A tile: 0 means that the cost model chooses.
struct CorrelateTile {
  int group = -1;  // 0 and 1 choose
  int mt = 0, nc = 0, warps = 0, wn = 0, chunk_blocks = 0, box_w = 0, box_h = 0, rounds = 0;
};
CorrelatePlan PlanCorrelate(const Problem&, const Device&, const CorrelateTile& = {});

cudaError_t LaunchCorrelate(const Problem&, const Operands&, const CorrelatePlan&, cudaStream_t);

// Defined in one small file a dtype, so that they compile in parallel.
template <class T>
cudaError_t EnqueueCorrelate(const CorrelatePlan&, const CorrelatePack&, const CorrelateArgs&,
                             cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_CORRELATE_H_
