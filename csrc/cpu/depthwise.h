// "depthwise": input gradient of one input and one output channel a group.
#ifndef JAXCONV_CPU_DEPTHWISE_H_
#define JAXCONV_CPU_DEPTHWISE_H_

#include <vector>

#include "cpu/table.h"

namespace jaxconv::cpu {

void AddDepthwise(std::vector<Row>& rows);

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_DEPTHWISE_H_
