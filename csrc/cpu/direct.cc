#include "cpu/direct.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/dtypes.h"

namespace jaxconv::cpu {
namespace {

// The taps of the outer two axes that join an input row to an output row.
// Calls body(t0, t1, i0, i1) for every pair of taps by which output (o0, o1) hears input (i0, i1).
template <class Body>
void ForInputRows(const Problem& p, int64_t o0, int64_t o1, Body body) {
  for (int64_t t0 = 0; t0 < p.k[0]; ++t0) {
    const int64_t at0 = o0 + p.pad[0] - t0 * p.dilation[0], i0 = at0 / p.stride[0];
    if (at0 < 0 || at0 % p.stride[0] != 0 || i0 >= p.isize[0]) continue;
    for (int64_t t1 = 0; t1 < p.k[1]; ++t1) {
      const int64_t at1 = o1 + p.pad[1] - t1 * p.dilation[1], i1 = at1 / p.stride[1];
      if (at1 < 0 || at1 % p.stride[1] != 0 || i1 >= p.isize[1]) continue;
      body(t0, t1, i0, i1);
    }
  }
}

// y[n, co, o0, o1, :] for each row: inputs scatter along the row, tap by tap.
template <class In, class Out>
void Forward(const Problem& p, const Operands& ops, const Parallel& parallel) {
  using Acc = Accumulator<In>;
  const auto* x = static_cast<const In*>(ops.x);
  const auto* w = static_cast<const In*>(ops.w);
  const auto* bias = static_cast<const Out*>(ops.bias);
  auto* y = static_cast<Out*>(ops.out);
  const Strides xs = p.XStrides(), ys = p.YStrides();
  const int64_t taps = Product(p.k), cig = p.cig(), cog = p.cog();
  const int64_t s2 = p.stride[2], d2 = p.dilation[2];
  parallel.For(p.n * p.co * p.osize[0], [&](int64_t task) {
    const int64_t o0 = task % p.osize[0], co = task / p.osize[0] % p.co;
    const int64_t n = task / p.osize[0] / p.co, group = co / cog;
    std::vector<Acc> row(static_cast<size_t>(p.osize[2]));
    for (int64_t o1 = 0; o1 < p.osize[1]; ++o1) {
      std::fill(row.begin(), row.end(), bias != nullptr ? static_cast<Acc>(bias[co]) : Acc{0});
      ForInputRows(p, o0, o1, [&](int64_t t0, int64_t t1, int64_t i0, int64_t i1) {
        for (int64_t c = 0; c < cig; ++c) {
          const int64_t ci = group * cig + c;
          const In* xrow = x + n * xs.n + ci * xs.c + i0 * xs.s[0] + i1 * xs.s[1];
          const In* wrow = w + (ci * cog + co % cog) * taps + (t0 * p.k[1] + t1) * p.k[2];
          for (int64_t t2 = 0; t2 < p.k[2]; ++t2) {
            const Range r = InputRange(p, 2, t2);
            const Acc weight = static_cast<Acc>(wrow[t2]);
            Acc* to = row.data() + t2 * d2 - p.pad[2];
            for (int64_t i = r.begin; i < r.end; ++i) {
              to[i * s2] += static_cast<Acc>(xrow[i * xs.s[2]]) * weight;
            }
          }
        }
      });
      Out* yrow = y + n * ys.n + co * ys.c + o0 * ys.s[0] + o1 * ys.s[1];
      for (int64_t o2 = 0; o2 < p.osize[2]; ++o2) {
        yrow[o2 * ys.s[2]] = static_cast<Out>(row[static_cast<size_t>(o2)]);
      }
    }
  });
}

// dx[n, ci, i0, i1, :] for each row: outputs are gathered along the row, tap by tap.
template <class In, class Out>
void InputGrad(const Problem& p, const Operands& ops, const Parallel& parallel) {
  using Acc = Accumulator<In>;
  const auto* y = static_cast<const In*>(ops.y);
  const auto* w = static_cast<const In*>(ops.w);
  auto* dx = static_cast<Out*>(ops.out);
  const Strides xs = p.XStrides(), ys = p.YStrides();
  const int64_t taps = Product(p.k), cig = p.cig(), cog = p.cog();
  parallel.For(p.n * p.ci * p.isize[0], [&](int64_t task) {
    const int64_t i0 = task % p.isize[0], ci = task / p.isize[0] % p.ci;
    const int64_t n = task / p.isize[0] / p.ci, group = ci / cig;
    std::vector<Acc> row(static_cast<size_t>(p.isize[2]));
    for (int64_t i1 = 0; i1 < p.isize[1]; ++i1) {
      std::fill(row.begin(), row.end(), Acc{0});
      for (int64_t c = 0; c < cog; ++c) {
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t t0 = t / p.k[2] / p.k[1], t1 = t / p.k[2] % p.k[1], t2 = t % p.k[2];
          const int64_t o0 = i0 * p.stride[0] + t0 * p.dilation[0] - p.pad[0];
          const int64_t o1 = i1 * p.stride[1] + t1 * p.dilation[1] - p.pad[1];
          if (o0 < 0 || o0 >= p.osize[0] || o1 < 0 || o1 >= p.osize[1]) continue;
          const Range r = InputRange(p, 2, t2);
          const Acc weight = static_cast<Acc>(w[(ci * cog + c) * taps + t]);
          const int64_t co = group * cog + c, shift = t2 * p.dilation[2] - p.pad[2];
          const In* yrow = y + n * ys.n + co * ys.c + o0 * ys.s[0] + o1 * ys.s[1];
          for (int64_t i = r.begin; i < r.end; ++i) {
            row[static_cast<size_t>(i)] +=
                static_cast<Acc>(yrow[(i * p.stride[2] + shift) * ys.s[2]]) * weight;
          }
        }
      }
      Out* to = dx + n * xs.n + ci * xs.c + i0 * xs.s[0] + i1 * xs.s[1];
      for (int64_t i2 = 0; i2 < p.isize[2]; ++i2) {
        to[i2 * xs.s[2]] = static_cast<Out>(row[static_cast<size_t>(i2)]);
      }
    }
  });
}

// dw[ci, co, :] for each pair of channels: a product of rows for every tap. Rows are summed in the
// accumulator's type and their sums in double, so the error does not grow with the volume.
template <class In, class Out>
void WeightGrad(const Problem& p, const Operands& ops, const Parallel& parallel) {
  using Acc = Accumulator<In>;
  const auto* x = static_cast<const In*>(ops.x);
  const auto* y = static_cast<const In*>(ops.y);
  auto* dw = static_cast<Out*>(ops.out);
  const Strides xs = p.XStrides(), ys = p.YStrides();
  const int64_t taps = Product(p.k), cig = p.cig(), cog = p.cog();
  parallel.For(p.ci * cog, [&](int64_t task) {
    const int64_t ci = task / cog, co = ci / cig * cog + task % cog;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t t0 = t / p.k[2] / p.k[1], t1 = t / p.k[2] % p.k[1], t2 = t % p.k[2];
      const Range r0 = InputRange(p, 0, t0), r1 = InputRange(p, 1, t1), r2 = InputRange(p, 2, t2);
      double sum = 0;
      for (int64_t n = 0; n < p.n; ++n) {
        for (int64_t i0 = r0.begin; i0 < r0.end; ++i0) {
          for (int64_t i1 = r1.begin; i1 < r1.end; ++i1) {
            const int64_t o0 = i0 * p.stride[0] + t0 * p.dilation[0] - p.pad[0];
            const int64_t o1 = i1 * p.stride[1] + t1 * p.dilation[1] - p.pad[1];
            const In* xrow = x + n * xs.n + ci * xs.c + i0 * xs.s[0] + i1 * xs.s[1];
            const In* yrow = y + n * ys.n + co * ys.c + o0 * ys.s[0] + o1 * ys.s[1];
            const int64_t shift = t2 * p.dilation[2] - p.pad[2];
            Acc row = 0;
            for (int64_t i = r2.begin; i < r2.end; ++i) {
              row += static_cast<Acc>(xrow[i * xs.s[2]]) *
                     static_cast<Acc>(yrow[(i * p.stride[2] + shift) * ys.s[2]]);
            }
            sum += static_cast<double>(row);
          }
        }
      }
      dw[task * taps + t] = static_cast<Out>(static_cast<Acc>(sum));
    }
  });
}

