// The plan of a "phases" kernel: how a transposed convolution falls into dense correlations.
//
// On every axis o = i * stride + t * dilation - pad. Outputs with o mod stride = r are one phase of
// y, and a tap belongs to exactly one phase, r(t) = (t * dilation - pad) mod stride. With
// o = stride * j + r(t) the equation loses its stride:
//
//   i = j + off(t) in the forward, j = i + off(t) in the gradients.
//
// The gradients count y with its padding, o + pad = stride * j + r(t), so that off(t) >= 0 and
// zeros of the padding lie at both ends of a row.
//
// All three passes are then stride-1 correlations between a source, which is contracted, and a
// destination, with K and M channels a group:
//
//   forward       source x, K = ci/groups;   destination y, M = co/groups, in stride phases
//   input grad    source y in stride phases; destination x
//   weight grad   as the input gradient, with x read and dw[m, k, t] summed over the positions
//
// Positions j of the destination's grid are cut into tiles. The source's grid positions that a tile
// hears are copied into a panel, [phase][channel][plane], zero where the source has no element.
// Planes are boxes, P0 x P1 x P2, of the tile and its halo, so that position (j0, j1, j2) of the
// tile is q = (j0 * P1 + j1) * P2 + j2 and a tap reads q + rel: one run of vectors covers the whole
// tile, and the few results between its rows are thrown away. Zeros after a row of the source also
// serve as the zeros before the next one: as far as the halo is zero on both sides, or heard by no
// position that exists, it is left out of P1 and P2 once.
#ifndef JAXCONV_CPU_PHASE_PLAN_H_
#define JAXCONV_CPU_PHASE_PLAN_H_

#include <cstdint>

#include "problem.h"

namespace jaxconv::cpu {

struct Tap {
  int64_t rel;  // offset in a plane: row * P2 + column
  int64_t row, column;
  int64_t t;     // index in the weight
  int64_t slot;  // index of its source phase among those with taps
};

// Where tap t of the weight is in the order of PhasePlan::taps.
struct Place {
  int64_t first, taps;  // of its destination phase
  int64_t index;        // its own, in that phase
};

// A source phase with taps. Phases up to `row_end` follow it one by one along axis 2, so that they
// interleave in a row; those up to `plane_end` share its phase along axis 0.
struct Slot {
  int64_t phase[3];
  int64_t row_end, plane_end;
};

// `mr` consecutive destination channels of a group, computed together.
struct Block {
  int64_t m0, mr;
};

// Elements between neighbours of an operand.
struct Distances {
  int64_t n, c, s[3];
};

// Plain data, because it is read by code compiled for several instruction sets: an inline function
// shared between them could be linked in the variant that the machine does not have.
struct PhasePlan {
  DType in_type, out_type;
  int64_t channels_last, src_last, dst_last;  // an operand of one channel is both first and last
  int64_t n, groups, k, m;
  Distances src, dst;
  int64_t src_size[3], dst_size[3];
  int64_t src_step[3], dst_step[3];  // the stride in the operand with phases, 1 in the other
  int64_t src_origin[3];             // position 0 of phase 0 is the element before 0 by so many
  int64_t lo[3];                     // least offset of a tap
  int64_t tile[3], tiles[3];         // positions of a tile; tiles
  int64_t span[3];                   // greatest offset less the least
  int64_t box[3];                    // P0, P1, P2
  int64_t tail;                      // what is read past a plane's boxes
  int64_t segment, segments;         // positions computed at once; how many times, a plane apart
  int64_t plane;                     // elements from one plane to the next
  int64_t row;                       // elements from one row of sums to the next
  const Tap* taps;                   // sorted by destination phase, then slot
  const Place* places;
  const int64_t* phase_begin;  // the taps of destination phase r: [r] .. [r + 1]
  int64_t ntaps;
  const Slot* slots;  // in the order of their phases
  int64_t nslots;
  int64_t slot_chunk, k_chunk;   // a panel holds so many source phases and channels a group
  const Block* blocks;           // of a group
  int64_t nblocks, group_chunk;  // a task does so many groups ...
  // ... and, if that is one group, one of so many parts of its blocks; in the weight gradient, of
  // its source channels.
  int64_t splits;
  int64_t acc_blocks;            // blocks computed before their sums are stored
  int64_t wg, wk, wm;            // strides of the weight along groups, source and destination
  int64_t parts;                 // weight gradient: sums over parts of the tiles
  int64_t panel_size, acc_size;  // elements of a thread's buffers

  bool one_panel() const { return slot_chunk >= nslots && k_chunk >= k; }
};

struct PhaseOperands {
  const void* src;
  const void* bias;
  void* dst;
  void* workspace;
};

// The code for one instruction set. A task needs scratch of panel_size + acc_size sums.
// Sums are kept in float, or in double for float64.
struct PhaseKernels {
  int64_t vector_bytes;
  int64_t max_mr;
  // Rearranges part `task` of `tasks` of the weight: [group][phase][block][k chunk][tap][k][mr].
  void (*pack_weight)(const PhasePlan&, const void* w, void* packed, int64_t task, int64_t tasks);
  void (*correlate)(const PhasePlan&, const PhaseOperands&, int64_t task, void* scratch);
  // Operand `dst` is x; the workspace gets the sums of each part.
  void (*weight_grad)(const PhasePlan&, const PhaseOperands&, int64_t task, void* scratch);
  // Adds the parts, of `size` sums each, in order, into part `task` of `tasks` of dw.
  void (*add_parts)(DType in_type, DType out_type, int64_t size, int64_t parts, const void* sums,
                    void* dw, int64_t task, int64_t tasks);
};

extern const PhaseKernels kPhasesPortable;
#if defined(__x86_64__)
extern const PhaseKernels kPhasesAvx2, kPhasesAvx512;
#endif

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_PHASE_PLAN_H_
