// A thread's memory for its tasks.
#ifndef JAXCONV_CPU_SCRATCH_H_
#define JAXCONV_CPU_SCRATCH_H_

#include <cstdint>

namespace jaxconv::cpu {

// At least `bytes`, aligned to a cache line, kept for the thread's next task: a few hundred KiB
// that need not be faulted in again. Its contents are what an earlier task left.
void* ThreadScratch(int64_t bytes);

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_SCRATCH_H_
