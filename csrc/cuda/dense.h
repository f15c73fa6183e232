// "dense": the forward and the input gradient of layers with many channels on Hopper. The
// correlation is that of correlate.h; here bulk tensor copies stage boxes of the input, groups of
// four warps multiply (wgmma), and warps of their own keep the copies going. docs/gpu_kernels.md
// explains the kernel.
#ifndef JAXCONV_CUDA_DENSE_H_
#define JAXCONV_CUDA_DENSE_H_

#include <cuda.h>  // types alone: the driver is not linked

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddDense(std::vector<Row>& rows);

inline constexpr int kDenseQuad = 4;  // steps

// A box of sources of the input, all of one residue by the input's stride, and the taps that read
// it. Its sources are (tile * box + v) * si + first[axis] for v < length[axis].
struct DenseSegment {
  int first[kAxes];  // where there is a map: in it, which has the sources of the residue alone
  int16_t map;
  int16_t lead;               // channels first: from the first source that is loaded
  int16_t sums;               // and to which phase's sums it adds, where a program has two
  int16_t taps, first_shift;  // of `shift`
  int entries;                // where its lists of steps begin: of a full chunk, and of the last
  int steps;                  // where its weights begin
};

// What one output phase needs (or all of them, where they share their sources; or both of the last
// axis).
struct DenseProgram {
  int16_t phase, first_segment, segments;
  int steps, quads;  // where its weights begin, and how many groups of four steps it takes
};

struct DenseAxis {
  int q_tiles, box, length;  // tiles; outputs of a tile and sources that they need
  int part;                  // outputs of one of the two groups of warps
  int si, so;
  int in_size, out_size;
  int64_t in_step, out_step;  // elements between neighbours
};

// What the main kernel needs to know. A step is 32 bytes of contracted channels of one tap, a quad
// is four steps, a stage is one box and one chunk of channels.
struct DenseArgs {
  static constexpr int kMaxTaps = 256, kMaxSegments = 64, kMaxPhases = 32;
  static constexpr int kMaxBuffers = 4, kMaxRing = 32;
  const char* weights;  // [groups][column_tiles][steps][N / 8][2][8 rows of 16 bytes]
  void* out;
  const void* in;
  const void* bias;  // [groups * jg], or null
  DenseAxis axis[kAxes];
  int64_t in_n_step, out_n_step, in_c_step, out_c_step;
  int n, box_n, part_n;
  // Along n, d, h, w: pixels of a patch (see DensePatch), distances in pixels between neighbours in
  // a staged box and in a group's part of the results.
  int patch[kAxes + 1], in_pitch[kAxes + 1], out_pitch[kAxes + 1];
  int in_eights, out_eights;  // the same between a patch's groups of eight
  int pieces, piece_length;   // copies of a box, side by side along the last axis
  // Channels first ("rows"): segments of a family share sources: residues along the last axis,
  // whose pixels become stages of their own; or phases along it (`paired`), which read the same
  // stages and have sums of their own. Boxes are copied as they are and turned in shared memory
  // (`raws` of them are under way), by bulk copies (`boxes`) or, if rows are not of a multiple of
  // 16 bytes, word by word; or pixels are loaded (no raws).
  int members;                                   // segments of a family, or 1
  int raws, raw_bytes, raw_piece;                // of a box, and of a piece of it
  int raw_lead;                                  // the least of all segments
  int raw_box, raw_channel, raw_plane, raw_row;  // elements of an image's, and between neighbours
  int raw_rows;                                  // rows of a channel, or pieces of its row
  int out_channel, out_image;  // and between channels and images of results on their way out
  int groups, cg, jg, programs, column_tiles, items;
  // Programs differ in work, and a block takes every so manieth item. So items come in bands of as
  // many tiles of pixels (of a group; of a pair) as blocks take at once, program by program: each
  // block gets all programs equally often. All tiles, those of a band, and a band's items.
  int tiles, band;
  Divisor by_band_items, by_band, by_last_band, by_column_tiles, by_groups, by_q_tiles[kAxes];
  int columns;                 // of a group: jg, times the phases where `fused`
  int row_bytes, swizzle;      // of a staged pixel; which address bits are swizzled
  int chunks, chunk_channels;  // the last chunk may have fewer steps than the others
  int full_steps, last_steps;  // of a tap
  int total_steps;             // of all programs
  int pixels, stage_bytes;     // of a stage
  int buffers, ring;           // stages and quads of weights in flight
  // Blocks of a cluster: each of `pair` neighbours has another tile of pixels and fetches a part of
  // their weights for both, and `split` such share the stages of their items.
  int split, pair, cluster;
  int segments;
  int in_maps;     // in front of those of the output
  int terms;       // products of a step: three of split float32 operands ("highest"), or one
  int part_bytes;  // of a stage: of the high parts of its operands, or all
  int store_columns, store_bytes, store_swizzle, store_pitch;  // of results on their way out
  int store_stages;                                            // for them, of a group of warps
  // Byte offsets.
  int smem_sources, smem_entries, smem_in, smem_out, smem_ring, smem_raw, smem_waste;
  bool images, fused, resident, rows, out_f32;  // images: they are innermost in boxes
  Divisor by_raw_row, by_length[2];
  // sends: results of channels first leave by bulk copies; twos: else two neighbours at a time.
  bool boxes, paired, sends, twos;
  bool matrices;  // boxes are turned by matrices of eight by eight
  // Where the taps of the last axis are columns ("folded"): how many taps and how many channels
  // beside each other; outputs in front of those of the first tile's first source; and where, from
  // that of an output's lowest source, the first tap's source lies, and each next one's.
  int fold_taps, fold_channels, fold_lead, fold_first, fold_step;
  // Groups that lie beside each other in a staged pixel ("grouped"), or 1: a step is of one of
  // them, with products of its own. `groups` counts such sets, cg and jg are those of a set.
  int sets;
  DenseProgram program[kMaxPhases];
  DenseSegment segment[kMaxSegments];
  uint16_t shift[kMaxTaps];  // of the taps, in pixels of the staged box, segment by segment
};

