// Large weights on few positions, channels first: what other kernels spend on rearranging the
// weight is what their products take. Here vectors are neighbouring taps, the weight is read where
// it lies, once, and y is what is small: see tap_plan.h.
#include "cpu/taps.h"

#include <algorithm>
#include <numeric>

#include "cpu/scratch.h"
#include "cpu/tap_plan.h"

namespace jaxconv::cpu {
namespace {

constexpr int64_t kMaxScratch = int64_t{16} << 20;  // bytes a task
constexpr int64_t kLeastTaps = 16;                  // of a row
constexpr int64_t kMaxChunk = 192;                  // positions: their sums stay near
// Of an input gradient's task: blocks of rows that read the same y, as long as there are many
// tasks.
constexpr int64_t kMostPieces = 8, kManyTasks = 64;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

TapPlan PlanOf(const Problem& q, const TapKernels& kernels) {
  TapPlan p{};
  p.problem = q;
  const int64_t size = SizeOf(q.in_dtype), lanes = kernels.vector_bytes / size;
  const bool forward = q.pass == Pass::kForward;
  p.vectors = Product(q.k) / lanes;
  p.in_place = !forward;
  for (int a = 0; a < kAxes; ++a) {
    p.plane[a] = (q.isize[a] - 1) * q.stride[a] + (q.k[a] - 1) * q.dilation[a] + 1;
    p.in_place = p.in_place && q.pad[a] == 0 && q.osize[a] >= p.plane[a];
  }
  const Sizes sizes = p.in_place ? q.osize : Sizes{p.plane[0], p.plane[1], p.plane[2]};
  p.pitch[2] = 1;
  p.pitch[1] = sizes[2];
  p.pitch[0] = sizes[2] * sizes[1];
  p.channel = Product(sizes);
  p.positions = q.n * Product(q.isize);
  int64_t elements = 0;
  if (forward) {
    // Vectors of whole channels that fill blocks of sums.
    p.block = std::min(q.cog(), kernels.rows / std::gcd(kernels.rows, p.vectors));
    p.blocks = CeilDiv(q.cog(), p.block);
    p.chunk = p.positions;
    p.chunks = 1;
    elements = (CeilDiv(p.block * q.n * p.channel, lanes) + q.cig() * kernels.rows) * lanes;
  } else {
    p.chunks = CeilDiv(p.positions, kMaxChunk);
    p.chunk = CeilDiv(p.positions, p.chunks);
    const int64_t pieces = q.ci * p.chunks / (kernels.rows * kManyTasks);
    p.block = kernels.rows * std::clamp<int64_t>(pieces, 1, kMostPieces);
    p.blocks = CeilDiv(q.cig(), p.block);
    elements = CeilDiv(p.chunk, kernels.positions) * kernels.positions * p.block * lanes;
  }
  p.scratch = elements * size + (p.vectors + 2 * p.chunk) * 8;
  return p;
}

int64_t PlanesBytes(const TapPlan& p) {
  if (p.problem.pass == Pass::kForward || p.in_place) return 0;
  return p.Planes() * p.channel * SizeOf(p.problem.in_dtype);
}

template <const TapKernels& kernels>
void LaunchTaps(const Problem& problem, const Operands& ops, const Parallel& parallel) {
  const TapPlan p = PlanOf(problem, kernels);
  const TapOperands operands{ops.x, ops.w, ops.y, ops.bias, ops.out, ops.workspace};
  if (PlanesBytes(p) > 0) {
    parallel.For(p.Planes(), [&](int64_t plane) { kernels.pack_plane(p, operands, plane); });
  }
  parallel.For(p.Tasks(), [&](int64_t task) {
    kernels.correlate(p, operands, task, ThreadScratch(p.scratch));
  });
}

template <const TapKernels& kernels>
std::string Refuse(const Problem& q, const Device& device) {
  if (kernels.vector_bytes > device.vector_bytes) {
    return "needs vectors of " + std::to_string(kernels.vector_bytes) +
           " bytes, the processor has " + std::to_string(device.vector_bytes);
  }
  if (q.channels_last) return "takes channels first";
  if (q.in_dtype != q.out_dtype || SizeOf(q.in_dtype) < 4) return "takes float32 and float64";
  if (q.Empty()) return "takes no empty arrays";
  const int64_t lanes = kernels.vector_bytes / SizeOf(q.in_dtype);
  // Of shorter rows the others' packed weight is small.
  if (q.k[2] < kLeastTaps || q.k[2] % lanes != 0 || q.dilation[2] != 1) {
    return "needs rows of 16 taps or more, a multiple of " + std::to_string(lanes) +
           ", without dilation";
  }
  double plane = 1;
  for (int a = 0; a < kAxes; ++a) {
    const double inputs = static_cast<double>(q.isize[a] - 1) * static_cast<double>(q.stride[a]);
    plane *= inputs + static_cast<double>(q.k[a] - 1) * static_cast<double>(q.dilation[a]) + 1;
  }
  if (plane > 1 << 26) return "takes planes of at most 2**26 outputs";
  const TapPlan p = PlanOf(q, kernels);
  if (p.scratch > kMaxScratch) {
    return "would need " + std::to_string(p.scratch >> 20) +
           " MiB of scratch memory a thread; 16 is the limit";
  }
  // What calls may have: a packed weight and a tenth of y.
  if (PlanesBytes(p) > (q.WElements() + q.YElements() / 10) * SizeOf(q.in_dtype)) {
    return "would copy y, which is more than the weight";
  }
  return "";
}

template <const TapKernels& kernels>
int64_t Workspace(const Problem& q, const Device&) {
  return PlanesBytes(PlanOf(q, kernels));
}

// Cycles at 3 GHz: products; weights from memory; sums that come and go; planes.
template <const TapKernels& kernels>
double Seconds(const Problem& q, const Device& device) {
  const TapPlan p = PlanOf(q, kernels);
  const auto real = [](int64_t n) { return static_cast<double>(n); };
  const bool forward = q.pass == Pass::kForward;
  const double pairs = real(p.positions) * real(p.vectors);
  double cycles = pairs * real(q.ci * q.cog()) * 0.8;
  cycles += real(q.WElements() * SizeOf(q.in_dtype)) * real(p.chunks) / 4;
  cycles += forward ? pairs * real(q.co) * 4 : real(p.positions * q.ci) * 24;
  cycles += real(p.Planes() * p.channel) * (forward || !p.in_place ? 1 : 0.25);
  cycles += real(p.Tasks()) * real(2 * p.chunk + p.vectors) * 4;
  return 2e-6 + cycles / 3e9 / device.threads;
}

template <const TapKernels& kernels>
void Add(std::vector<Row>& rows, const char* name) {
  for (Pass pass : {Pass::kForward, Pass::kInputGrad}) {
    rows.push_back(
        {name, pass, Refuse<kernels>, Workspace<kernels>, Seconds<kernels>, LaunchTaps<kernels>});
  }
}

}  // namespace

void AddTaps(std::vector<Row>& rows) {
#if defined(__x86_64__)
  Add<kTapsAvx512>(rows, "taps_avx512");
  Add<kTapsAvx2>(rows, "taps_avx2");
#endif
  Add<kTapsPortable>(rows, "taps");
}

}  // namespace jaxconv::cpu
