// "direct": the definition, row by row. Takes every problem; the yardstick for faster kernels.
#ifndef JAXCONV_CPU_DIRECT_H_
#define JAXCONV_CPU_DIRECT_H_

#include <vector>

#include "cpu/table.h"

namespace jaxconv::cpu {

void AddDirect(std::vector<Row>& rows);

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_DIRECT_H_
