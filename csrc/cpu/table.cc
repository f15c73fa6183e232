#include "cpu/table.h"

#include "cpu/direct.h"

namespace jaxconv::cpu {

const std::vector<Row>& Table() {
  static const std::vector<Row> table = [] {
    std::vector<Row> rows;
    AddDirect(rows);
    return rows;
  }();
  return table;
}

}  // namespace jaxconv::cpu