void LaunchForward(const Problem& p, const Operands& ops, const Parallel& parallel) {
  WithTypes(p, [&](auto in, auto out) { Forward<decltype(in), decltype(out)>(p, ops, parallel); });
}

void LaunchInputGrad(const Problem& p, const Operands& ops, const Parallel& parallel) {
  WithTypes(p,
            [&](auto in, auto out) { InputGrad<decltype(in), decltype(out)>(p, ops, parallel); });
}

void LaunchWeightGrad(const Problem& p, const Operands& ops, const Parallel& parallel) {
  WithTypes(p,
            [&](auto in, auto out) { WeightGrad<decltype(in), decltype(out)>(p, ops, parallel); });
}

std::string TakesAll(const Problem&, const Device&) { return ""; }

int64_t NoWorkspace(const Problem&, const Device&) { return 0; }

// Scalar multiply-adds at about 1 GHz a thread.
double Seconds(const Problem& p, const Device& device) {
  const double macs = static_cast<double>(p.n) * static_cast<double>(Product(p.isize)) *
                      static_cast<double>(p.WElements());
  return macs * 1e-9 / device.threads;
}

}  // namespace

void AddDirect(std::vector<Row>& rows) {
  const auto add = [&](Pass pass, Launch launch) {
    rows.push_back({"direct", pass, TakesAll, NoWorkspace, Seconds, launch});
  };
  add(Pass::kForward, LaunchForward);
  add(Pass::kInputGrad, LaunchInputGrad);
  add(Pass::kWeightGrad, LaunchWeightGrad);
}

}  // namespace jaxconv::cpu