// Channels first: threads that stage rows; of them, those that copy boxes, word by word unless a
// bulk copy does, and those that turn them. Each warp of these has bytes to waste.
inline constexpr int kDenseLoaders = 224, kDenseWaste = 128;
constexpr int DenseCopiers(const DenseArgs& a, size_t element) {
  return a.boxes ? 32 : element == 4 ? 64 : 96;
}
constexpr int DenseTurners(const DenseArgs& a, size_t element) {
  return kDenseLoaders - DenseCopiers(a, element);
}

// What the kernel that packs the weights needs to know beyond that.
struct DensePack {
  static constexpr uint8_t kUnused = 255;
  static constexpr int kTaps = 32;   // of a block at most
  static constexpr int kUnits = 40;  // its taps by tiles or steps at most, with padding
  const void* w;
  void* weights;
  int64_t w_g_step, w_c_step, w_j_step;
  int taps, groups, cg, jg, column_tiles;
  int tiles, used_tiles;  // of eight columns: in a column tile, and all that are stored
  int phase_tiles;        // that lie beside each other: of a phase, or of a folded tap
  int all_tiles;          // of a phase: those of its channels, and those that no phase stores
  // A block packs so many tiles of columns, steps of channels and taps. Its weights lie in memory
  // in rows, of columns by taps (forward) or of channels by taps, and in shared memory c_pitch and
  // j_pitch elements apart.
  int log_tiles, log_steps, range, ranges, c_pitch, j_pitch;
  SmallDivisor by_range;
  bool columns_inside;
  int channel_steps, log_chunk;  // channel steps: of 32 bytes; of a group, and of a chunk
  int chunks, chunk_channels, full_steps, last_steps, total_steps;
  int terms;
  // Of a segment: where its weights for the first chunk begin, those for the next one after that,
  // and those for the last one.
  int steps[DenseArgs::kMaxSegments], hop[DenseArgs::kMaxSegments], last[DenseArgs::kMaxSegments];
  int16_t segment_taps[DenseArgs::kMaxSegments];
  uint8_t tap_segment[DenseArgs::kMaxTaps];    // or kUnused: of a phase without outputs
  uint8_t tap_phase[DenseArgs::kMaxTaps];      // or its place among folded taps
  uint16_t tap_position[DenseArgs::kMaxTaps];  // within its segment
};

