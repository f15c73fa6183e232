// Depthwise input gradients: so little is multiplied that copying y into planes, or listing its
// pixels, takes longer than the products. Here y is read where it lies: see depthwise_plan.h.
#include "cpu/depthwise.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "cpu/depthwise_plan.h"
#include "cpu/scratch.h"

namespace jaxconv::cpu {
namespace {

constexpr int64_t kTasks = 64, kFewTasks = 16;      // enough to share evenly
constexpr int64_t kPiece = 32;                      // inputs of a piece of a row, at least
constexpr int64_t kLongRow = int64_t{8} << 10;      // bytes that the processor foresees by itself
constexpr int64_t kNear = int64_t{256} << 10;       // what stays in the second-level cache
constexpr int64_t kMaxScratch = int64_t{16} << 20;  // bytes a task
constexpr int64_t kMaxPad = int64_t{1} << 16;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

DepthwisePlan PlanOf(const Problem& q, const DepthwiseKernels& kernels) {
  DepthwisePlan p{};
  p.problem = q;
  const int64_t size = SizeOf(q.in_dtype), lanes = kernels.vector_bytes / size;
  const int64_t pixel = q.channels_last ? q.ci : 1;
  p.planes = q.channels_last ? q.n : q.n * q.ci;
  p.vectors = CeilDiv(q.channels_last ? q.ci : q.isize[2], lanes);
  p.rows =
      q.channels_last || q.isize[1] == 1 ? 1 : std::max<int64_t>(kernels.vectors / p.vectors, 1);
  p.pieces = 1;
  if (q.channels_last) {  // of few long rows, enough to share
    const int64_t rows = std::max<int64_t>(p.planes * q.isize[0] * q.isize[1], 1);
    p.pieces = std::clamp<int64_t>(CeilDiv(kFewTasks, rows), 1, CeilDiv(q.isize[2], kPiece));
  }
  p.blocks = CeilDiv(q.isize[1], p.rows) * p.pieces;
  p.steps = p.planes * q.isize[0] * p.blocks;
  p.tasks = std::min(p.steps, kTasks);
  const int64_t reach = p.vectors * lanes * q.stride[2] + q.k[2];
  p.margin = std::max({q.pad[2], reach - q.pad[2] - q.osize[2], int64_t{0}});
  p.asks = p.pieces == 1 && q.osize[2] * pixel * size <= (q.channels_last ? kNear / 4 : kLongRow);
  p.keeps = q.k[0] * q.osize[1] * q.osize[2] * pixel * size <= kNear;
  p.scratch = p.vectors * q.k[2] * 4 + (q.osize[2] + 2 * p.margin) * size;
  return p;
}

template <const DepthwiseKernels& kernels>
void LaunchDepthwise(const Problem& problem, const Operands& ops, const Parallel& parallel) {
  const DepthwisePlan p = PlanOf(problem, kernels);
  if (problem.channels_last) {
    kernels.pack(p, ops.w, ops.workspace);
    parallel.For(p.tasks,
                 [&](int64_t task) { kernels.last(p, ops.y, ops.workspace, ops.out, task); });
    return;
  }
  parallel.For(p.tasks, [&](int64_t task) {
    kernels.first(p, ops.y, ops.w, ops.out, task, ThreadScratch(p.scratch));
  });
}

template <const DepthwiseKernels& kernels>
std::string Refuse(const Problem& q, const Device& device) {
  if (kernels.vector_bytes > device.vector_bytes) {
    return "needs vectors of " + std::to_string(kernels.vector_bytes) +
           " bytes, the processor has " + std::to_string(device.vector_bytes);
  }
  if (q.Empty()) return "takes no empty arrays";
  if (q.cig() != 1 || q.cog() != 1) return "wants one input and one output channel a group";
  if (q.in_dtype != DType::kF32) return "takes float32";
  if (q.stride[2] > 2 || q.dilation[2] != 1 || q.k[2] > kDepthwiseTaps) {
    return "takes rows of at most " + std::to_string(kDepthwiseTaps) +
           " taps, without dilation and with a stride of 1 or 2";
  }
  if (std::abs(q.pad[2]) > kMaxPad) return "takes a padding of at most 2**16";
  if (!q.channels_last && PlanOf(q, kernels).scratch > kMaxScratch)
    return "takes rows of less than 4 million outputs";
  return "";
}

template <const DepthwiseKernels& kernels>
int64_t Workspace(const Problem& q, const Device&) {
  if (!q.channels_last) return 0;
  return Product(q.k) * PlanOf(q, kernels).vectors * kernels.vector_bytes;
}

// Cycles at 3 GHz, and y from memory.
template <const DepthwiseKernels& kernels>
double Seconds(const Problem& q, const Device& device) {
  const DepthwisePlan p = PlanOf(q, kernels);
  const auto real = [](int64_t n) { return static_cast<double>(n); };
  // Of a row of taps and a vector: products; channels last, the lines of what eight inputs hear.
  // With many of them and a stride of 2 they were measured to take longer on one of two processors.
  const int64_t pixels = 7 * q.stride[2] + q.k[2];
  const double line = q.stride[2] == 2 && q.k[0] * q.k[1] * pixels > 256 ? 5 : 2.5;
  const double row = q.channels_last ? line / 8 * real(pixels) : real(q.k[2]) * 1.1 + 1;
  const double vectors = real(p.planes * q.isize[0] * q.isize[1]) * real(p.vectors) *
                         real(q.channels_last ? q.isize[2] : 1);
  const double cycles =
      vectors * real(q.k[0] * q.k[1]) * row + real(p.steps) * 60 + real(q.YElements()) * 0.4;
  return 2e-6 + cycles / 3e9 / device.threads;
}

template <const DepthwiseKernels& kernels>
void Add(std::vector<Row>& rows, const char* name) {
  rows.push_back({name, Pass::kInputGrad, Refuse<kernels>, Workspace<kernels>, Seconds<kernels>,
                  LaunchDepthwise<kernels>});
}

}  // namespace

void AddDepthwise(std::vector<Row>& rows) {
#if defined(__x86_64__)
  Add<kDepthwiseAvx512>(rows, "depthwise_avx512");
  Add<kDepthwiseAvx2>(rows, "depthwise_avx2");
#endif
  Add<kDepthwisePortable>(rows, "depthwise");
}

}  // namespace jaxconv::cpu
