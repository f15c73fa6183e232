#include "cpu/table.h"

#include "cpu/depthwise.h"
#include "cpu/direct.h"
#include "cpu/phases.h"
#include "cpu/pixels.h"
#include "cpu/taps.h"

namespace jaxconv::cpu {

int VectorBytes() {
#if defined(__x86_64__)
  static const int bytes = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 16;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide ? 64 : 32;
  }();
  return bytes;
#else
  return 16;
#endif
}

const std::vector<Row>& Table() {
  static const std::vector<Row> table = [] {
    std::vector<Row> rows;
    AddPixels(rows);
    AddPhases(rows);
    AddTaps(rows);
    AddDepthwise(rows);
    AddDirect(rows);
    return rows;
  }();
  return table;
}

}  // namespace jaxconv::cpu
