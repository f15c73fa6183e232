// "taps": forward and input gradient, channels first, of kernels whose rows fill vectors.
#ifndef JAXCONV_CPU_TAPS_H_
#define JAXCONV_CPU_TAPS_H_

#include <vector>

#include "cpu/table.h"

namespace jaxconv::cpu {

void AddTaps(std::vector<Row>& rows);

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_TAPS_H_
