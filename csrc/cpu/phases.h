// "phases": vector kernels that fall into dense correlations by stride phases, one row of the table
// for each instruction set.
#ifndef JAXCONV_CPU_PHASES_H_
#define JAXCONV_CPU_PHASES_H_

#include <vector>

#include "cpu/table.h"

namespace jaxconv::cpu {

void AddPhases(std::vector<Row>& rows);

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_PHASES_H_