// The same where the phases are spread over the columns, whatever they read: columns are phases by
// channels, and a step is of a source that some of them read, with zeros for the others.
struct SpreadPack {
  static constexpr int kMaxSources = 40, kMaxPhases = 8;  // of an axis
  static constexpr int kMaxSteps = 1024;
  static constexpr uint16_t kPadding = 0xffff;
  struct Step {
    uint8_t at[kAxes];  // which sources
    uint16_t index;     // of 32 bytes of channels, or of a group in its set; or kPadding
  };
  const void* w;
  void* weights;
  int64_t w_g_step, w_c_step, w_j_step;
  int sets, cg, jg, columns, steps, k[kAxes], so[kAxes];  // no steps: not spread
  int16_t tap[kAxes][kMaxSources][kMaxPhases];            // that reads it for the phase, or -1
  Step step[kMaxSteps];
};

// The bulk tensor copies (of channels last alone): of the sources of each residue by the stride,
// then of each phase of the output.
struct DenseMaps {
  CUtensorMap map[DenseArgs::kMaxSegments + 1];
};

// The geometry of one of them.
struct DenseMap {
  uint64_t size[5], stride[4];  // stride in bytes
  uint32_t box[5], step[5];     // step: in elements of the tensor
  int64_t offset;               // of the first element, in bytes
  int row_bytes;                // of the box
};

// What a launch is made of, but for the pointers.
struct DensePlan {
  std::string refusal;  // the sentence's end; empty: the rest is meant
  int mt, columns;      // a group of warps multiplies mt * 64 pixels by this many columns
  int grid, smem;
  int merged;  // groups that run as one, with zeros between them
  int pack_grid[3];
  int64_t weights_bytes, expanded_bytes;
  double seconds, pack_seconds;  // in all; of packing the weights
  DenseArgs args;
  DensePack pack;
  SpreadPack spread;
  std::vector<DenseMap> in, out;
  std::vector<Sizes> residues;  // of the maps of the input

  int64_t Workspace() const { return weights_bytes + expanded_bytes; }
};

// What columns are: channels (of phases with the same sources); by taps of the last axis, whose
// products are kept apart, and outputs add them up ("fold"); by phases and neighbouring outputs,
// whatever they read ("blocks"); the same of groups beside each other ("grouped").
enum class DenseForm { kAny, kPlain, kFold, kBlocks, kGrouped };

// A tile: 0 means that the cost model chooses.
struct DenseTile {
  int mt = 0, columns = 0, buffers = 0, split = 0, pair = 0;
  int raws = 0;  // one more than there are
  int store_bytes = 0;
  int inside = 0;  // of boxes: 1 for pixels along the last axis, 2 for images
  DenseForm form = DenseForm::kAny;
  int box[kAxes] = {0, 0, 0};
};
DensePlan PlanDense(const Problem&, const Device&, const DenseTile& = {});

// A plan with its pointers, for any number of launches.
struct DenseLaunch {
  const void* w;
  void* expanded;  // the weights of merged groups
  DensePack pack;
  SpreadPack spread;
  DenseArgs args;
  DenseMaps maps;
};
cudaError_t PrepareDense(const Problem&, const Operands&, const DensePlan&, DenseLaunch&);

// `packs`: whether the workspace does not hold the packed weights yet.
cudaError_t RunDense(const Problem&, const DensePlan&, const DenseLaunch&, bool packs,
                     cudaStream_t);

// Defined in one small file a dtype, so that they compile in parallel.
template <class T>
cudaError_t EnqueueDense(const DensePlan&, const DenseLaunch&, bool packs, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_H_
