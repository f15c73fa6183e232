// "pixels": vector kernels for channels-last arrays, which are read and written where they lie, one
// row of the table for each instruction set.
#ifndef JAXCONV_CPU_PIXELS_H_
#define JAXCONV_CPU_PIXELS_H_

#include <vector>

#include "cpu/table.h"

namespace jaxconv::cpu {

void AddPixels(std::vector<Row>& rows);

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_PIXELS_H_
